"""Decisions carried out on streams: the same rows as of the dataset, dropped and changed as they come."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, IterableDatasetDict, List, Value, load_from_disk
from models import Example, bert, labelled, lora, padding, prompts, tiny
from test_streams import keeping
from watched import train

from hf_influence.attribution import attribute
from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter import DatasetFilter, Decision, Prune, Relabel, Reweight, Separate, StreamRows, save_curated
from hf_influence.gradients.collect import collect
from hf_influence.scores import Scores
from hf_influence.store import GradientStore

ROWS = [{**row, "text": f"row {i}", "name": f"id {i}"} for i, row in enumerate(prompts(10))]
TYPES = Features(
    {
        "input_ids": List(Value("int64")),
        "labels": List(Value("int64")),
        "text": Value("string"),
        "name": Value("string"),
    }
)


def of_rows(rows: list[Example], typed: bool = False) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows), features=TYPES if typed else None)


def names(stream: Any) -> list[str]:
    return [row["name"] for row in stream]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scores]:
    """A store that was captured from a stream, and scores of it."""
    path = tmp_path_factory.mktemp("stream")
    capture = GradientCapture(path / "rows", during="epochs", at_end=False)
    train(tiny(torch.float32), path, capture, data=of_rows(ROWS), max_steps=4)
    scores = attribute(path / "rows", "self_ip", point=1)
    assert scores.ids == list(range(10))
    return path / "rows", scores


def in_its_order(scores: Scores) -> Scores:
    """The scores of the dataset whose rows the stream gave one after the other."""
    return replace(scores, contents={})


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("collator", [None, padding("left", 3)], ids=["alone", "padded"])
def test_a_stream_is_filtered_by_the_contents_that_capture_saw(
    captured: tuple[Path, Scores], typed: bool, collator: Any
) -> None:
    path, scores = captured
    trim, by = DatasetFilter(drop=3), StreamRows(store=path, data_collator=collator)
    kept = trim.apply(of_rows(ROWS, typed), scores, by=by)
    assert isinstance(kept, IterableDataset)
    expected = DatasetFilter(drop=3).apply(Dataset.from_list(ROWS), in_its_order(scores))
    assert names(kept) == expected["name"][:]
    assert kept.features == (TYPES if typed else None)
    assert list(kept) == expected.to_list()  # a second pass gives the same
    backwards = trim.apply(of_rows(ROWS[::-1], typed), scores, by=by)
    assert names(backwards) == expected["name"][::-1]
    shuffled = trim.apply(of_rows(ROWS, typed), scores, by=by).shuffle(seed=0, buffer_size=5)
    assert sorted(names(shuffled)) == sorted(expected["name"])
    for store in (path, str(path), GradientStore.open(path)):
        assert names(trim.apply(of_rows(ROWS, typed), scores, by=store)) == expected["name"][:]
    worst = scores.lowest(1)[0]
    assert f"row {worst} was dropped: its score" in trim.report.explain(worst)


def test_raw_rows_are_known_by_what_becomes_of_them(captured: tuple[Path, Scores]) -> None:
    path, scores = captured
    tokenised = {row["text"]: row for row in ROWS}
    raw = [{"messages": [{"role": "user", "content": row["text"]}], "name": row["name"]} for row in ROWS]
    by = StreamRows(store=path, prepare=lambda row: tokenised[row["messages"][0]["content"]])
    kind = Features({"messages": [{"role": Value("string"), "content": Value("string")}], "name": Value("string")})
    stream = IterableDataset.from_generator(lambda: iter(raw), features=kind)
    kept = DatasetFilter(drop=3).apply(stream, scores, by=by)
    assert kept.features == kind
    assert list(kept) == [row for row in raw if row["name"] in names(kept)]
    assert names(kept) == DatasetFilter(drop=3).apply(Dataset.from_list(ROWS), in_its_order(scores))["name"][:]


def test_a_decision_on_a_stream_is_replayed_without_the_store(captured: tuple[Path, Scores], tmp_path: Path) -> None:
    path, scores = captured
    trim = DatasetFilter(drop=3, columns=True)
    kept = list(trim.apply(of_rows(ROWS, True), scores, by=StreamRows(store=path)))
    trim.report.save(tmp_path / "decision.json")
    decision = Decision.load(tmp_path / "decision.json")
    again = decision.replay(of_rows(ROWS, True))
    assert list(decision.replay(of_rows(ROWS, True), by=path)) == kept
    assert again.features == Features({**TYPES, "influence": Value("float64"), "influence_rank": Value("int64")})
    assert list(again) == kept
    with_dict = decision.replay(IterableDatasetDict({"train": of_rows(ROWS), "test": of_rows(ROWS)}))
    assert [len(list(with_dict[split])) for split in ("train", "test")] == [7, 10]
    for refused, message in (
        (lambda: decision.replay(Dataset.from_list(ROWS)), "to_iterable_dataset"),
        (lambda: decision.undo(Dataset.from_list(ROWS)), "nothing to undo"),
        (lambda: save_curated(again, decision, tmp_path), "cannot be saved"),  # type: ignore[arg-type]
    ):
        with pytest.raises(BadExample, match=message):
            refused()


def test_rows_that_training_did_not_reach_are_refused_kept_or_dropped(captured: tuple[Path, Scores]) -> None:
    path, scores = captured
    new = {**ROWS[0], "input_ids": [5, 6, 7], "labels": [5, 6, 7], "name": "new"}
    fates = {"keep": ["new"], "drop": []}
    usual = names(DatasetFilter(drop=3).apply(of_rows(ROWS), scores, by=StreamRows(store=path)))
    for unscored, more in fates.items():
        by = StreamRows(store=path, unscored=unscored)
        assert names(DatasetFilter(drop=3).apply(of_rows([*ROWS, new]), scores, by=by)) == usual + more
    stream = DatasetFilter(drop=3).apply(of_rows([*ROWS, new]), scores, by=StreamRows(store=path))
    with pytest.raises(BadExample, match=r"without a score: training did not get to it.*unscored="):
        list(stream)
    with pytest.raises(BadSetting, match=r"no value for the column 'weight'"):
        Reweight().apply(of_rows(ROWS), scores, by=StreamRows(store=path, unscored="keep"))
    with pytest.raises(BadSetting, match="unscored='maybe'"):
        StreamRows(unscored="maybe")


def test_rows_with_the_same_contents_stay_together(captured: tuple[Path, Scores]) -> None:
    path, scores = captured
    trim = DatasetFilter(drop=3)
    once = names(trim.apply(of_rows(ROWS), scores, by=StreamRows(store=path)))
    twice = names(trim.apply(of_rows([*ROWS, *ROWS]), scores, by=StreamRows(store=path)))
    assert twice == once + once
    equal = [ROWS[0], ROWS[1], ROWS[0]]
    first = DatasetFilter(drop=1)
    data = Dataset.from_list([{"text": row["text"], "name": row["name"]} for row in equal])
    first.apply(data, Scores(torch.tensor([[-1.0], [1.0], [-1.0]]), [0, 1, 2], "self_ip"))  # a copy of row 0 stays
    assert names(first.report.replay(data)) == ["id 1", "id 0"]
    assert names(first.report.replay(data.to_iterable_dataset())) == ["id 0", "id 1", "id 0"]


def test_rows_of_a_dataset_with_length_are_found_in_its_stream(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS, features=TYPES)
    collect(tiny(torch.float32), ROWS, tmp_path / "rows", data_collator=padding())
    scores = attribute(tmp_path / "rows", "self_ip")
    trim = DatasetFilter(drop=4)
    kept = trim.apply(data, scores)
    by = StreamRows(store=tmp_path / "rows", data_collator=padding())
    assert list(DatasetFilter(drop=4).apply(data.to_iterable_dataset(), scores, by=by)) == kept.to_list()
    for stream in (data.to_iterable_dataset(num_shards=3), data.to_iterable_dataset().with_format("numpy")):
        assert names(trim.report.replay(stream)) == names(kept)  # known by all columns: no store, no collator
    changed = data.to_iterable_dataset().map(lambda row: {"text": "other"}, features=TYPES)
    with pytest.raises(BadExample, match="without a score"):
        list(trim.report.replay(changed))


@pytest.mark.parametrize("column", ["name", "number"])
def test_an_id_column_needs_neither_store_nor_contents(tmp_path: Path, column: str) -> None:
    rows = [{**row, "number": 7 * i} for i, row in enumerate(ROWS)]
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False, id_column=column)
    options: dict[str, Any] = {"collate": keeping(column), "remove_unused_columns": False, "max_steps": 4}
    lean = [{name: row[name] for name in ("input_ids", "labels", column)} for row in rows]
    train(tiny(torch.float32), tmp_path, capture, data=of_rows(lean), **options)
    scores = attribute(tmp_path / "rows", "self_ip", point=1)
    assert scores.id_column == column
    raw = [{"prompt": [{"role": "user", "content": row["text"]}], column: row[column]} for row in rows]
    trim = DatasetFilter(drop=3)
    expected = trim.apply(Dataset.from_list(raw), scores).to_list()
    stream = IterableDataset.from_generator(lambda: iter(raw))
    assert list(trim.apply(stream, scores)) == expected
    assert list(trim.apply(stream.with_format("torch"), scores).with_format(None)) == expected
    without = stream.remove_columns(column)
    with pytest.raises(BadExample, match=f"no column '{column}'"):
        list(trim.apply(without, scores))


def test_labels_and_weights_of_a_stream_are_written_as_it_comes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = [{**row, "name": f"id {i}"} for i, row in enumerate(labelled(lambda i: i % 2, 8))]
    kind = Features(
        {"input_ids": List(Value("int64")), "labels": ClassLabel(names=["bad", "good"]), "name": Value("string")}
    )
    data = Dataset.from_list(rows, features=kind)
    collect(lora(bert(), ["query"], dtype=torch.float32), data, tmp_path / "rows", batch_size=3)
    scores = attribute(tmp_path / "rows", "self_ip")
    by = StreamRows(store=tmp_path / "rows")
    stream = data.to_iterable_dataset()
    phi = torch.tensor([[0.5, 0.5]]).expand(8, 2)
    for how in ("flip", "predicted", "soft"):
        relabel = Relabel(suspects=DatasetFilter(drop=3), how=how, label="labels", probabilities=phi)
        new = relabel.apply(data, scores)
        assert list(relabel.apply(stream, scores, by=tmp_path / "rows")) == new.to_list()
        lazily = relabel.apply(stream, scores, by=by)
        assert lazily.features == new.features
        assert list(lazily) == new.to_list()
    weigh = Reweight()
    weighted = weigh.apply(data, scores)
    lazily = weigh.apply(stream, scores, by=by)
    assert lazily.features == weighted.features
    assert list(lazily) == weighted.to_list()
    with pytest.raises(BadExample, match="already"):
        Reweight().apply(weighted.to_iterable_dataset(), scores, by=by)
    with pytest.raises(BadExample, match="not of IterableDataset"):
        Relabel(suspects=DatasetFilter(drop=3), label="labels", how="flip").suggest(stream, scores)
    with pytest.raises(BadExample, match="column 'name' of the stream holds names"):
        Relabel(suspects=DatasetFilter(drop=3), label="name", how="flip").apply(stream, scores, by=by)


def test_what_a_stream_cannot_tell_is_refused(captured: tuple[Path, Scores]) -> None:
    path, scores = captured
    stream, by = of_rows(ROWS, True), StreamRows(store=path)
    other = Scores(scores.values, list(range(1, 11)), "ip_other", scores.settings)
    named = Scores(scores.values, [row["name"] for row in ROWS], "ip", scores.settings, id_column="name")
    cases: list[tuple[Any, str]] = [
        (
            lambda: DatasetFilter(drop=3).apply(stream, scores),
            r"known: by='runs/…', .*by=StreamRows\(store=.*where the c",
        ),
        (lambda: DatasetFilter(drop=3, within="name").apply(stream, scores, by=by), "within='name'.*at its end"),
        (lambda: DatasetFilter(keep_tokens=9).apply(stream, scores, by=by), "keep_tokens.*at its end"),
        (lambda: DatasetFilter(drop=3).apply(stream, [scores, other], by=by), "of different examples"),
        (lambda: DatasetFilter(drop=3).apply(stream, other, by=by), "of all 10 scored examples"),
        (lambda: Relabel(suspects=DatasetFilter(drop=3), label="labels").apply(stream, scores, by=by), "'label'"),
        (
            lambda: Relabel(suspects=DatasetFilter(drop=3), label="labels").apply(stream, named),
            "labels of a stream .*by='runs/…'",
        ),
    ]
    for refused, message in cases:
        with pytest.raises(BadSetting, match=message):
            refused()
    splits = IterableDatasetDict(train=stream)
    for remedy, data, how in product((Prune(), Separate(column="part")), (stream, splits), (None, by)):
        name = type(remedy).__name__
        with pytest.raises(BadExample, match=rf"its end only, and {name} needs them before.*Dataset\.from_generator"):
            remedy.apply(data, scores, by=how)
    both = DatasetFilter(drop=3).apply(stream, [scores, scores], by=by)
    assert names(both) == names(DatasetFilter(drop=3).apply(stream, scores, by=by))


@pytest.mark.parametrize("by", ["no collator", "a tokenizer's"])
def test_rows_that_are_not_tokenised_are_told_from_rows_without_a_score(
    captured: tuple[Path, Scores], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scores = captured

    def pad(features: Any) -> Any:
        raise ValueError("You should supply an encoding that includes input_ids, but you provided ['labels']")

    raw = of_rows([{"text": row["text"], "labels": i} for i, row in enumerate(ROWS)])
    rows = StreamRows(store=path, data_collator=None if by == "no collator" else pad)
    with pytest.raises(
        BadExample, match=r"columns \['text', 'labels'\].*given \['labels'\].*\(trainer\.train_dataset of"
    ):
        list(DatasetFilter(drop=3).apply(raw, scores, by=rows))
    with pytest.raises(ValueError, match=r"^You should supply"):  # of rows that are, it is the collator that is wrong
        list(DatasetFilter(drop=3).apply(of_rows(ROWS), scores, by=StreamRows(store=path, data_collator=pad)))


def test_a_stream_that_was_filtered_is_kept_as_a_dataset_of_its_rows(
    captured: tuple[Path, Scores], tmp_path: Path
) -> None:
    path, scores = captured
    trim = DatasetFilter(drop=3)
    kept = trim.apply(of_rows([*ROWS, *ROWS]), scores, by=path)  # the rows that stay come twice
    save_curated(Dataset.from_list(list(kept)), trim.report, tmp_path / "out")
    assert load_from_disk(str(tmp_path / "out")).num_rows == 14


def test_a_filtered_stream_goes_through_workers_and_on_where_it_stopped(captured: tuple[Path, Scores]) -> None:
    path, scores = captured
    stream = Dataset.from_list(ROWS, features=TYPES).to_iterable_dataset(num_shards=2)
    kept = DatasetFilter(drop=3).apply(stream, scores, by=StreamRows(store=path))
    loader = torch.utils.data.DataLoader(kept, batch_size=None, num_workers=2)
    assert sorted(row["name"] for row in loader) == sorted(names(kept))
    every, rows = names(kept), iter(kept)
    begun = [next(rows)["name"] for _ in range(3)]
    state = kept.state_dict()
    again = DatasetFilter(drop=3).apply(stream, scores, by=StreamRows(store=path))
    again.load_state_dict(state)
    assert begun + names(again) == every
