"""Members of an ensemble that need no training: the weights with a few of them set to zero."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import BadSetting
from hf_influence.points.point import Point, trainable_values


@dataclass(frozen=True)
class ParameterDropout(Point):
    """Each trainable weight is zero with probability `rate`, the others are left as they are.

    Which ones follows from seed, member and the name of the parameter, on every device alike.
    """

    kind = "parameter_dropout"

    rate: float
    member: int
    seed: int

    def details(self) -> dict[str, Any]:
        """Rate, member and seed."""
        return asdict(self)

    def start(self, present: str) -> str | None:
        """The values that the model has."""
        return present

    def values(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Those of the model, with zeros."""
        return {name: self._dropped(name, value) for name, value in trainable_values(model).items()}

    def _dropped(self, name: str, value: Tensor) -> Tensor:
        seed = random.Random(f"{self.seed}/{self.member}/{name}").getrandbits(63)  # a string seed is stable
        drawn = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed))
        return value.masked_fill(drawn.to(value.device) < self.rate, 0)


def parameter_dropout(n: int = 5, *, max_rate: float = 0.01, seed: int = 0) -> list[Point]:
    """Members for `ip_ensemble`: each draws a rate from U(0, max_rate) and zeroes trainable weights at that rate.

    The first members do not depend on `n`.

    Args:
        n: Number of members; more is better, the paper has 5.
        max_rate: Bound of the rates, at most 1.
        seed: Of rates and zeros.

    Source: Revisiting Inner Product (IP Ensemble), eq. 5 and app. C.3.
    """
    if not isinstance(n, int) or n < 1:
        raise BadSetting(f"parameter_dropout(n={n!r}): n counts the members and must be at least 1.")
    if not 0 < max_rate <= 1:
        raise BadSetting(f"parameter_dropout(max_rate={max_rate!r}): the share of zeros must be above 0 and at most 1.")
    rates = [random.Random(f"{seed}/{member}").uniform(0, max_rate) for member in range(n)]
    return [ParameterDropout(rate, member, seed) for member, rate in enumerate(rates)]
