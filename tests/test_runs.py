"""Finished runs are kept and found again, never mixed with others, and say where they come from."""

import json
from pathlib import Path

import numpy as np
import pytest

from hf_influence.errors import BadSetting, StoreError, StoreMismatch
from hf_influence.evaluation import Runs, provenance


def test_a_series_goes_on_where_it_stopped_and_keeps_every_run_at_once(tmp_path):
    done = []

    def series(stop_at=None):
        runs = Runs(tmp_path, {"rows": 10, "share": 0.2})
        for seed in range(4):
            if seed == stop_at:
                raise KeyboardInterrupt
            runs.do({"set": "sst2", "seed": seed}, lambda seed=seed: done.append(seed) or {"auc": seed / 10})
        return runs

    with pytest.raises(KeyboardInterrupt):
        series(stop_at=2)
    assert len(list(tmp_path.glob("*.json"))) == 2
    runs = series()
    assert done == [0, 1, 2, 3]
    assert [(run.key, run.result) for run in runs] == [
        ({"set": "sst2", "seed": seed}, {"auc": seed / 10}) for seed in range(4)
    ]
    assert all(run.seconds >= 0 and run.about["versions"]["torch"] for run in runs)
    assert (tmp_path / "set=sst2,seed=0.json").is_file()
    with pytest.raises(StoreMismatch, match=r"made with share=0\.2, and now it is None"):
        list(Runs(tmp_path, {"rows": 10}))
    with pytest.raises(StoreMismatch, match="made with without=None"):
        list(Runs(tmp_path, {"rows": 10, "share": 0.2, "without": None}))


def test_a_run_that_fails_leaves_nothing_behind(tmp_path):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Runs(tmp_path).do({"seed": 0}, fail)
    assert Runs(tmp_path).do({"seed": 0}, lambda: 1) == 1


def test_runs_of_other_settings_are_never_mixed(tmp_path):
    Runs(tmp_path, {"rows": 10}).do({"seed": 0}, lambda: 1)
    other = Runs(tmp_path, {"rows": 20})
    with pytest.raises(StoreMismatch, match=r"seed=0\.json was made with rows=10, and now it is 20"):
        other.do({"seed": 0}, lambda: 1)
    with pytest.raises(StoreMismatch):
        list(other)
    (tmp_path / "seed=1.json").write_text("{")
    with pytest.raises(StoreError, match=r"seed=1\.json is not a finished run .* Delete that file"):
        Runs(tmp_path, {"rows": 10}).do({"seed": 1}, lambda: 1)
    with pytest.raises(BadSetting, match="key of a run is empty"):
        other.do({}, lambda: 1)


def test_keys_that_are_no_file_names_are_told_apart(tmp_path):
    runs = Runs(tmp_path)
    assert [runs.do({"model": name}, lambda name=name: name) for name in ("a/b", "a:b", "a_b")] == ["a/b", "a:b", "a_b"]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("one", "other"), [({"seed": 1}, {"seed": "1"}), ({"set": "a", "seed": 1}, {"set": "a,seed=1"})]
)
def test_keys_of_the_same_name_are_never_mixed(tmp_path, one, other, in_memory):
    runs = Runs(None if in_memory else tmp_path)
    runs.do(one, lambda: 1)
    with pytest.raises(StoreMismatch, match="has the same name"):
        runs.do(other, lambda: 2)
    assert runs.do(one, lambda: 3) == 1


def test_keys_may_hold_numbers_of_numpy_and_nothing_that_cannot_be_kept(tmp_path):
    assert Runs(tmp_path).do({"seed": np.int64(1), "sizes": (2, 3)}, lambda: 1) == 1
    assert Runs(tmp_path).do({"seed": 1, "sizes": [2, 3]}, lambda: 2) == 1
    with pytest.raises(BadSetting, match="cannot be written as JSON"):
        Runs(tmp_path).do({"model": object()}, lambda: pytest.fail("worked before the key was looked at"))


def test_results_in_memory_are_remembered_too():
    runs = Runs()
    assert [runs.do({"seed": 0}, lambda value=value: value) for value in (1, 2)] == [1, 1]
    assert [run.result for run in runs] == [1]


def test_where_figures_come_from_names_no_host_and_no_folder(monkeypatch, tmp_path):
    command = ["tests/bench.py", "--data", "/secret/place/data", "--out=/secret/place/out", "--results", "runs/a b"]
    about = provenance(command)
    assert about["command"] == "python tests/bench.py --data data --out=out --results 'runs/a b'"
    monkeypatch.chdir(tmp_path)
    assert provenance([str(tmp_path / "bench.py")])["command"] == "python bench.py"
    import platform

    assert about["machine"]["cpus"] >= 1
    assert {"torch", "transformers", "hf-influence"} <= set(about["versions"])
    text = json.dumps(about)
    assert "secret" not in text
    assert platform.node() not in text
    assert str(Path.home()) not in text
