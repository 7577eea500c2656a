"""How much damping: λ chosen by the queries, not guessed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_influence.curvature.curvature import DampedPath
from hf_influence.errors import MissingRows, NotConverged
from hf_influence.store import Rows

GRID = tuple(10.0**k for k in range(-4, 6))
"""Relative dampings to choose from; at the upper end `P` is, in each block, the identity up to scale but for a few
directions."""
QUERIES = 128
"""Queries that are asked at most, evenly spread over the split; the choice hardly moves beyond a few dozen."""


def choose_damping(curvature: DampedPath, train: Rows, query: Rows) -> tuple[float, list[float | None]]:
    """The damping at which the queries agree best with each other.

    Influence is a product in the metric of `P`, and so each query predicts another one by their cosine there,

        c_ab(λ) = ⟨v_a, P v_b⟩ / √(⟨v_a, P v_a⟩ ⟨v_b, P v_b⟩),   products summed over all blocks.

    Queries want the same kind of example, so their cosines should lie above 0 by much compared with their spread: the
    λ with the largest mean over standard deviation of c_ab, a ≠ b, is taken. Too little damping blows up directions
    that the training rows hardly show, which differ from query to query; too much lets the few directions in which all
    gradients vary swamp the rest. A query is never compared with itself, so nothing is fitted to it, and a cosine is
    not moved by a long gradient. Plain correlation between the scores of two halves of the queries does worse: it
    rewards any direction that all of them share. Agreement is no closeness to retraining: for that λ is given by the
    weight decay.

    Args:
        curvature: Whose `P` it is; its own damping does not matter.
        train: The training rows, which `P` is fitted to.
        query: The queries; those with a gradient of 0 have no say.

    Returns:
        The damping, one of `GRID`, and the agreement at each of `GRID`; `None` at those that are too small for an
        iterative solver to converge.

    Raises:
        MissingRows: Fewer than three queries with a gradient, or queries that agree at no damping.
        NotConverged: An iterative solver does not converge at the largest damping either.
    """
    asked = torch.linspace(0, len(query) - 1, min(QUERIES, len(query))).round().long()
    products = torch.zeros(len(GRID), len(asked), len(asked), dtype=torch.float64)  # [λ, m, m]
    least = 0  # of the grid, at which all blocks were solved
    for block in train.blocks:
        v = query.block(block)[asked]  # [m, d]
        at = curvature.prepare(train, block)
        for i in reversed(range(least, len(GRID))):
            try:
                products[i] += at(GRID[i])(v).double() @ v.double().T
            except NotConverged:
                if i == len(GRID) - 1:
                    raise
                least = i + 1
                break
    products = products[least:]
    if len(train) and not torch.isfinite(products).all():
        return 1.0, []  # rows that are not finite give scores that are not, and those are refused by name
    present = (products.diagonal(dim1=1, dim2=2) > 0).all(0)
    if present.sum() < 3:
        if not len(train) or not len(query):
            return 1.0, []  # nothing to score, or nothing to score it by
        raise MissingRows(
            f"damping='auto' compares queries with each other, and {query.folder} has {int(present.sum())} with a "
            "gradient that the training rows can be compared with; three are the least, some dozens are good. Collect "
            "more queries, or pass a number: damping=0.1 is usual."
        )
    curve = [_agreement(part[present][:, present]) for part in products]
    best = max(reversed(range(len(curve))), key=lambda i: curve[i])  # of equals the largest
    if curve[best] <= 0:
        raise MissingRows(
            f"damping='auto' looks for the damping at which the queries of {query.folder} agree with each other, and "
            f"there is none: the mean cosine between two of them is at best {curve[best]:.2f} times its spread. They "
            "have nothing in common to choose by. Pass a number: damping=0.1 is usual."
        )
    return GRID[least + best], [None] * least + curve


def _agreement(products: Tensor) -> float:
    """Mean over standard deviation of the cosines between different queries, from their products `[m, m]`."""
    length = products.diagonal().sqrt()
    pair = torch.triu_indices(len(products), len(products), 1)
    cosine = (products / length / length[:, None])[pair[0], pair[1]]
    return (cosine.mean() / cosine.std().clamp(min=math.sqrt(torch.finfo(torch.float32).eps))).item()
