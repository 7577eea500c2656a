"""What clean queries say of the scores of a classifier's training examples: how good they are, which are wrong."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from hf_influence.scores import mean_ranks

LEAST = 0.01
"""Of AUC − ½, for scores of which queries say nothing good."""


def auc_of(right: Tensor, wrong: Tensor) -> float:
    """How often a score under a right label `[q]` is above one under a wrong label `[q]`; ties count half."""
    n, m = len(right), len(wrong)
    ranks = mean_ranks(torch.cat((right, wrong)).double())
    return float(ranks[:n].sum() - n * (n + 1) / 2) / (n * m)


def divide(right: Tensor, wrong: Tensor) -> float:
    """Where scores under right labels `[q]` and under wrong ones `[m]` part best, those below it being called wrong.

    Of all places that call the largest share of the wrong scores wrong, less that of the right ones, the middle one.
    """
    both = torch.cat((right, wrong)).double().unique()  # in order
    between = torch.cat((both[:1], (both[1:] + both[:-1]) / 2))
    below = [torch.searchsorted(one.double().sort().values, between) / len(one) for one in (wrong, right)]
    gain = below[0] - below[1]
    best = between[gain >= gain.max() - 1e-9]
    return float(best[len(best) // 2])


def chance(n: int) -> float:
    """Standard error of the AUC of `n` scores that say nothing, against many others."""
    return 1 / math.sqrt(12 * n)


def auc_at_worst(right: Tensor, wrong: Tensor, given: Tensor | None) -> float:
    """The AUC where all wrong labels are of one class, the one whose are told worst, if that is clearly below the AUC.

        min(AUC, min_c AUC_c + 1 / √(12 m_c)),   AUC_c that of the m_c wrong labels of class c

    A model that leans to one class believes its labels, the wrong ones as well. Where labels of all classes are wrong,
    that hardly matters; where it has come to lean because those of one class are, its loss tells little.

    Args:
        right: Scores under right labels, `[q]`.
        wrong: Under wrong ones, `[m]`.
        given: The wrong labels, `[m]`; `None` if not known.
    """
    overall = auc_of(right, wrong)
    if given is None:
        return overall
    of = [wrong[given == label] for label in given.unique()]
    return min([overall, *(auc_of(right, one) + chance(len(one)) for one in of)])


def trust_of(right: Tensor, wrong: Tensor, given: Tensor | None, errors: float, fresh: float = 1.0) -> float:
    """(f (AUC − ½))⁴ of the scores of queries, at worst, less so many standard errors of an AUC that says nothing."""
    return (fresh * max(LEAST, auc_at_worst(right, wrong, given) - 0.5 - errors * chance(len(right)))) ** 4


def negative(scores: Tensor) -> float:
    """The share that is below zero, 0 of none."""
    return float((scores < 0).double().mean()) if len(scores) else 0.0


def freshness(examples: Tensor, right: Tensor, wrong: Tensor, share: float = 0.0) -> float:
    """How little a model has memorised the labels of its examples, 1 where nothing shows.

        min(1, (o + δ) / (e + δ)),   e = (1 − π) e₊ + π e₋,   δ = 1 / (2 min(n, q))

    o is the share of negative scores of the examples, and e the one to be expected: e₊ and e₋ are those of clean
    queries under right and under wrong labels, π the share of wrong labels. If fewer are negative, the model believes
    their labels because it has seen them.

    Args:
        examples: Scores, `[n]`.
        right: Of the queries, `[q]`.
        wrong: Of the queries under wrong labels, `[m]`.
        share: π.
    """
    if not len(examples) or not len(right):
        return 1.0
    half = 0.5 / min(len(examples), len(right))
    expected = (1 - share) * negative(right) + share * negative(wrong)
    return min(1.0, (negative(examples) + half) / (expected + half))


def log_odds(ranking: Tensor, auc: float, share: float) -> Tensor:
    """The ranking `[n]` as ln((1 − p) / p), p the probability that a label is wrong.

        ln((1 − p) / p) = d x + ln((1 − π) / π),   d = √2 Φ⁻¹(AUC)
        (1 − π) Φ(x − d/2) + π Φ(x + d/2) = (rank − ½) / n

    as if the scores of right and of wrong labels lay on two bell curves of width 1 that are d apart: then they are told
    apart with that AUC, and a rank is at x. Without ties the mean of p is π.

    Args:
        ranking: Ties are in the middle of their ranks.
        auc: Above ½; with 1 nothing would be uncertain.
        share: With 0 no probability is above ½.
    """
    n = len(ranking)
    if not n:
        return ranking
    share = min(max(share, 0.25 / n), 1 - 0.25 / n)
    d = math.sqrt(2) * float(ndtri(auc))
    x = np.linspace(-d / 2 - 8, d / 2 + 8, 20_001)
    below = (1 - share) * ndtr(x - d / 2) + share * ndtr(x + d / 2)
    return torch.from_numpy(d * np.interp(_places(ranking).numpy(), below, x) + math.log((1 - share) / share))


def cautious(auc: float, q: int) -> float:
    """The AUC with one more query of which nothing is known, so that a few that are all told apart are not enough."""
    return (auc * q + 0.5) / (q + 1)


def normal_scores(ranking: Tensor) -> Tensor:
    """The ranking `[n]` with the distances of a standard normal sample, and all of it above zero."""
    n = len(ranking)
    if not n:
        return ranking
    return torch.special.ndtri(_places(ranking)) - float(ndtri(0.25 / n))


def _places(ranking: Tensor) -> Tensor:
    """(rank − ½) / n, `[n]` in float64; what differs by rounding alone shares a place."""
    return (mean_ranks(ranking.round(decimals=12)) - 0.5) / len(ranking)
