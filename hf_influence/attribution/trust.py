"""What clean queries say of the scores of a classifier's training examples: how good they are, which are wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from hf_influence.scores import mean_ranks

LEAST = 0.01
"""Of AUC − ½, for scores of which queries say nothing good."""

EXPECTED = 0.1
"""Share of wrong labels before anything is seen."""


def auc_of(right: Tensor, wrong: Tensor) -> float:
    """How often a score under a right label `[q]` is above one under a wrong label `[q]`; ties count half."""
    n, m = len(right), len(wrong)
    ranks = mean_ranks(torch.cat((right, wrong)).double())
    return float(ranks[:n].sum() - n * (n + 1) / 2) / (n * m)


def trust_of(right: Tensor, wrong: Tensor, errors: float = 0.0, fresh: float = 1.0) -> float:
    """(f (AUC − ½))⁴ of the scores of queries, less so many standard errors of an AUC that says nothing."""
    return (fresh * max(LEAST, auc_of(right, wrong) - 0.5 - errors / math.sqrt(12 * len(right)))) ** 4


class Sighting(NamedTuple):
    """A share of wrong labels as it shows at one point, and its standard error."""

    share: float
    error: float


def sighting(
    examples: float, n: int, queries: float, q: int, before: float | None = None, turned: float = 1.0
) -> Sighting | None:
    """The share of wrong labels, from the shares of negative scores of `n` examples and of `q` clean queries.

        (o − e) / (1 − e − e′),   o of the examples, e of the queries, e′ = turned · e

    As o = (1 − π) e + π (1 − e′), where e′ is the share of scores above zero under wrong labels: for two classes e,
    since a wrong label turns the sign. A model that was trained on the examples believes their labels more than those
    of the queries, so this is on the low side, the more so the longer it was trained.

    Args:
        before: For examples that were seen during an epoch: the share of the queries at its beginning, where `queries`
            is that at its end. e is their mean then.
        turned: e′ / e.

    Returns:
        `None` where the scores tell nothing, e + e′ ≥ 1, and where the queries have changed by more than two standard
        errors in an epoch: the model was learning too fast to say.
    """
    if not n or not q:
        return None
    e = queries if before is None else (queries + before) / 2
    seen, error, rest = _variance(examples, n), _variance(e, q), 1 - (1 + turned) * e
    if rest <= 0 or (before is not None and (queries - before) ** 2 > 4 * error):
        return None
    return Sighting((examples - e) / rest, math.sqrt(seen + error) / rest)


def _variance(share: float, n: int) -> float:
    """Of a share among `n`, never 0."""
    share = (share * n + 0.5) / (n + 1)
    return share * (1 - share) / n


def freshness(examples: float, n: int, queries: float, q: int) -> float:
    """How little a model has learnt the labels of its `n` examples by heart, 1 where nothing shows.

        min(1, (o + δ) / (e + δ)),   δ = 1 / (2 min(n, q))

    o and e are the shares of negative scores of the examples and of `q` clean queries. A wrong label makes a score
    negative sooner than a right one, so the examples have more of them than the queries, or as many where no label is
    wrong; if they have fewer, the model believes their labels because it has seen them.
    """
    if not n or not q:
        return 1.0
    half = 0.5 / min(n, q)
    return min(1.0, (examples + half) / (queries + half))


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


def log_odds(ranking: Tensor, auc: float, share: float) -> Tensor:
    """The ranking `[n]` as ln((1 − p) / p), p the probability that a label is wrong.

        ln((1 − p) / p) = d x + ln((1 − π) / π),   d = √2 Φ⁻¹(AUC)
        (1 − π) Φ(x − d/2) + π Φ(x + d/2) = (rank − ½) / n

    as if the scores of right and of wrong labels lay on two bell curves of width 1 that are d apart: then they are told
    apart with that AUC, and a rank is at x. The mean of p is the share π.

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
