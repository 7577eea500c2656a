"""How the loss of each example changes from the final weights to each member of an ensemble, and products of that."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.over_members import OverMembers
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.statistic import statistic
from hf_influence.errors import MissingRows, StoreMismatch
from hf_influence.store import Rows

Side = Literal["train", "query"]


@dataclass(kw_only=True)
class Deviations(OverMembers):
    """A method that sees an example as its deviations Δℓ_m, one for each member m."""

    kind: ClassVar[str] = "continued_sgd"

    @abstractmethod
    def deviations(self, rows: Selection, side: Side) -> Tensor:
        """Δℓ_m of each example of a split, `[M, n]` in float64, in dataset order."""


@dataclass(kw_only=True)
class LossDeviations(Deviations):
    """Δℓ_m(z) = ℓ(z, θ_m) − ℓ(z, θ*), from the stored losses alone."""

    def select(self, rows: Selection, point: int | None) -> Selection:
        self._refuse(point)
        return rows.over([0, *self.chosen(rows)], queries="queries" in self.needs)

    def record(self, rows: Selection) -> dict[str, Any]:
        return super().record(rows) | {"points": [point for point in rows.points if point]}

    def deviations(self, rows: Selection, side: Side) -> Tensor:
        """See `Deviations`.

        Raises:
            MissingRows: A point lacks an example, or the losses.
        """
        *members, first = (part.train if side == "train" else part.query for part in rows.parts)  # point 0 is last
        for other in members:
            if not torch.equal(first.positions, other.positions):
                raise MissingRows(
                    f"{first.folder} and {other.folder} do not hold the same examples ({len(first)} and {len(other)}), "
                    "and losses are compared example by example. Collect all of them at both points."
                )
        base = statistic(first, "loss", f"method '{self.name}'").double()
        return torch.stack([statistic(other, "loss", f"method '{self.name}'").double() - base for other in members])


@dataclass(kw_only=True)
class LinearDeviations(Deviations):
    """Δℓ_m(z) = ⟨g_z, θ_m − θ*⟩, from the whole rows at the final weights and the displacement of each member."""

    def select(self, rows: Selection, point: int | None) -> Selection:
        self._refuse(point)
        self._check_exact(rows)
        return rows.at(0)

    def record(self, rows: Selection) -> dict[str, Any]:
        return super().record(rows) | {"points": self.chosen(rows)}

    def deviations(self, rows: Selection, side: Side) -> Tensor:
        """See `Deviations`."""
        seen: Rows = rows.train if side == "train" else rows.query
        displacements = [rows.store.displacement(point) for point in self.chosen(rows)]
        out = torch.zeros(len(displacements), len(seen), dtype=torch.float64)
        for block, width in seen.blocks.items():
            moved = [one.of(block) for one in displacements]
            step = torch.stack([torch.zeros(width) if one is None else one.to(seen.dtype) for one in moved])  # [M, d]
            for at, g in seen.chunks(block):
                out[:, at] += (step.to(g) @ g.T).double()  # [M, b]
        return out

    def _check_exact(self, rows: Selection) -> None:
        """The stored blocks give the inner product with a displacement exactly.

        Raises:
            StoreMismatch: They are compressed, or lack a parameter that moved.
        """
        header, path = rows.store.header, rows.store.path
        if header.compress is not None:
            raise StoreMismatch(
                f"{path} holds rows compressed by {header.compress}, which do not give the inner product of a gradient "
                f"with the way of a member. Collect whole rows for method '{self.name}', or use the losses alone: "
                f"method='{self.name.removesuffix('_lin')}'."
            )
        for point in self.chosen(rows):
            missing = [name for name in rows.store.displacement(point).moved() if name not in header.blocks]
            if missing:
                raise StoreMismatch(
                    f"point {point} of {path} has moved in {missing[0]} and {len(missing) - 1} other parameters that "
                    "the rows lack (they were collected with skip=), so the change of the loss cannot be had from "
                    f"them. Collect rows of all parameters, or use method='{self.name.removesuffix('_lin')}'."
                )


@dataclass(kw_only=True)
class DeviationProducts(Deviations, InnerProduct):
    """score[i, q] = 1/M Σ_m Δℓ_m(i) Δℓ_m(q): an inner product in which a row is the M deviations of an example."""

    def score(self, rows: Selection) -> Tensor:
        train, query = self.deviations(rows, "train"), self.deviations(rows, "query").T  # [M, n], [m, M]
        mix = self._mixture(rows.query)
        query = query if mix is None else mix.to(query) @ query  # [q, M]
        return (train.T @ query.T / len(train)).to(rows.train.dtype)


@dataclass(kw_only=True)
class SelfDeviations(Deviations):
    """score[i] = −1/M Σ_m Δℓ_m(i)²."""

    def score(self, rows: Selection) -> Tensor:
        return -self.deviations(rows, "train").square().mean(0)[:, None].to(rows.train.dtype)
