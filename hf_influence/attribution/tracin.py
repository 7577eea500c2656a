"""Inner products of gradients, summed over the points of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.over_points import OverTraining
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.self_influence import SelfInfluence
from hf_influence.errors import MissingRows


@dataclass(kw_only=True)
class WeightedPoints(OverTraining):
    """A sum over points, each row's term times the learning rate of its step.

    A method inherits from this first, and second from the method for one point that gives the terms.
    """

    weighted: bool = True
    """Each product times the learning rate of the step; otherwise their mean over the points."""

    def weights(self, part: Selection, n_points: int) -> Tensor:
        """What the term of each training row of a point counts, `[b]`.

        Raises:
            MissingRows: The learning rate is wanted and not known.
        """
        train = part.train
        if not self.weighted:
            return torch.full((len(train),), 1 / n_points, dtype=torch.float64)
        rate = part.of_step("learning_rate")
        if len(train) and rate is None:
            raise MissingRows(
                f"{train.folder} holds rows without a learning rate, as rows have that were not captured in a training "
                "step, or at a checkpoint up to which the Trainer had logged none. Pass weighted=False for the plain "
                "mean over the points."
            )
        return torch.zeros(0) if rate is None else rate

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, q]`, one column without queries."""

        def term(part: Selection) -> Tensor:
            own = super(WeightedPoints, self).score(part)  # type: ignore[safe-super]  # [b, q]
            return self.weights(part, len(rows.parts)).to(own)[:, None] * own

        return self.summed(rows, term)


@dataclass(kw_only=True)
class TracIn(WeightedPoints, InnerProduct, name="tracin"):
    """How far the example's own training steps have lowered the loss of the query, to first order.

        score[i, q] = Σ_c η_c(i) Σ_blocks ⟨g_i(θ_c), v_q(θ_c)⟩,   c over the points, η the rate of the step

    With `weighted=False` the mean 1/C Σ_c over the C points. A point that lacks an example adds nothing to its score.
    With rows captured during training g_i is that of the step that saw i, at its weights and under its dropout; v_q is
    taken at the weights with which the point ends. Without such rows the points are the checkpoints in the store.

    Cost: that of the inner product at each point.
    Use when: rows were captured during training, with queries, and what is memorised at the end should still count.
    See also: InnerProduct (one point), SelfTracIn, LossMean and Aum (without queries).
    Source: Pruthi et al., TracIn, NeurIPS 2020; GEX, eq. 5 (the mean).
    """

    needs: ClassVar[tuple[str, ...]] = ("rows", "queries", "points", "learning_rate")


@dataclass(kw_only=True)
class SelfTracIn(WeightedPoints, SelfInfluence, name="self_tracin"):
    """How little the example's own training steps have lowered its own loss: hard and mislabelled ones come lowest.

        score[i] = −Σ_c η_c(i) ‖g_i(θ_c)‖²,   c over the points, η the rate of the step

    With `weighted=False` the mean 1/C Σ_c over the C points. A point that lacks an example adds nothing to its score.

    Cost: one pass over the rows of each point.
    Use when: rows were captured during training and there are no clean queries.
    See also: SelfInfluence (one point), TracIn (against queries), LossMean and Aum (from statistics alone).
    Source: Pruthi et al., TracIn, NeurIPS 2020, sec. 3 (self-influence); Thakkar et al., Self-Influence Guided Data
    Reweighting, EMNLP 2023.
    """

    needs = ("rows", "points", "learning_rate")
