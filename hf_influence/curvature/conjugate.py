"""The inverse by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_influence.curvature.iterative import Iterative, Product, relative_residual
from hf_influence.errors import NotConverged
from hf_influence.store import Rows


@dataclass(kw_only=True)
class ConjugateGradients(Iterative):
    """Conjugate gradients on `(λI + GᵀG/n) x = v`, all vectors of a block at once, each until it is solved.

    Cost: a pass over the rows an iteration, O(n q d); at most about as many as there are rows, a few dozen as a rule.
    Source: Hestenes and Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, 1952.
    """

    tolerance: float = field(default=1e-6, metadata={"above": 0, "below": 1})
    """Largest ‖v − (λI + GᵀG/n) x‖ / ‖v‖ that counts as solved."""
    iterations: int = field(default=1000, metadata={"least": 1})
    """The most to take, after which it is an error."""

    def iterate(self, product: Product, v: Tensor, rows: Rows, block: str) -> tuple[Tensor, int]:
        x, r, p = torch.zeros_like(v), v.clone(), v.clone()  # each [q, d]
        square = r.square().sum(1)  # [q]
        goal = self.tolerance**2 * square
        taken = 0
        while (active := square > goal).any():
            if taken == self.iterations:
                self._refuse(relative_residual(product(x), v), rows, block)
            image = product(p[active])
            step = (square[active] / (p[active] * image).sum(1))[:, None]
            x[active] += step * p[active]
            r[active] -= step * image
            before, square = square, r.square().sum(1)
            p[active] = r[active] + (square / before)[active][:, None] * p[active]
            taken += 1
        # the residual that is carried along drifts away from the true one where the matrix is badly conditioned
        true = relative_residual(product(x), v)
        if not (true <= 10 * self.tolerance).all():
            self._refuse(true, rows, block)
        return x, taken

    def _refuse(self, residual: Tensor, rows: Rows, block: str) -> None:
        raise NotConverged(
            f"conjugate gradients on block {block} of {rows.folder} did not converge: the residual "
            f"‖v − (F + λI) x‖ / ‖v‖ is {residual.max():.2g} after at most {self.iterations} iterations, and "
            f"{self.tolerance:g} was asked for ({int((residual > self.tolerance).sum())} of {len(residual)} vectors "
            "are above). More damping makes it faster; or allow more iterations, or a larger tolerance."
        )
