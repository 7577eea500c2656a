"""The cosine of the angle between gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.products import inverse_norms
from hf_influence.attribution.selection import Selection


@dataclass(kw_only=True)
class Cosine(InnerProduct, name="cosine"):
    """How well the direction of the example's gradient agrees with that of the query.

        score[i, q] = ⟨g_i, v_q⟩ / (‖g_i‖ ‖v_q‖),   norms over all blocks together, 0 for a zero gradient

    With `queries="mean"` the mean of these cosines, not the cosine with the mean query, which is much worse.

    Cost: that of the inner product and one pass for the norms.
    Use when: a few examples with long gradients would decide everything otherwise, as with noisy labels.
    See also: InnerProduct (the same without the norms), Vote and KernelRidge (over the queries, better than the mean).
    Source: Xia et al., LESS, ICML 2024, there on gradients preconditioned by Adam.
    """

    def score(self, rows: Selection) -> Tensor:
        return self.products(rows.train, rows.query, inverse_norms(rows.query)) * inverse_norms(rows.train)[:, None]
