"""LiSSA."""

from __future__ import annotations

from dataclasses import dataclass

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.self_influence import SelfInfluence
from hf_influence.attribution.tuned import Tuned
from hf_influence.curvature import NeumannSeries


@dataclass(kw_only=True)
class Lissa(Tuned, NeumannSeries, InnerProduct, name="lissa"):
    """Influence with a few terms of the series of the inverse empirical Fisher matrix.

        score[i, q] = Σ_blocks ⟨g_i, r/s⟩,   r ← v_q + r − (λI + GᵀG/n) r/s,   s ≈ ‖λI + GᵀG/n‖₂

    The scores' report has the residual ‖v − (λI + GᵀG/n) r/s‖ / ‖v‖ that is left; a series that grew is refused.

    Cost: one pass over the rows an iteration, O(n q d), and 20 for one vector; no n × n and no d × d matrix.
    Use when: LiSSA itself is wanted; ten iterations leave most of the inverse undone, as the report says.
    See also: ConjugateGradient (converges, for the same products), Fisher (exact), DataInf.
    Source: Koh & Liang, ICML 2017; Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 7.
    """


@dataclass(kw_only=True)
class SelfLissa(NeumannSeries, SelfInfluence, name="self_lissa"):
    """Self-influence with a few terms of the series of the inverse empirical Fisher matrix.

        score[i] = −Σ_blocks ⟨g_i, r/s⟩,   r ← g_i + r − (λI + GᵀG/n) r/s,   s ≈ ‖λI + GᵀG/n‖₂

    Cost: O(n² d) an iteration in time, streamed: no n × n matrix.
    Use when: there are no clean queries, and LiSSA itself is wanted.
    See also: SelfConjugateGradient (converges), SelfFisher (exact), SelfDataInf.
    Source: Koh & Liang, ICML 2017; Schioppa et al., Scaling Up Influence Functions, AAAI 2022.
    """
