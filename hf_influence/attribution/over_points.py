"""Methods that look at an example at several parameter points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.errors import BadSetting


@dataclass(kw_only=True)
class OverPoints(Method):
    """A method that goes over the points of training: `rows.parts` has a selection for each.

    Scored are the examples that any of the points holds; `rows.places(part)` says where those of one point belong.
    """

    points: Sequence[int] | None = None
    """The points to go over, in any order; by default all whose rows were captured in training steps, of an ensemble
    all its members."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.points, Tensor | np.ndarray):
            self.points = self.points.tolist()
        points = self.points
        if points is None:
            return
        if (
            isinstance(points, str)
            or not isinstance(points, Sequence)
            or not points
            or not all(isinstance(point, Integral) and not isinstance(point, bool) and point >= 0 for point in points)
        ):
            raise BadSetting(f"method '{self.name}': points={points!r} must be a list of point numbers, at least one.")
        self.points = [int(point) for point in points]

    def chosen(self, rows: Selection) -> list[int] | None:
        """The points to go over; `None` for those of training."""
        return None if self.points is None else sorted(set(self.points))

    def select(self, rows: Selection, point: int | None) -> Selection:
        self._refuse(point)
        return rows.over(self.chosen(rows), queries="queries" in self.needs)

    def _refuse(self, point: int | None) -> None:
        if point is not None:
            raise BadSetting(
                f"method '{self.name}' goes over several points, so point={point} has no meaning for it. Pass "
                f"points=[{point}] for that point alone, or nothing for all points of its kind."
            )

    def record(self, rows: Selection) -> dict[str, Any]:
        return super().record(rows) | {"points": list(rows.points)}

    def summed(self, rows: Selection, term: Callable[[Selection], Tensor]) -> Tensor:
        """The sum of the terms `[b, q]` of all points, `[n, q]`; a point that lacks an example adds nothing to it."""
        columns = self.columns(rows)
        total = torch.zeros(len(rows.ids), 1 if columns is None else len(columns), dtype=rows.train.dtype)
        for part in rows.parts:
            total[rows.places(part)] += term(part)
        return total


@dataclass(kw_only=True)
class OverTraining(OverPoints):
    """Over the points of training; over the checkpoints in a store without such points."""

    def chosen(self, rows: Selection) -> list[int] | None:
        if self.points is None and not rows.training_points():
            return rows.store.points("checkpoint") or None
        return super().chosen(rows)


@dataclass(kw_only=True)
class MeanOverTraining(OverTraining):
    """A method for one point on average over training: it inherits from this first and from that method second.

    score[i] = 1/|C_i| Σ_{c ∈ C_i} score_c[i],   C_i the points that hold i
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.needs = (*cls.needs, "points")

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, q]`, as the method gives at each point."""
        parts = [(rows.places(part), super(MeanOverTraining, self).score(part)) for part in rows.parts]  # type: ignore[safe-super]
        total = torch.zeros(len(rows.ids), parts[0][1].shape[1], dtype=torch.float64)
        times = torch.zeros(len(rows.ids), 1, dtype=torch.float64)
        for at, values in parts:
            total[at] += values.double()
            times[at] += 1
        return (total / times).to(rows.train.dtype)
