"""Several processes that train one model, each with its own part of the data (torch.distributed)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from hf_influence.errors import InfluenceError

Made = TypeVar("Made")


def rank() -> int:
    """Number of this process; 0 where there is only one."""
    return dist.get_rank() if _several() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if _several() else 1


def wait_for_all() -> None:
    """Until every process has come here."""
    if _several():
        dist.barrier()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Process 0 runs the block, then all others do."""
    if rank() != 0:
        wait_for_all()
    try:
        yield
    finally:
        if rank() == 0:
            wait_for_all()


def by_first(make: Callable[[], Made]) -> Made:
    """What process 0 makes, in every process; errors of this library as well."""
    box: list[Any] = [None]
    if rank() == 0:
        try:
            box = [make()]
        except InfluenceError as error:
            box = [error]
    if _several():
        dist.broadcast_object_list(box)
    if isinstance(box[0], InfluenceError):
        raise box[0]
    return box[0]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
