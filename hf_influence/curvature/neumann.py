"""The inverse as a series of products (LiSSA)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hf_influence.curvature.iterative import Iterative, Product, relative_residual, spectral_norm
from hf_influence.errors import NotConverged
from hf_influence.store import Rows

POWER_ITERATIONS = 20
ROUNDING = 1e-12
"""A relative residual that is as good as none."""


@dataclass(kw_only=True)
class NeumannSeries(Iterative):
    """A fixed number of terms of the Neumann series of the inverse, with all rows in each term.

        r ← v + r − (λI + GᵀG/n) r / s,   from r = v;   P v = r / s

    s is `scale` times the spectral norm of λI + GᵀG/n. The error along an eigenvector with eigenvalue e shrinks by
    |1 − e/s| an iteration: fast where e is near s, and hardly at all where e is far below it.

    Cost: `iterations` + 1 passes over the rows, each O(n q d), and 20 with one vector for the norm.
    Source: Agarwal et al., LiSSA, JMLR 2017; Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 7.
    """

    iterations: int = field(default=10, metadata={"least": 1})
    """Terms after the first."""
    scale: float = field(default=1.0, metadata={"above": 0})
    """s relative to the spectral norm. Less is faster, down to about 1/2, below which the series grows without end."""

    def iterate(self, product: Product, v: Tensor, rows: Rows, block: str) -> tuple[Tensor, int]:
        scale = self.scale * spectral_norm(product, v, POWER_ITERATIONS)
        first = relative_residual(product(v) / scale, v)
        r = v.clone()
        for _ in range(self.iterations):
            r += v - product(r) / scale
        last = relative_residual(product(r) / scale, v)
        if not (grown := ~(last <= first.clamp(min=ROUNDING))).any():
            return r / scale, self.iterations
        worst = int((last / first).argmax())
        raise NotConverged(
            f"LiSSA on block {block} of {rows.folder} has grown instead of settling: in {self.iterations} iterations "
            f"the residual ‖v − (F + λI) x‖ / ‖v‖ went from {first[worst]:.2g} to {last[worst]:.2g} (the worst of "
            f"{int(grown.sum())} of {len(v)} vectors). The scale, {self.scale:g} times the spectral norm, is too "
            "small: use scale=1, or method='cg', which needs none."
        )
