"""What stands for the inverse curvature: settings, and a fit to the training rows of one block."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_influence.errors import BadExample, BadSetting
from hf_influence.store import Rows

RANGE = 1e-34, 1e34
"""Of λ in float32, whose numbers go from 1e-38 to 3e38."""

Solve = Callable[[Tensor], Tensor]
"""Takes vectors as rows, `[q, d]`, and gives `P v` for each, `[q, d]`."""


@dataclass(kw_only=True)
class Curvature(ABC):
    """A choice of `P` in `⟨g, P v⟩`. It is symmetric and fitted block by block, so blocks do not interact."""

    meets_rows: ClassVar[bool] = False
    """Whether `P v` may take the products of `v` with all rows, as many numbers as vectors times rows."""

    @abstractmethod
    def fit(self, rows: Rows, block: str) -> Solve:
        """Look at the rows of one block, `[n, d]` read in chunks, and return `v -> P v`."""

    @cached_property
    def report(self) -> dict[str, Any]:
        """What was found on the way and is no setting, such as how far an iteration has converged; kept as JSON."""
        return {}


@dataclass(kw_only=True)
class DampedPath(Curvature):
    """A curvature made invertible by adding `λI`, whose work on the rows serves every λ, so that λ can be chosen."""

    meets_rows = True

    damping: float | str = field(default=0.1, metadata={"above": 0, "choices": ("auto",)})
    """λ relative to the block's mean squared gradient entry; > 0. Where there are queries, "auto" chooses one number
    for the whole model, the one at which the queries agree best with each other (see `choose_damping`)."""

    def strength(self, square: float, rows: Rows, block: str, damping: float) -> float:
        """λ = damping · Σᵢ ‖gᵢ‖² / (n d), for `square` = Σᵢ ‖gᵢ‖².

        It is 0 only where every gradient is 0: such a block says nothing, and `P` is taken to be 0 there.

        Raises:
            BadExample: The gradients are too small or too large for numbers in the precision of the rows.
        """
        strength = damping * square / (max(1, len(rows)) * rows.blocks[block])
        narrow = rows.dtype != torch.float64 and math.isfinite(strength)  # what is not finite is refused by name later
        if narrow and strength and not RANGE[0] < strength < RANGE[1]:
            raise BadExample(
                f"the gradients of block {block} in {rows.folder} have a mean squared entry of "
                f"{strength / damping:.2g}, times a damping of {damping:g}, and {rows.dtype} has no room for what is "
                "divided by it. Look at the damping and the loss (is it scaled?), or collect from a model in float64."
            )
        return strength

    @abstractmethod
    def prepare(self, rows: Rows, block: str) -> Callable[[float], Solve]:
        """Do what does not depend on λ, and return a function from the relative damping to `v -> P v`."""

    def fit(self, rows: Rows, block: str) -> Solve:
        if self.damping == "auto":
            raise BadSetting(
                "damping='auto' is chosen by how well the queries agree with each other, and here there are none to "
                "ask. Pass a number: 0.1 is usual; with more the curvature counts less."
            )
        return self.prepare(rows, block)(float(self.damping))
