"""The mean of per-example inverses (DataInf)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_influence.curvature.curvature import DampedPath, Solve
from hf_influence.store import Rows


@dataclass(kw_only=True)
class MeanInverse(DampedPath):
    """The inverse of the mean is replaced by the mean of the inverses, which Sherman-Morrison gives in closed form.

        P v = 1/n Σᵢ (λI + gᵢ gᵢᵀ)⁻¹ v = (v − 1/n Σᵢ gᵢ ⟨gᵢ, v⟩ / (λ + ‖gᵢ‖²)) / λ

    Cost: one pass for the norms; then two matrix products a solve, O(n q d), and no n × n or d × d matrix.
    Source: Kwon et al., DataInf, ICLR 2024. https://arxiv.org/abs/2310.00902
    """

    def prepare(self, rows: Rows, block: str) -> Callable[[float], Solve]:
        square = torch.zeros(len(rows), dtype=torch.float64)
        for at, g in rows.chunks(block):
            square[at] = torch.linalg.vector_norm(g, dim=1, dtype=torch.float64).square()  # [b]
        total = square.sum().item()

        def at_damping(damping: float) -> Solve:
            lam = self.strength(total, rows, block, damping)

            def solve(v: Tensor) -> Tensor:
                if lam == 0:
                    return torch.zeros_like(v)
                pull = torch.zeros_like(v)  # [q, d]
                for at, g in rows.chunks(block):
                    weight = (v @ g.T) / (lam + square[at]).to(v.dtype)  # [q, b]
                    pull.addmm_(weight, g)
                return (v - pull / len(rows)) / lam

            return solve

        return at_damping
