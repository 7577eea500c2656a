"""Ridge regression on the directions of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_influence.attribution.auto.share_wrong import Epoch
from hf_influence.attribution.finite import check_finite
from hf_influence.attribution.method import Method
from hf_influence.attribution.over_points import OverTraining
from hf_influence.attribution.products import cosines
from hf_influence.attribution.selection import Selection
from hf_influence.errors import MissingRows, StoreMismatch
from hf_influence.store import Rows

SAME = 1e-4
"""Of 1: how far a cosine, or a statistic, may be off between two gradients of one example."""


class Fitted(NamedTuple):
    """The regression on some queries.

    Attributes:
        query: Their rows.
        inverse: (K + λI)⁻¹, `[q, q]` in float64.
        copies: Places of queries that are the same one, for each that is there several times.
    """

    query: Rows
    inverse: Tensor
    copies: Sequence[Tensor] = ()

    @property
    def weight(self) -> Tensor:
        """α, `[q]`."""
        return self.inverse.sum(1)

    @property
    def left_out(self) -> Tensor:
        """What the score of each query would be by the others, `[q]`; copies of it are not among those.

        1 − α_q / (K + λI)⁻¹_qq, or 1 − ((K + λI)⁻¹_SS)⁻¹ α_S for copies S.
        """
        return 1 - self._own

    @property
    def _own(self) -> Tensor:
        """By how much each query and its copies raise its score, `[q]`."""
        own = self.weight / self.inverse.diagonal()
        for same in self.copies:
            own[same] = torch.linalg.solve(self.inverse[same][:, same], self.weight[same])
        return own

    def turned(self, wrong: Rows) -> Tensor:
        """What the score of each query would be with the row that it has in `wrong`, by the other queries, `[q]`.

        That may be the row of the same query under another label, or of another point of training.

        Raises:
            StoreMismatch: `wrong` does not hold the same queries.
        """
        if not torch.equal(self.query.positions, wrong.positions):
            raise StoreMismatch(
                f"{wrong.folder} does not hold the queries of {self.query.folder}, under other labels. Collect both "
                "anew."
            )
        across = cosines(wrong, self.query).double()  # [q, q]
        check_finite(across, wrong)
        # α without query q is α − (α_q / inverse_qq) inverse_q, without copies S α − inverse_S (inverse_SS)⁻¹ α_S
        own = self._own
        share = own * (across * self.inverse).sum(1)
        for same in self.copies:
            share[same] = across[same] @ self.inverse[:, same] @ own[same]
        return across @ self.weight - share


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

    needs: ClassVar[tuple[str, ...]] = ("rows", "queries")
    joint = True

    ridge: float = field(default=1.0, metadata={"above": 0})
    """λ, relative to the squared length of a direction, which is 1; > 0."""

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, 1]`; MissingRows if there are no queries."""
        return self._applied(rows, self.fit(rows.query).weight)[:, None]

    def fit(self, query: Rows) -> Fitted:
        """The regression on these queries.

        Raises:
            MissingRows: There are no queries.
        """
        if not len(query):
            raise MissingRows(f"{query.folder} holds no examples, so there is nothing to fit. Collect some queries.")
        kernel = cosines(query, query)  # [q, q]
        check_finite(kernel, query)
        inverse = torch.linalg.inv(kernel.double() + self.ridge * torch.eye(len(query), dtype=torch.float64))
        return Fitted(query, inverse, copies(query, kernel))

    def _applied(self, rows: Selection, weight: Tensor) -> Tensor:
        """The scores of the examples, `[n]`."""
        return cosines(rows.train, rows.query) @ weight.to(rows.train.dtype)


@dataclass(kw_only=True)
class KernelRidgeMean(OverTraining, KernelRidge, name="kernel_ridge_mean"):
    """Kernel ridge regression on the directions of the gradients, on average over training.

        score[i] = Σ_c w_c s_c[i] / Σ_c w_c,   s_c the score of `kernel_ridge` at point c, over those that hold i
        w_c = max(0, share of s_c > 0 − ½)² / std(s_c), or 1 where these are 0 at all points that hold i

    Each point asks the queries with other weights, and what only one of them believes is averaged away. Most examples
    are right, so at a point that tells right from wrong most scores are positive; where half of them are, the model had
    not learnt anything yet, and the point counts nothing.

    Cost: that of `kernel_ridge` at each point.
    Use when: rows were captured during training, with clean queries, and labels may be wrong.
    See also: KernelRidge (one point), VoteMean (for language models), LossMean (without queries).
    Source: a method of this library.
    """

    needs = ("rows", "queries", "points")

    weighted: bool = True
    """Points by how far the examples agree with the queries; otherwise their mean."""

    @cached_property
    def _seen(self) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, float]]:
        """At each point of training: the places of its examples among all, and what an epoch is made of."""
        return []

    def epochs(self, among: Tensor) -> list[Epoch]:
        """What `score` saw at the points of training: of some examples, and of the queries with each left out.

        Args:
            among: Whether it is of each example, `[n]`.
        """
        return [
            Epoch.of(scores[among[at]], None if steps is None else steps[among[at]], queries, before, visits)
            for at, scores, steps, queries, before, visits in self._seen
        ]

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, 1]`; MissingRows if a point has no queries."""
        scores = []  # each [b]
        self._seen.clear()
        earlier: Rows | None = None
        visits = 0.0
        for part in rows.parts:
            query, fitted = part.query, self.fit(part.query)
            scores.append(self._applied(part, fitted.weight).double())
            if not part.points[0]:  # the end
                continue
            same = same_queries(earlier, query)
            before = None if same is None else fitted.turned(same)
            steps = part.train.stats.get("step")
            self._seen.append((rows.places(part), scores[-1], steps, fitted.left_out, before, visits))
            earlier = query
            visits += rows.share_in(part)
        weights = [weight_of(score) if self.weighted else 1.0 for score in scores]
        weights = weights if any(weights) else [1.0] * len(weights)
        total, times, plain, count = torch.zeros(4, len(rows.ids), dtype=torch.float64)  # each [n]
        for part, score, weight in zip(rows.parts, scores, weights, strict=True):
            at = rows.places(part)
            total[at] += weight * score
            times[at] += weight
            plain[at] += score
            count[at] += 1
        mean = torch.where(times > 0, total / times, plain / count)
        return mean.to(rows.train.dtype)[:, None]


def copies(rows: Rows, kernel: Tensor) -> list[Tensor]:
    """Places of rows that are of the same example, for each that is there several times.

    Args:
        rows: The rows.
        kernel: Their cosines, `[q, q]`.
    """
    same = kernel > 1 - SAME
    for name in ("loss", "length", "grad_norm"):
        if (values := rows.stats.get(name)) is not None:
            values = values.double()
            same &= (values - values[:, None]).abs() <= SAME * values.abs()
    same.fill_diagonal_(True)
    first = same.int().argmax(1)
    return [(first == one).nonzero()[:, 0] for one in first.unique() if int((first == one).sum()) > 1]


def same_queries(earlier: Rows | None, query: Rows) -> Rows | None:
    """The earlier rows, if they are of the same queries."""
    return earlier if earlier is not None and torch.equal(earlier.positions, query.positions) else None


def weight_of(score: Tensor) -> float:
    """How far most of the scores `[n]` of a point are positive, squared, over their spread."""
    if len(score) < 2 or not score.std() > 0:
        return 0.0
    return max(0.0, float((score > 0).double().mean()) - 0.5) ** 2 / float(score.std())
