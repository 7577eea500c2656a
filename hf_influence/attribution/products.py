"""Inner products of rows with rows, and the one loop of all methods that compare examples with queries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_influence.attribution.norms import row_norms
from hf_influence.store import Rows

Prepare = Callable[[str, Tensor], Tensor]
"""Takes a block and its query rows `[m, d]`, gives what the examples are multiplied with, `[q, d]`."""


def inner_products(train: Rows, query: Rows, width: int, prepare: Prepare) -> Tensor:
    """`Σ_blocks ⟨g_i, w_q⟩`, `[n, q]` in dataset order, with `w = prepare(block, v)` of the query rows `v`.

    Args:
        train: The rows that are streamed.
        query: The rows that are held in memory, a block at a time.
        width: The q rows that `prepare` gives.
        prepare: See there.
    """
    out = torch.zeros(len(train), width, dtype=train.dtype)  # in the order of the disk
    for block in train.blocks:
        w = prepare(block, query.block(block))  # [q, d]
        start, places = 0, []
        for at, g in train.chunks(block):
            out[start : start + len(at)].addmm_(g, w.T)  # [b, q]
            start += len(at)
            places.append(at)
    return out[torch.cat(places).argsort()] if len(train) else out


def inverse_norms(rows: Rows) -> Tensor:
    """`1 / ‖g_i‖` over all blocks together, `[n]` in the precision of the rows; 0 for a zero gradient."""
    norms = row_norms(rows)
    return torch.where(norms == 0, 0, norms.reciprocal()).to(rows.dtype)


def cosines(one: Rows, other: Rows) -> Tensor:
    """The cosine of each row of one with each of the other, `[n, m]`; 0 for a zero gradient."""
    scale = inverse_norms(other)[:, None]
    return inner_products(one, other, len(other), lambda _, v: v * scale) * inverse_norms(one)[:, None]
