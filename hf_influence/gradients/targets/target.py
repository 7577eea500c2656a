"""What the queries are to be good for, where that is not their mean loss: the gradient of any scalar of a query set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import BadExample, BadSetting, StoreMismatch
from hf_influence.gradients.batches import Collator, Examples, on_device
from hf_influence.gradients.compress import compressor_of
from hf_influence.gradients.identity import adapter_identity
from hf_influence.gradients.modes import evaluating
from hf_influence.gradients.own_loss import OwnTask
from hf_influence.gradients.plan import Plan
from hf_influence.gradients.processes import first_process_first, rank
from hf_influence.gradients.sweep import BatchSize, check_batch_size, sweep
from hf_influence.store import GradientStore

Target = Callable[[nn.Module, dict[str, Any]], Tensor]
"""`(model, batch) -> scalar`, summed over the batches, or `-> [k]` with a method `combine([k]) -> scalar`."""


def collect_target(
    model: nn.Module,
    dataset: Any,
    path: str | Path,
    *,
    target: Target,
    split: str,
    by: str | None = None,
    data_collator: Collator | None = None,
    batch_size: BatchSize = "auto",
    remove_unused_columns: bool = True,
    task: OwnTask | None = None,
    point: int = 0,
    overwrite: bool = False,
) -> GradientStore:
    """The gradient of one number of a whole query set, kept as a split of one row that every method can compare with.

        collect_target(model, validation, "runs/sst2", target=fairness(sensitive="gender"), split="fairness")
        scores = attribute("runs/sst2", "datainf", query_split="fairness")

    The row is `v = ∇f`, with f the target: the sum over the batches of what `target(model, batch)` gives. So the mean
    loss of the queries may be replaced by whatever should be *small*: then higher = more worth keeping as ever, since
    a method predicts how far f rises without the example. Give the negative of what should be large.

    A target is a function, or an object that may have three things more: `columns`, names of columns of the dataset
    that each batch is to carry (as a tensor where they are numbers, else as a list); `with_task(task) -> target`, where
    it is to know the loss of the rows; and `combine`, for a target that is no sum over batches. Then a call gives `[k]`
    numbers, their sums s over all batches (in float64) go to `combine(s) -> scalar`, and the row is `Σ_k ∂f/∂s_k ∇s_k`;
    a mean, a difference of means, a ratio can be had that way.

    Plain autograd, in evaluation mode, one batch in memory at a time; the model comes back as it was. The row holds the
    parameters that the store has as blocks and goes through the store's compressor. Its statistic "value" is f.

    Cost: a forward and backward pass over the queries, and with `combine` one more forward pass.

    Args:
        model: The model with which the training rows were collected, as it was then.
        dataset: The queries, as in `collect`.
        path: Folder of the store; the training rows must be there.
        target: What to take the gradient of. The batch is that of the data_collator, on the model's device.
        split: Name of the split, for `attribute(..., query_split=split)`.
        by: A column that cuts the queries into groups; the split then has a row for each group, of the target of that
            group alone, under the value of the column.
        data_collator: As in `collect`, like the two that follow.
        batch_size: See there.
        remove_unused_columns: See there.
        task: See there; label smoothing is known from the store.
        point: The parameter point of the rows to compare with.
        overwrite: Compute the row again if the split is there.

    Returns:
        The store. The id of the row is the name of the target: that of the function, or the object's `repr`.

    Raises:
        BadSetting: The target gives no number, or one that no parameter had a part in.
        BadExample: A column that is missing, or a gradient that is zero or not finite.
        StoreMismatch: The model or its adapter is not that of the store, or the split is there already.
        StoreError: There is no store at `path`.
    """
    check_batch_size(batch_size)
    store = GradientStore.open(path)
    adapter = adapter_identity(model)
    plan = Plan.again(store, model, dataset, point, data_collator, remove_unused_columns, task)
    if hasattr(target, "with_task"):
        target = target.with_task(plan.task)
    _check_place(store, split, point, overwrite)
    fingerprint, lengths = plan.examples.survey()
    carried = {name: _column(dataset, name) for name in getattr(target, "columns", ())}
    examples = _Carrying(dataset, model, data_collator, None, remove_unused_columns)
    examples.carried = carried
    name = str(getattr(target, "__name__", target))
    name = split if "<" in name else name  # a lambda, an address
    groups = _groups(dataset, by, name, len(examples))
    digest = hashlib.sha256(json.dumps([fingerprint, name, by, carried], default=repr).encode())
    weights = dict(model.named_parameters())
    device = next(iter(weights.values())).device
    blocks = {block: weights[block] for block in store.blocks}
    compress = compressor_of(store.header.compress)

    def over(todo: Sequence[int], run: Callable[[dict[str, Any]], list[Tensor]]) -> list[Tensor]:
        """The sum over all batches of what `run` gives."""
        total: list[Tensor] = []
        for _, parts in sweep(run, examples, todo, lengths, batch_size, device, f"target {name}"):
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        return total

    def row_of(todo: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """The gradient, block -> `[d]`, and the value."""
        combine = getattr(target, "combine", None)
        slope = None
        if combine is not None:
            with torch.no_grad():
                (sums,) = over(todo, lambda batch: [_numbers(target, model, on_device(batch, device), many=True)])
            sums.requires_grad_()
            value = combine(sums)
            _check_scalar(value, "combine")
            (slope,) = torch.autograd.grad(value, sums)

        def back(batch: dict[str, Any]) -> list[Tensor]:
            numbers = _numbers(target, model, on_device(batch, device), many=combine is not None)
            _check_grown(numbers, name)
            scalar = numbers if slope is None else numbers @ slope
            parts = torch.autograd.grad(scalar, list(blocks.values()), materialize_grads=True)
            exact = [part.to(torch.promote_types(part.dtype, torch.float32)).flatten() for part in parts]
            return [numbers.detach().sum(), *exact]

        total, *gradient = over(todo, back)
        return dict(zip(blocks, gradient, strict=True)), total if combine is None else value.detach()

    with first_process_first():
        if rank() == 0:
            with evaluating(model), torch.enable_grad():
                found = [row_of(todo) for todo in groups.values()]
            for label, (row, value) in zip(groups, found, strict=True):
                _check_usable(row, value, label)
            if overwrite:
                store.drop(point, split)
            rows = {k: torch.stack([row[k] for row, _ in found]).cpu() for k in blocks}  # block -> [groups, d]
            norms = torch.stack([g.square().sum(1) for g in rows.values()]).sum(0).sqrt()
            kept = {k: compress.fit(k, store.header.blocks[k])(g) for k, g in rows.items()} if compress else rows
            stats = {"value": torch.stack([value for _, value in found]), "grad_norm": norms}
            about: dict[str, Any] = {"adapter": adapter, "dataset": digest.hexdigest()[:16], "ids": list(groups)}
            with store.writer(split, n=len(groups), point=point, **about) as writer:
                writer.append(range(len(groups)), kept, stats)
    return store


class _Carrying(Examples):
    """Examples whose batches carry columns that the collator does not see."""

    carried: dict[str, list[Any]]

    def batch(self, positions: Sequence[int]) -> dict[str, Any]:
        own = {name: [values[i] for i in positions] for name, values in self.carried.items()}
        numbers = {
            name: torch.tensor(values) if all(isinstance(value, int | float) for value in values) else values
            for name, values in own.items()
        }
        return {**super().batch(positions), **numbers}


def _check_place(store: GradientStore, split: str, point: int, overwrite: bool) -> None:
    """Whether the split can be put there, before the pass over the queries."""
    if split in store.splits(point) and not overwrite:
        raise StoreMismatch(
            f"{store.path} holds a split {split!r} at point {point} already, and whether it is of the same target "
            "cannot be told. Choose another name, or pass overwrite=True to compute it again."
        )
    if split == "train":
        raise BadSetting("split='train' holds the examples to be judged; give the target a split of its own.")


def _column(dataset: Any, name: str) -> list[Any]:
    """The values of a column in dataset order."""
    if name not in dataset[0]:
        raise BadExample(
            f"the dataset has no column {name!r}, which the target needs of every query; its columns are "
            f"{list(dataset[0])}."
        )
    values = list(dataset[name]) if hasattr(dataset, "column_names") else [row[name] for row in dataset]
    return [value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value for value in values]


def _groups(dataset: Any, by: str | None, name: str, n: int) -> dict[str, list[int]]:
    """Id of a row -> positions of the queries that it is the target of."""
    if by is None:
        return {name: list(range(n))}
    groups: dict[str, list[int]] = {}
    for i, value in enumerate(_column(dataset, by)):
        groups.setdefault(str(value), []).append(i)
    return groups


def _numbers(target: Target, model: nn.Module, batch: dict[str, Any], many: bool) -> Tensor:
    """What the target gives: a scalar, or `[k]` if `many`; in float64, as half precision cannot count past 256."""
    numbers = target(model, batch)
    _check_scalar(numbers, "the target", many)
    return numbers.double()


def _check_scalar(numbers: object, what: str, many: bool = False) -> None:
    if not isinstance(numbers, Tensor) or numbers.ndim != int(many):
        found = f"shape {list(numbers.shape)}" if isinstance(numbers, Tensor) else f"type {type(numbers).__name__}"
        wanted = "a tensor of shape [k], as it has a method combine" if many else "a tensor with one number, shape []"
        raise BadSetting(
            f"{what} gave a result of {found}; it must be {wanted}. Reduce it with .sum(); a target that is no sum "
            "over batches needs combine."
        )


def _check_grown(numbers: Tensor, name: str) -> None:
    if not numbers.requires_grad:
        raise BadSetting(
            f"the target {name} gave a number without a gradient, so no parameter had a part in it. Compute it from "
            "model(**batch) without torch.no_grad(), .detach() or .item()."
        )


def _check_usable(row: dict[str, Tensor], value: Tensor, label: str) -> None:
    """Refuse a gradient that nothing can be compared with."""
    bad = next((block for block, g in row.items() if not torch.isfinite(g).all()), None)
    if bad is not None or not torch.isfinite(value):
        raise BadExample(
            f"the target {label!r} has the value {float(value):g} and a gradient that is not finite (first block: "
            f"{bad}). No score can be computed with it. Look at the queries, and at what the target divides by."
        )
    if all(bool((g == 0).all()) for g in row.values()):
        raise BadExample(
            f"the target {label!r} has the value {float(value):g} and a gradient of zero, so every score would be 0. "
            "Either it does not depend on the parameters that the store holds, or it is at its minimum already."
        )
