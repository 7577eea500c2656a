"""DataInf."""

from __future__ import annotations

from dataclasses import dataclass

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.tuned import Tuned
from hf_influence.curvature import MeanInverse


@dataclass(kw_only=True)
class DataInf(Tuned, MeanInverse, InnerProduct, name="datainf"):
    """Influence with the inverse curvature replaced by the mean of per-example inverses.

        score[i, q] = Σ_blocks ⟨g_i, P v_q⟩,   P v = 1/n Σ_k (λI + g_k g_kᵀ)⁻¹ v
                    = Σ_blocks ⟨g_i, v_q − 1/n Σ_k g_k ⟨g_k, v_q⟩ / (λ + ‖g_k‖²)⟩ / λ

    Cost: three passes of matrix products, O(n q d); no n × n and no d × d matrix.
    Use when: there are more rows than an n × n matrix allows, and more columns than a d × d matrix allows.
    See also: Fisher (exact, and no dearer for a few thousand rows), InnerProduct (no curvature; as λ → ∞, each block
    comes to that over its λ).
    Source: Kwon et al., DataInf, ICLR 2024. https://arxiv.org/abs/2310.00902
    """
