"""Losses and statistics against their formulas, and the hash that names an example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import autograd_row, bert, labelled, llama, lora, own_loss, padding, prompts, stored, tiny
from torch import nn
from transformers import T5Config, T5ForQuestionAnswering

from hf_influence.errors import BadExample, BadSetting, UnsupportedModel
from hf_influence.gradients import collect
from hf_influence.task import task_of

LABELS = {
    "single": ({"num_labels": 3}, lambda i: i % 3),
    "multi": ({"num_labels": 3}, lambda i: [float(i % 2), 0.7, float(i > 3)]),
    "regression": ({"num_labels": 1}, lambda i: i / 3),
}


def judged(z: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Margin, correct and EL2N of each token, by the formulas."""
    others = z.masked_fill(nn.functional.one_hot(y, z.shape[1]).bool(), -torch.inf)
    return {
        "margin": z.gather(1, y[:, None])[:, 0] - others.amax(1),
        "correct": (z.argmax(1) == y).double(),
        "el2n": (z.softmax(1) - nn.functional.one_hot(y, z.shape[1])).norm(dim=1),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_of_a_language_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model, examples = tiny(dtype).eval(), prompts()
    stats = stored(model, examples, tmp_path, data_collator=padding("left")).stats
    close: Any = {} if dtype != torch.bfloat16 else {"rtol": 0.05, "atol": 0.05}
    for i, example in enumerate(examples):
        logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1].double()
        y = torch.tensor(example["labels"][1:])
        expected = {name: value.mean() for name, value in judged(logits[y != -100], y[y != -100]).items()}
        expected |= {"loss": own_loss(model, example), "n_tokens": (y != -100).sum()}
        expected |= {"length": torch.tensor(len(example["input_ids"]))}
        if dtype != torch.bfloat16:
            squares = [g.square().sum() for g in autograd_row(model, example).values()]
            expected["grad_norm"] = torch.stack(squares).sum().sqrt()
        for name, value in expected.items():
            torch.testing.assert_close(stats[name][i], value.detach(), check_dtype=False, **close)


@pytest.mark.parametrize("kind", LABELS)
def test_statistics_of_a_classifier(tmp_path: Path, kind: str) -> None:
    config, label = LABELS[kind]
    model, examples = lora(bert(**config), ["query"], modules_to_save=["classifier"]).eval(), labelled(label)
    stats = stored(model, examples, tmp_path).stats
    for i, example in enumerate(examples):
        z, y = model(torch.tensor([example["input_ids"]])).logits[0], torch.tensor(example["labels"])
        expected = {"loss": own_loss(model, example), "n_tokens": torch.tensor(1)}
        if kind == "single":
            expected |= {"label": y, **{name: value[0] for name, value in judged(z[None], y[None]).items()}}
            expected |= {"probabilities": z.softmax(0)}
        elif kind == "multi":
            side = z * (2 * y - 1)
            error = (z.sigmoid() - y).norm()
            expected |= {"margin": side.mean(), "correct": (side > 0).double().mean(), "el2n": error}
        assert set(expected) | {"length", "hash", "grad_norm"} == set(stats)
        for name, value in expected.items():
            torch.testing.assert_close(stats[name][i], value.detach(), check_dtype=False)


@pytest.mark.parametrize("kind", ["causal", *LABELS])
def test_hash_does_not_depend_on_padding_and_tells_examples_apart(tmp_path: Path, kind: str) -> None:
    if kind == "causal":
        model, examples = tiny(), prompts(20)
        other_label = {**examples[0], "labels": [*examples[0]["labels"][:-1], -100]}
    else:
        config, label = LABELS[kind]
        longer = [row for row in labelled(label, 40) if len(row["input_ids"]) > 3]  # than the labels of "multi"
        model, examples = lora(bert(**config), ["query"]), longer[:20]
        other_label = {**examples[0], "labels": label(1)}
    other_order = {**examples[0], "input_ids": examples[0]["input_ids"][::-1]}
    examples = [*examples, examples[3], other_label, other_order]
    hashes = [
        stored(model, examples, tmp_path / f"{side}{extra}", data_collator=padding(side, extra), batch_size=size).stats[
            "hash"
        ]
        for side, extra, size in (("right", 0, 1), ("right", 5, 4), ("left", 2, 16))
    ]
    assert torch.equal(hashes[0], hashes[1])
    assert torch.equal(hashes[0], hashes[2])
    assert hashes[0][20] == hashes[0][3]
    assert len(hashes[0].unique()) == len(examples) - 1


def test_a_classifier_is_one_task_before_and_after_it_has_named_its_problem(tmp_path: Path) -> None:
    model, examples = lora(bert(), ["query"]), labelled(lambda i: i % 2)
    collect(model, examples, tmp_path)
    assert model.config.problem_type is None
    own_loss(model, examples[0])
    assert model.config.problem_type is not None
    collect(model, examples, tmp_path, split="query")


def test_other_reductions_and_heads_are_refused() -> None:
    with pytest.raises(BadSetting, match="loss_reduction='max': choose 'mean' or 'sum'"):
        task_of(llama(), "max")  # type: ignore[arg-type]
    t5 = T5ForQuestionAnswering(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for model in (t5, llama().model):
        with pytest.raises(UnsupportedModel, match="AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelFor"):
            task_of(model)


def test_examples_without_labels_are_refused(tmp_path: Path) -> None:
    examples = [{"input_ids": row["input_ids"]} for row in prompts()]
    with pytest.raises(BadExample, match=r"no labels \(it has: input_ids, attention_mask\).*column 'labels'"):
        collect(tiny(), examples, tmp_path)
