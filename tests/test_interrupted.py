"""Training that is cut short, goes on, or is begun again: no row is lost, doubled, or of another run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import psutil
import pytest
import torch
from models import padding, tiny
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from watched import EXAMPLES, QUERIES, Recording, Stumbling, assert_exact, train

from hf_influence import DatasetFilter, attribute
from hf_influence.callbacks import CurateEachEpoch, GradientCapture, WeightedTrainer
from hf_influence.errors import StoreError, StoreMismatch
from hf_influence.gradients import collect
from hf_influence.store import Claim, GradientStore


@pytest.mark.parametrize("where", ["forward", "step"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no")])
def test_no_hook_is_left_when_training_is_cut_short(tmp_path: Path, where: str, error: BaseException) -> None:
    model = tiny(torch.float32)
    hooks = models.state_of(model)["hooks"]
    capture = GradientCapture(tmp_path / "rows", during="epochs")
    kind = type("Fails", (Stumbling,), {"error": error, "where": where, "steps": 0})
    with pytest.raises(type(error)):
        train(model, tmp_path, capture, kind=kind)
    assert models.state_of(model)["hooks"] == hooks


def test_a_callback_can_be_used_again_after_an_error(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    kind = type("Fails", (Stumbling,), {"error": RuntimeError("no"), "steps": 0})
    with pytest.raises(RuntimeError, match="no"):
        train(tiny(torch.float32), tmp_path, capture, kind=kind)
    capture.overwrite = True
    train(tiny(torch.float32), tmp_path, capture, kind=Trainer)
    assert len(GradientStore.open(capture.path).rows("train", 2)) == len(EXAMPLES)


def test_training_that_stops_early_keeps_what_was_seen(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    train(tiny(torch.float32), tmp_path, capture, max_steps=6)
    store = GradientStore.open(capture.path)
    assert len(store.rows("train", 1)) == 10
    assert len(store.rows("train", 2)) == 6


class At(TrainerCallback):
    """Sets a flag of the control after some step."""

    def __init__(self, step: int, flag: str):
        self.step, self.flag = step, flag

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            setattr(control, self.flag, True)


def held(path: Path, point: int, split: str = "train") -> list[int]:
    """The examples of a point."""
    rows = GradientStore.open(path).rows(split, point)
    return [int(i) for i in rows.ids]


def test_an_epoch_that_a_callback_ends_early_is_a_point_of_its_own(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", QUERIES, during="epochs", at_end=False)
    curate = CurateEachEpoch(capture, DatasetFilter(drop=1), "loss")
    callbacks = [capture, curate, At(2, "should_epoch_stop")]
    run = train(tiny(torch.float32), tmp_path, *callbacks, num_train_epochs=3)
    store = GradientStore.open(capture.path)
    assert store.points() == [1, 2, 3]
    assert [len(store.rows("train", point)) for point in (1, 2, 3)] == [6, 9, 9]
    assert [store.rows("train", point).stats["epoch"].unique().tolist() for point in (1, 2, 3)] == [[1], [2], [3]]
    assert [store.rows("train", point).stats["step"].max().item() for point in (1, 2, 3)] == [2, 6, 10]
    assert sorted(curate.decisions) == [1, 2]
    assert run.state.global_step == 10


class OutOfMemory(Recording):
    """Large batches do not fit, which shows in the second step."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self._train_batch_size > 3 and len(self.micros) == 1:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def test_a_run_begun_anew_with_smaller_batches_leaves_its_own_rows_alone(tmp_path: Path) -> None:
    captures = [GradientCapture(tmp_path / name, QUERIES, during="epochs") for name in ("a", "b")]
    options: dict[str, Any] = {"auto_find_batch_size": True, "per_device_train_batch_size": 4}
    run = train(tiny(torch.float32), tmp_path, *captures, kind=OutOfMemory, **options)
    assert "training_step" not in vars(run)
    run.micros = run.micros[1:]
    for capture in captures:
        assert [len(held(capture.path, point)) for point in (0, 1, 2)] == [10, 10, 10]
        assert_exact(run, GradientStore.open(capture.path).rows("train", 2), EXAMPLES, 2)


def test_a_capture_that_was_taken_off_after_an_error_sees_nothing(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    kind = type("Fails", (Stumbling,), {"error": KeyboardInterrupt(), "steps": 0})
    runs: list[Any] = []
    remember = type("Remember", (TrainerCallback,), {"on_train_begin": lambda *_, **__: runs.append(None)})()
    made: dict[str, Any] = {}

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        made["run"] = self
        Trainer.__init__(self, *args, **kwargs)

    kind.__init__ = keep  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(tiny(torch.float32), tmp_path, capture, remember, kind=kind)
    run = made["run"]
    run.remove_callback(capture)
    kind.where = "nowhere"
    before = sorted(path.stat().st_mtime_ns for path in capture.path.rglob("*") if path.is_file())
    run.train()
    assert sorted(path.stat().st_mtime_ns for path in capture.path.rglob("*") if path.is_file()) == before
    assert len(runs) == 2


@pytest.mark.parametrize("during", ["epochs", None])
def test_a_run_that_ended_early_and_goes_on_replaces_its_rows_at_the_end(tmp_path: Path, during: Any) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    first = GradientCapture(tmp_path / "rows", QUERIES, during=during)
    train(tiny(torch.float32), tmp_path, first, At(4, "should_training_stop"), **options)
    losses = GradientStore.open(first.path).rows("train").stats["loss"]
    again = GradientCapture(tmp_path / "rows", QUERIES, during=during)
    train(tiny(torch.float32), tmp_path, again, resume=str(tmp_path / "checkpoint-4"), **options)
    rows = GradientStore.open(first.path).rows("train")
    assert len(rows) == 10
    assert rows.stats["loss"].mean() < losses.mean()


def test_a_checkpoint_that_a_later_callback_asks_for_has_all_rows_before_it(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", QUERIES, during="epochs", at_end=False)
    save, kind = At(2, "should_save"), type("Fails", (Stumbling,), {"error": RuntimeError("no"), "steps": 0})
    with pytest.raises(RuntimeError, match="no"):
        train(tiny(torch.float32), tmp_path, capture, save, kind=kind, save_strategy="steps", save_steps=100)
    again = GradientCapture(tmp_path / "rows", QUERIES, during="epochs", at_end=False)
    train(tiny(torch.float32), tmp_path, again, resume=str(tmp_path / "checkpoint-2"))
    assert held(capture.path, 1) == held(capture.path, 2) == list(range(10))


def test_a_file_of_rows_is_cut_where_training_goes_on(tmp_path: Path) -> None:
    """A checkpoint that is written without telling callbacks, as just-in-time checkpoints are, falls into a file."""
    taken: dict[str, Any] = {"during": "epochs", "at_end": False}
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 2}
    whole = train(
        tiny(torch.float32), tmp_path / "a", GradientCapture(tmp_path / "a/rows", QUERIES, **taken), **options
    )
    path = tmp_path / "b/rows"
    train(tiny(torch.float32), tmp_path / "b", GradientCapture(path, QUERIES, **taken), num_train_epochs=2)
    again = GradientCapture(path, QUERIES, **taken)  # its first epoch lies in one file, of steps 1 to 4
    state = tmp_path / "a/checkpoint-4"
    file = state / "trainer_state.json"
    file.write_text(
        file.read_text().replace('"global_step": 4', '"global_step": 2').replace('"epoch": 1.0', '"epoch": 0.5')
    )
    run = train(tiny(torch.float32), tmp_path / "b", again, resume=str(state), num_train_epochs=2)
    steps = GradientStore.open(path).rows("train", 1).stats["step"]
    assert sorted(steps.tolist()) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert run.state.global_step == whole.state.global_step


def test_points_that_training_does_not_reach_again_are_gone(tmp_path: Path) -> None:
    taken: dict[str, Any] = {"during": "epochs", "at_end": False}
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    path = tmp_path / "rows"
    train(tiny(torch.float32), tmp_path, GradientCapture(path, QUERIES, **taken), num_train_epochs=3, **options)
    again, resume = GradientCapture(path, QUERIES, **taken), str(tmp_path / "checkpoint-4")
    train(tiny(torch.float32), tmp_path, again, num_train_epochs=2, resume=resume, **options)
    assert GradientStore.open(path).points() == [1, 2]
    assert len(attribute(path, "tracin")) == 10


@pytest.mark.parametrize(
    ("step", "settings", "missing"),
    [
        (8, {"during": "epochs"}, r"epochs \[1, 2\]"),
        (10, {"during": "epochs", "every": 2}, r"epochs \[1, 3\]"),
        (2, {"during": "steps"}, r"steps \[1, 2\]"),
        (8, {"during": "epochs", "epochs": [3]}, None),
    ],
)
def test_what_a_capture_that_comes_late_has_missed_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int, settings: dict[str, Any], missing: str | None
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3}
    train(tiny(torch.float32), tmp_path, **options)
    late = GradientCapture(tmp_path / "rows", at_end=False, **settings)
    train(tiny(torch.float32), tmp_path, late, resume=str(tmp_path / f"checkpoint-{step}"), **options)
    said = [record.message for record in caplog.records if "has no rows of the" in record.message]
    assert len(said) == (missing is not None)
    if missing:
        assert re.search(rf"goes on at step {step}, and .*rows has no rows of the {missing} before", said[0])


def test_a_run_that_goes_on_with_its_capture_has_missed_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3}
    for resume in (None, str(tmp_path / "checkpoint-10"), str(tmp_path / "checkpoint-8")):
        capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
        train(tiny(torch.float32), tmp_path, capture, resume=resume, **options)
    assert not [record for record in caplog.records if "has no rows of the" in record.message]


def test_a_weight_of_0_leaves_an_example_out(tmp_path: Path) -> None:
    data = [{**row, "weight": float(i % 5 > 0)} for i, row in enumerate(EXAMPLES)]

    def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padding()([{name: row[name] for name in row if name != "weight"} for row in features])
        return {**batch, "weight": torch.tensor([row["weight"] for row in features])}

    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    kind = type("Weighing", (Recording, WeightedTrainer), {})
    run = train(tiny(torch.float32), tmp_path, capture, data=data, collate=collate, kind=kind)
    for micro in run.micros:
        micro.inputs.pop("weight", None)
    rows = GradientStore.open(capture.path).rows("train", 2)
    assert held(capture.path, 2) == [i for i in range(10) if i % 5]
    assert_exact(run, rows, EXAMPLES, 2, missing=2)


def test_a_run_that_was_captured_by_steps_does_not_go_on_by_epochs(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "epoch", "num_train_epochs": 3}
    kinds: list[dict[str, Any]] = [{"during": "steps", "every": 2}, {"during": "epochs"}]
    for before, after in (kinds, kinds[::-1]):
        path = tmp_path / before["during"]
        train(tiny(torch.float32), path, GradientCapture(path / "rows", at_end=False, **before), **options)
        held_before = {point: held(path / "rows", point) for point in GradientStore.open(path / "rows").points()}
        other = GradientCapture(path / "rows", at_end=False, **after)
        with pytest.raises(StoreMismatch, match=rf"another setting than during='{after['during']}'"):
            train(tiny(torch.float32), path, other, resume=str(path / "checkpoint-8"), **options)
        assert held_before == {point: held(path / "rows", point) for point in held_before}, "nothing is lost"


def test_a_run_that_goes_on_with_other_queries_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3}
    path = tmp_path / "rows"
    train(tiny(torch.float32), tmp_path, GradientCapture(path, QUERIES, during="epochs"), **options)
    for resume in ("checkpoint-6", "checkpoint-8"):
        again = GradientCapture(path, EXAMPLES[:3], during="epochs")
        with pytest.raises(StoreMismatch, match=r"other examples of 'query'|another dataset"):
            train(tiny(torch.float32), tmp_path, again, resume=str(tmp_path / resume), **options)


class InTheSeventh(Trainer):
    """Fails in the seventh step, of four an epoch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 6:
            raise RuntimeError("no")
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(
    ("before", "after", "points"),
    [
        ({"during": "epochs"}, {"during": "epochs", "every": 2}, [1, 3]),
        ({"during": "epochs"}, {"during": "epochs", "epochs": [1, 3]}, [1, 3]),
        ({"during": "epochs"}, {}, [1]),
        ({"during": "epochs"}, {"during": "epochs"}, [1, 2, 3]),
    ],
)
@pytest.mark.parametrize("compared", ["tracin", "loss_mean"])
def test_a_run_that_goes_on_with_fewer_points_leaves_none_half_filled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: Any, after: Any, points: list[int], compared: str
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
    first = GradientCapture(tmp_path / "rows", QUERIES, **before)
    with pytest.raises(RuntimeError, match="no"):
        train(tiny(torch.float32), tmp_path, first, kind=InTheSeventh, **options)
    again = GradientCapture(tmp_path / "rows", QUERIES, **after)
    train(tiny(torch.float32), tmp_path, again, resume=str(tmp_path / "checkpoint-5"), kind=Trainer, **options)
    store = GradientStore.open(again.path)
    assert store.points() == [0, *points]
    assert all(len(store.rows("train", point)) == 10 for point in store.points())
    assert (2 in points) != ("the points [2] of" in caplog.text)
    assert len(attribute(again.path, compared)) == 10


def test_rows_later_than_the_checkpoint_go_though_no_more_are_captured(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "epoch", "num_train_epochs": 3}
    train(tiny(torch.float32), tmp_path, GradientCapture(tmp_path / "rows", QUERIES, during="epochs"), **options)
    again = GradientCapture(tmp_path / "rows", QUERIES)
    train(tiny(torch.float32), tmp_path, again, resume=str(tmp_path / "checkpoint-4"), kind=Trainer, **options)
    assert GradientStore.open(again.path).points() == [0, 1]


@pytest.mark.parametrize("during", ["epochs", None])
def test_a_run_that_goes_on_leaves_rows_alone_that_were_collected_at_a_point(tmp_path: Path, during: Any) -> None:
    options: dict[str, Any] = {"save_strategy": "epoch", "num_train_epochs": 3}
    path = tmp_path / "rows"
    train(tiny(torch.float32), tmp_path, GradientCapture(path, during="epochs", epochs=[1]), **options)
    collect(tiny(torch.float32), EXAMPLES, path, data_collator=padding(), point=2)
    before = {name: block.clone() for name, block in all_blocks(path, 2).items()}
    again = GradientCapture(path, during=during, epochs=during and [1, 3])
    train(tiny(torch.float32), tmp_path, again, resume=str(tmp_path / "checkpoint-4"), kind=Trainer, **options)
    assert GradientStore.open(path).points() == ([0, 1, 2, 3] if during else [0, 1, 2])
    assert all(torch.equal(block, before[name]) for name, block in all_blocks(path, 2).items())


def all_blocks(path: Path, point: int) -> dict[str, Tensor]:
    rows = GradientStore.open(path).rows("train", point)
    return {name: rows.block(name) for name in rows.blocks}


@pytest.fixture
def other() -> Iterator[psutil.Process]:
    """Another process of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.communicate()


def claim_of(process: psutil.Process, path: Path, **changed: Any) -> None:
    """Leave what a run of that process would leave in the folder of a store."""
    Claim.take(path)
    file = path / "run.json"
    about = {**json.loads(file.read_text()), "pid": process.pid, "created": process.create_time(), "token": "its own"}
    file.write_text(json.dumps({**about, **changed}))


@pytest.mark.parametrize("settings", [{"during": "epochs"}, {"during": "epochs", "overwrite": True}, {}])
def test_a_folder_that_another_run_is_filling_is_refused_before_the_first_step(
    tmp_path: Path, other: psutil.Process, settings: dict[str, Any]
) -> None:
    claim_of(other, tmp_path / "rows")
    seen: list[None] = []
    kind = type("Counting", (Recording,), {"training_step": lambda *_, **__: seen.append(None)})
    with pytest.raises(StoreError, match=rf"filled by another training run \(process {other.pid} on .*mixed up"):
        train(tiny(torch.float32), tmp_path, GradientCapture(tmp_path / "rows", **settings), kind=kind)
    assert not seen
    assert json.loads((tmp_path / "rows/run.json").read_text())["token"] == "its own"


@pytest.mark.parametrize("state", ["killed", "elsewhere", "number taken again"])
def test_the_folder_of_a_run_that_is_dead_or_elsewhere_is_taken_over(
    tmp_path: Path, other: psutil.Process, state: str
) -> None:
    changes: dict[str, dict[str, Any]] = {"elsewhere": {"host": "another"}, "number taken again": {"created": 1.0}}
    claim_of(other, tmp_path / "rows", **changes.get(state, {}))
    if state == "killed":
        other.kill()
        other.wait()
    capture = GradientCapture(tmp_path / "rows", during="epochs")
    train(tiny(torch.float32), tmp_path, capture, kind=Trainer)
    assert [len(held(capture.path, point)) for point in (0, 1, 2)] == [10, 10, 10]
    assert not (capture.path / "run.json").exists()


def test_runs_that_begin_in_the_same_moment_do_not_share_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, claims = Path.replace, []

    def beside(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", plain)
        claims.append(Claim.take(tmp_path))  # while the other is about to
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", beside)
    last = Claim.take(tmp_path)
    last.check()
    with pytest.raises(StoreError, match="this very one"):
        claims[0].check()
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_run_that_had_the_number_of_this_process_is_another(tmp_path: Path) -> None:
    claim = Claim.take(tmp_path)
    assert Claim.of_another(tmp_path) is None
    claim_of(psutil.Process(), tmp_path, created=1.0)
    found = Claim.of_another(tmp_path)
    assert found is not None
    assert found.created == 1.0
    with pytest.raises(StoreError, match=rf"process {claim.pid} on [^,]*\) has begun"):
        claim.check()


class Begins(TrainerCallback):
    """Another run begins in the same folder after some step."""

    def __init__(self, step: int, path: Path, process: psutil.Process):
        self.step, self.path, self.process = step, path, process

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            claim_of(self.process, self.path, host="another")


@pytest.mark.parametrize(
    ("during", "step", "points"), [("epochs", 4, []), ("epochs", 5, [1]), ("steps", 2, [1, 2]), (None, 2, [])]
)
def test_a_run_whose_folder_another_has_taken_over_writes_no_more(
    tmp_path: Path, other: psutil.Process, during: Any, step: int, points: list[int]
) -> None:
    path = tmp_path / "rows"
    capture = GradientCapture(path, QUERIES, during=during)
    begins = Begins(step, path, other)
    with pytest.raises(StoreError, match=rf"another training run \(process {other.pid} on another\) has begun to fill"):
        train(tiny(torch.float32), tmp_path, capture, begins, kind=Trainer)
    whole = [file.parent for file in path.glob("points/*/train/rows.json") if json.loads(file.read_text())["closed"]]
    assert [int(folder.parent.name) for folder in sorted(whole)] == points
    assert json.loads((path / "run.json").read_text())["token"] == "its own"


def test_a_run_whose_folder_is_deleted_stops(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    delete = type("Delete", (At,), {"on_step_end": lambda self, *_, **__: (path / "run.json").unlink()})(1, "")
    with pytest.raises(StoreError, match=r"run\.json, which says that this training run fills .*, is gone"):
        train(tiny(torch.float32), tmp_path, GradientCapture(path, during="steps"), delete, kind=Trainer)


def test_two_captures_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    captures = [GradientCapture(tmp_path / "rows", during="epochs") for _ in "ab"]
    with pytest.raises(StoreError, match=r"this very one.*each callback, a folder of its own"):
        train(tiny(torch.float32), tmp_path, *captures, kind=Trainer)


def test_a_full_disk_is_said_whatever_file_it_keeps_from_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == "point.json":
            raise OSError("No space left on device")
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match=r"could not write .*point\.json \(No space left on device\). Make room"):
        train(tiny(torch.float32), tmp_path, GradientCapture(tmp_path / "rows", during="epochs"), kind=Trainer)
