"""Outliers among gradients, by their length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_influence.attribution.method import Method
from hf_influence.attribution.norms import row_norms
from hf_influence.attribution.selection import Selection


@dataclass(kw_only=True)
class OutlierL2(Method, name="outlier_l2"):
    """Minus the Euclidean length of the gradient: the longest come lowest.

        score[i] = −‖g_i‖₂

    Cost: one pass over the rows, O(n d).
    Use when: labels may be wrong and there are no clean queries.
    See also: OutlierL1 (less moved by a few large entries), SelfInfluence (its square).
    Source: Chhabra et al., Outlier Gradient Analysis, ICML 2025, sec. 3.3.
    """

    needs = ("rows",)
    order: ClassVar[int] = 2

    def score(self, rows: Selection) -> Tensor:
        return -row_norms(rows.train, self.order)[:, None]


@dataclass(kw_only=True)
class OutlierL1(OutlierL2, name="outlier_l1"):
    """Minus the sum of the absolute entries of the gradient: the largest come lowest.

        score[i] = −‖g_i‖₁

    Cost: one pass over the rows, O(n d).
    Use when: labels may be wrong and there are no clean queries, and a few large entries should not decide.
    See also: OutlierL2 (as good on most data), OutlierForest.
    Source: Chhabra et al., Outlier Gradient Analysis, ICML 2025, sec. 3.3.
    """

    order: ClassVar[int] = 1
