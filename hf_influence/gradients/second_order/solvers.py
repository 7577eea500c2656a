"""Linear systems with a symmetric matrix that is known by its products, for several right-hand sides at once."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_influence.errors import NotConverged
from hf_influence.gradients.second_order.lanczos import Product, lanczos

SAFE = 1.1
"""An estimate of the largest eigenvalue from a few products is too low by some per cent."""


def conjugate_gradients(
    product: Product, right: Tensor, damping: float, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, int]:
    """`(H + λI) x = v` for each row `v` of `right [q, D]`.

    Args:
        product: `H`.
        right: `[q, D]`.
        damping: λ.
        iterations: The limit.
        tolerance: The relative residual to reach.

    Returns:
        `x [q, D]`, its relative residuals `[q]`, computed anew from it, and the number of iterations.

    Raises:
        NotConverged: The limit was too low, rounding leaves more than ten times the tolerance, or `H + λI` is not
            positive definite.
    """
    solution, residual = torch.zeros_like(right), right.clone()
    direction, length = residual.clone(), _square(right)  # [q, D], [q]
    goal = tolerance**2 * length
    for step in range(iterations + 1):
        open_ = (_square(residual) > goal).nonzero()[:, 0]  # the columns that are not solved yet
        if not len(open_) or step == iterations:
            break
        p, r = direction[open_], residual[open_]
        image = product(p) + damping * p
        bend = (p * image).sum(1) / _square(p)
        if not bool((bend > 0).all()):
            raise NotConverged(
                f"the damped Hessian has a direction of curvature {float(bend.min()):.3g}, so the loss is no valley "
                f"there and (H + λI) x = v has no meaning as an influence. Pass a damping above "
                f"{damping - float(bend.min()):.3g} (it is {damping:g}), or train closer to a minimum."
            )
        before = _square(r)
        pace = (before / (p * image).sum(1))[:, None]
        solution[open_] += pace * p
        residual[open_] = r = r - pace * image
        direction[open_] = r + (_square(r) / before)[:, None] * p
    # the residual that is carried along drifts away from the true one where the matrix is badly conditioned
    true = _relative(right - product(solution) - damping * solution, right)
    if not len(open_) and bool((true <= 10 * tolerance).all()):
        return solution, true, step
    more = "Allow more iterations" if len(open_) else f"Rounding in {right.dtype} allows no less: take a wider dtype"
    raise NotConverged(
        f"after {step} iterations of conjugate gradients a residual of {float(true.max()):.2g} of the query is left, "
        f"and {tolerance:.2g} was asked for. {more}, more damping than {damping:g}, or a larger tolerance."
    )


def lissa(
    product: Product, right: Tensor, damping: float, iterations: int, tolerance: float, seed: int = 0
) -> tuple[Tensor, Tensor, int]:
    """The same by `r ← v + r − (H + λI) r / s`, `x = r / s`, cut off after `iterations`.

    `s` is the largest eigenvalue of `H + λI`, estimated by a few products, so that the iteration contracts wherever
    `H + λI` is positive definite.

    Source: Agarwal et al., Second-Order Stochastic Optimization, JMLR 2017; Koh & Liang, ICML 2017.

    Args:
        product: See `conjugate_gradients`, like all the others, but
        right: See there.
        damping: See there.
        iterations: At most so many; what is left then is reported, not refused.
        tolerance: Stop at this relative residual.
        seed: Of the estimate of the largest eigenvalue.

    Raises:
        NotConverged: The residual is larger than at the start.
    """
    values = lanczos(product, right.shape[1], 10, seed=seed, dtype=right.dtype).values
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    if low + damping <= 0:
        raise NotConverged(
            f"LiSSA would diverge: the Hessian has an eigenvalue of {low:.3g}, which a damping of {damping:g} leaves "
            f"negative. Pass a damping above {-low:.3g}, or train closer to a minimum."
        )
    scale = SAFE * max(0.0, high) + damping
    sum_, before = right.clone(), torch.full_like(right[:, 0], torch.inf)
    noise = max(tolerance, 1e3 * torch.finfo(right.dtype).eps)
    for step in range(1, iterations + 1):
        residual = right - (product(sum_) + damping * sum_) / scale
        relative = _relative(residual, right)
        if not bool((relative <= (before * (1 + 1e-3)).clamp(min=noise)).all()):
            worst = int((relative / before).argmax())
            raise NotConverged(
                f"LiSSA diverges: in iteration {step} the residual grows from {float(before[worst]):.3g} to "
                f"{float(relative[worst]):.3g} of the query (scale {scale:.3g}, damping {damping:g}). The damped "
                "Hessian has negative eigenvalues: pass more damping, or train closer to a minimum."
            )
        if step == iterations or float(relative.max()) <= tolerance:
            break
        sum_, before = sum_ + residual, relative
    return sum_ / scale, relative, step


def _square(vectors: Tensor) -> Tensor:
    return vectors.square().sum(1)


def _relative(residual: Tensor, right: Tensor) -> Tensor:
    """`‖residual‖ / ‖right‖` of each row, 0 for a row of zeros."""
    length = torch.linalg.vector_norm(right, dim=1)
    return torch.where(length > 0, torch.linalg.vector_norm(residual, dim=1) / length, 0.0)
