"""Answers after the prompts of other examples, against sequences put together by hand, and what reads them."""

from __future__ import annotations

import sys
from collections import Counter
from math import log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import Example, all_rows, bert, gpt2, labelled, llama, lora, padding, stored, tiny
from test_callback import trainer
from torch import nn
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hf_influence import attribute, collect
from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadExample, BadSetting, MissingRows, StoreMismatch
from hf_influence.gradients.batches import padding_with
from hf_influence.store import GradientStore

KEY = "other_prompt_loss"
PROMPTS = [[5, 6, 7], [5, 6, 8, 9], [20, 21], [20, 21, 22], [30, 6], [5, 6, 7]]
ANSWERS = [[11, 12], [13], [14, 15, 16], [11, 17], [18, 19, 10], [12, 13]]


def example(prompt: list[int], answer: list[int]) -> Example:
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


DATA = [example(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]


def likeness(one: list[int], other: list[int]) -> float:
    """Cosine of tf-idf, as scikit-learn defines it."""
    idf = {token: log((1 + 6) / (1 + sum(token in prompt for prompt in PROMPTS))) + 1 for token in {*one, *other}}
    a, b = ({token: n * idf[token] for token, n in Counter(ids).items()} for ids in (one, other))
    dot = sum(a[token] * b.get(token, 0.0) for token in a)
    return dot / sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))


def others_of(i: int) -> list[list[int]]:
    """Other prompts in the order of their likeness, the first in the dataset first where they are equally like it."""
    allowed = [j for j in range(6) if PROMPTS[j] != PROMPTS[i] and ANSWERS[j] != ANSWERS[i]]
    return [PROMPTS[j] for j in sorted(allowed, key=lambda j: -round(likeness(PROMPTS[i], PROMPTS[j]), 9))]


def t5() -> nn.Module:
    config = T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return lora(T5ForConditionalGeneration(config), ["q", "v"])


def loss_of(model: nn.Module, prompt: list[int], answer: list[int]) -> float:
    row = {name: torch.tensor([ids]) for name, ids in example(prompt, answer).items()}
    with torch.no_grad():
        return float(model.eval()(**row).loss)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_are_those_of_answers_after_the_prompt_that_is_most_alike_and_any_other(
    tmp_path: Path, kind: str, side: Any
) -> None:
    model = tiny(torch.float32) if kind == "llama" else lora(gpt2(), ["c_attn"], fan_in_fan_out=True)
    store = collect(model, DATA, tmp_path, data_collator=padding(side), batch_size=4, other_prompts=2)
    found = store.rows().stats[KEY]
    longest, drawn = max(len(row["input_ids"]) for row in DATA), []
    for i, answer in enumerate(ANSWERS):
        first, *rest = (loss_of(model, prompt[-(longest - len(answer)) :], answer) for prompt in others_of(i))
        assert float(found[i, 0]) == pytest.approx(first, rel=1e-5)
        drawn.append(min(range(len(rest)), key=lambda at: abs(rest[at] - float(found[i, 1]))))
        assert float(found[i, 1]) == pytest.approx(rest[drawn[-1]], rel=1e-5)
    assert len(set(drawn)) > 1
    own = store.rows().stats["loss"]
    gain = attribute(store, "prompt_gain").values[:, 0]
    torch.testing.assert_close(gain, (1 - own / found.mean(1)).to(gain.dtype))


def test_encoder_decoders_get_another_input(tmp_path: Path) -> None:
    model = t5()
    data = [{"input_ids": prompt, "labels": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    found = collect(model, data, tmp_path, other_prompts=1).rows().stats[KEY]
    for i, answer in enumerate(ANSWERS):
        row = {"input_ids": torch.tensor(others_of(i)[:1]), "labels": torch.tensor([answer])}
        with torch.no_grad():
            assert float(found[i, 0]) == pytest.approx(float(model.eval()(**row).loss), rel=1e-5)


def test_where_there_are_few_other_prompts_they_count_again(tmp_path: Path) -> None:
    found = collect(tiny(), DATA[:2], tmp_path, other_prompts=3).rows().stats[KEY]
    assert found.shape == (2, 3)
    assert bool((found == found[:, :1]).all())


def test_a_collection_that_was_cut_short_goes_on_with_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(torch.float32)
    want = collect(model, DATA, tmp_path / "whole", other_prompts=2).rows().stats
    calls: list[Any] = []

    def breaking(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["hf_influence.gradients.collect"], "_check_finite", breaking)
    with pytest.raises(KeyboardInterrupt):
        collect(model, DATA, tmp_path / "cut", batch_size=2, other_prompts=2)
    monkeypatch.undo()
    found = collect(model, DATA, tmp_path / "cut", batch_size=2, other_prompts=None).rows().stats
    torch.testing.assert_close(found[KEY], want[KEY], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["loss"], want["loss"], rtol=1e-5, atol=1e-6)


def test_rows_without_these_losses_stay_without(tmp_path: Path) -> None:
    model = tiny()
    collect(model, DATA, tmp_path)
    assert KEY not in collect(model, DATA, tmp_path, other_prompts=None).rows().stats
    with pytest.raises(StoreMismatch, match=f"without the statistic '{KEY}'"):
        collect(model, DATA, tmp_path, other_prompts=1)
    with pytest.raises(MissingRows, match=rf"(?s){KEY}.*prompt_gain.*other_prompts=1"):
        attribute(tmp_path, "prompt_gain")


WHOLE = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in DATA]


class SeeingForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """A language model that is given pictures as well."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        pixel_values: Any = None,
        **inputs: Any,
    ) -> Any:
        return super().forward(input_ids, attention_mask, labels=labels, **inputs)


def seeing() -> nn.Module:
    return lora(SeeingForCausalLM(llama().config), ["q_proj"])


SEEN = [{**row, "pixel_values": [0.0]} for row in DATA]
FIRST = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in DATA]
NOTHING: dict[str, tuple[Any, Any, Any, str]] = {
    "no prompts": (tiny, WHOLE, BadExample, r"labels of example 0 begin with its first or second token"),
    "the first token": (tiny, FIRST, BadExample, r"labels of example 0 begin with its first or second token"),
    "more than text": (seeing, SEEN, BadExample, r"the model takes pixel_values, and only text"),
    "one prompt": (tiny, [example([5, 6], [7 + i]) for i in range(3)], BadExample, r"example 0 has no other prompt"),
    "one answer": (tiny, [example([5, 6 + i], [4]) for i in range(3)], BadExample, r"example 0 has no other prompt"),
    "classes": (lambda: lora(bert(), ["query"], task_type="SEQ_CLS"), labelled(lambda i: i % 2), BadSetting, "task"),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_without_prompts_there_is_nothing_or_an_error(tmp_path: Path, kind: str) -> None:
    make, data, error, match = NOTHING[kind]
    model = make()
    assert KEY not in collect(model, data, tmp_path / "default", other_prompts=None).rows().stats
    with pytest.raises(error, match=match):
        collect(model, data, tmp_path / "asked", other_prompts=1)
    capture = GradientCapture(tmp_path / "capture", other_prompts=1)
    run = trainer(model, tmp_path, capture, train=Dataset.from_list(data), collate=padding_with(0))
    with pytest.raises(error, match=match):
        run.train()


@pytest.mark.parametrize("k", [None, 1])
def test_a_loss_that_is_not_finite_is_refused(tmp_path: Path, k: int | None) -> None:
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[20] = torch.nan  # of two prompts
    with pytest.raises(BadExample, match=r"example \d of train has no finite loss after the prompt of another"):
        collect(model, DATA, tmp_path, other_prompts=k)


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"other_prompts=-1"):
        collect(tiny(), DATA, tmp_path, other_prompts=-1)
    with pytest.raises(BadSetting, match=r"other_prompts=1 with at_end=False"):
        GradientCapture(tmp_path, during="epochs", at_end=False, other_prompts=1)


@pytest.mark.parametrize("during", [None, "epochs"])
def test_the_capture_keeps_them_at_the_end(tmp_path: Path, during: Any) -> None:
    capture = GradientCapture(tmp_path / "rows", DATA[:2], during=during)
    run = trainer(tiny(torch.float32), tmp_path, capture, train=Dataset.from_list(DATA))
    run.train()
    store = GradientStore.open(capture.path)
    again = collect(run.model, DATA, tmp_path / "again", other_prompts=2)
    torch.testing.assert_close(store.rows().stats[KEY], again.rows().stats[KEY])
    assert store.rows("query").stats[KEY].shape == (2, 2)
    assert store.points() == ([0] if during is None else [0, 1, 2])
    assert not any(KEY in store.rows("train", point).stats for point in store.points()[1:])


NAMES = [[11, 12], [13], [14, 15, 16]]


def named(model: nn.Module, n: int, shift: int = 0) -> list[Example]:
    """Prompts of which no two are the same, each with one of three names of classes after it, or as its output."""
    asked = [(list(range(20 + i, 23 + i + i % 3)), NAMES[(i + shift) % 3]) for i in range(n)]
    if model.config.is_encoder_decoder:
        return [{"input_ids": prompt, "labels": answer} for prompt, answer in asked]
    return [example(prompt, answer) for prompt, answer in asked]


@pytest.mark.parametrize("make", [tiny, t5])
def test_queries_whose_answers_name_classes_are_collected_under_other_names(tmp_path: Path, make: Any) -> None:
    model = make()
    store = collect(model, named(model, 15), tmp_path / "rows", "query", wrong_labels=True)
    wrong, *turned = (
        torch.cat(list(all_rows(rows).values()), 1)  # [q, d]
        for rows in (
            store.rows("query-mislabelled"),
            *(stored(model, named(model, 15, shift), tmp_path / str(shift)) for shift in (1, 2)),
        )
    )
    gaps = torch.stack([(wrong - rows).norm(dim=1) / rows.norm(dim=1) for rows in turned])  # [2, q]
    assert gaps.amin(0).max() < 1e-5, "each has the name of another class"
    assert (gaps.amax(0) > 1e-2).all()
    assert set(gaps.argmin(0).tolist()) == {0, 1}
    with pytest.raises(BadSetting, match=r"wrong_labels=True.*whose answers are few and repeated"):
        collect(model, named(model, 14), tmp_path / "few", "query", wrong_labels=True)
    with pytest.raises(BadSetting, match=r"there are none here"):
        collect(model, named(model, 15)[::3], tmp_path / "one", "query", wrong_labels=True)


def test_the_capture_does_so_and_auto_takes_the_answers_for_classes(tmp_path: Path) -> None:
    model = tiny(torch.float32)
    train, query = named(model, 12), named(model, 15, shift=1)
    run = trainer(model, tmp_path, GradientCapture(tmp_path / "rows", query, during="epochs"), train=train)
    run.train()
    store = GradientStore.open(tmp_path / "rows")
    assert sorted(store.splits(0)) == ["query", "query-mislabelled", "train"]
    again = collect(run.model, query, tmp_path / "again", "query", wrong_labels=True)
    for split in ("query", "query-mislabelled"):
        torch.testing.assert_close(all_rows(store.rows(split)), all_rows(again.rows(split)))
    assert set(attribute(store).report["parts"]) == {"loss_mean", "kernel_ridge_mean", "kernel_ridge"}
    assert "estimated_share_wrong" in attribute(store).report
    other = GradientCapture(tmp_path / "others", DATA * 3, during="epochs")
    trainer(tiny(torch.float32), tmp_path, other, train=train).train()
    assert set(attribute(other.path).report["parts"]) == {"loss_mean", "vote_mean", "prompt_gain"}


def test_an_example_without_a_prompt_is_named_before_training_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["hf_influence.gradients.other_prompts"], "POOL", 3)
    rows = [dict(row) for row in DATA]
    rows[1]["labels"] = list(rows[1]["input_ids"])
    capture = GradientCapture(tmp_path / "rows", other_prompts=2)
    run = trainer(tiny(torch.float32), tmp_path, capture, train=Dataset.from_list(rows))
    with pytest.raises(BadExample, match=r"labels of example 1 begin"):
        run.train()
    assert run.state.global_step == 0
