"""Rows during training from data without a length, and ids that come with the batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from models import Example, all_rows, labelled, padding, prompts, tiny
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer
from watched import (
    EXAMPLES,
    QUERIES,
    Recording,
    Stumbling,
    assert_exact,
    classifier,
    own_gradients,
    train,
    weights_and_logs,
)

from hf_influence.attribution import attribute
from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadExample, BadSetting, MissingRows
from hf_influence.gradients.identity import content_hash
from hf_influence.store import GradientStore

NAMED = [{**row, "name": f"row {i}"} for i, row in enumerate(EXAMPLES)]
NUMBERED = [{**row, "number": 7 * i} for i, row in enumerate(EXAMPLES)]


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Gives the same examples in every pass, the later passes backwards."""

    def __init__(self, rows: list[Example], backwards: bool = False):
        self.rows, self.passes, self.backwards = rows, 0, backwards

    def __iter__(self) -> Iterator[Example]:
        self.passes += 1
        return iter(self.rows[::-1] if self.passes > 1 and self.backwards else self.rows)


def of_library(rows: list[Example]) -> Any:
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


KINDS = {"torch": Stream, "datasets": of_library}
TWICE: dict[str, Any] = {"max_steps": 8, "kind": Recording}  # ten examples by three: four steps a pass


def capturing(path: Path, **settings: Any) -> GradientCapture:
    return GradientCapture(path / "rows", **{"during": "epochs", "at_end": False, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_stream_equal_autograd_and_keep_their_numbers(tmp_path: Path, kind: str) -> None:
    stream = KINDS[kind](EXAMPLES)
    run = train(tiny(torch.float32), tmp_path, capturing(tmp_path, query_dataset=QUERIES), data=stream, **TWICE)
    store = GradientStore.open(tmp_path / "rows")
    assert store.points() == [1, 2]
    for micro, number in zip(run.micros, range(8), strict=True):
        micro.epoch = number // 4 + 1  # the Trainer's own count is a share of max_steps
    for epoch in (1, 2):
        rows = store.rows("train", epoch)
        assert rows.ids == list(range(10))
        assert_exact(run, rows, EXAMPLES, epoch)
        assert len(store.rows("query", epoch)) == len(QUERIES)
    assert attribute(store, "tracin").values.shape == (10, len(QUERIES))


def test_an_example_of_a_later_pass_is_known_again_by_its_contents(tmp_path: Path) -> None:
    train(tiny(torch.float32), tmp_path, capturing(tmp_path), data=Stream(EXAMPLES, backwards=True), **TWICE)
    store = GradientStore.open(tmp_path / "rows")
    one, two = (store.rows("train", epoch) for epoch in (1, 2))
    assert one.ids == two.ids == list(range(10))
    assert torch.equal(one.stats["hash"], two.stats["hash"])
    assert two.stats["step"][-1] < two.stats["step"][0]
    for at, code in zip(one.ids, one.stats["hash"].tolist(), strict=True):  # as a dataset would have it
        ids, labels = (torch.tensor([EXAMPLES[at][name]]) for name in ("input_ids", "labels"))
        assert int(content_hash(ids, None, labels, per_token=True)) == code


def test_equal_examples_of_a_stream_are_one(tmp_path: Path) -> None:
    data = [*EXAMPLES[:4], EXAMPLES[0], EXAMPLES[4]]
    train(tiny(torch.float32), tmp_path, capturing(tmp_path), data=Stream(data), max_steps=2, kind=Trainer)
    assert GradientStore.open(tmp_path / "rows").rows("train", 1).ids == [0, 1, 2, 3, 4]


def test_points_of_steps_of_a_stream(tmp_path: Path) -> None:
    capture = capturing(tmp_path, during="steps", every=2, query_dataset=QUERIES)
    train(tiny(torch.float32), tmp_path, capture, data=Stream(EXAMPLES), **TWICE)
    store = GradientStore.open(tmp_path / "rows")
    assert store.points() == [1, 3, 5, 7]
    assert [len(store.rows("train", point)) for point in store.points()] == [3, 3, 3, 3]
    assert store.rows("train", 5).ids == store.rows("train", 1).ids == [0, 1, 2]


def test_training_on_a_stream_is_bit_identical_with_and_without_capture(tmp_path: Path) -> None:
    runs, passes = [], []
    for callbacks in ([], [capturing(tmp_path, query_dataset=QUERIES)]):
        stream = Stream(EXAMPLES)
        run = train(tiny(torch.float32), tmp_path / "out", *callbacks, data=stream, max_steps=6, kind=Trainer)
        runs.append(weights_and_logs(run))
        passes.append(stream.passes)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    assert passes[0] == passes[1] == 2


@pytest.mark.parametrize("settings", [{"during": "epochs"}, {"during": "steps"}])
@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_resumed_stream_leaves_the_store_of_an_undisturbed_run(
    tmp_path: Path, settings: dict[str, Any], stop: int
) -> None:
    data = prompts(40)
    options: dict[str, Any] = {"max_steps": 9, "save_strategy": "steps", "save_steps": 2}
    train(tiny(torch.float32), tmp_path / "a", capturing(tmp_path / "a", **settings), data=Stream(data), **options)

    class Fails(Stumbling):
        error, where = RuntimeError("no"), "step"

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step == stop:
                raise self.error
            return Trainer.training_step(self, *args, **kwargs)

    with pytest.raises(RuntimeError, match="no"):
        train(
            tiny(torch.float32),
            tmp_path / "b",
            capturing(tmp_path / "b", **settings),
            data=Stream(data),
            kind=Fails,
            **options,
        )
    checkpoint = str(tmp_path / "b" / f"checkpoint-{stop // 2 * 2}")
    again = capturing(tmp_path / "b", **settings)
    train(tiny(torch.float32), tmp_path / "b", again, data=Stream(data), resume=checkpoint, **options)
    one, two = (GradientStore.open(tmp_path / run / "rows") for run in "ab")
    assert one.points() == two.points()
    for point in one.points():
        a, b = one.rows("train", point), two.rows("train", point)
        assert a.ids == b.ids
        torch.testing.assert_close(all_rows(a), all_rows(b), rtol=0, atol=0)
        torch.testing.assert_close(a.stats, b.stats, rtol=0, atol=0)


def keeping(column: str) -> Any:
    """A collator that keeps a column."""

    def collate(features: list[Example]) -> dict[str, Any]:
        values = [row[column] for row in features]
        kept = torch.tensor(values) if isinstance(values[0], int) else values
        return {**padding()(features), column: kept}

    return collate


@pytest.mark.parametrize("column", ["name", "number"])
def test_the_ids_of_a_stream_come_with_its_batches(tmp_path: Path, column: str) -> None:
    data = NAMED if column == "name" else NUMBERED
    options = {"collate": keeping(column), "remove_unused_columns": False, **TWICE}
    train(tiny(torch.float32), tmp_path, capturing(tmp_path, id_column=column), data=Stream(data, True), **options)
    store = GradientStore.open(tmp_path / "rows")
    for epoch in (1, 2):
        rows = store.rows("train", epoch)
        assert rows.ids == [row[column] for row in data]
        assert rows.id_column == column
    assert torch.equal(store.rows("train", 1).stats["hash"], store.rows("train", 2).stats["hash"])


@pytest.mark.parametrize("column", ["name", "number"])
def test_ids_in_the_batch_tell_equal_examples_apart(tmp_path: Path, column: str) -> None:
    rows = [EXAMPLES[0], EXAMPLES[1], EXAMPLES[0], EXAMPLES[0]]
    data = [{**row, column: (f"row {i}" if column == "name" else 7 * i)} for i, row in enumerate(rows)]
    options: dict[str, Any] = {"collate": keeping(column), "remove_unused_columns": False}
    options |= {"per_device_train_batch_size": 1, "num_train_epochs": 1}
    names: list[Any] = []

    class Naming(Recording):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, count = super().get_batch_samples(*args, **kwargs)
            names.extend(next(iter(batch[column])) for batch in batches)
            return batches, count

    capture = capturing(tmp_path, id_column=column)
    run = train(tiny(torch.float32), tmp_path, capture, data=data, kind=Naming, **options)
    stored = GradientStore.open(tmp_path / "rows").rows("train", 1)
    assert stored.ids == [row[column] for row in data]
    for at, name in enumerate(stored.ids):  # equal examples differ by the weights of their steps
        step = names.index(name)
        assert int(stored.stats["step"][at]) == step + 1
        assert column not in run.micros[step].inputs  # the model takes no such argument
        (want,) = own_gradients(run.model, run.micros[step]).values()
        for block in stored.blocks:
            torch.testing.assert_close(stored.block(block)[at], want[block].flatten(), rtol=1e-4, atol=1e-6)


def test_ids_in_the_batch_let_a_collator_change_the_examples(tmp_path: Path) -> None:
    def masking(features: list[Example]) -> dict[str, Any]:
        batch = keeping("name")(features)
        return {**batch, "input_ids": torch.where(torch.rand(batch["input_ids"].shape) < 0.5, 7, batch["input_ids"])}

    capture = capturing(tmp_path, id_column="name")
    options: dict[str, Any] = {"collate": masking, "remove_unused_columns": False}
    train(tiny(torch.float32), tmp_path, capture, data=NAMED, **options)
    rows = GradientStore.open(tmp_path / "rows").rows("train", 2)
    assert rows.ids == [row["name"] for row in NAMED]


@pytest.mark.parametrize("given", [True, False])
def test_ids_that_the_batch_lacks_are_found_by_the_contents(tmp_path: Path, given: bool) -> None:
    named = Dataset.from_list(NAMED)
    capture = capturing(tmp_path, id_column="name", train_dataset=named if given else None)
    run = train(tiny(torch.float32), tmp_path, capture, data=NAMED)
    rows = GradientStore.open(tmp_path / "rows").rows("train", 1)
    assert rows.ids == [row["name"] for row in NAMED]
    assert_exact(run, rows, EXAMPLES, 1)


def test_a_stream_of_examples_that_are_also_at_hand_has_their_positions(tmp_path: Path) -> None:
    order = EXAMPLES[::-1]
    capture = capturing(tmp_path, train_dataset=Dataset.from_list(EXAMPLES), at_end=True)
    run = train(tiny(torch.float32), tmp_path, capture, data=Stream(order), **TWICE)
    store = GradientStore.open(tmp_path / "rows")
    assert store.points() == [0, 1, 2]
    assert store.rows("train", 2).ids == list(range(10))
    for number, micro in enumerate(run.micros):
        micro.epoch = number // 4 + 1
    assert_exact(run, store.rows("train", 1), EXAMPLES, 1)


def test_a_run_that_was_cut_short_says_how_to_go_on(tmp_path: Path) -> None:
    kind = type("Fails", (Stumbling,), {"error": RuntimeError("no"), "where": "step", "steps": 0})
    for name, data in (("stream", Stream(EXAMPLES)), ("dataset", EXAMPLES)):
        capture = GradientCapture(tmp_path / name, during="epochs", at_end=False)
        kind.steps = 0  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="no"):
            train(tiny(torch.float32), tmp_path, capture, data=data, max_steps=8, kind=kind)
        store = GradientStore.open(tmp_path / name)
        with pytest.raises(MissingRows, match=r"training steps.*resume_from_checkpoint=True.*GradientCapture"):
            store.rows("train", 1)
        with pytest.raises(MissingRows, match=r"GradientCapture\(.*query_dataset=…, during=\"epochs\"\)"):
            store.rows("query", 1)
        with pytest.raises(MissingRows, match=r"collect\(model, dataset"):
            store.rows("train", 0)


MULTI = labelled(lambda i: [float(i % 2), 1.0, 0.0], 10)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "at the end": ({"at_end": True}, {}, BadSetting, "Stream, without a length.*at_end=False.*Dataset.from_generator"),
    "at the end alone": ({"during": None, "at_end": True}, {}, BadSetting, "without a length"),
    "budget": ({"budget": 1.0}, {}, BadSetting, "budget=1.0.*every="),
    "no ids": ({"id_column": "name"}, {}, BadSetting, "no column 'name'.*remove_unused_columns=False"),
    "no such ids": (
        {"id_column": "weight"},
        {"collate": keeping("weight"), "remove_unused_columns": False},
        BadExample,
        "ids are integers or strings",
    ),
    "labels": ({}, {"make": classifier, "data": Stream(MULTI)}, BadSetting, "problem_type"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_with_a_stream_is_refused(tmp_path: Path, case: str) -> None:
    settings, options, error, message = REFUSED[case]
    options = {"data": Stream([{**row, "weight": 0.5} for row in EXAMPLES]), "max_steps": 2, **options}
    model = options.pop("make", lambda: tiny(torch.float32))()
    with pytest.raises(error, match=f"(?s){message}"):
        train(model, tmp_path, capturing(tmp_path, **settings), kind=Trainer, **options)
