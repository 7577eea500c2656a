"""The dominant directions of the loss surface, kept beside the rows."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from hf_influence.errors import BadExample, BadSetting
from hf_influence.gradients.batches import Collator
from hf_influence.gradients.identity import adapter_identity
from hf_influence.gradients.own_loss import OwnTask
from hf_influence.gradients.plan import Plan
from hf_influence.gradients.second_order.hessian import Hessian
from hf_influence.gradients.second_order.lanczos import lanczos
from hf_influence.gradients.sweep import BatchSize
from hf_influence.store import GradientStore
from hf_influence.store.artifacts import write_artifact

UNSETTLED = 0.1
"""Relative residual from which an eigenpair is said not to have converged."""


def collect_hessian(
    model: nn.Module,
    dataset: Any,
    path: str | Path,
    *,
    top: int = 100,
    iterations: int = 200,
    examples: int | None = 512,
    seed: int = 0,
    data_collator: Collator | None = None,
    batch_size: BatchSize = "auto",
    remove_unused_columns: bool = True,
    task: OwnTask | None = None,
    point: int = 0,
) -> GradientStore:
    """The eigenpairs of the Hessian of the mean loss with the largest absolute values, for the method `arnoldi`.

    The Hessian is exact and over all blocks of the store together; its products are taken on a random part of the
    dataset, in evaluation mode. The model comes back as it was.

    Cost: `iterations` products, each some four times a gradient of `examples` examples; memory for as many vectors of
    all trainable parameters, and disk for `top`.

    Args:
        model: As it was when the rows were collected.
        dataset: The training examples.
        path: The store with the rows.
        top: Eigenpairs to keep; fewer where the Hessian has fewer that are not zero.
        iterations: Of Lanczos, at least `top`; more of them make the smaller eigenvalues more exact.
        examples: How many examples to use; `None` for all.
        seed: Of their choice and of the first direction.
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
        UnsupportedModel: An operation of the model has no second derivative.
        BadExample: The loss has no curvature, or one that is not finite.
    """
    if not 1 <= top <= iterations:
        raise BadSetting(
            f"top={top} and iterations={iterations}: keep at least 1 eigenpair and at most as many as there are "
            "iterations; twice as many iterations as eigenpairs is usual."
        )
    store = GradientStore.open(path)
    store.check_whole("an eigenvector of the Hessian multiplies whole rows")
    plan = Plan.again(store, model, dataset, point, data_collator, remove_unused_columns, task)
    with Hessian(model, plan, store.header, examples=examples, seed=seed, batch_size=batch_size) as hessian:
        pairs = lanczos(hessian, hessian.size, iterations, seed=seed, dtype=hessian.dtype, title="Hessian products")
    values, vectors, residuals = (part[:top] for part in pairs)
    if not len(values):
        raise BadExample(
            f"the Hessian of the mean loss over {len(hessian.positions)} examples is zero, so there is nothing to "
            "divide by. Does the dataset have labels, and does the loss depend on the stored blocks?"
        )
    relative = residuals / values.abs()
    if unsettled := int((relative > UNSETTLED).sum()):
        warnings.warn(
            f"{unsettled} of {len(values)} eigenpairs have not converged (the worst is off by {relative.max():.0%} of "
            f"its eigenvalue). Use more iterations than {iterations}, or keep fewer: top={len(values) - unsettled}.",
            stacklevel=2,
        )
    tensors = {f"vectors.{name}": part for name, part in hessian.split(vectors).items()}
    details = {
        "examples": len(hessian.positions),
        "iterations": iterations,
        "seed": seed,
        "negative": int((values < 0).sum()),
        "worst_residual": float(relative.max()),
    }
    write_artifact(
        store,
        "hessian",
        {**tensors, "values": values, "residuals": residuals},
        details,
        adapter=adapter_identity(model),
        point=point,
    )
    return store
