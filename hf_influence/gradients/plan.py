"""How a dataset is collected: all that is decided, and refused, before the first batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_influence.errors import BadSetting, StoreMismatch
from hf_influence.gradients.answers import parts_of
from hf_influence.gradients.batches import Collator, Examples
from hf_influence.gradients.columns import check_columns
from hf_influence.gradients.compress import Compressor, compressor_of
from hf_influence.gradients.identity import adapter_identity, model_identity
from hf_influence.gradients.other_prompts import OtherPrompts
from hf_influence.gradients.own_loss import OwnTask, kept_task, task_of
from hf_influence.gradients.sweep import BatchSize
from hf_influence.gradients.taps import Modules, Tap, find_taps
from hf_influence.gradients.trial import try_out
from hf_influence.store import GradientStore, Header
from hf_influence.task import Reduction, Task, unwrapped


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first batch."""

    task: Task
    examples: Examples
    taps: list[Tap]
    header: Header
    compress: Compressor | None = None

    @property
    def size(self) -> int:
        """The bytes that the rows will take."""
        return self.header.row_bytes() * len(self.examples)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        dataset: Any,
        data_collator: Collator | None,
        loss_reduction: Reduction,
        compress: Compressor | None,
        modules: Modules,
        skip: Sequence[str],
        id_column: str | None,
        remove_unused_columns: bool,
        task: OwnTask | None = None,
    ) -> Plan:
        """See `collect` for the arguments and errors."""
        if getattr(unwrapped(model).config, "return_dict", None) is False:
            raise BadSetting(
                f"{type(unwrapped(model)).__name__} gives a bare tuple, in which the logits have no name, as "
                "model.config.return_dict is False. Set model.config.return_dict = True."
            )
        task = task_of(model, loss_reduction, task)
        taps = find_taps(model, modules, skip)
        examples = Examples(dataset, model, data_collator, id_column, remove_unused_columns)
        check_columns(dataset, examples.ids, model, task)
        task = examples.settled(task)
        examples.check_order()
        return cls(task, examples, taps, header_of(model, taps, task, compress), compress)

    @classmethod
    def again(
        cls,
        store: GradientStore,
        model: nn.Module,
        dataset: Any,
        point: int,
        data_collator: Collator | None = None,
        remove_unused_columns: bool = True,
        task: OwnTask | None = None,
        id_column: str | None = None,
    ) -> Plan:
        """How rows like those of a point of a store are collected from this model and dataset.

        The task is that of the store, where it keeps it, or the one that was given. Parameters that the store has no
        block for are left out.

        Raises:
            StoreMismatch: The model, its adapter or its task is not that of the rows.
        """
        header = store.header
        left_out = [name for name, w in model.named_parameters() if w.requires_grad and name not in header.blocks]
        plan = cls.of(
            model,
            dataset,
            data_collator,
            header.task.get("loss_reduction", "mean"),
            compressor_of(header.compress),
            "trainable",
            left_out,
            id_column,
            remove_unused_columns,
            kept_task(header.task) if task is None else task,
        )
        header.check(plan.header, store.path)
        was, now = store.adapter(point), adapter_identity(model)
        if was not in (None, now):
            raise StoreMismatch(
                f"{store.path} holds rows at other values of the adapter at point {point} (stored hash {was}, now "
                f"{now}), so the model at hand has nothing to say about them. Pass the model that the rows were "
                "collected from, or its point."
            )
        return plan


def check_collectable(
    model: nn.Module,
    dataset: Any,
    path: str | Path,
    split: str,
    *,
    data_collator: Collator | None = None,
    loss_reduction: Reduction = "mean",
    task: OwnTask | None = None,
    compress: Compressor | None = None,
    modules: Modules = "lora",
    skip: Sequence[str] = (),
    id_column: str | None = None,
    remove_unused_columns: bool = True,
    other_prompts: int | None = 0,
    batch_size: BatchSize = "auto",
    overwrite: bool = False,
    resumed: bool = False,
) -> Plan:
    """Whether `collect` with these arguments will go through, as far as that can be told before training.

    Args:
        resumed: The training run continues an earlier one, whose rows may be there already.

    The other arguments are those of `collect`, and so are the errors.

    Returns:
        How the rows will be collected.
    """
    plan = Plan.of(
        model, dataset, data_collator, loss_reduction, compress, modules, skip, id_column, remove_unused_columns, task
    )
    plan.examples.batch(range(min(2, len(plan.examples))))
    try_out(model, plan.task, plan.examples, plan.taps, several=batch_size != 1)
    if other_prompts:
        OtherPrompts(plan.task, plan.examples, other_prompts, todo=[0])
        parts_of(plan.task, plan.examples, range(len(plan.examples)))
    check_folder(path, plan.header, overwrite=overwrite, resumed=resumed)
    return plan


def check_folder(path: str | Path, header: Header, *, overwrite: bool, resumed: bool) -> None:
    """Whether rows of a training run may go to this folder.

    Raises:
        StoreMismatch: It holds other rows, or those of an earlier run.
    """
    if not (Path(path).expanduser() / "store.json").is_file() or overwrite:
        return
    store = GradientStore.open(path)
    store.header.check(header, store.path)
    splits = store.splits_anywhere()
    if splits and not resumed:
        raise StoreMismatch(
            f"{path} holds rows of an earlier run (splits: {', '.join(sorted(splits))}), and after training the "
            "weights will be others. Choose another folder, or pass overwrite=True to replace them."
        )


def header_of(model: nn.Module, taps: Sequence[Tap], task: Task, compress: Compressor | None) -> Header:
    """What a store says of the rows that this model, task and compressor give."""
    blocks = {tap.parameter: tap.shape for tap in taps}
    kept = {name: compress.columns(name, shape) for name, shape in blocks.items()} if compress else {}
    exact = any(weight.dtype == torch.float64 for weight in model.parameters())
    return Header(
        model=model_identity(model),
        task=task.settings(),
        blocks=blocks,
        compress=None if compress is None else compress.settings(),
        columns={name: columns for name, columns in kept.items() if columns is not None} or None,
        widths={name: compress.width(shape) for name, shape in blocks.items()} if compress else None,
        dtype="float64" if exact else "float32",
    )
