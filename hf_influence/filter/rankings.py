"""What rules are given to decide by: scores, or a store that has yet to be scored, and what it says beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_influence.attribution.attribute import attribute
from hf_influence.errors import BadSetting
from hf_influence.scores import Scores
from hf_influence.store import GradientStore

StoreOrPath = str | Path | GradientStore
Ranking = Scores | StoreOrPath
Given = Ranking | Sequence[Ranking]


def rankings_of(given: Given) -> list[Scores]:
    """Scores as they are; of a store, or the path of one, those of `attribute(store)`: its default method."""
    several = [given] if isinstance(given, Ranking) else list(given)
    return [one if isinstance(one, Scores) else attribute(one) for one in several]


def wrong_of(rankings: Sequence[Scores], ids: Sequence[Any]) -> Tensor:
    """The probability that the label of each of the rows `ids` is wrong, `[n]` in float64.

    Raises:
        BadSetting: Several sets of scores, or scores that are no log-odds.
    """
    if len(rankings) != 1:
        raise BadSetting(f"how='posterior' goes by one set of scores, and {len(rankings)} were given.")
    wrong = dict(zip(rankings[0].ids, rankings[0].probability_wrong().tolist(), strict=True))
    return torch.tensor([wrong[name] for name in ids], dtype=torch.float64)


def statistic_in(store: StoreOrPath, scores: Scores, name: str, ids: Sequence[Any]) -> Tensor | None:
    """A statistic of the scored rows `ids`, `[n, …]`, by a store of them; `None` unless it has it of every one.

    It is that at the point that was scored. Where several were, the weights after training come first, then the last
    point that has the row.

    Raises:
        StoreError: No store.
    """
    opened = store if isinstance(store, GradientStore) else GradientStore.open(store)
    settings, found = scores.settings, dict[Any, Tensor]()
    split = settings.get("train_split", "train")
    points = [settings["point"]] if "point" in settings else settings.get("points", opened.points("weights"))
    for point in points if len(points) == 1 else [0, *sorted(points, reverse=True)]:
        if split in opened.splits(point) and not found.keys() >= set(ids):
            rows = opened.rows(split, point)
            found = dict(zip(rows.ids, rows.stats.get(name, ()), strict=False)) | found
    return torch.stack([found[one] for one in ids]) if found and found.keys() >= set(ids) else None
