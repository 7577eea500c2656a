"""Influence with the exact damped Fisher matrix."""

from __future__ import annotations

from dataclasses import dataclass

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.tuned import Tuned
from hf_influence.curvature import EmpiricalFisher


@dataclass(kw_only=True)
class Fisher(Tuned, EmpiricalFisher, InnerProduct, name="fisher"):
    """Influence with the exact inverse of the damped empirical Fisher matrix, block by block.

        score[i, q] = Σ_blocks ⟨g_i, (λI + GᵀG/n)⁻¹ v_q⟩

    Cost: O(n² d + n³) a block and an n × n matrix, or O(n d² + d³) and a d × d matrix, whichever is less.
    Use when: up to some ten thousand rows, or compressed rows; the reference for the approximations.
    See also: DataInf (approximate, linear in n), ConjugateGradient (the same without the matrix), Dropout, Gaussian
    and LoGra (the same on compressed rows).
    Source: Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 1 ("Orig.").
    """
