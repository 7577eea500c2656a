"""Scores know the dataset that they are of, also where nothing but its order names the examples."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset, concatenate_datasets
from models import bert, labelled, lora, tiny
from watched import EXAMPLES, train

from hf_influence import DatasetFilter, attribute, collect
from hf_influence.attribution.combined import combined
from hf_influence.callbacks import CurateEachEpoch, GradientCapture
from hf_influence.dataset.contents import column_codes, content_of
from hf_influence.errors import BadExample, BadSetting
from hf_influence.evaluation import out_of_fold
from hf_influence.filter import Decision, Relabel, StreamRows
from hf_influence.gradients.batches import padding_with
from hf_influence.scores import Scores

ROWS = Dataset.from_list(
    [
        {**row, "text": f"text {i}", "pair": {"a": f"a {i % 4}"}, "source": "one"}
        for i, row in enumerate(labelled(lambda i: i % 2, 8))
    ]
).cast_column("labels", ClassLabel(names=["bad", "good"]))
TRIM = DatasetFilter(drop=2)


def model() -> Any:
    return lora(bert(), ["query", "value"], dtype=torch.float32)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return attribute(collect(model(), ROWS, tmp_path_factory.mktemp("rows")), "loss")


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("quiet")
def test_the_dataset_that_was_scored_is_known_again_in_any_form(scores: Scores, tmp_path: Path) -> None:
    want = TRIM.apply(ROWS, scores)["text"][:]
    scores.save(tmp_path / "scores")
    ROWS.to_parquet(tmp_path / "rows.parquet")
    ROWS.to_json(tmp_path / "rows.json")
    forms = {
        "parquet": Dataset.from_parquet(str(tmp_path / "rows.parquet")),
        "json": Dataset.from_json(str(tmp_path / "rows.json")),
        "tensors": ROWS.with_format("torch"),
        "a part of its columns": ROWS.select_columns(["text"]),
        "more columns": ROWS.add_column("more", list(range(8))),
        "nothing that was scored": Dataset.from_dict({"raw": ROWS["text"][:], "text": ROWS["text"][:]}).rename_column(
            "raw", "other"
        ),
        "labels of another name": Dataset.from_dict({"raw": ROWS["text"][:], "label": ROWS["labels"][:]}),
        "other labels": Relabel(suspects=TRIM, how="flip", label="labels").apply(ROWS, scores),
    }
    for form, dataset in forms.items():
        kept = TRIM.apply(dataset, Scores.load(tmp_path / "scores"))
        assert kept["text" if "text" in kept.column_names else "raw"][:] == want, form


def test_another_order_is_refused_and_other_values_are_told(scores: Scores, tmp_path: Path) -> None:
    by_text = Dataset.from_dict({"text": ROWS["text"][:]})
    for dataset in (
        ROWS.shuffle(0),
        ROWS.select([*range(0, 8, 2), *range(1, 8, 2)]),
        by_text.select([1, 0, *range(2, 8)]),
    ):
        with pytest.raises(BadSetting, match=r"the column '(input_ids|text)' holds .* in another order"):
            TRIM.apply(dataset, scores)
    renumbered = ROWS.shuffle(0).add_column("number", list(range(8)))
    numbered = attribute(collect(model(), ROWS.add_column("number", list(range(8))), tmp_path), "loss")
    with pytest.raises(BadSetting, match="another order"):
        TRIM.apply(renumbered, numbered)
    twice = Dataset.from_dict({"text": [f"row {i % 12}" for i in range(24)]})
    with pytest.raises(BadSetting, match="another order"):
        TRIM.apply(twice.shuffle(0), Scores(torch.zeros(24, 1), range(24), "ip", contents=column_codes(twice)))
    labels = ROWS.select_columns(["labels"])
    with pytest.warns(UserWarning, match="'labels'"):  # turned labels, or another order: who knows
        TRIM.apply(labels.select(range(7, -1, -1)), scores)


def test_a_dataset_of_other_rows_is_refused_however_many_it_has(scores: Scores) -> None:
    other = ROWS.map(lambda row: {"input_ids": [9, *row["input_ids"]], "text": f"other {row['text']}"})
    told = r"of 'input_ids', 'text' of the dataset do not hold what was scored.*filter first and change.*id_column=…"
    with pytest.raises(BadSetting, match=told):
        TRIM.apply(other, scores)
    with pytest.raises(BadSetting, match="of 'text' of the dataset do not hold what was scored"):
        TRIM.apply(other.select_columns(["text", "labels"]), scores)  # that its labels are the same tells nothing
    forced = TRIM.apply(other, replace(scores, contents={}))
    assert forced["labels"][:] == TRIM.apply(ROWS, scores)["labels"][:]
    edited = other.remove_columns("input_ids").add_column("input_ids", ROWS["input_ids"][:])
    with pytest.warns(UserWarning, match="of 'text' of the dataset do not hold .* and the values of 'input_ids' do,"):
        kept = TRIM.apply(edited, scores)
    assert kept["text"][:] == [f"other {text}" for text in TRIM.apply(ROWS, scores)["text"][:]]


def test_where_nothing_tells_the_order_it_is_said(scores: Scores) -> None:
    """Such as raw rows, of which the tokens were scored: in another order they would be filtered by chance."""
    raw = Dataset.from_dict({"raw": ROWS["text"][:]}).add_column("source", ["one"] * 8)
    with pytest.warns(UserWarning, match=r"told apart by \['input_ids', .*with \['raw', 'source'\].*id_column=…"):
        assert TRIM.apply(raw, scores)["raw"][:] == TRIM.apply(ROWS, scores)["text"][:]
    labelled = raw.add_column("label", ROWS["labels"][:])
    with pytest.warns(UserWarning, match="the values of 'labels' of the dataset do not hold what was scored"):
        TRIM.apply(labelled.select(range(7, -1, -1)), scores)
    tasks = Dataset.from_dict({"labels": [i % 12 for i in range(24)]})
    known = Scores(torch.zeros(24, 1), range(24), "ip", contents=column_codes(tasks))
    with pytest.raises(BadSetting, match="another order"):
        TRIM.apply(tasks.rename_column("labels", "label").shuffle(0), known)
    with pytest.warns(UserWarning, match=r"told apart by \['labels'\]"):
        TRIM.apply(Dataset.from_dict({"label": [str(i) for i in range(24)]}), known)
    one = Dataset.from_dict({"labels": [0] * 24})
    with pytest.warns(UserWarning, match="told apart by no column"):
        TRIM.apply(one, Scores(torch.zeros(24, 1), range(24), "ip", contents=column_codes(one)))


def test_scores_of_other_origin_know_the_dataset_as_well(scores: Scores) -> None:
    folds = out_of_fold(ROWS, lambda rows: model(), folds=2)
    assert folds.contents == scores.contents == column_codes(ROWS)
    assert set(folds.contents) == {"input_ids", "labels", "text", "pair", "source"}
    with pytest.raises(BadSetting, match="another order"):
        TRIM.apply(ROWS.shuffle(0), combined(scores, folds))
    mine = Scores(torch.arange(8.0)[:, None], list(range(8)), "mine")
    assert TRIM.apply(ROWS.shuffle(0), mine).num_rows == 6  # nothing is known of these


@pytest.mark.parametrize(
    ("rows", "columns", "told", "untold"),
    [
        (9, None, r'"bfd_split" an SFTTrainer cuts long rows, and .*Train with "bfd"', "left out"),
        (9, {"piece_of": [0] * 9}, r'"bfd_split".*Train with "bfd"', "left out"),
        (
            9,
            {"text": ["a"] * 9},
            r"rows were left out since.*leave rows out afterwards, or score with id_column=",
            "SFT",
        ),
        (7, {"text": ["a"] * 7}, r"Filter what was trained on, trainer\.train_dataset; or capture with id_c", "bfd"),
        (7, None, r"Filter what was trained on, trainer\.train_dataset.*GradientCapture\(…, train_dataset=…\)", "bfd"),
    ],
)
def test_scores_of_more_or_fewer_rows_are_told_by_what_they_may_be_of(
    rows: int, columns: dict[str, Any] | None, told: str, untold: str
) -> None:
    known = {} if columns is None else column_codes(Dataset.from_dict(columns))
    scored = Scores(torch.zeros(rows, 1), list(range(rows)), "loss", contents=known)
    with pytest.raises(BadSetting, match=f"cover {rows} examples and the dataset has 8 rows: .*{told}") as error:
        TRIM.apply(ROWS, scored)
    assert untold not in str(error.value)


@pytest.mark.parametrize("rows", [5, 8])
def test_scores_of_packed_rows_are_not_taken_for_those_of_examples(rows: int) -> None:
    packed = Dataset.from_dict({"input_ids": [[1, i] for i in range(rows)], "seq_lengths": [[1, 1]] * rows})
    scored = Scores(torch.zeros(rows, 1), list(range(rows)), "loss", contents=column_codes(packed))
    with pytest.raises(BadSetting, match=r"packed several .*Capture with GradientCapture\(…, train_dataset=…\)"):
        TRIM.apply(ROWS.select_columns(["text"]), scored)
    assert len(TRIM.apply(packed, scored)) == rows - 2


def test_rows_that_were_left_out_since_are_left_aside_where_ids_name_the_others(tmp_path: Path) -> None:
    named = ROWS.add_column("uid", [f"id {i}" for i in range(8)])
    odds = torch.tensor([[4.0], [-3.0], [3.0], [-2.0], [2.0], [-1.0], [1.0], [0.5]])
    scores = Scores(odds, named["uid"][:], "auto", id_column="uid", report={"log_odds": {"auc": 0.9}})
    left = named.filter(lambda row: row["uid"] not in ("id 1", "id 4")).shuffle(0)
    trim = DatasetFilter(drop=0.5)  # of the six that are there, not of the eight
    kept = trim.apply(left, scores)
    assert sorted(kept["uid"][:]) == ["id 0", "id 2", "id 6"]
    report = trim.report
    assert report is not None
    assert [(row.id, row.rank) for row in report.removed] == [("id 3", 0), ("id 5", 1), ("id 7", 2)]
    assert sorted(report.ranks) == list(range(6))
    assert "ranks 0 of 6" in report.explain("id 3")
    report.save(tmp_path / "d.json")
    again = Decision.load(tmp_path / "d.json")
    assert again.replay(left).to_list() == kept.to_list()
    assert again.undo(kept, rest=named).to_list() == left.to_list()
    with pytest.raises(BadExample, match="8 rows and the decision is on 6"):
        again.replay(named)
    assert sorted(DatasetFilter(drop=0.5).apply(left, [scores, scores])["uid"][:]) == ["id 0", "id 2", "id 6"]
    soft = Relabel(how="posterior", label="labels").apply(left, scores)
    whole = Relabel(how="posterior", label="labels").apply(named, scores)
    believed = dict(zip(whole["uid"][:], whole["labels"][:], strict=True))
    assert dict(zip(soft["uid"][:], soft["labels"][:], strict=True)).items() <= believed.items()
    more = concatenate_datasets([left, left.select([0, 1]).map(lambda row: {"uid": f"new {row['uid']}"})])
    told = r"2 of the 8 rows of the dataset have no score: 'new id \d', 'new id \d' in column 'uid'.*leave them out"
    with pytest.raises(BadSetting, match=told):
        trim.apply(more, scores)


def test_rows_of_training_know_the_dataset(tmp_path: Path) -> None:
    data = Dataset.from_list([{**row, "text": f"text {i}"} for i, row in enumerate(EXAMPLES)])
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    curate = CurateEachEpoch(capture, TRIM, "loss_mean")
    train(tiny(torch.float32), tmp_path, capture, curate, data=data, dataloader_drop_last=True)  # a row has no score
    store = tmp_path / "rows"
    assert len(attribute(store, "loss", point=1)) == 9
    scores = attribute(store, "loss_mean")
    assert scores.contents == column_codes(data)
    assert 1 in curate.decisions


def test_scores_of_a_stream_are_not_taken_for_those_of_a_dataset(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    stream = IterableDataset.from_generator(lambda: iter(EXAMPLES[::-1]))
    train(tiny(torch.float32), tmp_path, capture, data=stream, max_steps=8)
    scores = attribute(tmp_path / "rows", "loss_mean")
    scores.save(tmp_path / "scores")
    for known in (scores, Scores.load(tmp_path / "scores")):
        with pytest.raises(BadSetting, match=r"of a stream.*to_iterable_dataset\(\), scores, by='runs/…'\)"):
            TRIM.apply(data, known)
    by = StreamRows(store=tmp_path / "rows", data_collator=padding_with(0))
    kept = list(TRIM.apply(data.to_iterable_dataset(), scores, by=by))
    worst = {tuple(EXAMPLES[9 - i]["input_ids"]) for i in scores.lowest(2)}
    assert [tuple(row["input_ids"]) for row in kept] == [
        key for row in EXAMPLES if (key := tuple(row["input_ids"])) not in worst
    ]


def test_the_content_of_a_dataset_tells_it_from_others() -> None:
    rows = Dataset.from_dict({"a": ["x", "y"], "b": [1, 2]})
    assert content_of(rows) == content_of(Dataset.from_dict(rows.to_dict())) == content_of(rows.with_format("torch"))
    others = [rows.select([0]), rows.select([1, 0]), rows.rename_column("b", "c"), rows.select([])]
    assert len({content_of(one) for one in [rows, *others]}) == 5
