"""A vote of the queries that know an example best."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_influence.attribution.method import Method
from hf_influence.attribution.over_points import MeanOverTraining
from hf_influence.attribution.products import cosines
from hf_influence.attribution.selection import Selection
from hf_influence.errors import MissingRows


@dataclass(kw_only=True)
class Vote(Method, name="vote"):
    """Whether the queries whose gradients are most alike or most opposed to the example's are for or against it.

        score[i] = Σ_{q ∈ N_i} cos(g_i, v_q),   N_i the k queries with the largest |cos(g_i, v_q)|

    The other queries, whose small cosines are mostly noise, do not count.

    Cost: that of `cosine`, and an n × q matrix.
    Use when: there are some tens of clean queries or more, of many kinds, and the labels of the examples may be wrong.
    See also: Cosine (all queries count), KernelRidge (they count by how much they add to each other).
    Source: a method of this library.
    """

    needs = ("rows", "queries")
    joint = True

    k: int = field(default=20, metadata={"least": 1})
    """Queries that vote on an example; all of them if there are fewer."""

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, 1]`; MissingRows if there are no queries."""
        query = rows.query
        if not len(query):
            raise MissingRows(f"{query.folder} holds no examples, so there is nobody to vote. Collect some queries.")
        cos = cosines(rows.train, query)  # [n, q]
        nearest = cos.abs().topk(min(self.k, len(query)), dim=1).indices
        return cos.gather(1, nearest).sum(1, keepdim=True)

    def record(self, rows: Selection) -> dict[str, Any]:
        return super().record(rows) | {"k": min(self.k, len(rows.query))}


@dataclass(kw_only=True)
class VoteMean(MeanOverTraining, Vote, name="vote_mean"):
    """The vote of the queries that know an example best, on average over training.

        score[i] = 1/|C_i| Σ_{c ∈ C_i} Σ_{q ∈ N_i(θ_c)} cos(g_i(θ_c), v_q(θ_c)),   C_i the points that hold i

    Cost: that of `vote` at each point.
    Use when: rows were captured during training, with clean queries of many kinds, and labels may be wrong.
    See also: Vote (one point), KernelRidgeMean.
    Source: a method of this library.
    """
