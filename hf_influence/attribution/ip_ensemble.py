"""The inner product of gradients, averaged over an ensemble that costs no training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.over_members import OverMembers
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.self_influence import SelfInfluence


@dataclass(kw_only=True)
class MeanOverMembers(OverMembers):
    """A method for one point on average over members with a few trainable weights set to zero.

    It inherits from this first and from that method second.
    """

    kind = "parameter_dropout"

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, q]`, as the method gives at each member."""
        return self.summed(rows, lambda part: super(MeanOverMembers, self).score(part) / len(rows.parts))  # type: ignore[safe-super]


@dataclass(kw_only=True)
class IpEnsemble(MeanOverMembers, InnerProduct, name="ip_ensemble"):
    """The inner product with the query, averaged over members with a few trainable weights set to zero.

        score[i, q] = 1/T Σ_t Σ_blocks ⟨g_i(θ_t), v_q(θ_t)⟩,   θ_t = the final weights under parameter dropout

    Cost: rows and inner products at each of the T members; no training.
    Use when: one set of weights is too noisy a judge; insensitive to the rate of the dropout.
    See also: InnerProduct (one point), TracIn (over training), SelfIpEnsemble (without queries).
    Source: Revisiting Inner Product (IP Ensemble), eq. 5 and app. C.3.
    """

    needs = ("rows", "queries", "members")


@dataclass(kw_only=True)
class SelfIpEnsemble(MeanOverMembers, SelfInfluence, name="self_ip_ensemble"):
    """Self-influence, averaged over members with a few trainable weights set to zero.

        score[i] = −1/T Σ_t ‖g_i(θ_t)‖²,   θ_t = the final weights under parameter dropout

    Cost: rows at each of the T members and one pass over them; no training.
    Use when: there are no clean queries, and one set of weights is too noisy a judge.
    See also: SelfInfluence (one point), SelfTracIn (over training), IpEnsemble (against queries).
    Source: Revisiting Inner Product (IP Ensemble), eq. 5, with the example as its own query.
    """

    needs = ("rows", "members")
