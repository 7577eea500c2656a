"""The inner product of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_influence.attribution.given import one_for_each
from hf_influence.attribution.method import Method
from hf_influence.attribution.products import inner_products
from hf_influence.attribution.selection import Selection
from hf_influence.curvature import Identity
from hf_influence.errors import BadSetting, MissingRows
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

    queries: str | Sequence[Any] = "each"
    """"each" for one column for each query, "mean" for one column for their mean, or the group of each query in dataset
    order, an integer or a string, for one column for the mean of each group."""

    def __post_init__(self) -> None:
        if isinstance(self.queries, Tensor | np.ndarray):
            self.queries = self.queries.tolist()
        super().__post_init__()
        if isinstance(self.queries, str):
            known = self.queries in ("each", "mean")
        else:
            known = isinstance(self.queries, Sequence) and all(isinstance(group, int | str) for group in self.queries)
        if not known:
            raise BadSetting(
                f"method '{self.name}': queries={self.queries!r} must be 'each', 'mean', or a list of groups, an "
                "integer or a string for each query."
            )

    def score(self, rows: Selection) -> Tensor:
        return self.products(rows.train, rows.query)

    def columns(self, rows: Selection) -> list[Any] | None:
        if isinstance(self.queries, str):
            return ["mean"] if self.queries == "mean" else super().columns(rows)
        return list(dict.fromkeys(self._groups(rows.query)))

    def products(self, train: Rows, query: Rows, weight: Tensor | None = None) -> Tensor:
        """`Σ_blocks ⟨g_i, P v_q⟩`, `[n, q]`, each query multiplied by its `weight` `[m]` first.

        Raises:
            MissingRows: The mean of no queries was asked for.
            BadSetting: The groups are not as many as the queries.
        """
        mix = self._mixture(query)
        mix = mix if mix is None or weight is None else mix * weight

        def prepare(block: str, v: Tensor) -> Tensor:
            if mix is not None:
                v = mix @ v
            elif weight is not None:
                v = v * weight[:, None]
            return self.fit(train, block)(v)

        return inner_products(train, query, len(query) if mix is None else len(mix), prepare)

    def _mixture(self, query: Rows) -> Tensor | None:
        """The part of each query in each column, `[q, m]`; `None` where each has a column of its own."""
        if self.queries == "each":
            return None
        if self.queries == "mean":
            if not len(query):
                raise MissingRows(f"{query.folder} holds no examples, so there is no mean query. Collect some queries.")
            return torch.full((1, len(query)), 1 / len(query), dtype=query.dtype)
        groups = self._groups(query)
        names = list(dict.fromkeys(groups))
        member = torch.tensor([[group == other for other in groups] for group in names], dtype=query.dtype)
        member = member.reshape(len(names), len(groups))  # [q, m], also of none
        return member / member.sum(1, keepdim=True)

    def _groups(self, query: Rows) -> list[Any]:
        """That of each query, where groups were given."""
        return one_for_each(self.queries, query, self.name, "queries", "groups", "query")
