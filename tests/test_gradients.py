"""Rows are the gradients that plain autograd gives on a batch of one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import (
    PAD,
    all_rows,
    autograd_row,
    bert,
    gpt2,
    labelled,
    llama,
    lora,
    opt,
    padding,
    prompts,
    roberta,
    stored,
    tiny,
    worst_error,
)
from peft import LoraConfig
from torch import nn

from hf_influence.errors import UnsupportedModel
from hf_influence.evaluation.benchmarks import sentence_transformations, tokenize
from hf_influence.gradients import dropout, gaussian, logra, per_sample_gradients, sparse_jl
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.gradients.taps import find_taps
from hf_influence.task import task_of

Made = tuple[nn.Module, list[dict[str, Any]]]


def two_adapters() -> nn.Module:
    model = tiny()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    return model.double()


def shared() -> nn.Module:
    model = tiny()
    first, second = model.base_model.model.model.layers
    second.self_attn.q_proj = first.self_attn.q_proj
    return model


def without_peft(base: nn.Module, *trainable: str) -> nn.Module:
    for name, weight in base.named_parameters():
        weight.requires_grad_(any(part in name for part in trainable))
    return base.double()


def classifier(**config: Any) -> nn.Module:
    return lora(bert(**config), ["query", "dense"], modules_to_save=["classifier"])


def with_padding_token() -> list[dict[str, Any]]:
    """Whose end is the padding token, as where one token stands for both; embeddings keep its row."""
    return [{name: [*values, PAD] for name, values in row.items()} for row in prompts(4)]


KINDS: dict[str, Callable[[], Made]] = {
    "linear": lambda: (lora(llama(), ["q_proj", "v_proj", "down_proj"]), prompts()),
    "all linear": lambda: (lora(llama(), "all-linear"), prompts()),
    "Conv1D": lambda: (lora(gpt2(), ["c_attn", "c_proj"], fan_in_fan_out=True), prompts()),
    "OPT": lambda: (lora(opt(), ["q_proj", "v_proj"]), prompts()),
    "embedding": lambda: (lora(llama(), ["embed_tokens", "q_proj"]), prompts()),
    "embedding, padding token in the text": lambda: (lora(llama(), ["embed_tokens", "q_proj"]), with_padding_token()),
    "embedding tied with the head": lambda: (lora(gpt2(), ["wte", "c_attn"], fan_in_fan_out=True), prompts()),
    "adapter on the head": lambda: (lora(llama(), ["lm_head", "q_proj"]), prompts()),
    "whole head": lambda: (lora(llama(), ["q_proj"], modules_to_save=["lm_head"]), prompts()),
    "rsLoRA": lambda: (lora(llama(), ["q_proj"], use_rslora=True), prompts()),
    "bias of lora_B": lambda: (lora(bert(), ["query"], lora_bias=True), labelled(lambda i: i % 2)),
    "bias of the base": lambda: (lora(bert(), ["query"], bias="lora_only"), labelled(lambda i: i % 2)),
    "bias of Conv1D": lambda: (lora(gpt2(), ["c_attn"], bias="lora_only", fan_in_fan_out=True), prompts()),
    "active adapter of two": lambda: (two_adapters(), prompts()),
    "module used twice": lambda: (shared(), prompts()),
    "single label": lambda: (classifier(num_labels=3), labelled(lambda i: i % 3)),
    "multi label": lambda: (classifier(num_labels=3), labelled(lambda i: [i % 2, 1.0, float(i > 3)])),
    "regression": lambda: (classifier(num_labels=1), labelled(lambda i: i / 3)),
    "three outputs": lambda: (
        classifier(num_labels=3, problem_type="regression"),
        labelled(lambda i: [i / 3, 1.0, -1.0]),
    ),
    "RoBERTa": lambda: (lora(roberta(), ["query"], modules_to_save=["classifier"]), labelled(lambda i: i % 3)),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_rows_equal_plain_autograd(tmp_path: Path, make: Callable[[], Made], side: str) -> None:
    model, examples = make()
    reference = [autograd_row(model, example) for example in examples]
    rows = stored(model, examples, tmp_path, batch_size=3, data_collator=padding(side, extra=1))
    assert list(rows.blocks) == list(reference[0])
    assert worst_error(rows, reference) < 1e-10


@pytest.mark.parametrize(
    ("base", "trainable", "examples"),
    [
        (llama, ("o_proj", "up_proj"), prompts()),
        (gpt2, ("c_fc", "c_proj"), prompts()),
        (roberta, ("query", "classifier"), labelled(lambda i: i % 3)),
    ],
)
def test_rows_of_trainable_layers_without_an_adapter(
    tmp_path: Path, base: Callable[[], nn.Module], trainable: tuple[str, ...], examples: list[dict[str, Any]]
) -> None:
    model = without_peft(base(), *trainable)
    reference = [autograd_row(model, example) for example in examples]
    rows = stored(model, examples, tmp_path, modules="trainable")
    assert list(rows.blocks) == list(reference[0])
    assert worst_error(rows, reference) < 1e-10


def test_sum_over_tokens_is_the_mean_times_their_number(tmp_path: Path) -> None:
    model, examples = tiny(), prompts()
    rows = stored(model, examples, tmp_path, loss_reduction="sum")
    for i, example in enumerate(examples):
        n = sum(label != -100 for label in example["labels"][1:])
        assert rows.stats["n_tokens"][i] == n
        for name, g in autograd_row(model, example).items():
            torch.testing.assert_close(rows.block(name)[i], n * g.flatten())


def test_labels_as_many_as_tokens_stay_with_their_outputs(tmp_path: Path) -> None:
    model = classifier(num_labels=4)
    examples = [{"input_ids": [5, 6, 7 + i], "labels": [1.0, 0.0, 0.0, 1.0]} for i in range(3)]
    rows = stored(model, examples, tmp_path, data_collator=padding("left", extra=1))
    assert worst_error(rows, [autograd_row(model, example) for example in examples]) < 1e-10


def test_rows_on_a_base_in_four_bits(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = llama()
    for block in base.model.layers:
        old = block.self_attn.q_proj
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False)
        new.support_avx512bf16_for_cpu = False  # its kernel for inference takes 32 columns at a time, in bf16
        block.self_attn.q_proj = new.to("cpu")
    model = lora(base, ["q_proj", "v_proj"], dtype=torch.float32)
    examples = prompts()
    reference = [autograd_row(model, example) for example in examples]
    assert worst_error(stored(model, examples, tmp_path), reference) < 1e-5


@pytest.fixture(scope="module")
def sentences() -> tuple[nn.Module, Any, list[Any]]:
    model, tokenizer = models.minilm()
    splits = sentence_transformations(train=8, test=8)
    examples = [{**tokenizer(row["prompt"] + row["answer"]), "labels": i % 2} for i, row in enumerate(splits["train"])]
    return model, examples, [autograd_row(model, example) for example in examples]


@pytest.fixture(scope="module")
def answers() -> tuple[nn.Module, Any, list[Any]]:
    model, tokenizer = models.smollm2()
    dataset = tokenize(sentence_transformations(train=6, test=6)["train"], tokenizer)
    examples = [{name: row[name] for name in ("input_ids", "labels")} for row in dataset]
    assert min(len(row["labels"]) for row in examples) >= 10
    return model, examples, [autograd_row(model, example) for example in examples]


@pytest.mark.parametrize(("side", "batch_size"), [("right", 1), ("left", 4), ("right", 16), ("left", 16)])
@pytest.mark.parametrize("real", ["sentences", "answers"])
def test_rows_of_real_models_do_not_depend_on_the_batch(
    tmp_path: Path, request: pytest.FixtureRequest, real: str, side: str, batch_size: int
) -> None:
    model, examples, reference = request.getfixturevalue(real)
    order = random.Random(batch_size).sample(range(len(examples)), len(examples))
    rows = stored(
        model, [examples[i] for i in order], tmp_path, batch_size=batch_size, data_collator=padding(side, extra=2)
    )
    assert worst_error(rows, [reference[i] for i in order]) < 1e-5


EQUAL = prompts(4, shortest=6, longest=6)


class MeanPooled(nn.Module):
    """A pooler that reads every token."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.mean(1)


def mean_pooled() -> nn.Module:
    base = bert(num_labels=3)
    base.bert.pooler = MeanPooled()
    return lora(base, "all-linear", modules_to_save=["classifier"])


@pytest.mark.parametrize(
    ("make", "enough"),
    [
        (lambda: lora(bert(num_labels=3), "all-linear", modules_to_save=["classifier"]), True),
        (lambda: lora(roberta(), ["query", "dense"], modules_to_save=["classifier"]), True),
        (mean_pooled, False),
    ],
    ids=["BERT", "RoBERTa", "mean of all tokens"],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_layer_leaves_out_only_tokens_that_nobody_reads(
    make: Callable[[], nn.Module], enough: bool, side: str
) -> None:
    model, examples = make(), [{**example, "labels": i % 3} for i, example in enumerate(EQUAL)]
    reference = [autograd_row(model, example) for example in examples]
    before = models.state_of(model)
    resting = FixedWeights(model, task_of(model), RowCatcher(find_taps(model)))
    for _ in range(2):  # what one block has found holds in the next
        with resting:
            rows, _ = resting.run(padding(side)(examples))
        assert resting.first_token.enough is enough
        assert list(rows) == list(reference[0])
        for name, row in rows.items():
            torch.testing.assert_close(row, torch.stack([own[name].flatten() for own in reference]))
    models.assert_same_state(before, models.state_of(model))


def summed_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    token = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return (token.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)).sum()


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_own_backward_pass_gives_the_rows_of_a_summed_loss(checkpointing: bool | None) -> None:
    model = tiny(lora_dropout=0.0)
    reference = [autograd_row(model, example) for example in EQUAL]
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model.train()
    with per_sample_gradients(model) as catcher:
        for _ in range(2):  # nothing is left of one batch in the next
            summed_loss(model, padding()(EQUAL)).backward()
            rows = catcher.take()
    assert list(rows) == list(reference[0])
    for name, row in rows.items():
        torch.testing.assert_close(row, torch.stack([own[name].flatten() for own in reference]), rtol=1e-9, atol=1e-12)
    total = {name: weight.grad.flatten() for name, weight in model.named_parameters() if weight.requires_grad}
    torch.testing.assert_close({name: 2 * row.sum(0) for name, row in rows.items()}, total)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: tiny(lora_dropout=0.0), {"skip": ["*lora_A*"]}),
        (lambda: tiny(lora_dropout=0.0), {"compress": dropout(5)}),
        (lambda: tiny(lora_dropout=0.0), {"compress": logra(2, 3)}),
        (lambda: without_peft(llama(), "q_proj", "down_proj"), {"modules": "trainable"}),
        (lambda: without_peft(llama(), "q_proj"), {"modules": "trainable", "compress": gaussian(5)}),
    ],
    ids=["skip", "dropout", "logra", "trainable", "all"],
)
def test_own_backward_pass_heeds_its_options(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model = make()
    reference = [autograd_row(model, example) for example in EQUAL]
    with per_sample_gradients(model, **options) as catcher:
        summed_loss(model, padding()(EQUAL)).backward()
        rows = catcher.take()
    assert list(rows) == [name for name in reference[0] if "lora_A" not in name or "skip" not in options]
    for name, row in rows.items():
        whole = torch.stack([own[name].flatten() for own in reference])
        compress = options["compress"].fit(name, list(reference[0][name].shape)) if "compress" in options else None
        want = whole if compress is None else compress(whole)
        torch.testing.assert_close(row, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("raises", [False, True])
def test_no_hook_remains_after_the_block(raises: bool) -> None:
    model = tiny()
    before = models.state_of(model)
    try:
        with per_sample_gradients(model):
            assert models.state_of(model)["hooks"] != before["hooks"]
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    models.assert_same_state(before, models.state_of(model))


def test_rows_without_a_backward_pass_are_refused() -> None:
    with per_sample_gradients(tiny()) as catcher, pytest.raises(UnsupportedModel, match=r"no gradient reached 8 param"):
        catcher.take()


COMPRESSORS = [
    *(dropout(5, seed=1), dropout(10_000), gaussian(5, seed=1), gaussian(10_000)),
    *(sparse_jl(5, seed=1), sparse_jl(5, density=1.0), sparse_jl(10_000)),
    *(logra(2, 2, seed=1), logra(4, 64), logra(1, 5), logra(64, 2), logra(64, 64)),
]


@pytest.mark.parametrize("compress", COMPRESSORS, ids=repr)
@pytest.mark.parametrize(
    "kind", ["linear", "Conv1D", "embedding", "bias of the base", "bias of lora_B", "single label"]
)
def test_rows_compressed_in_the_hook_equal_rows_compressed_later(tmp_path: Path, kind: str, compress: Any) -> None:
    model, examples = KINDS[kind]()
    whole = all_rows(stored(model, examples, tmp_path / "whole"))
    small = stored(model, examples, tmp_path / "small", compress=compress)
    for name, row in whole.items():
        torch.testing.assert_close(small.block(name), compress.fit(name, small.header.blocks[name])(row))


def test_columns_name_the_entries_that_were_kept(tmp_path: Path) -> None:
    model, examples = tiny(), prompts(3)
    whole = all_rows(stored(model, examples, tmp_path / "whole"))
    kept = stored(model, examples, tmp_path / "kept", compress=dropout(5))
    mixed = stored(model, examples, tmp_path / "mixed", compress=gaussian(5))
    for name, row in whole.items():
        columns = kept.columns(name)
        assert columns is not None
        assert len(columns) == 5
        torch.testing.assert_close(kept.block(name), row[:, columns])
        assert mixed.columns(name) is None
