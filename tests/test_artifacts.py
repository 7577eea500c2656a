"""What lies beside the rows: it comes back as it was, belongs to the adapter of the rows, and is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stores import make_store

from hf_influence.errors import BadSetting, MissingRows, StoreError, StoreMismatch
from hf_influence.store import GradientStore
from hf_influence.store.artifacts import read_artifact, write_artifact

ROWS = {"layer": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}


def store_of(path: Path) -> GradientStore:
    return make_store(path, ROWS, point=2)


def test_what_is_written_comes_back_and_another_replaces_it(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    for value in (1.0, 2.0):
        tensors = {"a": torch.full((2, 3), value).T, "b": torch.tensor([value])}
        write_artifact(store, "hessian", tensors, {"seed": value}, adapter="", point=2)
        artifact = read_artifact(store.rows(point=2), "hessian", "the test")
        assert artifact.names == {"a", "b"}
        assert artifact.details == {"seed": value}
        assert all(torch.equal(artifact.tensor(name), tensors[name]) for name in tensors)
    assert store.splits(2) == ["train"]
    assert store.points() == [2]
    assert not list(tmp_path.rglob("*.part"))


def test_another_point_of_the_store_can_be_asked_and_need_not_hold_rows(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    write_artifact(store, "adam", {"a": torch.ones(1)}, {}, adapter="of training")
    rows = store.rows(point=2)
    assert read_artifact(rows, "adam", "the test", 0).folder.name == "0000"
    assert store.points() == [2]
    with pytest.raises(MissingRows, match=r"0002 does not hold the artifact 'adam' that the test needs.*point=2\)"):
        read_artifact(rows, "adam", "the test")


def test_an_artifact_at_other_weights_than_the_rows_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    with pytest.raises(StoreMismatch, match="hash , and other for 'hessian'"):
        write_artifact(store, "hessian", {}, {}, adapter="other", point=2)
    write_artifact(store, "hessian", {"a": torch.ones(1)}, {}, adapter="", point=2)
    file = tmp_path / "points" / "0002" / "hessian.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "adapter": "other"}))
    with pytest.raises(StoreMismatch, match="do not belong together"):
        read_artifact(store.rows(point=2), "hessian", "the test")


def test_a_file_cut_short_and_one_without_its_description_are_noticed(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    write_artifact(store, "hessian", {"a": torch.ones(100)}, {}, adapter="", point=2)
    file = tmp_path / "points" / "0002" / "hessian.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(StoreError, match="missing or cut short"):
        read_artifact(store.rows(point=2), "hessian", "the test")
    file.with_suffix(".json").unlink()
    with pytest.raises(MissingRows, match="collect_hessian"):
        read_artifact(store.rows(point=2), "hessian", "the test")


@pytest.mark.parametrize("name", ["", "point", "two words", "../up", "a1"])
def test_names_are_letters(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadSetting, match="letters only"):
        write_artifact(store_of(tmp_path), name, {}, {}, adapter="")
