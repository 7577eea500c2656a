"""One pass over a dataset: it leaves the model alone, goes on where it stopped, and refuses what it cannot do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from datasets import ClassLabel, Dataset, Value
from models import (
    VOCABULARY,
    all_rows,
    autograd_row,
    bert,
    labelled,
    llama,
    lora,
    opt,
    padding,
    prompts,
    roberta,
    stored,
    tiny,
)
from torch import nn
from transformers import BatchEncoding, DataCollatorWithFlattening

from hf_influence.attribution import attribute
from hf_influence.errors import BadExample, BadSetting, MissingRows, StoreMismatch, UnsupportedModel
from hf_influence.gradients import collect, dropout
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.store import GradientStore

EXAMPLES = prompts()


def failing(monkeypatch: pytest.MonkeyPatch, when: Callable[[int, int], Exception | None]) -> None:
    """Let the pass fail: `when(batch number, examples in the batch)` says with what."""
    run, count = FixedWeights.run, [0]

    def run_or_fail(self: FixedWeights, batch: dict[str, Any]) -> Any:
        count[0] += 1
        error = when(count[0], len(batch["input_ids"]))
        if error is not None:
            raise error
        return run(self, batch)

    monkeypatch.setattr(FixedWeights, "run", run_or_fail)


@pytest.mark.parametrize("raises", [False, True])
def test_the_model_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raises: bool) -> None:
    model = tiny().train()
    model.base_model.model.model.norm.eval()
    model(**padding()(EXAMPLES)).loss.backward()
    before = models.state_of(model)
    if raises:
        failing(monkeypatch, lambda batch, _: KeyboardInterrupt() if batch == 3 else None)  # type: ignore[arg-type,return-value]
        with pytest.raises(KeyboardInterrupt):
            collect(model, EXAMPLES, tmp_path, batch_size=2)
    else:
        collect(model, EXAMPLES, tmp_path, batch_size=2)
    models.assert_same_state(before, models.state_of(model))


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.from_list(EXAMPLES),
        Dataset.from_list([{**row, "text": "…"} for row in EXAMPLES]).with_format("torch"),
        [BatchEncoding(row) for row in EXAMPLES],
        torch.utils.data.Subset(Dataset.from_list(EXAMPLES * 2), range(7)),
    ],
    ids=["datasets", "torch format", "encodings", "subset"],
)
def test_the_kind_of_dataset_does_not_matter(tmp_path: Path, dataset: Any) -> None:
    collect(tiny(), EXAMPLES, tmp_path)
    rows = stored(tiny(), EXAMPLES, tmp_path / "list")
    torch.testing.assert_close(all_rows(stored(tiny(), dataset, tmp_path / "other")), all_rows(rows))
    collect(tiny(), dataset, tmp_path)  # the same dataset, so nothing is refused


def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = all_rows(stored(tiny(), EXAMPLES, tmp_path / "all"))
    full = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    failing(monkeypatch, lambda _, size: full if size > 2 else None)
    torch.testing.assert_close(all_rows(stored(tiny(), EXAMPLES, tmp_path / "halved", batch_size=7)), expected)
    failing(monkeypatch, lambda *_: full)
    with pytest.raises(BadExample, match=r"alone does not fit into memory.*Truncate"):
        collect(tiny(), EXAMPLES, tmp_path / "none", batch_size=7)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("the machine is going down")])
def test_an_interrupted_run_goes_on_and_equals_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Any
) -> None:
    expected = stored(tiny(), EXAMPLES, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        failing(patch, lambda batch, _: stop if batch == 3 else None)
        with pytest.raises(type(stop)):
            collect(tiny(), EXAMPLES, tmp_path / "stopped", batch_size=2)
    with pytest.raises(MissingRows, match=r"4 of 7 rows.*interrupted.*Run the same collect.*it continues"):
        attribute(tmp_path / "stopped", "self_ip")
    ran: list[int] = []
    failing(monkeypatch, lambda _, size: ran.append(size))  # type: ignore[func-returns-value]
    rows = stored(tiny(), EXAMPLES, tmp_path / "stopped", batch_size=2)
    assert sum(ran) == 3
    torch.testing.assert_close(all_rows(rows), all_rows(expected))
    torch.testing.assert_close(rows.stats, expected.stats)
    collect(tiny(), EXAMPLES, tmp_path / "stopped")
    assert sum(ran) == 3  # all rows were there


def test_an_example_without_labelled_tokens_has_a_row_of_zeros(tmp_path: Path) -> None:
    examples = [*EXAMPLES, {"input_ids": [5, 6, 7], "labels": [-100] * 3}, {"input_ids": [5], "labels": [5]}]
    with pytest.warns(UserWarning, match=r"2 of 9 examples of 'train' have no labelled token \(first: 7\)"):
        rows = stored(tiny(), examples, tmp_path)
    assert rows.stats["n_tokens"][-2:].tolist() == [0, 0]
    for values in (*all_rows(rows).values(), *rows.stats.values()):
        assert torch.isfinite(values).all()
    assert all((row[-2:] == 0).all() and (row[:-2] != 0).any() for row in all_rows(rows).values())


@pytest.mark.parametrize("id_column", [None, "name"])
def test_a_loss_that_is_no_number_names_the_example_and_keeps_the_rows_before_it(
    tmp_path: Path, id_column: str | None
) -> None:
    poison = VOCABULARY - 1
    examples = [{"input_ids": [5 + i] * (9 - i), "labels": [5 + i] * (9 - i), "name": f"number {i}"} for i in range(6)]
    examples[4]["input_ids"][0] = poison
    model = tiny()
    model.get_input_embeddings().weight.data[poison] = torch.nan
    named = "4" if id_column is None else "'number 4'"
    with pytest.raises(BadExample, match=rf"example {named} has loss nan.*first block: base_model.*rows\s+before it"):
        collect(model, examples, tmp_path, batch_size=1, id_column=id_column)
    with pytest.raises(MissingRows, match="4 of 6 rows"):
        GradientStore.open(tmp_path).rows()


def layer_norm_too() -> nn.Module:
    model = tiny()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model


def tied_head_alone() -> nn.Module:
    model = llama(tie_word_embeddings=True).requires_grad_(False).double()
    model.get_output_embeddings().weight.requires_grad_(True)
    return model


def frozen() -> nn.Module:
    return tiny().requires_grad_(False)


NORM = r"1 trainable parameter\(s\) have no exact.*model\.norm\.weight \(LlamaRMSNorm\).*skip="


def twice(features: list[Any]) -> dict[str, torch.Tensor]:
    """A collator that makes two rows of every example."""
    return padding()([row for row in features for _ in range(2)])


def test_a_collator_that_packs_gets_the_examples_one_by_one(tmp_path: Path) -> None:
    rows = stored(tiny(), EXAMPLES, tmp_path / "packed", data_collator=DataCollatorWithFlattening())
    torch.testing.assert_close(all_rows(rows), all_rows(stored(tiny(), EXAMPLES, tmp_path / "padded")))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "no LoRA": (llama, {}, UnsupportedModel, r"no LoRA layers.*get_peft_model.*modules='trainable'"),
    "frozen": (frozen, {}, UnsupportedModel, "no trainable parameter left.*is_trainable=True"),
    "norm": (layer_norm_too, {}, UnsupportedModel, NORM),
    "DoRA": (lambda: tiny(use_dora=True), {}, UnsupportedModel, "4 trainable.*lora_magnitude_vector.*skip="),
    "tied": (tied_head_alone, {"modules": "trainable"}, UnsupportedModel, r"embed_tokens.weight \(Embedding\)"),
    "tokens in a row": (lambda: lora(opt(), ["fc1"]), {}, UnsupportedModel, "saw .* rows in a batch of 2 examples"),
    "skip": (tiny, {"skip": ["*magnitude*"]}, BadSetting, r"skip='\*magnitude\*' fits no trainable"),
    "skip all": (tiny, {"skip": ["*"]}, UnsupportedModel, "no trainable parameter left"),
    "modules": (tiny, {"modules": "all"}, BadSetting, "modules='all': choose 'lora'.*or 'trainable'"),
    "batch_size": (tiny, {"batch_size": 0}, BadSetting, "batch_size=0: pass a number.*or 'auto'"),
    "split": (tiny, {"split": "../train"}, BadSetting, "not a folder name"),
    "reduction": (tiny, {"loss_reduction": "max"}, BadSetting, "choose 'mean' or 'sum'"),
    "empty": (tiny, {"dataset": []}, BadExample, "the dataset is empty"),
    "stream": (tiny, {"dataset": iter(EXAMPLES)}, BadExample, "without a length.*map-style"),
    "tuples": (tiny, {"dataset": [(1, 2)]}, BadExample, "an example is a tuple.*must be a dictionary"),
    "columns": (tiny, {"dataset": [{"text": "a"}]}, BadExample, r"none of the columns \['text'\].*Tokenise"),
    "labels": (tiny, {"dataset": [{"input_ids": [1, 2]}]}, BadExample, "has no labels"),
    "two rows": (tiny, {"data_collator": twice}, BadSetting, "made 2 rows of one example"),
    "no id": (tiny, {"id_column": "name"}, BadExample, "no id column 'name'"),
    "same ids": (
        tiny,
        {"id_column": "name", "dataset": [{**row, "name": "a"} for row in EXAMPLES]},
        BadExample,
        "must hold a different integer or string",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_with_a_reason(tmp_path: Path, case: str) -> None:
    make, settings, error, message = REFUSED[case]
    model = make()
    before = models.state_of(model)
    with pytest.raises(error, match=f"(?s){message}"):
        collect(model, path=tmp_path / "store", **{"dataset": EXAMPLES, "batch_size": 7, **settings})
    models.assert_same_state(before, models.state_of(model))


@pytest.mark.parametrize("make", [layer_norm_too, lambda: tiny(use_dora=True)], ids=["norm", "DoRA"])
def test_parameters_can_be_left_out_on_purpose(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    rows = stored(model, EXAMPLES, tmp_path, skip=["*magnitude*" if make is not layer_norm_too else "*norm*"])
    assert len(rows.blocks) == 8
    assert models.worst_error(rows, [autograd_row(model, example) for example in EXAMPLES]) < 1e-10


def trained_on() -> nn.Module:
    model = tiny()
    next(weight for weight in model.parameters() if weight.requires_grad).data += 0.1
    return model


def other_base() -> nn.Module:
    model = tiny()
    model.get_input_embeddings().weight.data += 0.1
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "adapter": (
        trained_on,
        {"split": "query"},
        "other values of the adapter.*same trained model, or into another folder",
    ),
    "base": (other_base, {"split": "query"}, "another model .*frozen.*another folder"),
    "targets": (
        lambda: lora(llama(), ["q_proj", "o_proj"]),
        {"split": "query"},
        r"rows of 8 blocks.*has 8 \(first that only one of them has: .*v_proj.*same target modules",
    ),
    "rank": (lambda: tiny(r=2), {"split": "query"}, "another blocks"),
    "reduction": (
        tiny,
        {"split": "query", "loss_reduction": "sum"},
        "another task.*stored: loss_reduction = mean; now",
    ),
    "compressor": (tiny, {"split": "query", "compress": dropout(4)}, "another compress"),
    "dataset": (tiny, {"dataset": prompts(7, seed=1)}, "another tokenised dataset.*overwrite=True"),
    "fewer": (tiny, {"dataset": EXAMPLES[:3]}, r"\(7 examples.*now 3"),
    "ids": (
        tiny,
        {"dataset": [{**row, "name": i} for i, row in enumerate(EXAMPLES)], "id_column": "name"},
        "under other ids.*id_column",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_rows_that_cannot_be_compared_are_refused_unless_replaced(tmp_path: Path, case: str) -> None:
    before = all_rows(stored(tiny(), EXAMPLES, tmp_path))
    make, settings, message = OTHERS[case]
    settings = {"dataset": EXAMPLES, "path": tmp_path, **settings}
    torch.manual_seed(0)
    with pytest.raises(StoreMismatch, match=f"(?s){message}"):
        collect(make(), **settings)
    torch.testing.assert_close(all_rows(GradientStore.open(tmp_path).rows()), before)

    torch.manual_seed(0)
    store = collect(make(), **settings, overwrite=True)
    assert len(store.rows(settings.get("split", "train"))) == len(settings["dataset"])
    if "split" in settings:
        assert store.splits() == ["query"]  # the old training rows are gone with their weights


def test_rows_of_the_same_model_and_dataset_are_kept_by_overwrite(tmp_path: Path) -> None:
    collect(tiny(), EXAMPLES, tmp_path)
    file = next((tmp_path / "points").rglob("*.safetensors"))
    written = file.stat().st_mtime_ns
    collect(tiny(), EXAMPLES, tmp_path, overwrite=True)
    assert file.stat().st_mtime_ns == written


def by_letters(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that makes tokens and labels itself."""
    made = [{"input_ids": [4 + ord(letter) % 40 for letter in row["text"]]} for row in rows]
    return padding()([{**row, "labels": row["input_ids"]} for row in made])


def last_alone(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = by_letters(rows)
    last = batch["attention_mask"].cumsum(1) == batch["attention_mask"].sum(1, keepdim=True)
    return {**batch, "labels": batch["labels"].masked_fill(~last, -100)}


@pytest.mark.parametrize(
    ("texts", "collator"),
    [(["other", "words", "here too"], by_letters), (["good", "bad one", "awful"], last_alone)],
    ids=["tokens", "labels"],
)
def test_what_a_collator_makes_of_the_columns_is_part_of_the_dataset(
    tmp_path: Path, texts: list[str], collator: Any
) -> None:
    keep: dict[str, Any] = {"remove_unused_columns": False}
    first = [{"text": text} for text in ("good", "bad one", "awful")]
    collect(tiny(), first, tmp_path, data_collator=by_letters, **keep)
    again = [{"text": text} for text in texts]
    with pytest.raises(StoreMismatch, match="other examples than the data_collator makes"):
        collect(tiny(), again, tmp_path, data_collator=collator, **keep)
    new = all_rows(collect(tiny(), again, tmp_path, data_collator=collator, overwrite=True, **keep).rows())
    alone = all_rows(collect(tiny(), again, tmp_path / "alone", data_collator=collator, **keep).rows())
    torch.testing.assert_close(new, alone)


def test_points_on_the_way_to_weights_that_are_replaced_go_with_them(tmp_path: Path) -> None:
    collect(tiny(), EXAMPLES, tmp_path)
    collect(trained_on(), EXAMPLES, tmp_path, point=1)
    collect(tiny(), EXAMPLES, tmp_path, overwrite=True)
    assert GradientStore.open(tmp_path).points() == [0, 1]
    collect(trained_on(), EXAMPLES, tmp_path, overwrite=True)
    assert GradientStore.open(tmp_path).points() == [0]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("collator", [None, padding()])
def test_examples_without_tokens_have_rows_of_zeros(tmp_path: Path, batch_size: int, collator: Any) -> None:
    examples = EXAMPLES[:4] + [{"input_ids": [], "labels": []}] * 3
    with pytest.warns(UserWarning, match="no labelled token"):
        rows = collect(tiny(), examples, tmp_path, batch_size=batch_size, data_collator=collator).rows()
    assert rows.stats["length"][4:].tolist() == rows.stats["n_tokens"][4:].tolist() == [0] * 3
    assert not any(rows.block(name)[4:].any() for name in rows.blocks)
    others = all_rows(stored(tiny(), EXAMPLES[:4], tmp_path / "others"))
    torch.testing.assert_close({name: block[:4] for name, block in all_rows(rows).items()}, others)


@pytest.mark.parametrize("ids", [[f"row {i}" for i in range(7)], [5, 3, 9, 1, 0, 2, 4]])
def test_an_id_column_names_the_rows(tmp_path: Path, ids: list[Any]) -> None:
    named = Dataset.from_list([{**row, "name": name} for row, name in zip(EXAMPLES, ids, strict=True)])
    rows = stored(tiny(), named, tmp_path / "named", id_column="name")
    assert rows.ids == ids
    assert rows.id_column == "name"
    torch.testing.assert_close(all_rows(rows), all_rows(stored(tiny(), EXAMPLES, tmp_path / "plain")))
    assert re.search("row 0|5", str(attribute(tmp_path / "named", "self_ip").ids[0]))


def test_one_example_and_one_token_batches(tmp_path: Path) -> None:
    model = lora(bert(), ["value"])
    for n in (1, 2):
        examples = [{"input_ids": [5], "labels": 1}] * n
        rows = stored(model, examples, tmp_path / str(n))
        assert models.worst_error(rows, [autograd_row(model, example) for example in examples]) < 1e-10
    assert len(stored(model, labelled(lambda i: 0, 1), tmp_path / "one")) == 1


def test_queries_are_collected_under_wrong_labels_as_the_capture_does(tmp_path: Path) -> None:
    rows = Dataset.from_list(labelled(lambda i: i % 3, 12))
    torch.manual_seed(0)
    model = lora(roberta(), ["query", "value"])
    store = collect(model, rows, tmp_path / "rows", "query", wrong_labels=True)
    right, wrong = store.rows("query").stats["label"], store.rows("query-mislabelled").stats["label"]
    assert (right != wrong).all()
    assert right.tolist() == rows["labels"][:]
    two = lora(bert(), ["query", "value"])
    store = collect(two, labelled(lambda i: i % 2), tmp_path / "two", "query", wrong_labels=True)
    assert store.splits() == ["query"]
    made = [{"input_ids": row["input_ids"], "kind": row["labels"]} for row in rows]

    def labels_made(batch: list[Any]) -> Any:
        return padding()(batch) | {"labels": torch.tensor([row["kind"] for row in batch])}

    own: dict[str, Any] = {"data_collator": labels_made, "remove_unused_columns": False, "wrong_labels": True}
    with pytest.raises(BadSetting, match=r"wrong_labels=True.*there are none here"):
        collect(model, made, tmp_path / "made", "query", **own)
    with pytest.raises(BadSetting, match=r"wrong_labels=True.*class numbers"):
        collect(tiny(), prompts(), tmp_path / "language", "query", wrong_labels=True)
    assert not (tmp_path / "language").exists()


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    model = lora(bert(), ["query", "value"])
    train, query = (
        Dataset.from_list(labelled(lambda i: i % 2)).cast_column("labels", ClassLabel(names=names))
        for names in (["bad", "good"], ["good", "bad"])
    )
    collect(model, train, tmp_path, "train")
    with pytest.raises(StoreMismatch, match=r"\['good', 'bad'\] in 'query' and \['bad', 'good'\] in 'train'"):
        collect(model, query, tmp_path, "query")
    collect(model, query.cast_column("labels", Value("int64")), tmp_path, "query")  # numbers say nothing of names


def test_a_dataset_with_a_transform_is_collected(tmp_path: Path) -> None:
    raw = Dataset.from_list([{"words": row["input_ids"], "kind": row["labels"]} for row in labelled(lambda i: i % 2)])

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": batch["words"], "labels": batch["kind"], "words": batch["words"]}

    model = lora(bert(), ["query", "value"])
    store = collect(model, raw.with_transform(transform), tmp_path / "transformed")
    plain = collect(model, labelled(lambda i: i % 2), tmp_path / "plain")
    name = plain.blocks[0]
    torch.testing.assert_close(store.rows().block(name), plain.rows().block(name))


def test_labels_that_are_no_single_class_are_named(tmp_path: Path) -> None:
    several = labelled(lambda i: [0, 1], 4)
    with pytest.raises(BadExample, match=r"shape \[1, 2\].*multi_label_classification"):
        collect(lora(bert(), ["query", "value"]), several, tmp_path / "several")
    with pytest.raises(BadExample, match=r"no labels \(it has: input_ids, attention_mask\)"):
        collect(tiny(), EXAMPLES, tmp_path / "none", data_collator=lambda rows: padding()(rows) | {"labels": None})
