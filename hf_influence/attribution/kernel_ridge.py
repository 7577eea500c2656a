"""Ridge regression on the directions of the gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_influence.attribution.finite import check_finite
from hf_influence.attribution.method import Method
from hf_influence.attribution.over_points import MeanOverTraining
from hf_influence.attribution.products import cosines
from hf_influence.attribution.selection import Selection
from hf_influence.errors import MissingRows


@dataclass(kw_only=True)
class KernelRidge(Method, name="kernel_ridge"):
    """How far a small change of the weights that is right for all queries alike is right for the example.

        score[i] = ⟨u_i, w⟩,   w = argmin Σ_q (1 − ⟨u_q, w⟩)² + λ‖w‖²,   u = −g / ‖g‖, 0 for a zero gradient
                 = Σ_q cos(g_i, v_q) α_q,   α = (K + λI)⁻¹ 1,   K the cosines of the queries with each other

    For two classes this is kernel ridge regression of the labels. The gradient is the residual times the slope of the
    logit margin, g = (p − y) ∂(z_1 − z_0)/∂θ, so dividing by the signed residual and by the length leaves the direction
    t u with t = ±1 the label; the regression learns t from the queries, and the score is t_i times its prediction,
    whatever the size of the residual. For more classes, or tokens, u is the direction in which the given label gains on
    what the model holds against it, and agreement has the same meaning.

    Cost: that of `cosine`, n × q and q × q matrices, O(q³) to solve.
    Use when: there are clean queries, and the labels of the examples may be wrong; queries may be alike or repeated.
    See also: Cosine (λ → ∞, up to scale), Vote (the nearest queries only).
    Source: a method of this library; Saunders et al., Ridge Regression Learning Algorithm in Dual Variables, ICML 1998.
    """

    needs = ("rows", "queries")

    ridge: float = field(default=1.0, metadata={"above": 0})
    """λ, relative to the squared length of a direction, which is 1; > 0."""

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, 1]`; MissingRows if there are no queries."""
        query = rows.query
        if not len(query):
            raise MissingRows(f"{query.folder} holds no examples, so there is nothing to fit. Collect some queries.")
        kernel = cosines(query, query)  # [q, q]
        check_finite(kernel, query)
        ridged = kernel.double() + self.ridge * torch.eye(len(query), dtype=torch.float64)
        weight = torch.linalg.solve(ridged, torch.ones(len(query), 1, dtype=torch.float64))
        return cosines(rows.train, query) @ weight.to(kernel)

    def columns(self, rows: Selection) -> list[Any]:
        return [self.name]


@dataclass(kw_only=True)
class KernelRidgeMean(MeanOverTraining, KernelRidge, name="kernel_ridge_mean"):
    """Kernel ridge regression on the directions of the gradients, on average over training.

        score[i] = 1/|C_i| Σ_{c ∈ C_i} Σ_q cos(g_i, v_q) α_q at θ_c,   α = (K + λI)⁻¹ 1, C_i the points that hold i

    Each point asks the queries with other weights, and what only one of them believes is averaged away.

    Cost: that of `kernel_ridge` at each point.
    Use when: rows were captured during training, with clean queries, and labels may be wrong.
    See also: KernelRidge (one point), LossMean (without queries).
    Source: a method of this library.
    """
