"""Influence by approximate unrolling of training (SOURCE)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.over_points import OverTraining
from hf_influence.attribution.segments import Segment, segments
from hf_influence.attribution.selection import Selection
from hf_influence.errors import BadSetting


@dataclass(kw_only=True)
class Unrolled(OverTraining):
    """A method that follows what an example did in each segment of training to the end of it."""

    segments: int = field(default=3, metadata={"least": 1})
    """Into how many stretches of as many points each training is cut; at most as many as there are points."""
    step_mass: Sequence[float] | None = None
    """The sum of the learning rates over the optimizer steps of each segment; by default from the stored steps and
    rates. Steps without rows, between two points or before the first one, count with the rate of the next step that
    has rows."""
    thin: bool = True
    """Where a block has more columns than there are examples, its curvature is that of one row of each example in a
    segment, from one of the points, and needs an n × n matrix; with False that of all rows, n times the points."""

    def __post_init__(self) -> None:
        super().__post_init__()
        masses = self.step_mass
        if masses is not None and (
            isinstance(masses, str)
            or not isinstance(masses, Sequence)
            or not all(isinstance(mass, int | float) and mass >= 0 and isfinite(mass) for mass in masses)
        ):
            raise BadSetting(
                f"method '{self.name}': step_mass={masses!r} must be a list of numbers, at least 0, one for each "
                "segment."
            )

    def record(self, rows: Selection) -> dict[str, Any]:
        """The settings, with the number of segments and their masses as they were used."""
        cut = self.cut(rows)
        used = {"segments": len(cut), "step_mass": [segment.mass for segment in cut]} if cut else {}
        return super().record(rows) | used

    def unrolled(self, cut: Sequence[Segment], block: str, v: Tensor) -> Iterator[tuple[Segment, Tensor]]:
        """From the last segment to the first: it, and what to multiply its gradients with.

        Args:
            cut: Training, in segments.
            block: Of the parameters.
            v: Gradients at the end of training, `[q, d]`.

        Yields:
            Segment l, and `φ(H_l) Π_{k>l} exp(−T_k H_k) v`, `[q, d]`.
        """
        for segment in reversed(cut):
            apply = segment.curvature(block, self.thin)
            yield segment, apply(segment.moved, v)
            if segment is not cut[0]:
                v = apply(segment.kept, v)

    def cut(self, rows: Selection) -> list[Segment]:
        return segments(rows, self.segments, self.step_mass, self.name)


@dataclass(kw_only=True)
class Tda(Unrolled, InnerProduct, name="tda"):
    """How far the example's own training steps have lowered the query's final loss, as later steps undo part of it.

        score[i, q] = 1/n Σ_l Σ_blocks ⟨φ(H_l) ḡ_{i,l}, Π_{k>l} exp(−T_k H_k) v_q⟩,   φ(H) = (I − exp(−T_l H)) H⁻¹

    over the segments l of training, consecutive points taken as gradient descent with one curvature: H_l is the mean of
    g gᵀ over the rows of the segment, T_l the sum of the learning rates of its steps, ḡ_{i,l} the mean gradient of i
    over the points that hold it (nothing where none does). φ(σ) is T_l at σ = 0, so there is no damping. v_q is taken
    at the weights after training. Early segments count less where curvature is strong, as training forgets. For T → 0
    the score is in proportion to TracIn with the final queries, for T → ∞ to the influence with H_L⁻¹, undamped, where
    the rows of the last segment span the block. What is unrolled is plain gradient descent; Adam divides its steps by
    √ŝ, and its T would be larger by about as much.

    Cost: a segment and block, O(p n d q) for its p points, and the eigenvectors of a matrix of size min(n, d): O(n² d
    + 10 n³) or O(p n d² + 10 d³). Memory for the rows of n examples, the queries and that matrix of one block.
    Use when: rows were captured during training, which was cut short of convergence or whose order matters.
    See also: SelfTda (without queries), TracIn (no curvature), Fisher (training to convergence).
    Source: Bae et al., Training Data Attribution via Approximate Unrolled Differentiation, 2024, arXiv 2405.12186.
    """

    needs = ("rows", "queries", "points", "learning_rate")
    at_end: ClassVar[frozenset[str]] = frozenset({"queries"})
    """What of it is needed at the end of training alone."""

    query_point: int | None = field(default=None, metadata={"least": 0})
    """The point of the query rows; by default 0, the weights after training, or the last of the points of training if
    point 0 has no queries."""

    def select(self, rows: Selection, point: int | None) -> Selection:
        self._refuse(point)
        several = rows.over(self.chosen(rows), queries=False)
        asked = self.query_point
        if asked is None:
            final = rows.at(0)
            at_end = final.query_split in rows.store.splits(0) and not final.query.statistics_only
            asked = 0 if at_end else next((point for point in reversed(several.points) if point), 0)
        return replace(several, query_point=asked)

    def record(self, rows: Selection) -> dict[str, Any]:
        return super().record(rows) | {"query_point": rows.query_point}

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, q]`; MissingRows if the mean of no queries was asked for."""
        mix, cut = self._mixture(rows.query), self.cut(rows)
        total = torch.zeros(len(rows.ids), len(self.columns(rows) or ()), dtype=rows.train.dtype)  # [n, q]
        for block in rows.train.blocks:
            v = rows.query.block(block)
            for segment, w in self.unrolled(cut, block, v if mix is None else mix @ v):
                for at, g in segment.rows(block):
                    total[at] += g @ w.T / segment.times[at][:, None]
        return total / max(1, len(rows.ids))


@dataclass(kw_only=True)
class SelfTda(Unrolled, name="self_tda"):
    """How little the example's own training steps have lowered its own final loss, as later steps undo part of it.

        score[i] = −1/n Σ_l Σ_blocks ⟨φ(H_l) ḡ_{i,l}, Π_{k>l} exp(−T_k H_k) g_i⟩,   φ(H) = (I − exp(−T_l H)) H⁻¹

    with g_i the last captured gradient of i, and all else as for `tda`.

    Cost: that of `tda` with as many queries as there are examples, but no n × n scores: O(n² d) a segment and block.
    Memory for the rows of n examples three times over.
    Use when: rows were captured during training and there are no clean queries.
    See also: Tda (against queries), SelfTracIn (no curvature), SelfFisher (training to convergence).
    Source: Bae et al., Training Data Attribution via Approximate Unrolled Differentiation, 2024, arXiv 2405.12186.
    """

    needs = ("rows", "points", "learning_rate")

    def score(self, rows: Selection) -> Tensor:
        n, cut = len(rows.ids), self.cut(rows)
        total = torch.zeros(n, 1, dtype=rows.train.dtype)
        for block, width in rows.train.blocks.items():
            last = torch.zeros(n, width, dtype=rows.train.dtype)  # [n, d]
            for segment in cut:
                for at, g in segment.rows(block):
                    last[at] = g
            for segment, w in self.unrolled(cut, block, last):
                for at, g in segment.rows(block):
                    total[at] -= (g * w[at]).sum(1, keepdim=True) / segment.times[at][:, None]
        return total / max(1, n)
