"""Self-influence: each example compared with itself, and the one loop that does so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.curvature import EmpiricalFisher, Identity, MeanInverse


@dataclass(kw_only=True)
class SelfInfluence(Identity, Method, name="self_ip"):
    """How little an example's own step changes its own loss: hard, odd and mislabelled examples come lowest.

        score[i] = −Σ_blocks ⟨g_i, g_i⟩ = −‖g_i‖²

    A method that puts a curvature `P` in between inherits from a `Curvature` first and from this second.

    Cost: one pass over the rows, O(n d).
    Use when: there are no clean queries to compare with.
    See also: SelfDataInf, SelfFisher (with curvature), the norms `outlier_l1` and `outlier_l2`.
    Source: Pruthi et al., TracIn, NeurIPS 2020.
    """

    needs: ClassVar[tuple[str, ...]] = ("rows",)

    def score(self, rows: Selection) -> Tensor:
        n = len(rows.train)
        out = torch.zeros(n, 1, dtype=rows.train.dtype)
        for block in rows.train.blocks:
            solve = self.fit(rows.train, block)
            for at, g in rows.train.chunks(block, per_row=n if self.meets_rows else 0):
                out[at] -= (g * solve(g)).sum(1, keepdim=True)  # [b, 1]
        return out


@dataclass(kw_only=True)
class SelfDataInf(MeanInverse, SelfInfluence, name="self_datainf"):
    """Self-influence with the inverse curvature of DataInf.

        score[i] = −Σ_blocks ⟨g_i, P g_i⟩,   P v = 1/n Σ_k (λI + g_k g_kᵀ)⁻¹ v

    Cost: O(n² d) in time, streamed: no n × n matrix.
    Use when: there are no clean queries, and too many rows for the exact Fisher matrix.
    See also: SelfFisher (exact), SelfInfluence (no curvature).
    Source: Kwon et al., DataInf, ICLR 2024; Bejan et al., Make Every Example Count, EMNLP 2023.
    """


@dataclass(kw_only=True)
class SelfFisher(EmpiricalFisher, SelfInfluence, name="self_fisher"):
    """Self-influence with the exact inverse of the damped empirical Fisher matrix.

        score[i] = −Σ_blocks ⟨g_i, (λI + GᵀG/n)⁻¹ g_i⟩

    Cost: O(n² d + n³) a block and an n × n matrix, or O(n d²) and a d × d matrix, whichever is less.
    Use when: there are no clean queries, and up to some ten thousand rows or compressed rows.
    See also: SelfDataInf (approximate), Fisher (against queries).
    Source: Koh & Liang, Understanding Black-box Predictions via Influence Functions, ICML 2017.
    """
