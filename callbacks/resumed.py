"""What an earlier run left in a store, where a training run goes on from one of its checkpoints."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Container

from hf_influence.store import GradientStore, RowWriter
from hf_influence.store.points import point_folder

logger = logging.getLogger(__name__)


def captured(store: GradientStore) -> list[int]:
    """The points that have rows of training steps."""
    return [point for point in store.points("weights") if point and "train" in store.splits(point)]


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


def _writers(store: GradientStore, point: int) -> list[RowWriter]:
    """Of the rows of a point, and of those that other processes have not handed in."""
    writer = RowWriter.again(point_folder(store.path, point) / "train", store.header)
    return [writer, *writer.parts()]
