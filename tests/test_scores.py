"""Scores: their mean, the lowest of them, what is refused, and what is written to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError

from hf_influence.attribution.combined import combined
from hf_influence.errors import BadSetting, MissingRows, StoreError
from hf_influence.filter import DatasetFilter
from hf_influence.scores import Scores


def per_query(values: torch.Tensor) -> Scores:
    return Scores(values, list(range(len(values))), "ip", query_ids=list(range(values.shape[1])))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_lowest_are_those_that_a_filter_drops(layout: str) -> None:
    """Also where the columns cancel, so that a mean in float32 is mostly rounding."""
    rows = Dataset.from_dict({"row": list(range(30))})
    for seed in range(20):
        values = torch.randn(30, 400, generator=torch.Generator().manual_seed(seed)) * 1e3
        values -= values.mean(1, keepdim=True)
        scores = per_query(values if layout == "rows" else values.T.contiguous().T)
        trim = DatasetFilter(drop=5)
        trim.apply(rows, scores)
        assert trim.report is not None
        assert scores.lowest(5) == [row.id for row in trim.report.removed]


def test_a_mean_of_large_scores_is_finite() -> None:
    mean = per_query(torch.full((3, 4), 3e38)).mean()
    assert mean.dtype == torch.float64
    assert mean.tolist() == pytest.approx([3e38] * 3)


def test_whole_numbers_are_scores(tmp_path: Path) -> None:
    scores = Scores(torch.tensor([[2, 1], [0, 1], [5, 5]]), [0, 1, 2], "mine", query_ids=[0, 1])
    assert scores.mean().tolist() == [1.5, 0.5, 5.0]
    assert scores.lowest(1) == [1]
    assert DatasetFilter(drop=1).apply(Dataset.from_dict({"row": [0, 1, 2]}), scores)["row"][:] == [0, 2]
    scores.save(tmp_path / "s")
    assert torch.equal(Scores.load(tmp_path / "s").values, scores.values)


def test_what_is_no_number_of_scores_is_refused() -> None:
    scores = per_query(torch.zeros(3, 1))
    assert scores.lowest(0) == []
    assert scores.lowest(9) == [0, 1, 2]
    assert scores.lowest(np.int64(2)) == [0, 1]
    for wrong in (-1, 0.1, "10", None):
        with pytest.raises(BadSetting, match=rf"lowest\({wrong!r}\).*whole number"):
            scores.lowest(wrong)  # type: ignore[arg-type]


def test_scores_that_are_no_probabilities_say_which_are() -> None:
    with pytest.raises(BadSetting, match=r"^scores by 'ip' rank .* those by 'auto' are, of single labels"):
        Scores(torch.zeros(3, 1), [0, 1, 2], "ip").probability_wrong()


@pytest.mark.parametrize("given", [[per_query(torch.zeros(3, 1))] * 2, [], torch.zeros(3, 1), "runs/mine"])
def test_what_is_no_scores_is_not_combined(given: Any) -> None:
    with pytest.raises(BadSetting, match=rf"{type(given).__name__} is no scores.*combined\(\*several\)"):
        combined(given)


def test_scores_without_queries_to_compare_with_are_refused() -> None:
    with pytest.raises(MissingRows, match=r"'ip' compares with queries, and the query split holds no examples"):
        per_query(torch.zeros(3, 0))
    assert len(per_query(torch.zeros(0, 0))) == 0


def test_settings_are_written_as_the_plain_values_that_they_hold(tmp_path: Path) -> None:
    held: dict[str, Any] = {
        "damping": np.float32(0.5),
        "k": np.int64(3),
        "scale": torch.tensor(0.25),
        "points": (np.int64(1), 2),
        "queries": Dataset.from_dict({"task": ["x", "y"]})["task"],
        "array": np.array([[1, 2]]),
    }
    scores = Scores(torch.zeros(1, 1), [np.int64(7)], "mine", held)  # type: ignore[list-item]
    scores.save(tmp_path / "s.st")
    again = Scores.load(tmp_path / "s.st")
    assert again.ids == [7]
    assert again.settings == {
        "damping": 0.5,
        "k": 3,
        "scale": 0.25,
        "points": [1, 2],
        "queries": ["x", "y"],
        "array": [[1, 2]],
    }
    assert json.loads(json.dumps(again.settings)) == again.settings


def test_in_short_they_say_what_comes_next(tmp_path: Path) -> None:
    values = torch.tensor([[3.0], [-1], [2]])
    assert repr(Scores(values, [7, 8, 9], "ip")) == "Scores(3 examples by 'ip'; lowest 8, 9, 7)"
    wrong = Scores(values, ["a", "b", "c"], "auto", report={"log_odds": {"auc": 0.9}})
    assert str(wrong) == "Scores(3 examples by 'auto', 30% probably wrong; lowest 'b', 'c', 'a')"
    each = Scores(torch.zeros(1, 2), [0], "cosine", query_ids=[0, 1])
    assert repr(each) == "Scores(1 examples × 2 queries by 'cosine'; lowest 0)"


def test_a_home_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Scores(torch.zeros(1, 1), [0], "mine").save("~/s")
    assert Scores.load("~/s").method == "mine"
    assert (tmp_path / "s").is_file()


@pytest.mark.parametrize("value", [object(), {1, 2}, {(1, 2): 3}], ids=["object", "set", "key"])
def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path, value: Any) -> None:
    scores = Scores(torch.zeros(1, 1), [0], "mine", {"given": value})
    with pytest.raises(BadSetting, match="cannot be written as JSON"):
        scores.save(tmp_path / "new" / "s.st")
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_nothing_half(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(StoreError, match=r"could not write .*Is a directory"):
        Scores(torch.zeros(1, 1), [0], "mine").save(tmp_path / "s")
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_a_disk_that_is_full_is_said_and_earlier_scores_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    path = tmp_path / "s"
    Scores(torch.ones(1, 1), [0], "mine").save(path)
    monkeypatch.setattr("hf_influence.saving.save_file", full)
    with pytest.raises(StoreError, match=r"could not write .*\(No space left on device\)\. Make room"):
        Scores(torch.zeros(1, 1), [0], "mine").save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert Scores.load(path).values.tolist() == [[1.0]]
