"""Draws: a sampler in which some indices come more often than others and some not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

from hf_influence.errors import BadSetting

STEPS = 2**20


class Draws(Sampler[int]):
    """The order of another sampler, with as many draws an epoch, in which index i comes about w_i times.

    With the weights scaled to mean 1 over the order i_1 … i_N of the other sampler, and one u from [0, 1) an epoch,

        draws of i_k = ⌊W_k + u⌋ − ⌊W_{k−1} + u⌋,   W_k = w_{i_1} + … + w_{i_k}

    so that an index of weight w comes ⌊w⌋ or ⌈w⌉ times, w times on average over u, and N indices come in all. One that
    comes c times does so once in each of c equal parts of the epoch, at its place in the order. Without weights, or
    with equal ones, the order is the other sampler's.

    Args:
        inner: A sampler with a length.
        seed: Of u.
    """

    def __init__(self, inner: Sampler[int], seed: int):
        self.inner = inner
        self.seed = seed
        self.epoch = 0
        self.weights: Tensor | None = None

    def weigh(self, weights: Sequence[float] | None, epoch: int) -> None:
        """From now on.

        Args:
            weights: One for each index, at least 0; `None` for the plain order.
            epoch: Draws u, together with the seed.
        """
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        order = list(self.inner)
        if self.weights is None:
            return iter(order)
        u = Random(f"{self.seed} {self.epoch}").randrange(STEPS) / STEPS
        return iter(drawn(order, self.weights[order], u))

    def __getattr__(self, name: str) -> Any:
        """The epoch is set, and the generator looked for, on the sampler behind."""
        if name in ("set_epoch", "generator", "data_source"):
            return getattr(self.inner, name)
        raise AttributeError(name)


def drawn(order: list[int], weights: Tensor, u: float) -> list[int]:
    """See `Draws`.

    Args:
        order: N indices.
        weights: Of each of them, `[N]`.
        u: In [0, 1).

    Raises:
        BadSetting: No index has a weight.
    """
    n, sums = len(order), weights.cumsum(0)  # [N]
    if n and not sums[-1] > 0:
        raise BadSetting(
            f"none of the {n} examples that this epoch would have drawn is kept, so there is nothing to train on. "
            "Drop fewer."
        )
    edges = sums * (n / sums[-1])
    edges[sums == sums[-1]] = n  # whatever was rounded
    counts = (edges + u).floor().diff(prepend=edges.new_zeros(1)).long()  # [N]
    at = torch.arange(n).repeat_interleave(counts)  # [N], which place of the order each draw is of
    turn = torch.arange(n) - (counts.cumsum(0) - counts)[at]  # [N], the how manieth of its draws
    when = (turn + at.double() / n) / counts[at]  # [N], from 0 to 1
    return [order[place] for place in at[when.argsort(stable=True)].tolist()]


def drawn_through(loader: Any, seed: int) -> Draws:
    """Put `Draws` into a data loader, between its sampler and its batches; until told otherwise nothing changes.

    It is the main process that draws, so workers, persistent ones too, need not know.

    Args:
        loader: What `Trainer.get_train_dataloader` made, by one process or in several.
        seed: Of the draws; the same in all processes, whose shares of the batches are cut afterwards.

    Raises:
        BadSetting: Its batches are not made from the indices of a sampler.
    """
    outer = loader.batch_sampler
    batches = getattr(outer, "batch_sampler", outer)  # accelerate deals the batches out to several processes
    if type(batches) is not BatchSampler:
        raise BadSetting(
            f"the batches of the training are made by a {type(batches).__name__}, which chooses whole batches and not "
            "examples one by one, so dropped examples cannot be left out of them. Choose another "
            'train_sampling_strategy ("random", "sequential", "group_by_length"), or curate between two runs '
            "(curate_and_retrain)."
        )
    draws = Draws(batches.sampler, seed)  # type: ignore[arg-type]
    batches.sampler = draws
    return draws
