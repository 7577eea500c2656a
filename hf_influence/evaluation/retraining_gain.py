"""How much of what perfect cleaning would bring does a curated training set bring?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t as student
from sklearn.utils import Bunch

from hf_influence.errors import BadSetting


def retraining_gain(
    metrics: Mapping[str, Sequence[float]],
    *,
    bottom: str = "noisy",
    top: str = "clean",
    higher_is_better: bool = True,
) -> Bunch:
    """The share of the gap between noisy and truly clean training data that each other set recovers.

        share = (mean_s metric[s] − mean_s bottom[s]) / (mean_s top[s] − mean_s bottom[s])

    over the seeds s. 0 is no better than the noisy data, 1 as good as perfect cleaning. Where the gap itself is within
    the noise (its 95% interval over the seeds, by Student's t on the paired differences, reaches 0) a share of it means
    nothing: then there is none, and a sentence says so.

    Args:
        metrics: Name of the training set -> the held-out metric for each seed, seeds in the same order for all.
        bottom: The name of the noisy data, or of a random drop of the same size.
        top: The name of the truly clean data.
        higher_is_better: `False` for a loss.

    Returns:
        `gap`, `gap_interval` (half its width, `None` with one seed), `shares` (name -> `share` and `spread`, the
        jackknife standard error over the seeds; both `None` where the gap is within the noise) and `text`, the same in
        a sentence a set.

    Raises:
        BadSetting: A name is missing, there is no other set, or the seeds differ in number or have no finite metric.

    See also: removal_curve.

    >>> noisy, clean, mine = [0.70, 0.72, 0.71], [0.80, 0.82, 0.81], [0.78, 0.79, 0.77]
    >>> print(retraining_gain({"noisy": noisy, "clean": clean, "trimmed": mine}).text)
    trimmed recovers 70% ± 6% of the gap of 0.100 ± 0.000 between noisy and clean (3 seeds).
    """
    _check(metrics, bottom, top)
    sign = 1 if higher_is_better else -1
    gaps = [sign * (b - a) for a, b in zip(metrics[bottom], metrics[top], strict=True)]
    n, gap = len(gaps), statistics.fmean(gaps)
    reach = float(student.ppf(0.975, n - 1)) * statistics.stdev(gaps) / math.sqrt(n) if n > 1 else None
    between = f"between {bottom} and {top} ({n} seed{'s' if n > 1 else ''})"
    why = None
    if reach is None:
        why = f"with one seed it is not known whether the gap of {gap:.3f} {between} is more than noise"
    elif gap + reach < 0:
        why = f"{top} is worse than {bottom}: the gap {between} is {gap:.3f} ± {reach:.3f}"
    elif gap - reach <= 0:
        why = f"the gap of {gap:.3f} ± {reach:.3f} {between} is within the noise"

    shares: dict[str, dict[str, float | None]] = {}
    lines = []
    for name, values in metrics.items():
        if name in (bottom, top):
            continue
        won = [sign * (value - low) for value, low in zip(values, metrics[bottom], strict=True)]
        if why is not None:
            shares[name] = {"share": None, "spread": None}
            lines.append(f"{name}: {statistics.fmean(won):+.3f} against {bottom}, and no share, as {why}.")
            continue
        share, spread = statistics.fmean(won) / gap, _jackknife(won, gaps)
        shares[name] = {"share": share, "spread": spread}
        lines.append(f"{name} recovers {share:.0%} ± {spread:.0%} of the gap of {gap:.3f} ± {reach:.3f} {between}.")
    return Bunch(gap=gap, gap_interval=reach, shares=shares, text="\n".join(lines))


def _jackknife(won: list[float], gaps: list[float]) -> float:
    """Standard error of mean(won) / mean(gaps), from leaving out one seed at a time."""
    n = len(gaps)
    without = [(sum(won) - won[i]) / (sum(gaps) - gaps[i]) for i in range(n)]
    return math.sqrt((n - 1) / n * sum((value - statistics.fmean(without)) ** 2 for value in without))


def _check(metrics: Mapping[str, Sequence[float]], bottom: str, top: str) -> None:
    if missing := [name for name in (bottom, top) if name not in metrics]:
        raise BadSetting(
            f"metrics has {list(metrics)} and no {missing}: the gap lies between the noisy data and the truly clean. "
            "Add it, or name yours: bottom=…, top=…."
        )
    if len(metrics) < 3:
        raise BadSetting(f"metrics has {list(metrics)} alone, and no curated set whose gain could be told.")
    seeds: Any = {name: len(values) for name, values in metrics.items()}
    if len(set(seeds.values())) > 1 or 0 in seeds.values():
        raise BadSetting(
            f"the sets were trained with unlike numbers of seeds, {seeds}: give one metric a seed for all."
        )
    for name, values in metrics.items():
        if not all(math.isfinite(value) for value in values):
            raise BadSetting(f"metrics[{name!r}] has a value that is not finite: {list(values)}.")
