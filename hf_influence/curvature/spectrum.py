"""Any function of the empirical Fisher matrix, applied exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hf_influence.curvature.fisher import TILE, gram_matrix, scatter_matrix

Function = Callable[[Tensor], Tensor]
"""From eigenvalues to the function of them, `[k] -> [k]`, in float64; finite at 0."""
Apply = Callable[[Function, Tensor], Tensor]
"""Takes `f` and vectors as rows, `[q, d]`, and gives `f(H) v` for each, `[q, d]`, `H = GᵀG/n`."""


def by_dense_side(pieces: Iterable[Tensor], width: int, n: int) -> Apply:
    """`f(H) v = U f(σ) Uᵀ v` for `H = U σ Uᵀ`, d × d: the smaller side where there are more rows than columns.

    The damped inverse is the case f(σ) = 1 / (λ + σ); `EmpiricalFisher` has a Cholesky factor for it, which costs a
    tenth of the eigenvectors.

    Args:
        pieces: The n rows, `[b, d]` each; looked at once.
        width: d.
        n: As many rows as there are.
    """
    values, vectors = _eigenpairs(scatter_matrix(pieces, width) / max(1, n))  # [d], [d, d]

    def apply(f: Function, v: Tensor) -> Tensor:
        return ((v.double() @ vectors * f(values)) @ vectors.T).to(v.dtype)

    return apply


def by_gram_side(g: Tensor) -> Apply:
    """`f(H) v = f(0) v + 1/n Gᵀ W ((f(σ) − f(0)) / σ) Wᵀ G v` for `GGᵀ/n = W σ Wᵀ`, n × n, from the rows `G [n, d]`.

    What `H` does not see, the vectors at right angles to all rows, is only multiplied by f(0).
    """
    n, tiles = len(g), g.split(TILE)
    values, vectors = _eigenpairs(gram_matrix(tiles, g.dtype)[0].double() / max(1, n))  # [n], [n, n]
    seen = values > torch.finfo(torch.float64).eps * n * values.amax(0) if n else values > 0  # others are rounding

    def apply(f: Function, v: Tensor) -> Tensor:
        at_zero = f(values.new_zeros(1))
        slope = torch.where(seen, f(values) - at_zero, 0) / torch.where(seen, values, 1)  # [n]
        product = (v @ g.T).double()  # [q, n]
        weight = (product @ vectors * slope) @ vectors.T / max(1, n)
        return torch.addmm(v, weight.to(v.dtype), g, beta=float(at_zero))

    return apply


def _eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none below 0, and eigenvectors of a matrix whose lower half is given; NaN if it is not finite.

    Scores become NaN then and are refused by name.
    """
    if not torch.isfinite(matrix).all():
        return matrix.new_full(matrix.shape[:1], torch.nan), torch.full_like(matrix, torch.nan)
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0), vectors
