"""What clean queries say of the scores of a classifier's training examples: how good they are, how many are wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_influence.scores import mean_ranks

LEAST = 0.01
"""Of AUC − ½, for scores of which queries say nothing good."""


def mirrored_auc(values: Tensor) -> float:
    """How often one of the values is above the negative of one, `[q]`; ties count half.

    The AUC at which scores tell right labels from wrong ones, if a wrong label turns the sign of a score.
    """
    n = len(values)
    ranks = mean_ranks(torch.cat((values, -values)).double())
    return float(ranks[:n].sum() - n * (n + 1) / 2) / n**2


def trust_of(values: Tensor, errors: float = 0.0) -> float:
    """(AUC − ½)⁴ of the scores of queries `[q]`, less so many standard errors of an AUC that says nothing."""
    return max(LEAST, mirrored_auc(values) - 0.5 - errors / math.sqrt(12 * len(values))) ** 4


def estimated_share(train: Tensor, queries: Tensor) -> float:
    """The share of wrong labels among the training examples, from the signs of their scores and of those of queries.

        π = (o − e) / (1 − 2e),   o and e the shares of negative scores of examples `[n]` and of clean queries `[q]`

    For two classes and scores of which a wrong label turns the sign, o = (1 − π) e + π (1 − e). A model that was
    trained on the examples believes their labels more than those of the queries, so this is on the low side, and 0 on
    clean data. 0 also where the scores tell nothing, e ≥ ½.
    """
    if not len(train) or not len(queries):
        return 0.0
    seen, error = (float((values < 0).double().mean()) for values in (train, queries))
    return 0.0 if error >= 0.5 else min(1.0, max(0.0, (seen - error) / (1 - 2 * error)))


def on_scale(ranking: Tensor, share: float) -> Tensor:
    """The ranking `[n]` with the distances of a standard normal sample; below zero are ⌊share · n⌋ of them."""
    n = len(ranking)
    if not n:
        return ranking
    place = (mean_ranks(ranking.round(decimals=12)) - 0.5) / n
    zero = torch.tensor(max(math.floor(share * n), 0.25) / n, dtype=place.dtype)
    return torch.special.ndtri(place) - torch.special.ndtri(zero)
