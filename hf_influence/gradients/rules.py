"""The gradient of one example for each kind of parameter, as a sum over its tokens of outer products.

A parameter `W [m, n]` that is used linearly has the per-example gradient

    ∂ℓ_b/∂W = Σ_t left[b, t] ⊗ right[b, t]        left: [b, t, m], right: [b, t, n]

so a layer only has to say what its two factors are, given its input `x` and the gradient `g` at its output. A bias has
`left = g` alone, an embedding has token ids in place of one-hot vectors on the right.

Entries instead of the whole: `left[..., i] * right[..., j]` summed over tokens gives the entries `(i, j)` alone, and
the
full gradient never exists.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def outer(left: Tensor, right: Tensor, keep: Entries | None = None) -> Tensor:
    """`[b, t, m], [b, t, n] -> [b, m n]`, or `[b, k]` where only some entries are kept."""
    if keep is not None:
        return (_pick(left, keep.i) * _pick(right, keep.j)).sum(1)
    if left.shape[2] <= right.shape[2]:
        return torch.bmm(left.transpose(1, 2), right).flatten(1)
    # a product with its long side last is several times faster
    return torch.bmm(right.transpose(1, 2), left).transpose(1, 2).flatten(1)


def total(left: Tensor, keep: Entries | None = None) -> Tensor:
    """The gradient of a bias, `[b, t, m] -> [b, m]`."""
    row = left.sum(1)
    return row if keep is None else row[:, keep.i]


def one_hot_outer(left: Tensor, ids: Tensor, size: int, keep: Entries | None = None) -> Tensor:
    """Rows chosen by token ids on the right, `[b, t, m], [b, t] -> [b, m size]`."""
    if keep is not None:
        return (_pick(left, keep.i) * (ids[..., None] == keep.j)).sum(1)
    row = left.new_zeros(len(ids), left.shape[2], size)
    return row.scatter_add_(2, ids[:, None, :].expand(-1, left.shape[2], -1), left.transpose(1, 2)).flatten(1)


def _pick(values: Tensor, columns: Tensor) -> Tensor:
    """`values[..., columns]`, `[b, t, d] -> [b, t, k]`, several times faster on the CPU."""
    return values.gather(2, columns.expand(*values.shape[:2], -1))
