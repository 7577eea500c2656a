"""What rules are given to decide by: scores, or a store that has yet to be scored."""

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

Ranking = Scores | str | Path | GradientStore
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
