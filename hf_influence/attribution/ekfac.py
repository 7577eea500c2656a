"""Influence with the Kronecker-factored eigenbasis."""

from __future__ import annotations

from dataclasses import dataclass

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.self_influence import SelfInfluence
from hf_influence.attribution.tuned import Tuned
from hf_influence.curvature import KroneckerEigenbasis


@dataclass(kw_only=True)
class OnFactors(KroneckerEigenbasis, Method):
    """A method with the curvature of EK-FAC."""

    def select(self, rows: Selection, point: int | None) -> Selection:
        """The rows that the method looks at; StoreMismatch if they are compressed."""
        rows.store.check_whole("EK-FAC turns whole rows")
        return super().select(rows, point)


@dataclass(kw_only=True)
class Ekfac(Tuned, OnFactors, InnerProduct, name="ekfac"):
    """Influence with the empirical Fisher matrix taken as diagonal in the eigenvectors of its Kronecker factors.

        score[i, q] = Σ_blocks ⟨g_i, U (Λ + λI)⁻¹ Uᵀ v_q⟩,   U = U_S ⊗ U_A,   Λ = 1/n Σ_k (Uᵀ g_k)²

    Cost: O((n + q) (a + b) d) for weights a × b, no n × n matrix; before that `collect_ekfac`, one pass of the model.
    Use when: there are too many rows for the exact Fisher matrix, and the model is at hand.
    See also: SelfEkfac (without queries), Fisher (exact), DataInf (from the rows alone).
    Source: Grosse et al., Studying Large Language Model Generalization with Influence Functions, 2023.
    """

    needs = ("rows", "queries", "ekfac")


@dataclass(kw_only=True)
class SelfEkfac(OnFactors, SelfInfluence, name="self_ekfac"):
    """Self-influence with the inverse curvature of EK-FAC.

        score[i] = −Σ_blocks ⟨g_i, U (Λ + λI)⁻¹ Uᵀ g_i⟩

    Cost: O(n (a + b) d) for weights a × b; before that `collect_ekfac`, one pass of the model.
    Use when: there are no clean queries, too many rows for the exact Fisher matrix, and the model is at hand.
    See also: Ekfac (against queries), SelfFisher (exact), SelfDataInf (from the rows alone).
    Source: Grosse et al., Studying Large Language Model Generalization with Influence Functions, 2023.
    """

    needs = ("rows", "ekfac")
