"""Norms of whole rows, over all blocks together."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_influence.store import Rows


def row_norms(rows: Rows, order: int = 2) -> Tensor:
    """`‖g_i‖` of the given order, `[n]` in float64, in which the squares of all rows have room."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    for block in rows.blocks:
        for at, g in rows.chunks(block):
            total[at] += torch.linalg.vector_norm(g, order, dim=1, dtype=torch.float64).pow(order)  # [b]
    return total.pow(1 / order)
