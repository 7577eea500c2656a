"""The dominant eigenpairs of a symmetric matrix that is known by its products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from hf_influence.errors import BadExample

Product = Callable[[Tensor], Tensor]
"""`[k, D] -> [k, D]`."""


class Eigenpairs(NamedTuple):
    """Sorted by absolute value, the largest first.

    values: `[p]`.
    vectors: `[p, D]`, orthonormal.
    residuals: `‖H u − λ u‖` of each, `[p]`: so far may λ be from an eigenvalue.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def lanczos(
    product: Product, size: int, iterations: int, *, seed: int = 0, dtype: torch.dtype, title: str | None = None
) -> Eigenpairs:
    """Eigenpairs by the Arnoldi iteration, which for a symmetric matrix is that of Lanczos.

    Every new direction is made orthogonal to all before it, twice, so that no eigenvalue shows up several times. Where
    the directions found so far are closed under the matrix, another random one continues, unless the matrix maps it to
    nothing. With as many iterations as `size` the result is the whole spectrum.

    Cost: a product an iteration, and memory for `iterations` vectors.
    Source: Schioppa et al., Scaling Up Influence Functions, AAAI 2022, alg. 1.

    Args:
        product: `[1, D] -> [1, D]`.
        size: D.
        iterations: At most so many.
        seed: Of the first direction.
        dtype: Of the vectors.
        title: Of the progress bar; `None` for no bar.

    Returns:
        At most `iterations` eigenpairs; those that rounding cannot tell from zero are left out.

    Raises:
        BadExample: A product is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    rounding = torch.finfo(dtype).eps ** 0.75  # products by autograd are off by some ten eps
    basis = torch.zeros(min(iterations, size), size, dtype=dtype)
    diagonal: list[float] = []
    beside: list[float] = []
    scale, fresh, rest = 0.0, True, torch.zeros(size, dtype=dtype)
    for step in tqdm(range(len(basis)), desc=title, unit="product", disable=title is None):
        known = basis[:step]
        if fresh:
            rest = _orthogonal(torch.randn(size, generator=generator, dtype=dtype), known)
        basis[step] = rest / torch.linalg.vector_norm(rest)
        image = product(basis[step : step + 1])[0]
        length = float(torch.linalg.vector_norm(image))
        if not length < torch.inf:
            raise BadExample(
                "a product with the Hessian is not finite. Look at the losses of the examples (losses(...)) and leave "
                "out those that are not finite, or use a wider dtype."
            )
        if fresh and length <= rounding * scale:
            break  # a random direction is mapped to nothing: so is all that is left
        diagonal.append(float(image @ basis[step]))
        rest = _orthogonal(image, basis[: step + 1])
        beside.append(float(torch.linalg.vector_norm(rest)))
        scale = max(scale, length)
        fresh = beside[-1] <= rounding * scale
        if fresh:
            beside[-1] = 0.0
    k = len(diagonal)
    side = torch.tensor(beside[: max(0, k - 1)], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(side, 1) + torch.diag(side, -1)
    values, mix = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)
    order = order[values[order].abs() > rounding * scale]
    values, mix = values[order], mix[:, order]
    residuals = (beside[-1] * mix[-1]).abs() if k else values
    return Eigenpairs(values, mix.T.to(dtype) @ basis[:k], residuals)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """What is left of `vector [D]` beside the rows of `basis [k, D]`."""
    for _ in range(2):  # the second time removes what rounding left of the first
        vector = vector - (basis @ vector) @ basis
    return vector
