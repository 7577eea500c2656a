"""The gradient of one example for each kind of parameter, as a sum over its tokens of outer products.

A parameter `W [m, n]` that is used linearly has the per-example gradient

    ∂ℓ_b/∂W = Σ_t left[b, t] ⊗ right[b, t]        left: [b, t, m], right: [b, t, n]

where one factor comes from the layer's input and the other from the gradient at its output. A `Rule` says which: what
to note of the input when the forward pass goes by and of the gradient when that comes back, and how the two form a row.

Entries instead of the whole: `left[..., i] * right[..., j]` summed over tokens gives the entries `(i, j)` alone. Only
those columns of the input and of the gradient are noted, and the full product never exists. A factor as slim as a LoRA
rank is left whole: multiplying all of it is faster than picking its columns. Likewise for projections of both sides:
each factor is projected on its own before they are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

SLIM = 32
"""Columns up to which a factor is not worth picking from."""


@dataclass(frozen=True)
class Entries:
    """Positions in a parameter `[m, n]`, as rows `i` and columns `j`, each `[k]`.

    Attributes:
        left: The columns to pick from the left factor, `None` to keep all of it.
        right: The same of the right one; at most one of them is kept whole.
        at: Where the entries lie in the flattened product of what was kept; `None` if both were picked.
    """

    i: Tensor
    j: Tensor
    left: Tensor | None
    right: Tensor | None
    at: Tensor | None

    @classmethod
    def of(cls, columns: list[int], shape: list[int]) -> Entries:
        """From positions in the flattened parameter."""
        flat = torch.tensor(columns)
        m, n = shape if len(shape) > 1 else (shape[0], 1)
        i, j, k = flat // n, flat % n, torch.arange(len(flat))
        if len(shape) == 1 or min(m, n) > SLIM:
            return cls(i, j, i, j, None)
        return cls(i, j, i, None, k * n + j) if n <= m else cls(i, j, None, j, i * len(flat) + k)

    def to(self, device: torch.device) -> Entries:
        parts = (self.i, self.j, self.left, self.right, self.at)
        return Entries(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]

    def on_the_left(self, values: Tensor) -> Tensor:
        """The columns that the entries need of a left factor, `[b, t, m] -> [b, t, m or k]`."""
        return values if self.left is None else _picked(values, self.left)

    def on_the_right(self, values: Tensor) -> Tensor:
        """The columns that the entries need of a right factor, `[b, t, n] -> [b, t, n or k]`."""
        return values if self.right is None else _picked(values, self.right)


@dataclass(frozen=True)
class Projections:
    """What the two factors of a parameter `[m, n]` are projected by, `[m, m']` and `[n, n']`; `None` to keep one."""

    left: Tensor | None
    right: Tensor | None

    def to(self, device: torch.device) -> Projections:
        return Projections(*(None if side is None else side.to(device) for side in (self.left, self.right)))

    def on_the_left(self, values: Tensor) -> Tensor:
        """`[b, t, m] -> [b, t, m']`."""
        return _projected(values, self.left)

    def on_the_right(self, values: Tensor) -> Tensor:
        """`[b, t, n] -> [b, t, n']`."""
        return _projected(values, self.right)


Keep: TypeAlias = Entries | Projections
"""What is kept of a parameter's gradient; `None` in its place for all of it."""


class Rule(NamedTuple):
    """How the rows of one parameter come about.

    of_input: `(x [b, t, i] or token ids [b, t], keep) -> [b, t, …]`, noted at the forward pass.
    of_gradient: `(g [b, t, o], keep) -> [b, t, …]`, noted at the backward pass.
    row: `(left, right, keep) -> [b, d]`, of the two.
    input_left: Which of them is the left factor.
    """

    of_input: Callable[[Tensor, Keep | None], Tensor]
    of_gradient: Callable[[Tensor, Keep | None], Tensor]
    row: Callable[[Tensor, Tensor, Keep | None], Tensor]
    input_left: bool = False


def outer(left: Tensor, right: Tensor, keep: Keep | None) -> Tensor:
    """`[b, t, m], [b, t, n] -> [b, m n]`; of chosen entries, `[b, t, m or k], [b, t, n or k] -> [b, k]`."""
    if isinstance(keep, Entries):
        if keep.at is None:
            return (left * right).sum(1)
        return torch.bmm(left.transpose(1, 2), right).flatten(1).index_select(1, keep.at)
    if left.shape[2] <= right.shape[2]:
        return torch.bmm(left.transpose(1, 2), right).flatten(1)
    # a product with its long side last is several times faster
    return torch.bmm(right.transpose(1, 2), left).transpose(1, 2).flatten(1)


def outer_of_many(factors: Sequence[tuple[Tensor, Tensor, Entries]]) -> list[Tensor]:
    """`outer` for the chosen entries of many parameters, in one product for all that have the same shape."""
    alike: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for number, (left, right, _) in enumerate(factors):
        alike.setdefault((left.shape, right.shape), []).append(number)
    rows: dict[int, Tensor] = {}
    for numbers in alike.values():
        lefts, rights, keeps = zip(*(factors[number] for number in numbers), strict=True)
        product = torch.matmul(torch.stack(lefts).transpose(2, 3), torch.stack(rights)).flatten(2)  # [p, b, m k]
        at = torch.stack([keep.at for keep in keeps])[:, None]  # [p, 1, k]
        rows |= dict(zip(numbers, product.gather(2, at.expand(-1, product.shape[1], -1)), strict=True))
    return [rows[number] for number in range(len(factors))]


def linear() -> Rule:
    """A weight `[o, i]`: `y = x Wᵀ`."""
    return Rule(_on_the_right, _on_the_left, outer)


def transposed() -> Rule:
    """A weight `[i, o]`: `y = x W`."""
    return Rule(_on_the_left, _on_the_right, outer, input_left=True)


def bias() -> Rule:
    """A bias `[o]`; the input does not matter."""
    return Rule(lambda x, keep: x.new_empty(*x.shape[:2], 0), _on_the_left, lambda g, nothing, keep: g.sum(1))


def one_hot(left: Callable[[Tensor], Tensor], size: int, padding: int | None = None) -> Rule:
    """A weight `[m, size]` whose columns are chosen by token ids; `left(g)` is `[b, t, m]`.

    The column of the token `padding` gets no gradient, wherever the token stands.
    """

    def of_input(ids: Tensor, keep: Keep | None) -> Tensor:
        counts = ids != (size if padding is None else padding)  # [b, t]
        if isinstance(keep, Entries):
            return (ids[..., None] == keep.j) & counts[..., None]
        if isinstance(keep, Projections) and keep.right is not None:
            return keep.right[ids] * counts[..., None]  # a token picks its row of the projection, [b, t, n']
        return ids.masked_fill(~counts, size)

    def of_gradient(g: Tensor, keep: Keep | None) -> Tensor:
        a = left(g)
        return _picked(a, keep.i) if isinstance(keep, Entries) else _on_the_left(a, keep)

    def row(a: Tensor, ids: Tensor, keep: Keep | None) -> Tensor:
        if isinstance(keep, Entries):
            return (a * ids).sum(1)  # [b, t, k] both; ids say which of the entries a token is
        if isinstance(keep, Projections) and keep.right is not None:
            return outer(a, ids.to(a), keep)
        a, ids = a.masked_fill((ids == size)[..., None], 0), ids.clamp(max=size - 1)
        rows = a.new_zeros(len(ids), a.shape[2], size)
        return rows.scatter_add_(2, ids[:, None, :].expand(-1, a.shape[2], -1), a.transpose(1, 2)).flatten(1)

    return Rule(of_input, of_gradient, row)


def looked_up(table: Callable[[], Tensor]) -> Rule:
    """A weight `[m, n]` behind a frozen look-up table `[size, n]`: its input is `table[ids]`."""
    after = linear()
    return after._replace(of_input=lambda ids, keep: after.of_input(table()[ids], keep))


def _on_the_left(values: Tensor, keep: Keep | None) -> Tensor:
    return values if keep is None else keep.on_the_left(values)


def _on_the_right(values: Tensor, keep: Keep | None) -> Tensor:
    return values if keep is None else keep.on_the_right(values)


def _projected(values: Tensor, by: Tensor | None) -> Tensor:
    """`[b, t, d] -> [b, t, k]`, at least in float32: half precision would round every row anew."""
    if by is None:
        return values
    exact = torch.promote_types(values.dtype, torch.float32)
    return values.to(exact) @ by.to(exact)


def _picked(values: Tensor, columns: Tensor) -> Tensor:
    """`[b, t, d] -> [b, t, k]`; twice as fast in two dimensions as in three."""
    return values.reshape(-1, values.shape[2]).index_select(1, columns).view(*values.shape[:2], -1)
