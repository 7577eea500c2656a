"""Methods whose damping can be chosen by the queries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.curvature import DampedPath, choose_damping
from hf_influence.curvature.choice import GRID


@dataclass(kw_only=True)
class Tuned(DampedPath, Method):
    """Answers `damping="auto"`: the number is chosen, recorded with the settings, and reported with its curve.

    Comes first among the bases of a method, before its curvature and its comparison.
    """

    def score(self, rows: Selection) -> Tensor:
        if self.damping != "auto":
            return super().score(rows)  # type: ignore[safe-super]
        settled = replace(self, damping=self._chosen(rows))
        values = settled.score(rows)
        self.report.update(settled.report)
        return values

    def record(self, rows: Selection) -> dict[str, Any]:
        return super().record(rows) | ({"damping": self._chosen(rows)} if self.damping == "auto" else {})

    def _chosen(self, rows: Selection) -> float:
        if "damping" not in self.report:
            # on a copy, as what the trial solves report is no news of the scores
            chosen, agreement = choose_damping(replace(self, damping=1.0), rows.train, rows.query)
            self.report["damping"] = {"chosen": chosen, "tried": list(GRID), "agreement": agreement}
        return float(self.report["damping"]["chosen"])
