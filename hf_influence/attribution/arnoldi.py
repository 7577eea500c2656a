"""Influence on the dominant eigenvectors of the true Hessian."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.errors import MissingRows
from hf_influence.store import Rows
from hf_influence.store.artifacts import read_artifact


@dataclass(kw_only=True)
class OnEigenvectors(Method):
    """Rows as coordinates in the eigenvectors of the Hessian, which are over all blocks together."""

    top: int | None = field(default=None, metadata={"least": 1})
    """How many eigenpairs to use, those with the largest absolute values; by default all that were collected."""
    positive: bool = False
    """Leave out eigenvalues below zero, which a model that was not trained to a minimum has."""

    def select(self, rows: Selection, point: int | None) -> Selection:
        """The rows that the method looks at; StoreMismatch if they are compressed."""
        rows.store.check_whole("the eigenvectors of the Hessian are those of whole rows")
        return super().select(rows, point)

    def coordinates(self, train: Rows, *others: Rows) -> tuple[Tensor, list[Tensor]]:
        """The eigenvalues `[p]`, and the coordinates of the training rows and of each of the others, `[n, p]`.

        Raises:
            MissingRows: No eigenpairs were collected, fewer than are asked for, or none above zero.
        """
        pairs = read_artifact(train, "hessian", f"method '{self.name}'")
        values = pairs.tensor("values")
        if self.top is not None and self.top > len(values):
            raise MissingRows(
                f"{pairs.folder} holds {len(values)} eigenpairs of the Hessian and top={self.top} were asked for. Use "
                f"all of them, or collect more: collect_hessian(model, dataset, path, top={self.top}, "
                f"iterations={2 * self.top})."
            )
        used = torch.arange(len(values))[: self.top]
        used = used[values[used] > 0] if self.positive else used
        if self.positive and not len(used):
            raise MissingRows(
                f"none of the eigenvalues that {pairs.folder} holds is above zero, so positive=True leaves nothing to "
                "score by. Train on, as these weights are at no minimum, or leave positive=True out."
            )
        parts = (train, *others)
        out = [torch.zeros(len(rows), len(used), dtype=rows.dtype) for rows in parts]
        for block in train.blocks:
            vectors = pairs.tensor(f"vectors.{block}")[used].to(train.dtype)  # [p, d]
            for rows, sums in zip(parts, out, strict=True):
                for at, g in rows.chunks(block):
                    sums[at] += g @ vectors.T  # [b, p]
        return values[used].to(train.dtype), out


@dataclass(kw_only=True)
class Arnoldi(OnEigenvectors, InnerProduct, name="arnoldi"):
    """Influence with the inverse of the true Hessian on its dominant eigenvectors, all blocks together.

        score[i, q] = Σ_j ⟨g_i, u_j⟩ ⟨u_j, v_q⟩ / λ_j,   H u_j = λ_j u_j,   |λ_1| ≥ |λ_2| ≥ …

    Cost: O((n + q) d p) for p eigenpairs; before that `collect_hessian`, some hundreds of products with the Hessian.
    Use when: the model is at hand, and what the true Hessian says is wanted at the price of a short training run.
    See also: SelfArnoldi (without queries), Fisher (from the rows alone), Ekfac.
    Source: Schioppa et al., Scaling Up Influence Functions, AAAI 2022, alg. 1 and eq. 5.
    """

    needs = ("rows", "queries", "hessian")

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, q]`; MissingRows if the mean of no queries was asked for."""
        values, (train, query) = self.coordinates(rows.train, rows.query)
        mix = self._mixture(rows.query)
        query = query if mix is None else mix @ query
        return (train / values) @ query.T


@dataclass(kw_only=True)
class SelfArnoldi(OnEigenvectors, name="self_arnoldi"):
    """Self-influence with the inverse of the true Hessian on its dominant eigenvectors.

        score[i] = −Σ_j ⟨g_i, u_j⟩² / λ_j

    Cost: O(n d p) for p eigenpairs; before that `collect_hessian`.
    Use when: there are no clean queries and the model is at hand.
    See also: Arnoldi (against queries), SelfFisher (from the rows alone).
    Source: Schioppa et al., Scaling Up Influence Functions, AAAI 2022.
    """

    needs = ("rows", "hessian")

    def score(self, rows: Selection) -> Tensor:
        values, (train,) = self.coordinates(rows.train)
        return -(train.square() / values).sum(1, keepdim=True)
