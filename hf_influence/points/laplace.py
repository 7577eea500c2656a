"""Draws from the Laplace posterior around the final weights, with a Kronecker-factored curvature."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_influence.errors import BadExample, BadSetting, UnsupportedModel
from hf_influence.gradients.batches import Collator
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.gradients.identity import adapter_identity
from hf_influence.gradients.own_loss import OwnTask
from hf_influence.gradients.plan import Plan
from hf_influence.gradients.second_order.factors import FactorCatcher
from hf_influence.gradients.sweep import BatchSize, check_batch_size, sweep
from hf_influence.gradients.taps import Tap
from hf_influence.points.point import Point, trainable_values
from hf_influence.task import Reduction


class Side(NamedTuple):
    """One factor of a weight's curvature: its eigenvalues `[k]` and its eigenvectors `[k, k]`, `None` for the axes."""

    values: Tensor
    vectors: Tensor | None

    @classmethod
    def of(cls, moment: Tensor, dtype: torch.dtype) -> Side:
        """From the factor `[k, k]`."""
        values, vectors = torch.linalg.eigh(moment)
        return cls(values.clamp(min=0).to(dtype), vectors.to(dtype))


@dataclass(frozen=True, eq=False)
class Spread:
    """The posterior covariance of a weight `[m, n]`, `(S ⊗ A + I / variance)⁻¹`."""

    left: Side
    right: Side
    variance: Tensor

    def draw(self, generator: torch.Generator) -> Tensor:
        """A step `[m, n]` with this covariance.

        The symmetric root of the covariance times noise: unlike that of another root, the outcome does not hang on the
        choice of a basis where eigenvalues coincide, such as the many that are zero.
        """
        left, right = self.left, self.right
        noise = torch.randn(len(left.values), len(right.values), generator=generator, dtype=torch.float64)
        noise = noise.to(left.values)
        noise = noise if left.vectors is None else left.vectors.T @ noise
        noise = noise if right.vectors is None else noise @ right.vectors
        step = noise * (torch.outer(left.values, right.values) + 1 / self.variance).rsqrt()  # 0 where variance is 0
        step = step if left.vectors is None else left.vectors @ step
        return step if right.vectors is None else step @ right.vectors.T


@dataclass(frozen=True, eq=False, kw_only=True)
class Posterior:
    """What the members of one ensemble are drawn from."""

    mean: Mapping[str, Tensor]
    spread: Mapping[str, Spread]
    start: str
    about: Mapping[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Laplace(Point):
    """One draw. It follows from the posterior, the seed, the member and the name of the parameter."""

    kind = "laplace"

    member: int
    posterior: Posterior

    def details(self) -> dict[str, Any]:
        """The member, and what its posterior was made from."""
        return {"member": self.member, **self.posterior.about}

    def start(self, present: str) -> str | None:
        """The weights that the posterior is around."""
        return self.posterior.start

    def values(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The mean and a step."""
        return {name: self._drawn(name, mean) for name, mean in self.posterior.mean.items()}

    def _drawn(self, name: str, mean: Tensor) -> Tensor:
        if name not in self.posterior.spread:
            return mean
        seed = random.Random(f"{self.posterior.about['seed']}/{self.member}/{name}").getrandbits(63)
        step = self.posterior.spread[name].draw(torch.Generator().manual_seed(seed))
        return mean.to(step) + step.view_as(mean)


def laplace(
    model: nn.Module,
    dataset: Any,
    n: int = 32,
    *,
    seed: int = 0,
    prior_scale: float = 0.1,
    data_collator: Collator | None = None,
    batch_size: BatchSize = "auto",
    loss_reduction: Reduction = "mean",
    task: OwnTask | None = None,
    skip: Sequence[str] = (),
    remove_unused_columns: bool = True,
) -> list[Point]:
    """Members for `la`: draws from the Laplace posterior of the weights, around their present values.

        θ_m ~ N(θ*, (N Ŝ ⊗ Â + τI)⁻¹) for each weight `[m, n]` on its own,
        Ŝ = 1/N Σ_t s_t s_tᵀ,   Â = 1/T Σ_t x_t x_tᵀ,   τ = 1 / (prior_scale² · mean square of the weight's entries)

    Here `Σ_t s_t x_tᵀ` over an example's tokens is its gradient, and N examples have T tokens in all through which
    their losses reach the weight. So `N Ŝ ⊗ Â` stands for the sum of the outer products of the rows, the empirical
    Fisher matrix of the summed loss. The prior of each entry is a Gaussian around θ* of precision τ: where the data say
    nothing, entries move by `prior_scale` of their root mean square, and nowhere by more. A weight that is zero stays.
    A bias has Â = 1; for an embedding Â is diagonal.

    The model stays as it is. The first members do not depend on `n`.

    Cost: a forward and backward pass over the dataset; time and memory for an eigendecomposition `m × m` and one
    `n × n` of each weight; for each member two products with them when it is entered.

    Args:
        model: As in `collect`, with the weights after training.
        dataset: The training examples.
        n: Number of members; 32 in the paper.
        seed: Of the draws.
        prior_scale: Standard deviation of the prior in units of the root mean square of each weight's entries; > 0.
        data_collator: As in `collect`, like all that follow.
        batch_size: See there. Another one rounds otherwise, and a store goes on with the very same members alone.
        loss_reduction: See there.
        task: See there.
        skip: Names of trainable parameters that are not to move, such as those that have no exact rule.
        remove_unused_columns: See there.

    Raises:
        BadSetting: A setting that cannot work.
        BadExample: Gradients that are not finite.
        UnsupportedModel: A trainable parameter that no rule covers or no gradient reaches.

    Source: GEX: A flexible method for approximating influence via Geometric Ensemble, alg. 1, which leaves out the
    inverse in its line 16, and the prior; Ritter et al., A Scalable Laplace Approximation for Neural Networks, 2018.
    """
    if not isinstance(n, int) or n < 1:
        raise BadSetting(f"laplace(n={n!r}): n counts the members and must be at least 1.")
    if not 0 < prior_scale < math.inf:
        raise BadSetting(
            f"laplace(prior_scale={prior_scale!r}): pass how far weights may move in units of their own size, above 0; "
            "without a prior they would move without bound where the data say nothing."
        )
    check_batch_size(batch_size)
    plan = Plan.of(
        model, dataset, data_collator, loss_reduction, None, "trainable", skip, None, remove_unused_columns, task
    )
    mean = {name: value.cpu() for name, value in trainable_values(model).items()}
    fingerprint, lengths = plan.examples.survey()
    catcher = MomentCatcher(plan.taps)
    with FixedWeights(model, plan.task, catcher) as resting:
        todo = range(len(plan.examples))
        for _ in sweep(resting.backward, plan.examples, todo, lengths, batch_size, resting.device, "Kronecker factors"):
            catcher.settle()
    posterior = Posterior(
        mean=mean,
        spread={name: _spread(name, mean[name], catcher.factors, prior_scale) for name in catcher.shapes},
        start=adapter_identity(model),
        about={
            "seed": seed,
            "prior_scale": float(prior_scale),
            "dataset": fingerprint,
            "task": plan.task.settings(),
            "skip": list(skip),
        },
    )
    return [Laplace(member, posterior) for member in range(n)]


class MomentCatcher(FactorCatcher):
    """Counts the tokens as well.

    Attributes:
        factors: "tokens.<parameter>" `[]`, and for an embedding "ids.<parameter>" `[n]`, how often each came.
    """

    def _add(self, tap: Tap, left: Tensor, right: Tensor) -> None:
        if not (left.isfinite().all() and right.isfinite().all()):
            if self._overflowed is not None and self._overflowed.any():
                return  # the batch goes through once more
            raise BadExample(
                f"the gradients of the dataset at {tap.parameter} are not finite, so there is no posterior to draw "
                "from. collect(model, dataset, …) names the first example of which that is so; leave it out."
            )
        super()._add(tap, left, right)
        reached = self._reached(tap, left, right)
        self._batch.append((f"tokens.{tap.parameter}", reached.sum().double().cpu()))
        if right.ndim == 2:
            counts = torch.bincount(right[reached], minlength=tap.shape[1])
            self._batch.append((f"ids.{tap.parameter}", counts.double().cpu()))


def _spread(name: str, weight: Tensor, factors: Mapping[str, Tensor], prior_scale: float) -> Spread:
    """The posterior of one weight, from its summed moments."""
    if f"left.{name}" not in factors:
        raise UnsupportedModel(
            f"no gradient reached {name} on the whole dataset, so its curvature is unknown. Either its layer is not "
            f"used by the model's forward pass, or its weights are used without calling it. Leave it where it is with "
            f"skip=[{name!r}, …]."
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    tokens = factors[f"tokens.{name}"].clamp(min=1)
    if f"ids.{name}" in factors:
        right = Side((factors[f"ids.{name}"] / tokens).to(dtype), None)
    elif f"right.{name}" in factors:
        right = Side.of(factors[f"right.{name}"] / tokens, dtype)
    else:
        right = Side(torch.ones(1, dtype=dtype), None)
    variance = prior_scale**2 * weight.to(dtype).square().mean()
    return Spread(Side.of(factors[f"left.{name}"], dtype), right, variance)
