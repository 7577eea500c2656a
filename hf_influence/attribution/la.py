"""Deviations over members from the Laplace posterior: what `fisher` becomes without the linearisation of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_influence.attribution.deviations import DeviationProducts, LossDeviations, SelfDeviations


@dataclass(kw_only=True)
class La(LossDeviations, DeviationProducts, name="la"):
    """How far the loss of the example and that of the query move together over draws from the Laplace posterior.

        score[i, q] = 1/M Σ_m Δℓ_m(i) Δℓ_m(q),   Δℓ_m(z) = ℓ(z, θ_m) − ℓ(z, θ*),   θ_m ~ N(θ*, (n Ŝ ⊗ Â + τI)⁻¹)

    With losses that are linear in the weights the mean tends to the influence `g_iᵀ (n Ŝ ⊗ Â + τI)⁻¹ g_q`.

    Cost: next to nothing from stored losses; to store them, a backward pass over the data and M forward passes.
    Use when: gradients are too dear to store, and so is the training of a geometric ensemble.
    See also: Gex (members by more training, better in the paper), SelfLa (without queries), Ekfac (linear).
    Source: GEX: A flexible method for approximating influence via Geometric Ensemble, eq. 12 and alg. 1.
    """

    kind: ClassVar[str] = "laplace"
    needs = ("queries", "members", "loss", "query loss")


@dataclass(kw_only=True)
class SelfLa(LossDeviations, SelfDeviations, name="self_la"):
    """How little the loss of the example moves over draws from the Laplace posterior.

        score[i] = −1/M Σ_m Δℓ_m(i)²,   Δℓ_m(z) = ℓ(z, θ_m) − ℓ(z, θ*),   θ_m ~ N(θ*, (n Ŝ ⊗ Â + τI)⁻¹)

    Cost: next to nothing from stored losses; to store them, a backward pass over the data and M forward passes.
    Use when: there are no clean queries, labels may be wrong, and more training is too dear for `self_gex`.
    See also: SelfGex (members by more training, better in the paper), La (against queries), SelfEkfac (linear).
    Source: GEX: A flexible method for approximating influence via Geometric Ensemble, eq. 12 and alg. 1, with z' = z.
    """

    kind: ClassVar[str] = "laplace"
    needs = ("members", "loss")
