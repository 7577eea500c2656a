"""Stored rows against plain autograd: the same gradients, found in the slow and obvious way."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import StoreError, StoreMismatch
from hf_influence.gradients.batches import Collator, alone, forward_arguments, on_device
from hf_influence.gradients.compress import compressor_of
from hf_influence.gradients.example_losses import losses_by
from hf_influence.gradients.identity import adapter_identity
from hf_influence.gradients.modes import autocasts, evaluating
from hf_influence.gradients.objective import has_own_loss
from hf_influence.gradients.own_loss import OwnTask
from hf_influence.gradients.plan import Plan
from hf_influence.store import GradientStore, Rows
from hf_influence.task import IGNORED, CausalLM, LanguageModel

BALANCING = "output_router_logits"
"""What makes a mixture of experts add a term to its loss that is no example's own."""
TOLERANCE = 1e-3
TOLERANCE_HALF = 5e-2


def verify(
    model: nn.Module,
    dataset: Any,
    store: str | Path | GradientStore,
    split: str = "train",
    *,
    k: int = 8,
    seed: int = 0,
    tolerance: float | None = None,
    data_collator: Collator | None = None,
    remove_unused_columns: bool = True,
    task: OwnTask | None = None,
    point: int = 0,
) -> float:
    """Compute `k` random rows of a store once more and compare: `torch.autograd.grad(model(**example).loss)`.

    Each example goes through the model alone and without padding, with no hook of this library, and the store's
    compressor is applied to the whole gradient. The loss is that of the labels alone, without the term by which a
    mixture balances its experts. The model comes back as it was.

    Args:
        model: As it was when the rows were collected.
        dataset: What they were collected from.
        store: The store, or its path.
        split: Which of its splits.
        k: Number of rows; all of them where there are fewer.
        seed: Of their choice.
        tolerance: The largest ‖row − reference‖ / ‖reference‖ that is rounding. By default 1e-3 (float32 rows differ by
            1e-6 to 1e-4, as batches of other shapes already do in plain PyTorch; a row that is wrong differs by 1e-1 or
            more), or 5e-2 where the model has parameters, or computes, in half precision.
        data_collator: The one of `collect`.
        remove_unused_columns: That of `collect`.
        task: That of `collect`; label smoothing is known from the store.
        point: The parameter point.

    Returns:
        The largest relative error.

    Raises:
        BadSetting: The rows are of a loss function of your own, and it was not given.
        StoreMismatch: The model, its adapter or the dataset is not what the rows were collected from.
        StoreError: A row is further off than `tolerance`; the message names the example.
        MissingRows: The split is not there, or not complete.
    """
    store = GradientStore.open(store)
    rows = store.rows(split, point)
    plan = _plan(store, model, dataset, rows, point, data_collator, remove_unused_columns, task)
    if tolerance is None:
        half = autocasts(model) or any(w.dtype in (torch.float16, torch.bfloat16) for w in model.parameters())
        tolerance = TOLERANCE_HALF if half else TOLERANCE
    chosen = random.Random(seed).sample(range(len(rows)), min(k, len(rows)))
    stored = {name: _read(rows, name, chosen) for name in rows.blocks}
    compress, worst = compressor_of(store.header.compress), 0.0
    with evaluating(model):
        for at, position in enumerate(chosen):
            difference = length = 0.0
            for name, g in _gradient(model, plan, position, list(rows.blocks)).items():
                whole = g.detach().flatten()[None].to("cpu", rows.dtype)  # [1, d]
                reference = whole if compress is None else compress.fit(name, store.header.blocks[name])(whole)
                difference += float((stored[name][at] - reference[0]).square().sum())
                length += float(reference.square().sum())
            error = (difference / length) ** 0.5 if length else difference**0.5
            if not error <= tolerance:
                raise StoreError(
                    f"the row of example {rows.ids[position]!r} in {rows.folder} differs from plain autograd by "
                    f"{error:.1e} of its length, {tolerance:.0e} is allowed. Either the file was changed (rows.check() "
                    "compares checksums), or the data_collator is another one, or the model computes an example "
                    "differently in a batch: collect with batch_size=1 and compare again."
                )
            worst = max(worst, error)
    return worst


def _plan(
    store: GradientStore,
    model: nn.Module,
    dataset: Any,
    rows: Rows,
    point: int,
    data_collator: Collator | None,
    remove_unused_columns: bool,
    task: OwnTask | None,
) -> Plan:
    """How the rows of the store would be collected from this model and dataset; refuses others."""
    plan = Plan.again(store, model, dataset, point, data_collator, remove_unused_columns, task, rows.id_column)
    for what, was, now in (
        ("values of the adapter", store.adapter(point), adapter_identity(model)),
        ("tokenised dataset", rows.dataset, plan.examples.survey()[0]),
        ("ids", rows.ids, plan.examples.ids or list(range(len(plan.examples)))),
    ):
        if was != now:
            found = f" (stored hash {was}, now {now})" if isinstance(was, str) else ""
            raise StoreMismatch(
                f"{rows.folder} holds rows at other {what}{found}, so there is nothing to compare. Pass the model and "
                "the dataset that the rows were collected from."
            )
    return plan


def _read(rows: Rows, name: str, chosen: list[int]) -> Tensor:
    """The chosen rows of a block, `[k, d]`, touching no others."""
    out = torch.empty(len(chosen), rows.blocks[name], dtype=rows.dtype)
    place = {position: at for at, position in enumerate(chosen)}
    for index, piece in rows.chunks(name):
        for at, position in enumerate(index.tolist()):
            if position in place:
                out[place[position]] = piece[at]
    return out


def _gradient(model: nn.Module, plan: Plan, position: int, names: list[str]) -> dict[str, Tensor]:
    """The gradient of one example's own loss at the named parameters; zeros where no token is labelled."""
    batch = alone(plan.examples.batch([position]), labels_too=isinstance(plan.task, CausalLM))
    batch = on_device(batch, next(model.parameters()).device)
    weights = dict(model.named_parameters())
    factor = 1
    if isinstance(plan.task, LanguageModel):
        n_tokens = int((plan.task.targets(batch["labels"], None) != IGNORED).sum())
        if n_tokens == 0:
            return {name: torch.zeros_like(weights[name]) for name in names}
        factor = n_tokens if plan.task.reduction == "sum" else 1
    with torch.enable_grad():
        own = has_own_loss(plan.task)
        plain = {BALANCING: False} if BALANCING in forward_arguments(model) else {}
        loss = losses_by(plan.task, model, batch).sum() if own else model(**batch, **plain).loss * factor
        return dict(
            zip(names, torch.autograd.grad(loss, [weights[n] for n in names], materialize_grads=True), strict=True)
        )
