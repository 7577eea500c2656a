"""The Kronecker-factored eigenbasis with corrected eigenvalues (EK-FAC)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_influence.curvature.curvature import DampedPath, Solve
from hf_influence.store import Rows
from hf_influence.store.artifacts import read_artifact


@dataclass(kw_only=True)
class KroneckerEigenbasis(DampedPath):
    """The empirical Fisher matrix taken to be diagonal in the eigenvectors of its Kronecker factors.

        P v = U (Λ + λI)⁻¹ Uᵀ v,   U = U_S ⊗ U_A,   Λ = 1/n Σᵢ (Uᵀ gᵢ)²

    for a weight `[m, n]`: `U_S [m, m]` and `U_A [n, n]` are the eigenvectors of the second moments of its two factors,
    collected from the model; Λ comes from the rows. A bias has no second factor.

    Cost: O(n_rows (m + n) d) for Λ and the same for a solve; memory for the two bases of one block.
    Source: George et al., Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis, NeurIPS 2018;
    Grosse et al., Studying Large Language Model Generalization with Influence Functions, 2023.
    """

    def prepare(self, rows: Rows, block: str) -> Callable[[float], Solve]:
        """Take Λ from the rows; it serves every λ.

        Raises:
            MissingRows: The factors were not collected.
        """
        bases = read_artifact(rows, "ekfac", "EK-FAC")
        shape = rows.header.blocks[block]
        m, n = shape if len(shape) == 2 else (rows.blocks[block], 1)
        left = bases.tensor(f"left.{block}").to(rows.dtype)
        right = bases.tensor(f"right.{block}").to(rows.dtype) if f"right.{block}" in bases.names else None

        def turned(v: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
            """`[q, m n] -> [q, m n]`."""
            grid = left @ v.unflatten(1, (m, n))
            return (grid if right is None else grid @ right).flatten(1)

        def into(v: Tensor) -> Tensor:
            return turned(v, left.T, right)

        def back(v: Tensor) -> Tensor:
            return turned(v, left, None if right is None else right.T)

        spectrum = torch.zeros(rows.blocks[block], dtype=torch.float64)
        for _, g in rows.chunks(block):
            spectrum += into(g).double().square().sum(0)

        def at(damping: float) -> Solve:
            lam = self.strength(spectrum.sum().item(), rows, block, damping)
            if lam == 0:
                return torch.zeros_like
            divisor = (spectrum / max(1, len(rows)) + lam).to(rows.dtype)  # [d]
            return lambda v: back(into(v) / divisor)

        return at
