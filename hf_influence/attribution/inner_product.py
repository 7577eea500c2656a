"""The inner product of gradients, and the one loop of all methods that compare rows with queries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.curvature import Identity
from hf_influence.errors import MissingRows
from hf_influence.store import Rows


@dataclass(kw_only=True)
class InnerProduct(Identity, Method, name="ip"):
    """How far a step along the example's gradient lowers the loss of the query.

        score[i, q] = Σ_blocks ⟨g_i, v_q⟩

    A method that puts a curvature `P` in between, ⟨g_i, P v_q⟩, inherits from a `Curvature` first and from this second.

    Cost: one pass over the rows, O(n q d); memory for the queries of one block.
    Use when: a first look, or when the rows come from several checkpoints anyway.
    See also: Cosine (long gradients do not dominate), DataInf and Fisher (with curvature), TracIn (over training).
    Source: Pruthi et al., TracIn, NeurIPS 2020; Revisiting Inner Product (IP Ensemble), eq. 2.
    """

    needs: ClassVar[tuple[str, ...]] = ("rows", "queries")

    queries: str = field(default="each", metadata={"choices": ("each", "mean")})
    """One column for each query, or one column for their mean."""

    def score(self, rows: Selection) -> Tensor:
        return self.products(rows.train, rows.query)

    def columns(self, rows: Selection) -> list[Any] | None:
        return ["mean"] if self.queries == "mean" else super().columns(rows)

    def products(self, train: Rows, query: Rows, weight: Tensor | None = None) -> Tensor:
        """`Σ_blocks ⟨g_i, P v_q⟩`, `[n, q]`, each query multiplied by its `weight` `[m]` first.

        Raises:
            MissingRows: The mean of no queries was asked for.
        """
        mean = self.queries == "mean"
        if mean and not len(query):
            raise MissingRows(f"{query.folder} holds no examples, so there is no mean query. Collect some queries.")
        out = torch.zeros(len(train), 1 if mean else len(query), dtype=train.dtype)  # [n, q], in the order of the disk
        for block in train.blocks:
            v = query.block(block)  # [m, d]
            v = v if weight is None else v * weight[:, None]
            v = self.fit(train, block)(v.mean(0, keepdim=True) if mean else v)  # [q, d]
            start, places = 0, []
            for at, g in train.chunks(block):
                out[start : start + len(at)].addmm_(g, v.T)  # [b, q]
                start += len(at)
                places.append(at)
        return out[torch.cat(places).argsort()] if len(train) else out
