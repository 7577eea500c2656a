"""Geometric ensembles: which examples change their loss together when training goes on."""

from __future__ import annotations

from dataclasses import dataclass

from hf_influence.attribution.deviations import DeviationProducts, LinearDeviations, LossDeviations, SelfDeviations


@dataclass(kw_only=True)
class Gex(LossDeviations, DeviationProducts, name="gex"):
    """How far the loss of the example and that of the query move together from member to member of an ensemble.

        score[i, q] = 1/M Σ_m Δℓ_m(i) Δℓ_m(q),   Δℓ_m(z) = ℓ(z, θ_m) − ℓ(z, θ*)

    The members θ_m come from more SGD on the training loss. Examples whose losses rise and fall with the query's pull
    the weights the same way, and are worth keeping.

    Cost: next to nothing from stored losses; to store them, the training of M members and a forward pass at each.
    Use when: gradients are too dear to store, or the loss is far from linear; 8 members do nearly as well as 32.
    See also: GexLin (gradients instead of losses), SelfGex (without queries), Fisher.
    Source: GEX: A flexible method for approximating influence via Geometric Ensemble, eq. 10 and alg. 2.
    """

    needs = ("queries", "members", "loss", "query loss")


@dataclass(kw_only=True)
class SelfGex(LossDeviations, SelfDeviations, name="self_gex"):
    """How little the loss of the example moves from member to member: what training is torn about comes lowest.

        score[i] = −1/M Σ_m Δℓ_m(i)²,   Δℓ_m(z) = ℓ(z, θ_m) − ℓ(z, θ*)

    Cost: next to nothing from stored losses; to store them, the training of M members and a forward pass at each.
    Use when: there are no clean queries and labels may be wrong; in its paper the best of all at that.
    See also: Gex (against queries), SelfGexLin, SelfFisher.
    Source: GEX: A flexible method for approximating influence via Geometric Ensemble, eq. 10, with z' = z.
    """

    needs = ("members", "loss")


@dataclass(kw_only=True)
class GexLin(LinearDeviations, DeviationProducts, name="gex_lin"):
    """The same as `gex` with the change of each loss to first order, from the gradients at the final weights.

        score[i, q] = 1/M Σ_m Δℓ_m(i) Δℓ_m(q),   Δℓ_m(z) = Σ_blocks ⟨g_z, θ_m − θ*⟩

    Cost: one pass over the whole rows at the final weights, O(n M d); no rows and no losses at the members.
    Use when: to see what the linearisation loses; whole rows are at hand and members are many.
    See also: Gex (the losses themselves), Fisher (what it tends to with members from a Gaussian posterior).
    Source: GEX: A flexible method for approximating influence via Geometric Ensemble, eq. 11, on the ensemble of eq. 9.
    """

    needs = ("rows", "queries", "members")


@dataclass(kw_only=True)
class SelfGexLin(LinearDeviations, SelfDeviations, name="self_gex_lin"):
    """The same as `self_gex` with the change of each loss to first order, from the gradients at the final weights.

        score[i] = −1/M Σ_m Δℓ_m(i)²,   Δℓ_m(z) = Σ_blocks ⟨g_z, θ_m − θ*⟩

    Cost: one pass over the whole rows at the final weights, O(n M d); no rows and no losses at the members.
    Use when: to see what the linearisation loses, without queries.
    See also: SelfGex (the losses themselves), GexLin (against queries).
    Source: GEX: A flexible method for approximating influence via Geometric Ensemble, eq. 11, with z' = z.
    """

    needs = ("rows", "members")
