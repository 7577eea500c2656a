"""The file of a decision: what was changed in it is refused, and a failure leaves nothing half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk

from hf_influence.errors import BadSetting, StoreError
from hf_influence.filter import DatasetFilter, Decision, Prune, Relabel, Reweight, Separate, add_to_card, save_curated
from hf_influence.filter.on_disk import checksum
from hf_influence.scores import Scores

N = 6


def rows() -> Dataset:
    return Dataset.from_dict({"text": list("abcdef"), "label": [0, 1] * 3})


def decided(path: Path, **settings: Any) -> tuple[Dataset, Decision]:
    trim = DatasetFilter(drop=1)
    curated = trim.apply(rows(), Scores(torch.arange(N * 1.0)[:, None], list(range(N)), "ip", settings))
    assert trim.report is not None
    trim.report.save(path / "d.json")
    return curated, trim.report


def changed(path: Path, **change: Any) -> Path:
    """The file with something changed."""
    saved = json.loads((path / "d.json").read_text()) | change
    (path / "changed.json").write_text(json.dumps(saved))
    return path / "changed.json"


CHANGES: dict[str, Any] = {
    "rule": "drop=0",
    "ids": ["x"] * N,
    "actions": ["drop"] * N,
    "scores": [1.0] * N,
    "ranks": list(range(N))[::-1],
    "counts": {"keep": N},
    "reasons": ["another"],
    "groups": [["x", 1, 2]],
    "sources": [{"method": "other", "settings": {}}],
    "versions": {},
    "writes": [{"name": "text", "new": [1] * N, "feature": None, "old": None, "old_feature": None}],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_was_changed_is_refused(tmp_path: Path, name: str) -> None:
    decided(tmp_path)
    with pytest.raises(StoreError, match=r"changed\.json does not hold a decision as it was saved.*it was changed"):
        Decision.load(changed(tmp_path, **{name: CHANGES[name]}))


def test_a_file_of_before_there_were_estimates_is_read(tmp_path: Path) -> None:
    _, report = decided(tmp_path)
    saved = json.loads((tmp_path / "d.json").read_text())
    del saved["sha256"], saved["estimates"]
    (tmp_path / "old.json").write_text(json.dumps({"sha256": checksum(saved), **saved}))
    assert Decision.load(tmp_path / "old.json") == report


def test_a_file_without_a_checksum_is_refused(tmp_path: Path) -> None:
    decided(tmp_path)
    with pytest.raises(StoreError, match="no checksum"):
        Decision.load(changed(tmp_path, sha256=None))


def test_a_file_that_is_laid_out_anew_is_the_same(tmp_path: Path) -> None:
    _, report = decided(tmp_path, parts={2: 1, 10: 2}, rate=np.float32(0.1), bound=float("inf"))
    saved = json.loads((tmp_path / "d.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(saved, sort_keys=True))
    for file in ("d.json", "other.json"):
        assert Decision.load(tmp_path / file).actions == report.actions


def test_settings_are_saved_as_the_plain_values_that_they_hold(tmp_path: Path) -> None:
    tasks = Dataset.from_dict({"task": ["x", "y"]})["task"]
    curated, report = decided(tmp_path, queries=tasks, k=np.int64(2), scale=torch.tensor(0.5), points=(1, 2))
    plain = {"queries": ["x", "y"], "k": 2, "scale": 0.5, "points": [1, 2]}
    assert Decision.load(tmp_path / "d.json").settings == plain
    save_curated(curated, report, tmp_path / "out")
    assert Decision.load(tmp_path / "out" / "decision.json").settings == plain


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    trim = DatasetFilter(drop=1)
    curated = trim.apply(rows(), Scores(torch.zeros(N, 1), list(range(N)), "ip", {"given": object()}))
    assert trim.report is not None
    with pytest.raises(BadSetting, match="cannot be written as JSON"):
        trim.report.save(tmp_path / "new" / "d.json")
    with pytest.raises(BadSetting, match="cannot be written as JSON"):
        save_curated(curated, trim.report, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, report = decided(tmp_path)
    before = (tmp_path / "d.json").read_bytes()

    def full(handle: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for save in (report.save, lambda path: add_to_card(path.parent, report)):
        with pytest.raises(StoreError, match=r"could not write .*\(No space left on device\)\. Make room"):
            save(tmp_path / "d.json")
    assert [file.name for file in tmp_path.iterdir()] == ["d.json"]
    assert (tmp_path / "d.json").read_bytes() == before


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    scores = Scores(torch.arange(N * 1.0)[:, None], list(range(N)), "ip")
    scores.save(tmp_path / "home" / "s.st")
    trim = DatasetFilter(drop=1)
    curated = trim.apply(rows(), "~/s.st")
    assert trim.report is not None
    trim.report.save("~/d.json")
    save_curated(curated, trim.report, "~/out")
    add_to_card("~/other", trim.report)
    assert Decision.load("~/d.json") == Decision.load("~/out") == trim.report
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["d.json", "other", "out", "s.st"]
    assert load_from_disk(str(tmp_path / "home" / "out")).num_rows == N - 1
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


RULES: dict[str, tuple[Any, str]] = {
    "filter": (DatasetFilter(drop=1), "it has 6 rows, and 5 were to be kept"),
    "columns": (DatasetFilter(drop=0, columns=True), "it lacks the column 'influence'"),
    "prune": (Prune(drop=2), "it has 6 rows, and 4 were to be kept"),
    "relabel": (
        Relabel(suspects=DatasetFilter(drop=2), how="flip"),
        "its column 'label' holds what was to be replaced",
    ),
    "reweight": (Reweight(), "it lacks the column 'weight'"),
    "groups": (Separate(how="otsu"), "it lacks the column 'influence_group'"),
    "named groups": (Separate(how="otsu", column="part"), "it lacks the column 'part'"),
}


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_a_decision_is_kept_with_what_it_made_and_with_nothing_else(tmp_path: Path, name: str, splits: bool) -> None:
    rule, message = RULES[name]
    curated = rule.apply(rows(), Scores(torch.arange(N * 1.0)[:, None], list(range(N)), "self_ip"))
    if splits:
        curated = DatasetDict(curated if name == "groups" else {"part": curated}, test=rows().select([0]))
        message = "its splits have" if name == "groups" else f"of 'part', {message}.*; of 'test', it has 1 rows"
    original = DatasetDict(part=rows(), test=rows().select([0])) if splits else rows()
    with pytest.raises(BadSetting, match=rf"did not make this dataset: {message}.*Pass what `apply` gave"):
        save_curated(original, rule.report, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    save_curated(curated, rule.report, tmp_path / "out")
    assert load_from_disk(str(tmp_path / "out")).num_rows == curated.num_rows


def test_what_is_made_of_a_curated_dataset_on_purpose_is_kept_as_well(tmp_path: Path) -> None:
    trim, flip = DatasetFilter(drop=1), Relabel(suspects=DatasetFilter(drop=2), how="flip")
    for rule in (trim, flip):
        curated = rule.apply(rows(), Scores(torch.arange(N * 1.0)[:, None], list(range(N)), "ip"))
        assert rule.report is not None
        tokenised = curated.map(lambda row: {"input_ids": [len(row["text"])]}, remove_columns="text")
        save_curated(tokenised.class_encode_column("label"), rule.report, tmp_path / "out")


@pytest.mark.parametrize("splits", [False, True])
def test_a_save_that_fails_leaves_nothing_that_passes_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: bool
) -> None:
    curated, report = decided(tmp_path)
    given = DatasetDict(train=curated, test=rows()) if splits else curated
    save_curated(given, report, tmp_path / "out")

    def full(dataset: Dataset, path: str, **_: Any) -> None:
        (Path(path) / "data-00000-of-00001.arrow").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Dataset, "save_to_disk", full)
    with pytest.raises(OSError, match="No space"):
        save_curated(given, report, tmp_path / "out")
    with pytest.raises(StoreError, match=r"out does not hold a decision"):
        Decision.load(tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        load_from_disk(str(tmp_path / "out"))
    monkeypatch.undo()
    save_curated(given, report, tmp_path / "out")
    assert load_from_disk(str(tmp_path / "out")).num_rows == given.num_rows
    assert Decision.load(tmp_path / "out") == report


@pytest.mark.parametrize("splits", [False, True])
def test_a_dataset_is_not_saved_over_itself(tmp_path: Path, splits: bool) -> None:
    (DatasetDict(train=rows(), test=rows()) if splits else rows()).save_to_disk(tmp_path / "disk")
    data, trim = load_from_disk(str(tmp_path / "disk")), DatasetFilter(drop=1)
    curated = trim.apply(data, Scores(torch.arange(N * 1.0)[:, None], list(range(N)), "ip"))
    with pytest.raises(BadSetting, match="its own rows would be lost"):
        save_curated(curated, trim.report, tmp_path / "disk")
    assert load_from_disk(str(tmp_path / "disk")).num_rows == data.num_rows


def test_a_file_is_no_folder_for_a_curated_dataset(tmp_path: Path) -> None:
    curated, report = decided(tmp_path)
    before = (tmp_path / "d.json").read_bytes()
    for folder in (tmp_path / "d.json", tmp_path / "d.json" / "x"):
        with pytest.raises(BadSetting, match=r"d\.json is a file, .* go into a folder\. Name a folder"):
            save_curated(curated, report, folder)
    assert (tmp_path / "d.json").read_bytes() == before
