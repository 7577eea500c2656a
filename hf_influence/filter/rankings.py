"""What rules are given to decide by: scores, or a store that has yet to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_influence.attribution.attribute import attribute
from hf_influence.scores import Scores
from hf_influence.store import GradientStore

Ranking = Scores | str | Path | GradientStore
Given = Ranking | Sequence[Ranking]


def rankings_of(given: Given) -> list[Scores]:
    """Scores as they are; of a store, or the path of one, those of `attribute(store)`: its default method."""
    several = [given] if isinstance(given, Ranking) else list(given)
    return [one if isinstance(one, Scores) else attribute(one) for one in several]
