"""Removal curves: what becomes of a model when the lowest or the highest scores are left out of its training set."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Literal

from datasets import Dataset
from sklearn.utils import Bunch

from hf_influence.dataset.contents import content_of
from hf_influence.dataset.matching import in_dataset_order
from hf_influence.errors import BadSetting
from hf_influence.evaluation.labels import as_list
from hf_influence.evaluation.runs import Runs
from hf_influence.evaluation.shares import share_of
from hf_influence.scores import Scores

End = Literal["lowest", "highest"]


def removal_curve(
    scores: Scores,
    dataset: Dataset,
    retrain: Callable[[Dataset], float],
    fractions: Sequence[float] = (0.1, 0.2, 0.4),
    ends: Sequence[End] = ("lowest", "highest"),
    *,
    seeds: Sequence[int] = (0, 1, 2),
    folder: str | Path | None = None,
) -> Bunch:
    """The metric of a model retrained without the lowest, the highest, or as many random rows.

    Good scores help when the lowest go and hurt when the highest go, both by more than random drops differ among each
    other. Cost: 1 + fractions × (ends + seeds) trainings.

    Args:
        scores: Any method; rows are ranked by their mean over the queries, the earlier row first where it is equal.
        dataset: What was scored.
        retrain: Trains a fresh model on what it is given and returns a figure on held-out data. It should do the same
            number of steps whatever the size, or smaller sets lose for that reason alone.
        fractions: Of the rows to leave out; f as written, ⌊f · n⌋ rows.
        ends: Which of them.
        seeds: One random drop of each size for each; a larger one contains the smaller.
        folder: Where every result is kept at once, so that an interrupted curve goes on. One for each way of training:
            `retrain` itself cannot be checked. Random drops are shared by all scores whose curves have this folder.

    Returns:
        `whole` (nothing left out) and `curve`, for each fraction a dict with `fraction`, `removed` (rows), `lowest`,
        `highest`, `random` (a list), `random_mean` and `random_spread` (sample standard deviation, `None` with one).

    Raises:
        BadSetting: A fraction, an end or seeds that cannot work, scores of another dataset, a result that is no number.
        BadExample: A dataset without rows or without the scores' id column.

    See also: lds (both directions in one figure), retraining_gain.
    """
    counts = {float(share): int(share * len(dataset)) for share in map(share_of, fractions)}
    seeds = as_list(seeds)
    if unusable := [f for f, count in counts.items() if not 0 < count < len(dataset)]:
        raise BadSetting(
            f"fractions has {unusable[0]}, which leaves out {counts[unusable[0]]} of {len(dataset)} rows; it must "
            "leave out some and leave some."
        )
    if unknown := [end for end in ends if end not in ("lowest", "highest")]:
        raise BadSetting(f"ends has {unknown[0]!r}; choose among 'lowest' and 'highest'.")
    if not seeds:
        raise BadSetting("seeds is empty: without random drops of the same size there is nothing to compare with.")
    runs = Runs(folder, {"dataset": content_of(dataset)})
    by_row = in_dataset_order(dataset, scores).mean(1)  # [n]
    order = {"lowest": by_row.argsort(stable=True).tolist(), "highest": (-by_row).argsort(stable=True).tolist()}

    def without(dropped: Sequence[int], **key: object) -> float:
        gone = set(dropped)

        def train() -> float:
            value = float(retrain(dataset.select([i for i in range(len(dataset)) if i not in gone])))
            if not math.isfinite(value):
                raise BadSetting(f"retrain gave {value} after leaving out {len(gone)} rows; it must give a number.")
            return value

        return float(runs.do(key, train))

    name = content_of(Dataset.from_dict({"score": by_row.tolist()}))
    curve = []
    for fraction, count in counts.items():
        point: dict[str, object] = {"fraction": fraction, "removed": count}
        for end in ends:
            point[end] = without(order[end][:count], drop=end, rows=count, scores=f"{scores.method} {name}")
        draws = []
        for seed in seeds:
            mixed = Random(seed).sample(range(len(dataset)), len(dataset))
            draws.append(without(mixed[:count], drop="random", rows=count, seed=seed))
        spread = statistics.stdev(draws) if len(draws) > 1 else None
        curve.append(point | {"random": draws, "random_mean": statistics.fmean(draws), "random_spread": spread})
    return Bunch(whole=without((), drop="nothing"), curve=curve)
