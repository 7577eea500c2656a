"""How much of a score is nothing but length, or how often an example occurs."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from sklearn.utils import Bunch
from torch import Tensor

from hf_influence.attribution.statistic import statistic
from hf_influence.errors import BadSetting, StoreMismatch
from hf_influence.evaluation.spearman import spearman
from hf_influence.scores import Scores
from hf_influence.store import GradientStore

MOSTLY = 0.7
"""|ρ| from which a score is said to be mostly the other thing: half of the variance of the ranks (ρ² = .49)."""
_STATISTICS = ("length", "n_tokens", "hash")
_NAMES = {
    "length": "the number of tokens",
    "labelled": "the number of labelled tokens",
    "duplicates": "how often an example occurs",
}


def biases(scores: Scores, store: str | Path | GradientStore, threshold: float = MOSTLY) -> Bunch:
    """Rank correlation of the mean score of each example with its length and with how often it occurs.

        ρ = Spearman(mean_j score[i, j], tokens of i),   and likewise for labelled tokens and for copies of i

    A benchmark whose wrong answers are shorter is won by counting tokens; a filter whose scores are length throws long
    examples away. Negative: long (or repeated) examples come lowest. Cost: one sort.

    Args:
        scores: Any method.
        store: Where the rows came from; their statistics `length`, `n_tokens` and `hash` are read.
        threshold: |ρ| from which a warning is given; by default 0.7, where half of the variance of the ranks is shared.

    Returns:
        `length`, `labelled` and `duplicates`, each ρ or `None` where all examples are the same in it, and `warnings`, a
        list of sentences.

    Raises:
        BadSetting: A threshold outside of 0 to 1.
        MissingRows: The store lacks the rows or a statistic.
        StoreMismatch: The scores are of other examples.

    >>> biases(attribute("runs/mine", "loss"), "runs/mine").warnings   # doctest: +SKIP
    ["'loss' is mostly the number of tokens (Spearman -0.83, …"]

    See also: mislabel_detection with `within`, the method 'length' as a baseline.
    """
    if not 0 < threshold <= 1:
        raise BadSetting(f"threshold={threshold!r} is no size of a correlation; give a number above 0, at most 1.")
    stats = _stats_of(scores, GradientStore.open(store))
    _, which, copies = stats["hash"].unique(return_inverse=True, return_counts=True)
    sides = {"length": stats["length"], "labelled": stats["n_tokens"], "duplicates": copies[which]}
    mean = scores.mean().cpu().numpy()[:, None]  # [n, 1]
    found: dict[str, float | None] = {}
    for name, values in sides.items():
        rho = float(spearman(mean, values.double().numpy()[:, None])[0])
        found[name] = None if math.isnan(rho) else rho
    warnings = [
        f"'{scores.method}' is mostly {_NAMES[name]} (Spearman {rho:.2f}, limit {threshold}): compare it with a "
        "ranking by that alone, and rank within tasks or sources."
        for name, rho in found.items()
        if rho is not None and abs(rho) >= threshold
    ]
    return Bunch(**found, warnings=warnings)


def _stats_of(scores: Scores, store: GradientStore) -> dict[str, Tensor]:
    """The statistics of the examples in the order of the scores, each `[n]`: an example has the same at every point."""
    split = str(scores.settings.get("train_split", "train"))
    points = scores.settings.get("points") or [scores.settings.get("point", 0)]
    found: dict[object, list[int]] = {}  # id -> its statistics
    for point in dict.fromkeys([*([0] if split in store.splits(0) else []), *map(int, points)]):
        rows = store.rows(split, point)
        columns = [statistic(rows, name, "biases()").tolist() for name in _STATISTICS]
        found |= {id_: row for id_, *row in zip(rows.ids, *columns, strict=True) if id_ not in found}
        if all(id_ in found for id_ in scores.ids):
            break
    if lost := [id_ for id_ in scores.ids if id_ not in found]:
        raise StoreMismatch(
            f"{len(lost)} of the {len(scores)} examples of the scores are not in the split {split!r} of {store.path} "
            f"(first: {lost[0]!r}), so their lengths are not known. Pass the store that was attributed."
        )
    values = torch.tensor([found[id_] for id_ in scores.ids], dtype=torch.long).reshape(-1, len(_STATISTICS))
    return dict(zip(_STATISTICS, values.T, strict=True))
