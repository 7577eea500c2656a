"""A store does not show how training went: killed and resumed, or by one process or two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import run

from hf_influence.store import GradientStore

SCRIPT = str(Path(__file__).parent / "runs.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def process(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_same_stores(one: Path, other: Path, points: list[int], tolerance: float) -> None:
    a, b = (GradientStore.open(folder / "rows") for folder in (one, other))
    assert a.points() == b.points() == [0, 1, 2, 3]
    for point in points:
        assert a.splits(point) == b.splits(point) == ["query", "train"]
        for split in a.splits(point):
            x, y = a.rows(split, point), b.rows(split, point)
            assert x.ids == y.ids
            for name in x.blocks:
                torch.testing.assert_close(y.block(name), x.block(name), rtol=tolerance, atol=tolerance)
            for name, values in x.stats.items():
                torch.testing.assert_close(y.stats[name], values, rtol=tolerance, atol=tolerance)


def test_a_run_that_is_killed_ten_times_leaves_the_store_of_an_undisturbed_one(tmp_path: Path) -> None:
    process(SCRIPT, str(tmp_path / "undisturbed"))
    assert "finished after 10 kills" in process(SCRIPT, str(tmp_path / "killed"), "--kill", "10")
    assert_same_stores(tmp_path / "undisturbed", tmp_path / "killed", [0, 1, 2, 3], tolerance=0)


@pytest.mark.parametrize("examples", [32, 31])
def test_two_processes_give_the_same_store_as_one(tmp_path: Path, examples: int) -> None:
    run(tmp_path / "one", examples=examples, batch_size=4, dropout=0.0)
    settings = ["--examples", str(examples), "--batch-size", "4", "--dropout", "0"]
    process(*TORCHRUN, SCRIPT, str(tmp_path / "two"), *settings)
    # of 31 examples the second process trains on one twice, so from its last step on training itself is another
    same = [0, 1, 2, 3] if examples == 32 else []
    assert_same_stores(tmp_path / "one", tmp_path / "two", same, tolerance=1e-5)
    one, two = (GradientStore.open(tmp_path / folder / "rows").rows("train", 1) for folder in ("one", "two"))
    assert one.ids == two.ids == list(range(examples))
    for name in one.blocks:
        torch.testing.assert_close(two.block(name), one.block(name), rtol=1e-5, atol=1e-6)
