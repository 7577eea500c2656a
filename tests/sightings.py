"""What tests of scores and of shares of wrong labels begin with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_influence.attribution.auto.share_wrong import Sighting, estimate


def estimated_share(sightings: Sequence[Sighting]) -> float | None:
    found = estimate(sightings)
    return None if found is None else found.share


def flags(below: int, n: int) -> Tensor:
    """Scores of which so many are below zero."""
    return torch.where(torch.arange(n) < below, -1.0, 1.0)
