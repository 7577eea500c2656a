"""The cosine between the step that Adam would take on an example and the gradient of the query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_influence.attribution.products import inverse_norms
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.tracin import TracIn
from hf_influence.errors import StoreMismatch
from hf_influence.store import Rows
from hf_influence.store.artifacts import Artifact, read_artifact


@dataclass(kw_only=True)
class Less(TracIn, name="less"):
    """How well the step of Adam on the example agrees in direction with the gradient of the query, over training.

        score[i, q] = Σ_c η_c(i) cos(Γ_c(g_i(θ_c)), v_q(θ_c)),   c over the points, η the rate of the step
        Γ(g) = m̂ / (√ŝ + ε),   m̂ = (β₁ m + (1 − β₁) g) / (1 − β₁ᵗ⁺¹),   ŝ = (β₂ s + (1 − β₂) g²) / (1 − β₂ᵗ⁺¹)

    with the moments m, s of Adam after t steps and all operations by entry. They are those at the end of training for
    every point (stored at point 0), as only these are left where no checkpoints were kept; with `state="each"` those
    stored at each point. The query stays a plain gradient. `weighted=False` gives the mean over the points.

    Cost: that of the inner product at each point, and one pass more for the norms.
    Use when: the model was trained by Adam, rows were captured during training, and lengths should not count.
    See also: TracIn (plain inner products), Cosine (one point, without Adam).
    Source: Xia et al., LESS: Selecting Influential Data for Targeted Instruction Tuning, ICML 2024.
    """

    needs = ("rows", "queries", "points", "learning_rate", "adam")

    state: str = field(default="final", metadata={"choices": ("final", "each")})
    """The state of Adam at the end of training for all points, or the one stored at each point."""

    def select(self, rows: Selection, point: int | None) -> Selection:
        """The rows that the method looks at; StoreMismatch if they are projections, as Adam works on entries."""
        header = rows.store.header
        if header.compress is not None and header.columns is None:
            raise StoreMismatch(
                f"{rows.store.path} holds projections of gradients (compress={header.compress['name']!r}), and Adam "
                "divides single entries. Collect whole rows, or rows with compress=dropout(r)."
            )
        return super().select(rows, point)

    def products(self, train: Rows, query: Rows, weight: Tensor | None = None) -> Tensor:
        """The cosines of Adam's steps with the queries, `[b, q]`, each query multiplied by its `weight` `[m]` first."""
        steps, scale = self._steps(train), inverse_norms(query)
        scale = scale if weight is None else scale * weight
        return super().products(steps, query, scale) * inverse_norms(steps)[:, None]

    def _steps(self, train: Rows) -> Rows:
        """The training rows of a point, each turned into a step of Adam while it is read.

        Raises:
            MissingRows: No state of Adam was kept.
        """
        adam = read_artifact(train, "adam", f"method '{self.name}'", 0 if self.state == "final" else None)
        maps = {}
        for block in train.blocks:
            entries = train.columns(block)
            assert entries is not None
            maps[block] = _step(adam, block, entries, train.dtype)
        return train.mapped(maps, train.blocks)


def _step(adam: Artifact, block: str, entries: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Γ of a block, `[b, d] -> [b, d]`."""
    mean, square = (adam.tensor(f"{kind}.{block}")[entries].to(dtype) for kind in ("exp_avg", "exp_avg_sq"))  # [d]
    (beta1, beta2), eps = adam.details["betas"][block], adam.details["eps"][block]
    after = adam.details["steps"][block] + 1

    def step(g: Tensor) -> Tensor:
        first = torch.add(beta1 * mean, g, alpha=1 - beta1) / (1 - beta1**after)
        second = torch.add(beta2 * square, g.square(), alpha=1 - beta2) / (1 - beta2**after)
        return first / (second.sqrt() + eps)

    return step
