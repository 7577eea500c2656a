"""The damped empirical Fisher matrix, inverted exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from hf_influence.curvature.curvature import DampedPath, Solve
from hf_influence.store import Rows

WIDE = 40_000
"""Columns of a block over its damping from which on products of the Gram side are taken in float64: λ is relative to
the mean eigenvalue, so the largest one over λ, which multiplies the rounding, grows with both."""

TILE = 256  # rows in a tile of the Gram matrix: large enough for fast products, small enough to skip half of them


@dataclass(kw_only=True)
class EmpiricalFisher(DampedPath):
    """The exact damped inverse, by whichever side of `G` `[n, d]` is smaller.

        P v = (λI + GᵀG/n)⁻¹ v                         dense side, d × d
            = (v − Gᵀ (nλI + GGᵀ)⁻¹ G v) / λ           Gram side, n × n

    Products are taken in the precision of the rows, on the Gram side in float64 where d / damping is over 40,000, and
    summed, factored and solved in float64.

    Cost: Gram side O(n² d / 2 + n³ / 3 + n q (n + d)) and n² numbers; dense side the same with n and d exchanged.
    Source: Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 1; Woodbury for the Gram side.
    """

    side: str = field(default="auto", metadata={"choices": ("auto", "gram", "dense")})
    """The matrix to factor: "gram" (n × n), "dense" (d × d), or "auto" for the smaller one, block by block."""

    def prepare(self, rows: Rows, block: str) -> Callable[[float], Solve]:
        gram = len(rows) < rows.blocks[block] if self.side == "auto" else self.side == "gram"
        return self._gram(rows, block) if gram else self._dense(rows, block)

    def _dense(self, rows: Rows, block: str) -> Callable[[float], Solve]:
        outer = scatter_matrix((g for _, g in rows.chunks(block)), rows.blocks[block])
        square = outer.trace().item()
        outer /= max(1, len(rows))

        def at_damping(damping: float) -> Solve:
            lam = self.strength(square, rows, block, damping)
            if lam == 0:
                return torch.zeros_like
            factor = _factor(outer, lam)
            return lambda v: torch.cholesky_solve(v.T.double(), factor).T.to(v.dtype)

        return at_damping

    def _gram(self, rows: Rows, block: str) -> Callable[[float], Solve]:
        tiles = [g for _, g in rows.chunks(block, TILE)]  # views of the mapped files
        square = sum(torch.linalg.vector_norm(g, dtype=torch.float64).square().item() for g in tiles)
        made: dict[torch.dtype, tuple[Tensor, list[slice]]] = {}

        def at_damping(damping: float) -> Solve:
            lam = self.strength(square, rows, block, damping)
            if lam == 0:
                return torch.zeros_like
            exact = torch.float64 if rows.blocks[block] > WIDE * damping else rows.dtype
            if exact not in made:
                made[exact] = gram_matrix(tiles, exact)
            gram, spans = made[exact]
            factor = _factor(gram, len(rows) * lam)

            def solve(v: Tensor) -> Tensor:
                rest = v.to(exact, copy=True)  # [q, d]
                product = torch.cat([g.to(exact) @ rest.T for g in tiles])  # [n, q]
                weight = torch.cholesky_solve(product.double(), factor).to(exact)  # [n, q]
                for span, g in zip(spans, tiles, strict=True):
                    rest.addmm_(weight[span].T, g.to(exact), alpha=-1)
                return (rest / lam).to(v.dtype)

            return solve

        return at_damping


def scatter_matrix(pieces: Iterable[Tensor], width: int) -> Tensor:
    """`GᵀG`, `[d, d]` in float64, from the rows in pieces `[b, d]`."""
    outer = torch.zeros(width, width, dtype=torch.float64)
    for g in pieces:
        outer += g.T @ g
    return outer


def gram_matrix(tiles: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[slice]]:
    """`GGᵀ`, the lower half of `[n, n]`, from the rows in tiles `[b, d]`, and where the rows of each tile are in it.

    Products are taken in this precision.
    """
    ends = torch.tensor([0, *map(len, tiles)]).cumsum(0).tolist()
    spans = [slice(start, stop) for start, stop in pairwise(ends)]
    gram = torch.zeros(ends[-1], ends[-1], dtype=dtype)
    for i, tile in enumerate(tiles):
        g = tile.to(dtype)
        for j in range(i + 1):
            torch.mm(g, tiles[j].to(dtype).T, out=gram[spans[i], spans[j]])
    return gram, spans


def _factor(matrix: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of `matrix + damping · I`; NaN, and so every score, where there is none.

    There is none if the rows are not finite, or the damping drowns in rounding; the scores are refused for it, by name.
    One for each λ of a path costs less than one eigendecomposition for all of them: that takes as long as 13 factors.
    """
    matrix = matrix.to(torch.float64, copy=True)
    matrix.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return factor.fill_(torch.nan) if failed else factor
