"""The inner product of gradients, summed over the points of training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.over_points import OverPoints
from hf_influence.attribution.selection import Selection
from hf_influence.errors import MissingRows


@dataclass(kw_only=True)
class TracIn(OverPoints, InnerProduct, name="tracin"):
    """How far the example's own training steps have lowered the loss of the query, to first order.

        score[i, q] = Σ_c η_c(i) Σ_blocks ⟨g_i(θ_c), v_q(θ_c)⟩,   c over the points, η the rate of the step

    With `weighted=False` the mean 1/C Σ_c over the C points. A point that lacks an example adds nothing to its score.
    With rows captured during training g_i is that of the step that saw i, at its weights and under its dropout; v_q is
    taken at the weights with which the point ends.

    Cost: that of the inner product at each point.
    Use when: rows were captured during training, with queries, and what is memorised at the end should still count.
    See also: InnerProduct (one point), LossMean and Aum (without queries).
    Source: Pruthi et al., TracIn, NeurIPS 2020; GEX, eq. 5 (the mean).
    """

    needs = ("rows", "queries", "points")

    weighted: bool = True
    """Each product times the learning rate of the step; otherwise their mean over the points."""

    def score(self, rows: Selection) -> Tensor:
        total = torch.zeros(len(rows.ids), len(self.columns(rows) or ()), dtype=rows.train.dtype)  # [n, q]
        for part in rows.parts:
            products = self.products(part.train, part.query)  # [b, q]
            total[rows.places(part)] += self._weights(part, len(rows.parts)).to(total)[:, None] * products
        return total

    def _weights(self, part: Selection, n_points: int) -> Tensor:
        """What the product of each training row of a point counts, `[b]`.

        Raises:
            MissingRows: The learning rate is wanted and not known.
        """
        train = part.train
        if not self.weighted:
            return torch.full((len(train),), 1 / n_points, dtype=torch.float64)
        stats = train.stats
        if len(train) and "learning_rate" not in stats:
            raise MissingRows(
                f"{train.folder} holds rows without a learning rate, as rows have that were not captured in a training "
                "step. Pass weighted=False for the plain mean over the points."
            )
        return stats.get("learning_rate", torch.zeros(0))
