"""What clean queries say of the scores of a classifier's training examples: how good they are, which are wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import betainc, ndtr, ndtri
from torch import Tensor

from hf_influence.scores import mean_ranks

LEAST = 0.01
"""Of AUC − ½, for scores of which queries say nothing good."""

PRIOR = (0.3, 2.7)
"""Beta distribution of the share of wrong labels before anything is seen: mostly far below its mean, .1."""

QUARTERS = 4
"""Of an epoch."""


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


def trust_of(right: Tensor, wrong: Tensor, errors: float = 0.0, fresh: float = 1.0) -> float:
    """(f (AUC − ½))⁴ of the scores of queries, less so many standard errors of an AUC that says nothing."""
    return (fresh * max(LEAST, auc_of(right, wrong) - 0.5 - errors / math.sqrt(12 * len(right)))) ** 4


class Sighting(NamedTuple):
    """A share of wrong labels as it shows at one point.

    Attributes:
        share: It may lie outside of 0 to 1.
        error: Standard error.
        reach: The largest that the error could be with so many examples and queries, whatever their shares are.
    """

    share: float
    error: float
    reach: float


class Epoch(NamedTuple):
    """Shares of negative scores as an epoch goes by.

    Attributes:
        quarters: Of the examples in each quarter of its steps, at the weights of the step that each was seen in.
        queries: Of clean queries at its end.
        n: Number of examples in a quarter.
        before: Of the queries as they were at its beginning, scored as those at its end are; `None` if not known.
    """

    quarters: tuple[float, ...]
    queries: float
    n: int
    before: float | None = None

    @classmethod
    def of(cls, examples: Tensor, steps: Tensor | None, queries: Tensor, before: Tensor | None = None) -> Epoch:
        """From scores of the examples `[n]`, the steps that saw them, and scores of the queries at its end and before.

        Without steps all examples were looked at together, at its end.
        """
        parts = (examples,) * QUARTERS
        if steps is not None:
            parts = examples[steps.argsort(stable=True)].tensor_split(QUARTERS)
        quarters = tuple(map(negative, parts))
        return cls(quarters, negative(queries), len(examples) // QUARTERS, None if before is None else negative(before))

    def moved(self, q: int) -> bool:
        """Whether the `q` queries of its beginning look other than those of its end, by more than two standard errors.

        Then so may examples, that were seen on the way.
        """
        if self.before is None or not q:
            return True
        return (self.queries - self.before) ** 2 > 4 * _variance((self.queries + self.before) / 2, q)


def negative(scores: Tensor) -> float:
    """The share that is below zero, 0 of none."""
    return float((scores < 0).double().mean()) if len(scores) else 0.0


def sighting(examples: float, n: float, queries: float, q: int, missed: float | None = None) -> Sighting | None:
    """The share of wrong labels, from the shares of negative scores of `n` examples and of `q` clean queries.

        (o − e) / (1 − e − e′),   o of the examples, e of the queries

    As o = (1 − π) e + π (1 − e′), where e′ is the share of scores above zero under wrong labels: for two classes e,
    since a wrong label turns the sign. A model that was trained on the examples believes their labels more than those
    of the queries, so this is on the low side, the more so the longer it was trained.

    Args:
        missed: e′, by default e.

    Returns:
        `None` where the scores tell nothing, e + e′ ≥ 1.
    """
    rest = 1 - queries - (queries if missed is None else missed)
    if not n or not q or rest <= 0:
        return None
    error = math.sqrt(_variance(examples, n) + _variance(queries, q)) / rest
    return Sighting((examples - queries) / rest, error, math.sqrt(0.25 / n + 0.25 / q) / rest)


def sighting_in(epoch: Epoch, q: int, turned: float = 1.0) -> Sighting | None:
    """The same from the second half of an epoch: where the examples were last seen longest ago.

    Args:
        turned: e′ / e, which is taken not to change over training.

    Returns:
        `None` also where the model was learning too fast to say: the queries have moved in the epoch, or the share of
        the examples has fallen by more than two standard errors.
    """
    early, late = sum(epoch.quarters[:2]) / 2, sum(epoch.quarters[2:]) / 2
    if not epoch.n or epoch.moved(q) or _fell(early, late, 2 * epoch.n):
        return None
    return sighting(late, 2 * epoch.n, epoch.queries, q, turned * epoch.queries)


def sighting_in_first(epoch: Epoch, q: int, after: Epoch | None, turned: float = 1.0) -> Sighting | None:
    """The same from the end of the first epoch: of examples that the model has never seen.

        o = s₄ + (s₄ − s₃) / 2,   s₃ and s₄ of its last quarters

    where the line through the two arrives at its end, since the model is still learning.

    Args:
        after: The next epoch, if there is one.
        turned: As above.

    Returns:
        `None` also where the model was learning too fast to say: the queries move in the next epoch, or the share of
        the examples has fallen in the last quarter by more than two standard errors.
    """
    *_, third, fourth = epoch.quarters
    if not epoch.n or not q or (after is not None and after.moved(q)) or _fell(third, fourth, epoch.n):
        return None
    at_end = min(1.0, max(0.0, 1.5 * fourth - 0.5 * third))
    return sighting(at_end, epoch.n / (1.5**2 + 0.5**2), epoch.queries, q, turned * epoch.queries)


def _fell(share: float, later: float, n: int) -> bool:
    """Whether the later of two shares of `n` examples each is smaller by more than two standard errors."""
    return later < share and (share - later) ** 2 > 4 * (_variance(share, n) + _variance(later, n))


def _variance(share: float, n: float) -> float:
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


def estimated_share(sightings: Sequence[Sighting], at_end: Sighting | None = None) -> float | None:
    """The share of wrong labels, given what is seen of it and what is to be expected before; `None` without sightings.

        π = E[π | s],   π ~ Beta(0.3, 2.7) on [0, ½],   s ~ N(π, error²)

    s is the mean of the first two sightings whose error, by the numbers of examples and queries alone, may reach no
    more than half as much again as that of the sharpest; they have the queries in common, so two are hardly sharper
    than one. A model believes the labels of the examples the more the longer it has seen them, and what is seen at the
    end of training counts only where nothing else is seen as sharply.

    Beforehand 8 % of the labels are expected to be wrong, and few examples or queries leave it at that; but half of all
    data are taken to have less than 3 %, so that a small share has to be seen clearly. (Northcutt et al., Pervasive
    Label Errors in Test Sets, NeurIPS 2021, find at least 3.3 % on average in those of ten benchmarks.)

    Args:
        sightings: Of epochs, in the order of training.
        at_end: Of its end.
    """
    every = [*sightings, *([] if at_end is None else [at_end])]
    if not every:
        return None
    sharp = 1.5 * min(one.reach for one in every)
    seen = [one for one in sightings if one.reach <= sharp][:2] or every[-1:]
    middle = sum(one.share for one in seen) / len(seen)
    edges = np.linspace(0, 0.5, 5001)
    share = (edges[1:] + edges[:-1]) / 2
    likely = -0.5 * ((share - middle) / seen[0].error) ** 2
    weight = np.diff(betainc(*PRIOR, edges)) * np.exp(likely - likely.max())  # or all are 0 far outside of [0, ½]
    return float((share * weight).sum() / weight.sum())


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
