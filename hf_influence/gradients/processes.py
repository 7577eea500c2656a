"""Several processes that train one model, each with its own part of the data (torch.distributed)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from hf_influence.errors import InfluenceError, StoreError

Made = TypeVar("Made")
_OF_FIRST = "process 0 failed ({error}), and the others go by what it makes. Its own message says where."


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
    """What process 0 makes, in every process, once all have come here; its errors as well.

    So `make` may take away what the others have read before, and they see what it has left. An error that is none of
    this library comes to the others as a StoreError.
    """
    wait_for_all()
    box: list[Any] = [None]
    failed: Exception | None = None
    if rank() == 0:
        try:
            box = [make()]
        except Exception as error:
            failed = error
            box = [error if isinstance(error, InfluenceError) else StoreError(_OF_FIRST.format(error=repr(error)))]
    if _several():
        dist.broadcast_object_list(box)
    if failed is not None:
        raise failed
    if isinstance(box[0], InfluenceError):
        raise box[0]
    return box[0]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
