"""The gradient of one example for each kind of parameter, as a sum over its tokens of outer products.

A parameter `W [m, n]` that is used linearly has the per-example gradient

    ∂ℓ_b/∂W = Σ_t left[b, t] ⊗ right[b, t]        left: [b, t, m], right: [b, t, n]

where one factor comes from the layer's input and the other from the gradient at its output. A `Rule` says which: what
to remember of the input when the forward pass goes by, and how to form the row when the gradient comes back.

Entries instead of the whole: `left[..., i] * right[..., j]` summed over tokens gives the entries `(i, j)` alone. Only
those columns of the input are remembered, and the full gradient never exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entries:
    """Positions in a parameter `[m, n]`, as rows `i` and columns `j`, each `[k]`."""

    i: Tensor
    j: Tensor

    @classmethod
    def of(cls, columns: list[int], shape: list[int]) -> Entries:
        """From positions in the flattened parameter."""
        flat = torch.tensor(columns)
        n = shape[-1] if len(shape) > 1 else 1
        return cls(flat // n, flat % n)

    def to(self, device: torch.device) -> Entries:
        return Entries(self.i.to(device), self.j.to(device))


class Rule(NamedTuple):
    """How the rows of one parameter come about.

    remember: `(x [b, t, i] or token ids [b, t], entries) -> [b, t, …]`, at the forward pass.
    row: `(what was remembered, g [b, t, o], entries) -> [b, d]`, at the backward pass.
    """

    remember: Callable[[Tensor, Entries | None], Tensor]
    row: Callable[[Tensor, Tensor, Entries | None], Tensor]


def linear() -> Rule:
    """A weight `[o, i]`: `y = x Wᵀ`."""
    return Rule(_on_the_right, lambda x, g, keep: _outer(_on_the_left(g, keep), x, keep))


def transposed() -> Rule:
    """A weight `[i, o]`: `y = x W`."""
    return Rule(_on_the_left, lambda x, g, keep: _outer(x, _on_the_right(g, keep), keep))


def bias() -> Rule:
    """A bias `[o]`; the input does not matter."""
    return Rule(lambda x, keep: x.new_empty(*x.shape[:2], 0), lambda _, g, keep: _on_the_left(g, keep).sum(1))


def one_hot(left: Callable[[Tensor], Tensor], size: int) -> Rule:
    """A weight `[m, size]` whose columns are chosen by token ids; `left(g)` is `[b, t, m]`."""

    def row(ids: Tensor, g: Tensor, keep: Entries | None) -> Tensor:
        a = left(g)
        if keep is not None:
            return _outer(_on_the_left(a, keep), ids.to(a), keep)  # ids: [b, t, k], which of the entries it is
        rows = a.new_zeros(len(ids), a.shape[2], size)
        return rows.scatter_add_(2, ids[:, None, :].expand(-1, a.shape[2], -1), a.transpose(1, 2)).flatten(1)

    return Rule(lambda ids, keep: ids if keep is None else ids[..., None] == keep.j, row)


def looked_up(table: Callable[[], Tensor]) -> Rule:
    """A weight `[m, n]` behind a frozen look-up table `[size, n]`: its input is `table[ids]`."""
    after = linear()
    return Rule(lambda ids, keep: after.remember(table()[ids], keep), after.row)


def _outer(left: Tensor, right: Tensor, keep: Entries | None) -> Tensor:
    """`[b, t, m], [b, t, n] -> [b, m n]`; of chosen entries `[b, t, k], [b, t, k] -> [b, k]`."""
    if keep is not None:
        return (left * right).sum(1)
    if left.shape[2] <= right.shape[2]:
        return torch.bmm(left.transpose(1, 2), right).flatten(1)
    # a product with its long side last is several times faster
    return torch.bmm(right.transpose(1, 2), left).transpose(1, 2).flatten(1)


def _on_the_left(values: Tensor, keep: Entries | None) -> Tensor:
    """The columns that the entries need of a left factor, `[b, t, m] -> [b, t, k]`."""
    return values if keep is None else values.index_select(2, keep.i)


def _on_the_right(values: Tensor, keep: Entries | None) -> Tensor:
    """The columns that the entries need of a right factor, `[b, t, n] -> [b, t, k]`."""
    return values if keep is None else values.index_select(2, keep.j)
