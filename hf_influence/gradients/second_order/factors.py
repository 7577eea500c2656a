"""The Kronecker factors of the curvature of each weight, and their eigenvectors, kept beside the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.gradients.batches import Collator
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.gradients.identity import adapter_identity
from hf_influence.gradients.own_loss import OwnTask
from hf_influence.gradients.plan import Plan
from hf_influence.gradients.sweep import BatchSize, check_batch_size, sweep
from hf_influence.gradients.taps import Tap
from hf_influence.store import GradientStore
from hf_influence.store.artifacts import write_artifact


def collect_ekfac(
    model: nn.Module,
    dataset: Any,
    path: str | Path,
    *,
    data_collator: Collator | None = None,
    batch_size: BatchSize = "auto",
    remove_unused_columns: bool = True,
    task: OwnTask | None = None,
    point: int = 0,
) -> GradientStore:
    """The Kronecker eigenbasis of each block, for the methods `ekfac` and `self_ekfac`; one pass over the dataset.

    The gradient of an example at a weight `[m, n]` is a sum over its tokens, `Σ_t s_t x_tᵀ`. The basis is that of
    `S = Σ s_t s_tᵀ` and `A = Σ x_t x_tᵀ` over all tokens of all examples through which the loss of their example
    reaches the weight: a token whose part of the sum is no more than rounding, padding for one, does not count. The
    losses are those of the rows, with the labels of the dataset: the empirical Fisher matrix. Eigenvalues are not kept:
    the method takes the corrected ones from the stored rows.

    Biases have the factor S alone. The factor A of an embedding's one-hot inputs is diagonal, so it needs no basis.

    Cost: a forward and backward pass over the dataset; memory and disk for an `m × m` and an `n × n` matrix a weight.

    Args:
        model: As it was when the rows were collected.
        dataset: The training examples.
        path: The store with the rows.
        data_collator: The one of `collect`.
        batch_size: As in `collect`.
        remove_unused_columns: That of `collect`.
        task: That of `collect`; label smoothing is known from the store.
        point: The parameter point.

    Returns:
        The store.

    Raises:
        BadSetting: The rows are of a loss function of your own, and it was not given.
        StoreMismatch: Another model or adapter than that of the rows, or compressed rows.
    """
    check_batch_size(batch_size)
    store = GradientStore.open(path)
    store.check_whole("EK-FAC multiplies whole rows")
    plan = Plan.again(store, model, dataset, point, data_collator, remove_unused_columns, task)
    catcher = FactorCatcher(plan.taps)
    lengths = plan.examples.survey()[1]
    with FixedWeights(model, plan.task, catcher) as resting:
        todo = range(len(plan.examples))
        for _ in sweep(resting.backward, plan.examples, todo, lengths, batch_size, resting.device, "Kronecker factors"):
            catcher.settle()
    bases = {name: torch.linalg.eigh(factor)[1] for name, factor in catcher.factors.items()}
    dtype = getattr(torch, store.header.dtype)
    write_artifact(
        store,
        "ekfac",
        {name: basis.to(dtype) for name, basis in bases.items()},
        {"examples": len(plan.examples)},
        adapter=adapter_identity(model),
        point=point,
    )
    return store


class FactorCatcher(RowCatcher):
    """Watches like its base, and keeps the second moments of the two factors instead of their product.

    Attributes:
        factors: "left.<parameter>" `[m, m]` and "right.<parameter>" `[n, n]`, float64, summed over all tokens so far.
    """

    def __init__(self, taps: list[Tap]):
        super().__init__(taps)
        self.factors: dict[str, Tensor] = {}
        self._batch: list[tuple[str, Tensor]] = []

    def settle(self) -> None:
        """Add what was seen of a batch that went through; one that failed half way is forgotten by `clear`."""
        self._go_through()
        for name, moment in self._batch:
            self.factors[name] = self.factors.get(name, 0) + moment
        self._batch.clear()

    def clear(self) -> None:
        super().clear()
        self._batch.clear()

    def _add(self, tap: Tap, left: Tensor, right: Tensor) -> None:
        reached = self._reached(tap, left, right)
        self._batch.append((f"left.{tap.parameter}", _moment(left[reached])))
        if _has_columns(right):
            self._batch.append((f"right.{tap.parameter}", _moment(right[reached])))

    def _reached(self, tap: Tap, left: Tensor, right: Tensor) -> Tensor:
        """The tokens whose part of the row is more than rounding, `[b, t]`."""
        exact = torch.promote_types(left.dtype, torch.float32)
        share = torch.linalg.vector_norm(left, dim=2, dtype=exact)  # [b, t], the length of each token's part of the row
        if _has_columns(right):
            share = share * torch.linalg.vector_norm(right, dim=2, dtype=exact)
        elif right.ndim == 2:
            share = share.masked_fill(right >= tap.shape[1], 0)  # the padding token, which has no column
        # attention leaves rounding where a gradient is zero, such as that of the first token's query; it is that of
        # sums, which are taken in float32 where the rest is in half precision
        rounding = torch.finfo(share.dtype).eps ** 0.75
        return share > rounding * share.amax(1, keepdim=True)


def _has_columns(right: Tensor) -> bool:
    """Neither the nothing of a bias nor token ids."""
    return right.ndim == 3 and right.shape[2] > 0


def _moment(values: Tensor) -> Tensor:
    """`Σ_t x_t x_tᵀ`."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return (values.T @ values).double().cpu()
