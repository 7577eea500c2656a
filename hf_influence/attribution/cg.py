"""Influence by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.self_influence import SelfInfluence
from hf_influence.attribution.tuned import Tuned
from hf_influence.curvature import ConjugateGradients


@dataclass(kw_only=True)
class ConjugateGradient(Tuned, ConjugateGradients, InnerProduct, name="cg"):
    """Influence with the inverse of the damped empirical Fisher matrix by conjugate gradients, to a tolerance.

        score[i, q] = Σ_blocks ⟨g_i, x_q⟩,   (λI + GᵀG/n) x_q = v_q,   ‖residual‖ ≤ tolerance ‖v_q‖

    The scores' report has the iterations and the residual; what did not converge is refused.

    Cost: one pass over the rows an iteration, O(n q d); no n × n and no d × d matrix.
    Use when: there are too many rows for the exact matrix and DataInf is too rough.
    See also: Fisher (the same, exact), Lissa, DataInf (three passes).
    Source: Martens, Deep Learning via Hessian-free Optimization, ICML 2010; Koh & Liang, ICML 2017.
    """


@dataclass(kw_only=True)
class SelfConjugateGradient(ConjugateGradients, SelfInfluence, name="self_cg"):
    """Self-influence with the inverse of the damped empirical Fisher matrix by conjugate gradients.

        score[i] = −Σ_blocks ⟨g_i, x_i⟩,   (λI + GᵀG/n) x_i = g_i,   ‖residual‖ ≤ tolerance ‖g_i‖

    Cost: O(n² d) an iteration in time, streamed: no n × n matrix.
    Use when: there are no clean queries, and too many rows for the exact matrix.
    See also: SelfFisher (the same, exact), SelfDataInf (three passes).
    Source: Martens, Deep Learning via Hessian-free Optimization, ICML 2010; Koh & Liang, ICML 2017.
    """
