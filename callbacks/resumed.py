"""What an earlier run left in a store, where a training run goes on from one of its checkpoints."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Container
from pathlib import Path

from transformers import TrainerState

from hf_influence.store import GradientStore, RowWriter
from hf_influence.store.files import open_shard
from hf_influence.store.points import point_folder
from hf_influence.store.rows import Manifest

logger = logging.getLogger(__name__)


def captured(store: GradientStore) -> list[int]:
    """The points that have rows of training steps, or are begun and have none yet; not those that `collect` filled."""
    points = [point for point in store.points("weights") if point and "train" in store.splits(point)]
    return [point for point in points if _of_steps(point_folder(store.path, point) / "train")]


def drop_outdated(path: Path, state: TrainerState, by_steps: bool) -> None:
    """What a run that now goes on left at its end, and beyond where this one begins, if it has no rows of steps.

    Args:
        path: Of the store, which need not be there.
        state: Where training goes on.
        by_steps: This run takes rows of training steps, and will look after those that are there.
    """
    if not (path / "store.json").is_file():
        return
    store = GradientStore.open(path)
    if state.global_step < state.max_steps and 0 in store.points():
        store.drop(0)
    if not by_steps:
        for point in captured(store):
            forget_after(store, point, state.global_step)
        drop_open(store, state.global_step)


def drop_earlier(path: Path) -> None:
    """The points of another run, whose weights those at the end do not belong to; a run of `during` begins so."""
    if (path / "store.json").is_file():
        GradientStore.open(path).clear()


def forget_after(store: GradientStore, point: int, step: int) -> None:
    """Leave of a point what was captured up to a step; nothing, if that is nothing."""
    parts = _writers(store, point)
    cut = [part.forget_after(step) for part in parts]
    if not any(part.done for part in parts):
        store.drop(point)
    elif any(cut):
        drop_queries(store, point)


def drop_queries(store: GradientStore, point: int) -> None:
    """What was taken at weights that training has left again."""
    for split in store.splits(point):
        if split != "train":
            store.drop(point, split)


def drop_open(store: GradientStore, step: int, but: Container[int] = ()) -> None:
    """Drop the points that lack rows which this run will not add to them, as no score could be had beside them.

    Args:
        store: The store.
        step: Where training goes on, for the message.
        but: Points that go on or are to be completed.
    """
    unfinished = [point for point in captured(store) if point not in but and not _whole(store, point)]
    for point in unfinished:
        store.drop(point)
    if unfinished:
        logger.warning(
            "training goes on at step %d and captures less than the run before it: the points %s of %s are left half "
            "filled, and are dropped. To fill them, resume with the settings of that run",
            step,
            reprlib.repr(unfinished),
            store.path,
        )


def _whole(store: GradientStore, point: int) -> bool:
    writer, *parts = _writers(store, point)
    return writer.manifest.complete and not any(part.done for part in parts)


def _of_steps(folder: Path) -> bool:
    """Whether the rows of a split carry the step that they are of, as far as there are any."""
    for part in (folder, *sorted(folder.glob("rank-*"))):
        for shard in Manifest.read(part).shards[:1]:
            names = open_shard(part / shard["file"]).keys()
            if "stats.step" not in names:
                return False
    return True


def _writers(store: GradientStore, point: int) -> list[RowWriter]:
    """Of the rows of a point, and of those that other processes have not handed in."""
    writer = RowWriter.again(point_folder(store.path, point) / "train", store.header)
    return [writer, *writer.parts()]
