"""Several processes that train one model, each with its own part of the data (torch.distributed)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


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


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
