"""Several examples in one row of a batch: where each begins and ends, and how to tell their tokens apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The examples that a batch is made of, in reading order, where they are not simply its rows.

    Attributes:
        owner: `[b, t]`, the number of the example that a token belongs to, -1 for padding.
        place: `[b, t]`, the position of a token in its example.
        source: `[n, l]`, the tokens of each example in the flattened batch; `b t` where there is none.
    """

    owner: Tensor
    place: Tensor
    source: Tensor

    @classmethod
    def of(cls, position_ids: Tensor, mask: Tensor | None = None) -> Packing | None:
        """Cut where the positions start again from 0.

        Args:
            position_ids: `[b, t]`.
            mask: 0 for padding, `[b, t]`.

        Returns:
            `None` if every row is one example.
        """
        real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask != 0
        starts = (position_ids == 0) & real
        starts[:, 0] |= real[:, 0]
        if bool((starts.sum(1) <= 1).all()):
            return None
        return cls._of((starts.flatten().cumsum(0) - 1).view_as(position_ids).masked_fill(~real, -1))

    @classmethod
    def one_a_row(cls, mask: Tensor) -> Packing:
        """One example a row behind or before its padding, `[b, t]`."""
        rows = torch.arange(len(mask), device=mask.device)[:, None]
        return cls._of(rows.expand_as(mask).masked_fill(mask == 0, -1))

    @classmethod
    def _of(cls, owner: Tensor) -> Packing:
        flat = owner.flatten()
        n = int(flat.max()) + 1
        at = (flat >= 0).nonzero()[:, 0]  # [k], real tokens
        lengths = torch.bincount(flat[at], minlength=n)  # [n]
        first = lengths.cumsum(0) - lengths
        place = torch.arange(len(at), device=at.device) - first[flat[at]]
        source = torch.full((n, int(lengths.max())), flat.numel(), device=at.device)
        source[flat[at], place] = at
        places = torch.zeros_like(flat)
        places[at] = place
        return cls(owner, places.view_as(owner), source)

    def unpack(self, values: Tensor) -> Tensor:
        """One example a row, zeros behind its end: `[b, t, …] -> [n, l, …]`."""
        flat = values.flatten(0, 1)
        return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[self.source]
