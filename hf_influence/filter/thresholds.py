"""Where to cut: how many rows of a ranking are to go, read off the scores themselves.

    DatasetFilter(drop="otsu")        # the two groups that differ most
    DatasetFilter(drop="mixture")     # rows that rather belong to the lower of two bell curves
    DatasetFilter(drop="negative")    # rows that are predicted to do harm
    DatasetFilter(drop="doubtful")    # rows whose label is less than twice as likely right as wrong
    DatasetFilter(drop=discovery(0.1))  # rows that do harm for sure, at most a tenth of them by chance

A threshold is a function from the scores `[n, q]` to one flag a row, `[n]`: true for rows that go. Higher scores are
more worth keeping, so the flags are always those of the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from hf_influence.errors import BadSetting
from hf_influence.scores import LOG_ODDS, Scores

Threshold = Callable[[Tensor], Tensor]
"""Scores `[n, q]` -> which rows go, `[n]`."""

PERMUTATIONS = 2000
ROUNDING = 1e-12
"""Of a mean, in which equal ones may differ."""


def all_equal(mean: Tensor) -> bool:
    """Whether mean scores `[n]` are the same but for rounding."""
    return not len(mean) or bool(mean.max() - mean.min() <= ROUNDING * mean.abs().max())


def otsu(values: Tensor) -> Tensor:
    """The cut between two groups of rows that makes the means of the groups differ most.

        cut = argmax_c  w_low(c) w_high(c) (μ_low(c) − μ_high(c))²        over all cuts between two rows

    It always finds two groups, also where there are none: on clean data it still drops up to half of the rows.

    Source: Otsu 1979; for influence, Kong et al., ICLR 2022, and GEX, section 5.2.
    """
    mean = values.double().mean(1)
    if all_equal(mean):
        return torch.zeros(len(mean), dtype=torch.bool)
    ordered = mean.sort().values
    n, total = len(mean), ordered.sum()
    low = torch.arange(1, n, dtype=torch.float64)
    sums = ordered.cumsum(0)[:-1]
    between = low * (n - low) * (sums / low - (total - sums) / (n - low)).square()
    between[ordered[1:] == ordered[:-1]] = -1  # equal scores stay together
    return mean <= ordered[int(between.argmax())]


def mixture(values: Tensor) -> Tensor:
    """The rows that belong to the lower of two normal distributions with more than even odds.

    Two components are fitted to the mean scores; where one component explains them as well (by the Bayesian information
    criterion), no row goes. But scores that are skewed look like two groups as well: of clean data a quarter and more
    may go.

    Source: Arazo et al., Unsupervised Label Noise Modeling, ICML 2019, there for losses.
    """
    fitted = normal_components(values, 2)
    if fitted is None:
        return torch.zeros(len(values), dtype=torch.bool)
    scaled, centers, odds = fitted
    # a wide lower component claims the far end of the other side as well; only what lies below goes
    return (odds[:, 0] > 0.5) & (scaled < centers[1])


def normal_components(values: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """K normal distributions that the mean scores are a mixture of, in ascending order of their means.

    Args:
        values: `[n, q]`.
        k: At least 2.

    Returns:
        The mean scores, standardised, `[n]`; the means of the distributions on that scale, `[k]`; the probability that
        a row belongs to each, `[n, k]`. `None` for fewer than 2 k rows, equal scores, and where one distribution
        explains the scores as well (by the Bayesian information criterion).
    """
    mean = values.double().mean(1)
    if len(mean) < 2 * k or all_equal(mean):
        return None
    scaled = (mean - mean.mean()) / mean.std()
    rows = scaled.numpy()[:, None]
    one, several = (GaussianMixture(c, n_init=5, random_state=0).fit(rows) for c in (1, k))
    if several.bic(rows) >= one.bic(rows):
        return None
    centers, order = torch.from_numpy(several.means_[:, 0]).sort(stable=True)
    return scaled, centers, torch.from_numpy(several.predict_proba(rows))[:, order]


def negative(values: Tensor) -> Tensor:
    """The rows with a mean score below zero: without them the queries' loss is predicted to fall.

    Of scores by "auto": the rows whose label is rather wrong than right, as far as that is known. A filter refuses
    scores of which none is above zero, as with self-influence or losses, and scores without queries that all lie
    between 0 and 1, as with probabilities: there zero means nothing.
    """
    return values.double().mean(1) < 0


def doubtful(values: Tensor) -> Tensor:
    """The rows whose label is right with a probability of less than two thirds, of scores that are log-odds.

        score < ln 2

    A wrong label does more harm than a right one does good, so more goes than what is rather wrong than right; of clean
    data a few rows in a hundred.
    """
    return values.double().mean(1) < math.log(2)


def discovery(rate: float, permutations: int = PERMUTATIONS, seed: int = 0) -> Threshold:
    """Rows that harm the queries beyond chance; of those dropped at most `rate` by mistake, in expectation.

    If a row did not matter, the signs of its scores would not either. So the mean score of row i is compared with its
    means under random signs ε of the queries, the same for all rows, which keeps the rows' dependence:

        p_i = (1 + #{ mean_j ε_j s_ij ≤ mean_j s_ij }) / (1 + permutations)

    and the rows with p below the line of Benjamini and Hochberg go. It needs a score a query, and enough queries.

    Args:
        rate: Accepted share of mistakes among the dropped rows, in (0, 1).
        permutations: Random sign patterns.
        seed: Of them.

    Raises:
        BadSetting: A rate out of range; when it is applied, scores with fewer than 8 queries.

    Source: Benjamini & Hochberg 1995; sign-flip test.
    """
    if not 0 < rate < 1:
        raise BadSetting(f"discovery({rate!r}): the accepted share of mistakes must lie between 0 and 1.")
    return partial(_discovered, rate=rate, permutations=permutations, seed=seed)


def _discovered(values: Tensor, rate: float, permutations: int, seed: int) -> Tensor:
    n, q = values.shape
    if q < 8:
        raise BadSetting(
            f"the scores have {q} column(s), and whether a row harms beyond chance shows in its scores for many "
            "queries (at least 8). Use a method that compares with each query, queries='each'."
        )
    values = values.double()
    signs = torch.randint(0, 2, (permutations, q), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1  # [p, q]
    mean = values.mean(1)
    least = (mean + ROUNDING * values.abs().mean(1))[:, None]  # what is equal is as low
    as_low = torch.zeros(n, dtype=torch.float64)
    for piece in signs.double().split(256):
        as_low += (values @ piece.T / q <= least).sum(1)
    p = (1 + as_low) / (1 + permutations)
    ordered, order = p.sort()
    under = (ordered <= rate * torch.arange(1, n + 1) / n).nonzero()
    gone = torch.zeros(n, dtype=torch.bool)
    if len(under):
        gone[order[: int(under[-1]) + 1]] = True
    return gone


THRESHOLDS: dict[str, Threshold] = {"otsu": otsu, "mixture": mixture, "negative": negative, "doubtful": doubtful}

RANKINGS = ("auto", "combined")
"""What gives places in an order."""


def check_scale(drop: object, scores: Scores) -> None:
    """Refuse to look for what scores do not have.

    Raises:
        BadSetting: "otsu" or "mixture" on scores by "auto" or `combined`, which have no gaps; "doubtful" on scores that
            are no log-odds; "negative" on a ranking, on scores of which none is above zero, and on scores without
            queries that all lie between 0 and 1.
    """
    name = _threshold(drop)
    if name == "doubtful":
        try:
            scores.probability_wrong()
        except BadSetting as error:
            raise BadSetting(f"{error} Or say how much is to go: DatasetFilter(drop=0.05).") from None
    ranking = scores.method in RANKINGS
    if name in ("otsu", "mixture") and ranking:
        raise BadSetting(
            f'scores by {scores.method!r} are a ranking on a scale that has no gaps of its own, so "{name}" would find '
            'one where there is none. Use drop="doubtful" (scores by attribute(store), with clean queries), a share, '
            f"or \"{name}\" on other scores: attribute(store, 'loss_mean')."
        )
    if name == "negative" and ranking and LOG_ODDS not in scores.report:
        raise BadSetting(
            f"scores by {scores.method!r} are a ranking here, of which none is negative: whether a label is wrong is "
            'known with clean queries alone (see drop="doubtful"). Use a share.'
        )
    if name != "negative" or not len(scores):
        return
    low, high = scores.mean().aminmax()
    if high <= 0:
        raise BadSetting(
            "no score is above zero, so zero does not part good from bad (self-influence, losses and outlier scores "
            'are all negative). Use drop="mixture", drop="otsu" or a share.'
        )
    if low >= 0 and high <= 1 and scores.query_ids is None and LOG_ODDS not in scores.report:
        raise BadSetting(
            f"the scores by {scores.method!r} all lie between 0 and 1, as probabilities do, so none is negative and "
            "zero does not part good from bad. Use a share."
        )


def goes_by_odds(drop: object) -> bool:
    """Whether it cuts where a label is so much more probably right than wrong, if the scores tell."""
    return _threshold(drop) in ("doubtful", "negative")


def _threshold(drop: object) -> str | None:
    return next((name for name, own in THRESHOLDS.items() if drop in (name, own)), None)


def name_of(threshold: Threshold) -> str:
    """How a report calls it, such as "discovery(0.1, …)"."""
    if isinstance(threshold, partial) and threshold.func is _discovered:
        return "discovery({rate}, permutations={permutations}, seed={seed})".format(**threshold.keywords)
    return getattr(threshold, "__name__", type(threshold).__name__)
