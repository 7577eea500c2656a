"""The damped empirical Fisher matrix, inverted by iteration: nothing but products with the rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_influence.curvature.curvature import DampedPath, Solve
from hf_influence.store import Rows

Product = Callable[[Tensor], Tensor]
"""`v -> A v` for vectors as rows, `[q, d]`, in float64."""


@dataclass(kw_only=True)
class Iterative(DampedPath):
    """`P v = (λI + GᵀG/n)⁻¹ v` by iteration; it says in its `report` how far it has converged.

    The report holds, over all blocks and vectors, the most `iterations` and the largest `residual`
    ‖v − (λI + GᵀG/n) P v‖ / ‖v‖, which is computed anew from the result.
    """

    @abstractmethod
    def iterate(self, product: Product, v: Tensor, rows: Rows, block: str) -> tuple[Tensor, int]:
        """Solve `A x = v` for `v` `[q, d]`, all finite, A = λI + GᵀG/n; the solutions and how many iterations it took.

        Raises:
            NotConverged: With the numbers.
        """

    def prepare(self, rows: Rows, block: str) -> Callable[[float], Solve]:
        square = 0.0
        for _, g in rows.chunks(block):
            square += g.double().square().sum().item()

        def at_damping(damping: float) -> Solve:
            lam = self.strength(square, rows, block, damping)

            def product(v: Tensor) -> Tensor:
                return fisher_product(rows, block, v) + lam * v

            def solve(v: Tensor) -> Tensor:
                if lam == 0:
                    return torch.zeros_like(v)
                v64 = v.double()
                fine = torch.isfinite(v64).all(1) & (lam < torch.inf)  # others are refused by name once scores are NaN
                out = torch.full_like(v64, torch.nan)
                if fine.any():
                    out[fine], iterations = self.iterate(product, v64[fine], rows, block)
                    residual = relative_residual(product(out[fine]), v64[fine]).max().item()
                    self._note(iterations, residual)
                return out.to(v.dtype)

            return solve

        return at_damping

    def _note(self, iterations: int, residual: float) -> None:
        self.report["iterations"] = max(iterations, self.report.get("iterations", 0))
        self.report["residual"] = max(residual, self.report.get("residual", 0.0))


def fisher_product(rows: Rows, block: str, v: Tensor) -> Tensor:
    """`GᵀG v / n` for vectors as rows, `[q, d]` in float64; one pass over the rows.

    In float64, as rounding in float32 would keep an ill-conditioned system from converging.
    """
    out = torch.zeros_like(v)
    for _, g in rows.chunks(block):
        g64 = g.double()
        out.addmm_(v @ g64.T, g64, alpha=1 / len(rows))
    return out


def spectral_norm(product: Product, like: Tensor, iterations: int) -> float:
    """The largest eigenvalue of a symmetric positive matrix by power iteration, never above it.

    Args:
        product: `v -> A v`.
        like: A tensor of the vectors' width and device, `[·, d]`.
        iterations: Products to take; 20 are within a few percent as a rule.
    """
    start = torch.randn(1, like.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, norm = start.to(like.device), 0.0
    for _ in range(iterations):
        v = v / v.norm()
        image = product(v)
        norm, v = float((v * image).sum()), image
    return norm


def relative_residual(image: Tensor, v: Tensor) -> Tensor:
    """‖v − A x‖ / ‖v‖ of each vector from the image A x, `[q]`; 0 for v = 0."""
    length = v.norm(dim=1)
    return (v - image).norm(dim=1) / length.where(length > 0, 1)
