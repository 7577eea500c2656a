"""What stands for the inverse curvature: settings, and a fit to the training rows of one block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from hf_influence.store import Rows

Solve = Callable[[Tensor], Tensor]
"""Takes vectors as rows, `[q, d]`, and gives `P v` for each, `[q, d]`."""


@dataclass(kw_only=True)
class Curvature(ABC):
    """A choice of `P` in `⟨g, P v⟩`. It is symmetric and fitted block by block, so blocks do not interact."""

    @abstractmethod
    def fit(self, rows: Rows, block: str) -> Solve:
        """Look at the rows of one block, `[n, d]` read in chunks, and return `v -> P v`."""


@dataclass(kw_only=True)
class Damped(Curvature):
    """A curvature that is made invertible by adding `λI`."""

    damping: float = field(default=0.1, metadata={"above": 0})
    """λ relative to the block's mean squared gradient entry; > 0."""

    def strength(self, square: float, rows: Rows, block: str) -> float:
        """λ = damping · Σᵢ ‖gᵢ‖² / (n d), for `square` = Σᵢ ‖gᵢ‖².

        It is 0 only where every gradient is 0: such a block says nothing, and `P` is taken to be 0 there.
        """
        return self.damping * square / (max(1, len(rows)) * rows.blocks[block])
