"""One pass over a dataset at fixed weights: a row for every example, into a store."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import BadExample, BadSetting, StoreMismatch
from hf_influence.gradients.batches import Collator
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.compress import Compressor
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.gradients.identity import adapter_identity
from hf_influence.gradients.mislabelled import SPLIT, mislabelled
from hf_influence.gradients.other_prompts import STATISTIC, other_prompt_losses
from hf_influence.gradients.own_loss import OwnTask
from hf_influence.gradients.plan import Plan
from hf_influence.gradients.processes import first_process_first, rank, wait_for_all, world
from hf_influence.gradients.sweep import BatchSize, check_batch_size, sweep
from hf_influence.gradients.taps import Modules
from hf_influence.gradients.trial import try_out
from hf_influence.store import GradientStore, PointAbout, RowWriter
from hf_influence.task import Reduction, two_classes

LOOKED_AT = 4
"""Rows that are there, to see whether they are of the examples that are to be collected."""


def collect(
    model: nn.Module,
    dataset: Any,
    path: str | Path,
    split: str = "train",
    *,
    data_collator: Collator | None = None,
    batch_size: BatchSize = "auto",
    loss_reduction: Reduction = "mean",
    task: OwnTask | None = None,
    compress: Compressor | None = None,
    modules: Modules = "lora",
    skip: Sequence[str] = (),
    id_column: str | None = None,
    remove_unused_columns: bool = True,
    point: int = 0,
    about: PointAbout | None = None,
    rows: bool = True,
    features: bool = False,
    other_prompts: int | None = 0,
    wrong_labels: bool = False,
    overwrite: bool = False,
) -> GradientStore:
    """The gradient of every example's own loss, taken at the model's present weights and kept on disk.

    Runs in evaluation mode (no dropout) with one batched forward and backward for all examples of a batch. The rows
    are the same whatever the batch size, the order and the side of the padding. The model comes back as it was:
    weights, modes, `requires_grad` and `.grad`. Stopped half way, the same call goes on where it stopped. Several
    processes (torch.distributed) share the work: all of them must call.

    Cost: a forward and backward pass over the dataset, somewhat less than training for one epoch. Disk: four bytes for
    each trainable parameter and example, or `4 r` bytes for each parameter tensor and example with `compress`.

    Args:
        model: A language model (causal or encoder-decoder) or a classifier of sequences or images of transformers, with
            a LoRA adapter of PEFT.
        dataset: Tokenised examples with labels, map-style.
        path: Folder of the store; made if it is not there.
        split: "train" for the examples to be judged, "query" for those that judge; any other name for more.
        data_collator: As in `Trainer`; by default pads `input_ids` and `labels` on the right.
        batch_size: Examples a batch, or "auto" for a number of tokens that suits the device. Halves when memory runs
            out.
        loss_reduction: "mean" over an example's labelled tokens, or "sum".
        task: For a loss other than cross-entropy: `label_smoothing(0.1)`, `own_loss(function)`, or a `Task` of yours.
        compress: `dropout(r)`, `gaussian(r)`, `sparse_jl(r)` or `logra(r_in, r_out)`; whole rows without.
        modules: "lora" for the adapter and `modules_to_save`; "trainable" for the trainable linear layers of any model.
        skip: Names of trainable parameters to leave out; `*` stands for anything.
        id_column: Column of integers or strings that names the examples; their positions otherwise.
        remove_unused_columns: As in `TrainingArguments`; `False` for a collator that needs other columns.
        point: The number under which a store keeps rows at different weights apart.
        about: What the store is to say of the point; `collect_at` fills it in.
        rows: False keeps the statistics of each example alone (loss, margin, …), by forward passes alone; enough for
            methods that compare losses, such as `gex`.
        features: Keep the input of the last layer as well, as the statistic "features" `[n, h]`; of a language model
            its mean over the positions that predict the labels.
        other_prompts: Of a language model: keep the loss of each answer after so many prompts of other examples, in
            turn like its own and at random, as the statistic "other_prompt_loss" `[n, k]`, for `prompt_gain`; a forward
            pass for each. A prompt is what comes before the first label that is not -100. `None`: two where all
            examples have prompts.
        wrong_labels: Of clean queries of more than two classes, or whose answers name classes (five examples or more
            for each different answer, on average): keep their rows under wrong labels as well, in the split
            "{split}-mislabelled", by which `auto` tells how probable it is that a label is wrong. Of a classifier of
            two classes they are known without.
        overwrite: Replace rows of another model, adapter or dataset instead of refusing.

    Returns:
        The store; `store.rows(split)` has the rows.

    Raises:
        UnsupportedModel: No LoRA, or trainable parameters without a rule (named).
        BadExample: An empty dataset, missing labels, or an example whose loss or gradient is not finite (named); other
            prompts are wanted where there are none.
        BadSetting: Wrong labels of what has no classes.
        StoreMismatch: The folder holds rows of another model, adapter, dataset or compressor, or without features or
            other prompts; or its other splits have other classes.
    """
    check_batch_size(batch_size)

    def planned(dataset: Any, collator: Collator | None, id_column: str | None) -> Plan:
        keep = remove_unused_columns, task
        return Plan.of(model, dataset, collator, loss_reduction, compress, modules, skip, id_column, *keep)

    plan = planned(dataset, data_collator, id_column)
    wrong = mislabelled(model, dataset, data_collator, remove_unused_columns) if wrong_labels and task is None else None
    if wrong_labels and wrong is None and (task is not None or not two_classes(plan.task.settings())):
        raise BadSetting(
            "wrong_labels=True puts other class numbers in the place of the labels, or other names of classes in that "
            "of the answers, and there are none here: it is for classifiers with one label an example, and for prompts "
            "whose answers are few and repeated, with the loss of their own. Leave it out."
        )
    try_out(model, plan.task, plan.examples, plan.taps if rows else [], several=batch_size != 1)
    store = collect_planned(
        model,
        plan,
        path,
        split,
        batch_size=batch_size,
        point=point,
        about=about,
        rows=rows,
        features=features,
        other_prompts=other_prompts,
        overwrite=overwrite,
    )
    if wrong is not None:
        collect_planned(
            model,
            planned(*wrong, None),
            path,
            SPLIT.format(split),
            batch_size=batch_size,
            point=point,
            about=about,
            rows=rows,
            overwrite=overwrite,
        )
    return store


def collect_planned(
    model: nn.Module,
    plan: Plan,
    path: str | Path,
    split: str,
    *,
    batch_size: BatchSize,
    point: int = 0,
    about: PointAbout | None = None,
    rows: bool = True,
    features: bool = False,
    other_prompts: int | None = 0,
    overwrite: bool = False,
    quiet: bool = False,
) -> GradientStore:
    """What `collect` does once all is decided, without progress bars if `quiet`; the same plan serves again."""
    examples = plan.examples
    fingerprint, lengths = examples.survey()
    adapter = adapter_identity(model)

    def writer_of(rank: int) -> RowWriter:
        store = GradientStore.create(path, plan.header, overwrite=overwrite)
        make = partial(
            store.writer,
            split,
            adapter=adapter,
            dataset=fingerprint,
            n=len(examples),
            ids=examples.ids,
            id_column=examples.id_column,
            contents=examples.contents,
            classes=examples.classes,
            point=point,
            rank=rank,
            about=about,
            blocks=rows,
            statistics=[*(["features"] if features else []), *([STATISTIC] if other_prompts else [])],
            overwrite=overwrite,
        )
        writer = make()
        if rank == 0 and _of_others(model, plan, writer):
            if not overwrite:
                raise StoreMismatch(
                    f"{writer.folder} holds rows of other examples than the data_collator makes of the dataset now "
                    "(their tokens or labels differ). Collect into another folder or split, or pass overwrite=True."
                )
            store.drop(point, split)
            writer = make()
        return writer

    with first_process_first():
        writer = writer_of(rank())
        if rank() == 0:
            writer.gather()  # an interrupted run of several processes may have left parts
    wait_for_all()
    todo = [i for i in range(len(examples)) if i not in writer.done][rank() :: world()]
    if todo:
        resting = FixedWeights(model, plan.task, RowCatcher(plan.taps if rows else [], plan.compress), features)
        run = resting.run if rows else lambda batch: ({}, resting.judge(batch))
        title = f"{'gradients' if rows else 'losses'} of {split}"
        k = 0 if other_prompts is None and writer.lacks(STATISTIC) else other_prompts
        others = None if k == 0 else other_prompt_losses(model, plan.task, examples, todo, k, batch_size, split, quiet)
        with writer, resting:
            batches = sweep(run, examples, todo, lengths, batch_size, resting.device, None if quiet else title)
            for positions, (gradients, stats) in batches:
                _check_finite(gradients, stats, positions, examples.ids)
                stats = stats if others is None else {**stats, STATISTIC: others[positions]}
                writer.append(positions, gradients, stats)
    wait_for_all()
    if rank() == 0:
        writer.gather()
    wait_for_all()
    store = GradientStore.open(path)
    empty = (store.rows(split, point).stats["n_tokens"] == 0).nonzero().flatten().tolist()
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(examples)} examples of {split!r} have no labelled token (first: {empty[0]}): their "
            "loss does not exist and their rows are zero; stats['n_tokens'] == 0 finds them. Prompts that fill the "
            "whole length after truncation are a usual cause.",
            stacklevel=2,
        )
    return store


def _of_others(model: nn.Module, plan: Plan, writer: RowWriter) -> bool:
    """Whether rows that are there are of other tokens or labels, which a collator may make of the same columns."""
    known, other = writer.some("hash", LOOKED_AT), False
    if not known:
        return False
    with FixedWeights(model, plan.task, RowCatcher([])) as resting:
        for position, was in known.items():
            now, again = (int(resting.judge(plan.examples.batch([position]))["hash"]) for _ in range(2))
            if now != again:  # drawn anew each time
                return False
            other |= now != was
    return other


def _check_finite(
    rows: dict[str, Tensor], stats: dict[str, Tensor], positions: Sequence[int], ids: Sequence[Any] | None
) -> None:
    bad = ~(torch.isfinite(stats["loss"]) & torch.isfinite(stats.get("grad_norm", stats["loss"])))
    if not bad.any():
        return
    at = int(bad.nonzero()[0])
    name = positions[at] if ids is None else ids[positions[at]]
    where = next((block for block, row in rows.items() if not torch.isfinite(row[at]).all()), "none")
    raise BadExample(
        f"example {name!r} has loss {stats['loss'][at].item():g} and a gradient that is not finite (first block: "
        f"{where}). No score can be computed with it. Look at its text and labels, and at the learning rate if many "
        "are so; the rows before it are kept. Leave it out with dataset.select, or train in a wider dtype."
    )
