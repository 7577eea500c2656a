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


def estimated_share(examples: float, n: int, queries: float, q: int, before: float | None = None) -> float:
    """The share of wrong labels, from the shares of negative scores of `n` examples and of `q` clean queries.

        π = (o − e) / (1 − 2e),   o of the examples, e of the queries

    For two classes and scores of which a wrong label turns the sign, o = (1 − π) e + π (1 − e). A model that was
    trained on the examples believes their labels more than those of the queries, so this is on the low side, the more
    so the longer it was trained, and 0 on clean data. 0 also where the scores tell nothing, e ≥ ½.

    Args:
        before: For examples that were seen during an epoch: the share of the queries at its beginning, where `queries`
            is that at its end. e is their mean then, and where the two differ by more than two standard errors the
            model was learning too fast to say. One standard error is taken off π, as of many epochs the one with the
            largest is believed.
    """
    e, off = queries, 0.0
    if before is not None:
        e = (queries + before) / 2
        error = e * (1 - e) / max(1, q)
        if (queries - before) ** 2 > 4 * error:
            return 0.0
        off = math.sqrt(error + examples * (1 - examples) / max(1, n))
    return 0.0 if e >= 0.5 else min(1.0, max(0.0, (examples - e - off) / (1 - 2 * e)))


def on_scale(ranking: Tensor, share: float) -> Tensor:
    """The ranking `[n]` with the distances of a standard normal sample; below zero are ⌊share · n⌋ of them."""
    n = len(ranking)
    if not n:
        return ranking
    place = (mean_ranks(ranking.round(decimals=12)) - 0.5) / n
    zero = torch.tensor(max(math.floor(share * n), 0.25) / n, dtype=place.dtype)
    return torch.special.ndtri(place) - torch.special.ndtri(zero)
