"""One pass over a dataset: batches of like lengths, a progress bar, and half the batch when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm.auto import tqdm

from hf_influence.errors import BadExample, BadSetting

logger = logging.getLogger(__name__)

BatchSize = int | Literal["auto"]
Result = TypeVar("Result")

AUTO_EXAMPLES = 64
AUTO_TOKENS = 1024
AUTO_TOKENS_ACCELERATOR = 16384


class Batches(Protocol):
    """Examples by their positions: `Examples`, or what changes them."""

    def __len__(self) -> int: ...

    def batch(self, positions: Sequence[int]) -> dict[str, Any]: ...


def sweep(
    run: Callable[[dict[str, Any]], Result],
    examples: Batches,
    todo: Sequence[int],
    lengths: Sequence[int],
    batch_size: BatchSize,
    device: torch.device,
    title: str | None,
) -> Iterator[tuple[list[int], Result]]:
    """Run a function on every batch.

    A batch that does not fit into memory comes in halves, as do all after it.

    Args:
        run: Takes a collated batch.
        examples: The dataset.
        todo: Positions of the examples to run on.
        lengths: Tokens of every example.
        batch_size: Examples a batch, or "auto" for as many as suit the device, padding included.
        device: Where the model is.
        title: Of the progress bar; `None` for no bar.

    Yields:
        Positions of the examples in a batch, and what the function gave.

    Raises:
        BadExample: One example alone does not fit into memory.
    """
    tokens = AUTO_TOKENS if device.type == "cpu" else AUTO_TOKENS_ACCELERATOR
    waiting = list(by_length(todo, lengths, None if batch_size == "auto" else batch_size, tokens))[::-1]
    most: int | None = None
    with tqdm(
        total=len(examples), initial=len(examples) - len(todo), desc=title, unit="row", disable=title is None
    ) as bar:
        while waiting:
            positions = waiting.pop()
            if most is not None and len(positions) > most:
                waiting += [positions[start : start + most] for start in range(0, len(positions), most)][::-1]
                continue
            try:
                result = run(examples.batch(positions))
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if len(positions) == 1:
                    raise BadExample(
                        f"example {positions[0]} alone does not fit into memory ({error}). Truncate it, or use a "
                        "smaller dtype."
                    ) from error
                most = len(positions) // 2
                logger.warning("out of memory with %d examples, going on with %d at a time", len(positions), most)
                waiting.append(positions)
            else:
                yield positions, result
                bar.update(len(positions))
                continue
            clear_device_cache(garbage_collection=True)  # out here the failed batch is no longer referred to


def by_length(todo: Sequence[int], lengths: Sequence[int], batch_size: int | None, tokens: int) -> Iterator[list[int]]:
    """Positions in batches of like lengths, the longest first (so that memory runs out at once or never).

    Args:
        todo: The positions.
        lengths: Tokens of every example.
        batch_size: Examples a batch; `None` for as many as `tokens` hold, padding included.
        tokens: See there.
    """
    order = sorted(todo, key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = batch_size or max(1, min(AUTO_EXAMPLES, tokens // max(1, lengths[order[start]])))
        yield order[start : start + size]
        start += size


def check_batch_size(batch_size: BatchSize) -> None:
    """Refuse what is neither a positive number nor "auto"."""
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise BadSetting(f"batch_size={batch_size!r}: pass a number of examples, at least 1, or 'auto'.")
