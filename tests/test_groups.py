"""Groups of examples: what counts as one, whatever the values are, and which of them are published."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from hf_influence.attribution import combined
from hf_influence.dataset.groups import group_of
from hf_influence.evaluation import corrupt_answers, mislabel_detection
from hf_influence.filter import DatasetFilter, Prune, save_curated
from hf_influence.scores import Scores

NAN = float("nan")


def scores_of(values: list[float]) -> Scores:
    return Scores(torch.tensor(values)[:, None], list(range(len(values))), "self_ip")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (NAN, None),
        (np.float32("nan"), None),
        (torch.tensor(math.nan), None),
        (np.int64(3), 3),
        (torch.tensor(3), 3),
        ([1, 2], torch.tensor([1, 2])),
        (["a", {"b": 1, "c": 2}], ["a", {"c": 2, "b": 1}]),
        ([np.array([1])], [[1]]),
        ({3}, {3}),
    ],
    ids=str,
)
def test_equal_values_are_one_group(one: Any, other: Any) -> None:
    assert group_of(one) == group_of(other)
    assert hash(group_of(one)) == hash(group_of(other))


def test_different_values_are_different_groups() -> None:
    assert len({group_of(value) for value in (None, "", "a", 0, 1.5, [1], [1, 2], [], {"a": 1})}) == 9


@pytest.mark.parametrize("other", [[NAN] * 4, [None] * 4, [[1, 2]] * 4], ids=str)
@pytest.mark.parametrize("rule", [DatasetFilter(drop=0.5, within="task"), Prune(drop=0.5, within="task")])
def test_rows_without_a_value_and_rows_with_a_list_are_groups_like_others(rule: Any, other: list[Any]) -> None:
    own = [[3]] * 4 if isinstance(other[0], list) else [1.0] * 4
    rows = Dataset.from_dict({"row": list(range(8)), "task": own + other})
    kept = rule.apply(rows, scores_of([4.0, 3.0, 2.0, 1.0, -1.0, -2.0, -3.0, -4.0]))
    assert kept["row"][:] == ([0, 1, 4, 5] if isinstance(rule, DatasetFilter) else [2, 3, 6, 7])


@pytest.mark.parametrize("hard", [[NAN, float("nan"), np.nan], [["hard"]] * 3], ids=str)
def test_detection_within_groups_takes_any_values(hard: list[Any]) -> None:
    scores = scores_of([10.0, 12.0, 14.0, -10.0, -8.0, -6.0])
    wrong = [True, False, False, True, False, False]
    for within in (["easy"] * 3 + hard, np.array([1.0] * 3 + hard)) if hard[0] is NAN else (["easy"] * 3 + hard,):
        assert mislabel_detection(scores, wrong, within=within).auc == 1


def test_answers_are_swapped_among_rows_without_a_task() -> None:
    right = Dataset.from_dict({"prompt": ["1+1=", "2+2="], "answer": ["2", "4"], "task": [NAN, float("nan")]})
    assert corrupt_answers(right, ["swapped_within"], share=0.5)["answer"][:] in (["2", "2"], ["4", "4"])


def test_combined_scores_tell_by_which_groups_they_were_ranked() -> None:
    one, tasks = scores_of([3.0, 1.0, 2.0, 0.0]), ["a", "a", NAN, None]
    within = combined(one, groups=tasks)
    assert within.values[:, 0].tolist() == [0.75, 0.25, 0.75, 0.25]
    assert within.settings["groups"].startswith("2 groups, sha256 ")
    assert within.settings != combined(one, groups=["a", "b", "a", "b"]).settings
    assert "groups" not in combined(one).settings


TEXTS = [f"Patient {i} was seen again" for i in range(60)]


@pytest.mark.parametrize("name", ["label", "task", "source"])
def test_a_column_of_text_is_not_published(tmp_path: Path, name: str) -> None:
    data = Dataset.from_dict({name: TEXTS, "text": ["x"] * 60})
    trim = DatasetFilter(drop=10)
    curated = trim.apply(data, scores_of([float(i) for i in range(60)]))
    save_curated(curated, trim.report, tmp_path)
    assert trim.report is not None
    assert trim.report.groups == {}
    for file in ("README.md", "decision.json"):
        assert "Patient" not in (tmp_path / file).read_text()


def test_the_first_column_that_holds_classes_is_counted() -> None:
    def groups(features: Features | None = None, **columns: Any) -> Any:
        data = Dataset.from_dict(columns, features=features)
        trim = DatasetFilter(drop=1)
        trim.apply(data, scores_of([float(i) for i in range(len(data))]))
        assert trim.report is not None
        return trim.report.groups

    assert groups(source=["x", "x", "y", "y"]) == {"x": (2, 1), "y": (2, 2)}
    assert groups(label=["free", "text", "of", "rows"], source=["x", "x", "y", "y"]) == {"x": (2, 1), "y": (2, 2)}
    assert groups(label=[0.5, 1.5, 2.5, 3.5], task=[True, False, True, False]) == {True: (2, 1), False: (2, 2)}
    assert groups(source=list(range(51)) * 2) == {}
    assert len(groups(source=list(range(50)) * 2)) == 50
    names = Features({"label": ClassLabel(names=["bad", "good"]), "x": Value("int64")})
    assert groups(names, label=[0, 1, 1], x=[1, 2, 3]) == {"bad": (1, 0), "good": (2, 2)}


def test_a_card_shows_some_groups_and_how_many_more_there_are() -> None:
    data = Dataset.from_dict({"source": [f"site {i % 25}" for i in range(50)]})
    trim = DatasetFilter(drop=1)
    trim.apply(data, scores_of([float(i) for i in range(50)]))
    assert trim.report is not None
    card = trim.report.card()
    assert card.count("| site ") == 20
    assert "\n\nand 5 more groups.\n" in card
