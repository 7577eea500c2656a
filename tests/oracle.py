"""The methods once more, written for the eye and not for speed: dense float64 matrices, explicit inverses and loops.

Rows are dictionaries block -> `[n, d]`; scores are `[n, q]`, one column without queries.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Blocks = dict[str, Tensor]
Inverse = Callable[[Tensor, float], Tensor]


def identity(g: Tensor, damping: float) -> Tensor:
    return torch.eye(g.shape[1], dtype=torch.float64)


def fisher(g: Tensor, damping: float) -> Tensor:
    """(λI + GᵀG/n)⁻¹."""
    n, d = g.shape
    return torch.linalg.inv(strength(g, damping) * torch.eye(d, dtype=torch.float64) + g.T @ g / n)


def mean_of_inverses(g: Tensor, damping: float) -> Tensor:
    """1/n Σᵢ (λI + gᵢ gᵢᵀ)⁻¹."""
    lam, eye = strength(g, damping), torch.eye(g.shape[1], dtype=torch.float64)
    return torch.stack([torch.linalg.inv(lam * eye + torch.outer(row, row)) for row in g]).mean(0)


def strength(g: Tensor, damping: float) -> float:
    """λ: so much of the mean squared entry."""
    return damping * float(g.square().mean())


def influence(train: Blocks, query: Blocks, inverse: Inverse, damping: float = 0.1) -> Tensor:
    out = torch.zeros(len(next(iter(train.values()))), len(next(iter(query.values()))), dtype=torch.float64)
    for name, g in train.items():
        middle = inverse(g, damping)
        for i, row in enumerate(g):
            for q, v in enumerate(query[name]):
                out[i, q] += row @ middle @ v
    return out


def self_influence(train: Blocks, inverse: Inverse, damping: float = 0.1) -> Tensor:
    return -influence(train, train, inverse, damping).diagonal()[:, None]


def cosine(train: Blocks, query: Blocks) -> Tensor:
    g, v = torch.cat(list(train.values()), 1), torch.cat(list(query.values()), 1)
    return torch.stack([torch.stack([row @ other / (row.norm() * other.norm()) for other in v]) for row in g])


def norm(train: Blocks, order: int) -> Tensor:
    g = torch.cat(list(train.values()), 1)
    return -((g.abs() ** order).sum(1, keepdim=True) ** (1 / order))


def tracin(points: list[tuple[Blocks, Blocks, Tensor, list[int]]], n: int, weighted: bool) -> Tensor:
    """For each point: rows of all n examples, queries, learning rate of each example, and the examples it holds."""
    out = torch.zeros(n, len(next(iter(points[0][1].values()))), dtype=torch.float64)
    for train, query, rate, present in points:
        products = influence(train, query, identity)
        for i in present:
            out[i] += products[i] * (rate[i] if weighted else 1 / len(points))
    return out


def mean_over_points(seen: list[list[float]]) -> Tensor:
    """For each example its values where it was seen."""
    return torch.tensor([[sum(values) / len(values)] for values in seen], dtype=torch.float64)


def forgetting_events(seen: list[list[float]]) -> Tensor:
    """As in the paper, for each example whether it was right each time it was seen: 1 or 0."""
    most = max(map(len, seen))
    counts = [
        sum(before == 1 and now == 0 for before, now in pairwise(right)) if 1 in right else most for right in seen
    ]
    return -torch.tensor(counts, dtype=torch.float64)[:, None]


def forgotten_tokens(seen: list[list[list[int]]]) -> Tensor:
    """The same for each token of each example, `seen[example][time][token]`, averaged over the tokens."""
    most = max(map(len, seen))
    scores = []
    for times in seen:
        tokens = [[[float(right) for right in token]] for token in zip(*times, strict=True)]
        counts = [forgetting_events([*token, [0.0] * most])[0, 0] for token in tokens]
        scores.append(sum(counts) / len(counts))
    return torch.tensor(scores, dtype=torch.float64)[:, None]
