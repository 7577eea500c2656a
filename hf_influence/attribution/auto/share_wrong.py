"""How many labels are wrong, as scores of examples show beside those of clean queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import betainc
from torch import Tensor

PRIOR = (0.3, 2.7)
"""Beta distribution of the share of wrong labels before anything is seen: mostly far below its mean, .1."""

EXPECTED = PRIOR[0] / sum(PRIOR)
"""Share of wrong labels that a score is read with: the mean of that distribution."""

TINY = 1e-12
"""Variance of scores that are all the same."""

LEAST_APART = 1e-3
"""Of suspicions under right and wrong labels, for a share to be seen."""

BY_HEART = 0.03
"""By how much the share of wrong labels that shows is expected to fall each time that training sees the examples."""

QUARTERS = 4
"""Of an epoch."""


class Suspicion(NamedTuple):
    """What a score says of its label: the probability that it is wrong, if one label in ten were.

        h(s) = 1 / (1 + exp(a (s − m)) (1 − π₀) / π₀),   a = (μ − μ′) / σ²,   m = (μ + μ′) / 2,   π₀ = 0.1

    μ and μ′ are the means of scores under right and under wrong labels, σ² the mean of their variances. That is right
    for two bell curves. Of anything else it is some function from 0 to 1 that is larger where labels rather are wrong,
    which is all that a share needs: a score far below says more than one just below zero, and one above says little.

    Attributes:
        slope: a, or 0 where right labels have the lower scores.
        middle: m.
    """

    slope: float
    middle: float

    @classmethod
    def of(cls, right: Tensor, wrong: Tensor) -> Suspicion:
        """From the scores of queries under right labels `[q]` and under wrong ones `[m]`."""
        right, wrong = right.double(), wrong.double()
        variance = float(right.var(correction=0) + wrong.var(correction=0)) / 2
        apart = float(right.mean() - wrong.mean())
        return cls(max(0.0, apart) / max(variance, TINY), float(right.mean() + wrong.mean()) / 2)

    def __call__(self, scores: Tensor) -> Tensor:
        """Of scores of any shape, in float64."""
        return torch.sigmoid(self.slope * (self.middle - scores.double()) + math.log(EXPECTED / (1 - EXPECTED)))


class Sighting(NamedTuple):
    """A share of wrong labels as it shows at one point.

    Attributes:
        share: It may lie outside of 0 to 1.
        own: Standard error by the examples looked at, and by what else makes this sighting differ from others.
        common: Standard error by the queries, which all sightings have in common.
        visits: How often training had seen each example before.
    """

    share: float
    own: float
    common: float
    visits: float = 0.0


def sighting(
    examples: Tensor,
    right: Tensor,
    wrong: Tensor,
    visits: float = 0.0,
    unsure: float = 0.0,
    guessed: float = 0.0,
) -> Sighting | None:
    """The share of wrong labels, from what makes labels suspicious, each from 0 to 1.

        π = (o − e) / (w − e),   o, e and w the means over examples, right and wrong labels

    as o = (1 − π) e + π w.

    Args:
        examples: Of the examples, `[n]`.
        right: Of clean queries, `[q]`.
        wrong: Of queries under wrong labels, `[m]`.
        visits: As in the sighting.
        unsure: Standard error of e beside that of its mean.
        guessed: Standard error of w, of which a share that is small hardly depends; it has it in common with others.

    Returns:
        `None` where it tells nothing, w ≤ e or hardly above it, or of nothing.
    """
    if not len(examples) or not len(right) or not len(wrong):
        return None
    e = float(right.double().mean())
    apart = float(wrong.double().mean()) - e
    if apart < LEAST_APART:
        return None
    own = math.sqrt(_variance(examples) + unsure**2)
    common = math.sqrt(_variance(right) + (EXPECTED * guessed) ** 2)
    return Sighting((float(examples.double().mean()) - e) / apart, own / apart, common / apart, visits)


def _variance(values: Tensor) -> float:
    """Of the mean of values from 0 to 1, `[n]`; never 0."""
    n = len(values)
    mean = (float(values.double().sum()) + 0.5) / (n + 1)
    square = (float(values.double().square().sum()) + 0.5) / (n + 1)
    return max(1e-6, square - mean**2) / n


class Epoch(NamedTuple):
    """Scores of right and wrong labels alike as an epoch goes by, such that a wrong label turns the sign.

    Attributes:
        examples: Of the examples, each at the weights of the step that saw it, in the order of the steps, `[n]`.
        queries: Of clean queries at its end, `[q]`.
        before: Of the queries at its beginning, `[q]`; `None` if not known.
        visits: How often training had seen each example before.
        together: All examples were looked at together, at its end.
    """

    examples: Tensor
    queries: Tensor
    before: Tensor | None = None
    visits: float = 0.0
    together: bool = False

    @property
    def suspicion(self) -> Suspicion:
        """By the queries at its end."""
        return Suspicion.of(self.queries, -self.queries)

    @property
    def moved(self) -> float:
        """By how much less suspicious queries are at its end than at its beginning, on average; 0 if not known."""
        if self.before is None:
            return 0.0
        return float((self.suspicion(self.before) - self.suspicion(self.queries)).mean())

    @property
    def settled(self) -> bool:
        """Whether the queries look as at its beginning, within two standard errors, or all was looked at together."""
        if self.before is None or not len(self.queries):
            return self.together
        return self.moved**2 <= 4 * sum(_variance(self.suspicion(one)) for one in (self.queries, self.before))

    @classmethod
    def of(cls, examples: Tensor, steps: Tensor | None, queries: Tensor, before: Tensor | None, visits: float) -> Epoch:
        """From scores of the examples `[n]` and the steps that saw them, without which they were seen together."""
        order = slice(None) if steps is None else steps.argsort(stable=True)
        return cls(examples[order], queries, before, visits, steps is None)


def sighting_in(epoch: Epoch, beyond: float = 0.0) -> Sighting | None:
    """The same from the second half of an epoch: where the examples were last seen longest ago.

        e = ¾ e_end + ¼ e_before ± ¼ |e_end − e_before|

    and w likewise, as the queries would have looked half way through that half.

    Args:
        epoch: Not the first.
        beyond: How far wrong labels are more suspicious than if they turned the sign, 0 as much and 1 wholly, or less,
            -1 not at all. It is known for the end alone, so w is as uncertain as it makes a difference.

    Returns:
        `None` also where nobody knows how the queries looked before.
    """
    if not len(epoch.queries) or (epoch.before is None and not epoch.together):
        return None
    suspicion, late, unsure = epoch.suspicion, epoch.examples, 0.0
    right, wrong = suspicion(epoch.queries), suspicion(-epoch.queries)
    if epoch.before is not None and not epoch.together:
        late = late[len(late) // 2 :]
        right = 0.75 * right + 0.25 * suspicion(epoch.before)
        wrong = 0.75 * wrong + 0.25 * suspicion(-epoch.before)
        unsure = 0.25 * abs(epoch.moved)
    return _sighting(suspicion(late), right, wrong, beyond, epoch.visits, unsure)


def sighting_in_first(epoch: Epoch, after: Epoch | None, beyond: float = 0.0) -> Sighting | None:
    """The same from the end of the first epoch, of examples that the model has never seen.

        o = o₄ ± max(|o₃ − o₄|, |e_end − e_after|),   o₃ and o₄ of its last quarters

    Args:
        epoch: The first.
        after: The next epoch, if there is one.
        beyond: As above.

    Returns:
        `None` also where nobody knows how the queries move afterwards.
    """
    if not len(epoch.queries) or (after is not None and after.before is None):
        return None
    suspicion = epoch.suspicion
    third, fourth = (suspicion(part) for part in epoch.examples.tensor_split(QUARTERS)[-2:])
    unsure = 0.0
    if epoch.together:
        fourth = suspicion(epoch.examples)
    elif len(third):
        unsure = max(abs(float(third.mean() - fourth.mean())), abs(after.moved) if after else 0.0)
    return _sighting(fourth, suspicion(epoch.queries), suspicion(-epoch.queries), beyond, 0.0, unsure)


def _sighting(
    examples: Tensor, right: Tensor, mirrored: Tensor, beyond: float, visits: float, unsure: float
) -> Sighting | None:
    """By queries whose sign was turned, `[m]`, in place of those under wrong labels."""
    wrong = mirrored + beyond * ((1 - mirrored) if beyond > 0 else mirrored)
    return sighting(examples, right, wrong, visits, unsure, abs(float((wrong - mirrored).mean())))


class Estimate(NamedTuple):
    """The share of wrong labels.

    Attributes:
        share: Its posterior mean.
        error: Its posterior standard deviation.
    """

    share: float
    error: float

    @property
    def sharp(self) -> bool:
        """Whether it says more than what is expected of all data: half of its deviation."""
        a, b = PRIOR
        return self.error < 0.5 * math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)))


def estimate(sightings: Sequence[Sighting]) -> Estimate | None:
    """The share of wrong labels, given what is seen of it and what is to be expected before; `None` without sightings.

        π = E[π | s],   s_c ~ N(π − b v_c, own_c² + common²),   π ~ Beta(0.3, 2.7) on [0, ½],   b ~ Exp(mean 0.03)

    v_c are the visits: a model believes the labels of the examples the more the more often it has seen them, and so
    fewer and fewer look wrong. b is by how much fewer each time; so it is the share before that that counts. The
    sightings have the queries in common, so many are not much sharper than one.

    Beforehand 8 % of the labels are expected to be wrong, and few examples or queries leave it at that; but half of all
    data are taken to have less than 3 %, so that a small share has to be seen clearly. (Northcutt et al., Pervasive
    Label Errors in Test Sets, NeurIPS 2021, find at least 3.3 % on average in those of ten benchmarks.)
    """
    if not sightings:
        return None
    seen, own, common, visits = np.array(sightings, dtype=np.float64).T  # each [c]
    precision = np.linalg.inv(np.diag(own**2) + np.outer(common, common))  # [c, c]
    edges = np.linspace(0, 0.5, 2001)
    share = ((edges[1:] + edges[:-1]) / 2)[:, None]  # [p, 1]
    forgets = np.linspace(0, 10 * BY_HEART, 201)[None]  # [1, b]
    ones = np.ones_like(seen)

    def product(one: np.ndarray, other: np.ndarray) -> float:
        return float(one @ precision @ other)

    likely = share * product(ones, seen) - forgets * product(visits, seen) + share * forgets * product(ones, visits)
    likely = likely - 0.5 * (share**2 * product(ones, ones) + forgets**2 * product(visits, visits))
    likely = likely - forgets / BY_HEART  # [p, b]
    weight = np.diff(betainc(*PRIOR, edges)) * np.exp(likely - likely.max()).sum(1)  # [p]
    mean = float((share[:, 0] * weight).sum() / weight.sum())
    return Estimate(mean, math.sqrt(float(((share[:, 0] - mean) ** 2 * weight).sum() / weight.sum())))
