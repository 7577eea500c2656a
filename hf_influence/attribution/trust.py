"""What clean queries say of the scores of a classifier's training examples: how good they are, which are wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from hf_influence.scores import mean_ranks

LEAST = 0.01
"""Of AUC − ½, for scores of which queries say nothing good."""

EXPECTED = 0.1
"""Share of wrong labels before anything is seen."""


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


class Sighting(NamedTuple):
    """A share of wrong labels as it shows at one point, and its standard error."""

    share: float
    error: float


def sighting(examples: float, n: int, queries: float, q: int, before: float | None = None) -> Sighting | None:
    """The share of wrong labels, from the shares of negative scores of `n` examples and of `q` clean queries.

        (o − e) / (1 − 2e),   o of the examples, e of the queries

    For two classes and scores of which a wrong label turns the sign, o = (1 − π) e + π (1 − e). A model that was
    trained on the examples believes their labels more than those of the queries, so this is on the low side, the more
    so the longer it was trained.

    Args:
        before: For examples that were seen during an epoch: the share of the queries at its beginning, where `queries`
            is that at its end. e is their mean then.

    Returns:
        `None` where the scores tell nothing, e ≥ ½, and where the queries have changed by more than two standard errors
        in an epoch: the model was learning too fast to say.
    """
    if not n or not q:
        return None
    e = queries if before is None else (queries + before) / 2
    seen, error = _variance(examples, n), _variance(e, q)
    if e >= 0.5 or (before is not None and (queries - before) ** 2 > 4 * error):
        return None
    return Sighting((examples - e) / (1 - 2 * e), math.sqrt(seen + error) / (1 - 2 * e))


def _variance(share: float, n: int) -> float:
    """Of a share among `n`, never 0."""
    share = (share * n + 0.5) / (n + 1)
    return share * (1 - share) / n


def estimated_share(sightings: Sequence[Sighting]) -> float | None:
    """The share of wrong labels, given what is seen of it and what is to be expected before; `None` without sightings.

        π = E[π | s],   π ~ Beta(1, 9) on [0, ½],   s ~ N(π, error²)

    As all sightings are on the low side, s is the one with the largest share less its error. Beforehand a tenth of the
    labels is expected to be wrong, rather less than more: few examples or queries leave it at that.
    """
    if not sightings:
        return None
    seen = max(sightings, key=lambda one: one.share - one.error)
    share = np.linspace(0, 0.5, 5001)
    density = (1 - share) ** (1 / EXPECTED - 2) * np.exp(-0.5 * ((share - seen.share) / seen.error) ** 2)
    return float((share * density).sum() / density.sum())


def slope_of(queries: Tensor) -> float:
    """How many log-odds of a right label a score of 1 is worth, from the scores of clean queries `[q]`; 0 for nothing.

        a = argmax_a≥0  Σ_q ln σ(a s_q) + ln σ(a m) + ln σ(−a m),   m the mean of |s_q|

    Logistic regression through the origin, as a wrong label would have turned the sign of each, with one more query of
    either kind, so that a few queries that all are right do not make it certain (Platt 1999).
    """
    s = queries.double().numpy()
    if not len(s) or not s.sum() > 0:
        return 0.0
    s = np.concatenate((s, [np.abs(s).mean(), -np.abs(s).mean()]))

    def rising(a: float) -> float:
        return float((s / (1 + np.exp(np.clip(a * s, -500, 500)))).sum())

    high = 1 / float(np.abs(s).mean())
    while rising(high) > 0:
        high *= 2
    return float(brentq(rising, 0.0, high))


def log_odds(ranking: Tensor, evidence: Tensor, share: float) -> Tensor:
    """The ranking `[n]` as ln((1 − p) / p), p the probability that a label is wrong, with a mean of `share`.

    The k-th in the ranking gets the k-th of the `evidence [m]`, log-odds up to a constant of the same or of fewer
    examples; between two of them where these are fewer or places are shared. With a share of 0 all are above 0.
    """
    n = len(ranking)
    if not n or not len(evidence):
        return ranking
    share = min(max(share, 0.25 / n), 1 - 0.25 / n)
    known = evidence.double().sort().values.numpy()
    place = (mean_ranks(ranking.round(decimals=12)) - 0.5) / n
    values = np.interp(place.numpy(), (np.arange(len(known)) + 0.5) / len(known), known)

    def excess(constant: float) -> float:
        return float((1 / (1 + np.exp(np.clip(values + constant, -500, 500)))).mean()) - share

    odds = math.log((1 - share) / share)
    return torch.from_numpy(values + brentq(excess, odds - values.max(), odds - values.min()))


def normal_scores(ranking: Tensor) -> Tensor:
    """The ranking `[n]` with the distances of a standard normal sample, and all of it above zero."""
    n = len(ranking)
    if not n:
        return ranking
    place = (mean_ranks(ranking.round(decimals=12)) - 0.5) / n
    return torch.special.ndtri(place) - torch.special.ndtri(torch.tensor(0.25 / n, dtype=place.dtype))
