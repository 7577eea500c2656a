"""The cosine of the angle between gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.norms import row_norms
from hf_influence.attribution.selection import Selection
from hf_influence.store import Rows


@dataclass(kw_only=True)
class Cosine(InnerProduct, name="cosine"):
    """How well the direction of the example's gradient agrees with that of the query.

        score[i, q] = ⟨g_i, v_q⟩ / (‖g_i‖ ‖v_q‖),   norms over all blocks together, 0 for a zero gradient

    With `queries="mean"` the mean of these cosines, not the cosine with the mean query, which is much worse.

    Cost: that of the inner product and one pass for the norms.
    Use when: a few examples with long gradients would decide everything otherwise, as with noisy labels.
    See also: InnerProduct (the same without the norms).
    Source: Xia et al., LESS, ICML 2024, there on gradients preconditioned by Adam.
    """

    def score(self, rows: Selection) -> Tensor:
        return self.products(rows.train, rows.query, _inverse_norms(rows.query)) * _inverse_norms(rows.train)[:, None]


def _inverse_norms(rows: Rows) -> Tensor:
    norms = row_norms(rows)
    return torch.where(norms == 0, 0, norms.reciprocal())  # [n]
