"""What a Trainer must be for its rows to be right, looked at before the first step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Value
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Trainer, TrainerState, TrainingArguments

from hf_influence.callbacks.weighted import WeightedTrainer, soft_cross_entropy
from hf_influence.errors import BadExample, BadSetting, MissingRows, StoreMismatch
from hf_influence.gradients.lora import approximated
from hf_influence.gradients.plan import Plan
from hf_influence.gradients.processes import world
from hf_influence.gradients.taps import Tap
from hf_influence.store import GradientStore
from hf_influence.task import IGNORED, LABELS, CausalLM, Classification, Task, labels_of, unwrapped

logger = logging.getLogger(__name__)

LOOKED_AT = 8
"""Examples whose labels are looked at."""

SUPERVISED = ("SFTTrainer", "_BaseTrainer", "BaseTrainer")
"""TRL's Trainers that have a loss of a single example; all others compare answers, or imitate other models."""


def check_kind(trainer: Trainer) -> None:
    """Refuse a Trainer that does not train on the examples' own losses, or cuts the weights up.

    Raises:
        BadSetting: Says why.
    """
    for kind in type(trainer).__mro__:
        of_trl = kind.__module__.startswith("trl.") and issubclass(kind, Trainer)
        if of_trl and kind.__name__ not in SUPERVISED:
            raise BadSetting(
                f"{kind.__name__} does not train on the examples' own cross-entropy, so there is no gradient of a "
                "single example to capture. Supported are Trainer, Seq2SeqTrainer and SFTTrainer."
            )
    if trainer.args.fsdp or trainer.args.deepspeed:
        raise BadSetting(
            f"{'FSDP' if trainer.args.fsdp else 'DeepSpeed'} keeps a part of each weight in each process, and the "
            "gradient of an example never exists in one place. Train with DDP (torchrun without it), or train without "
            "the callback and call collect(model, dataset, path) on the saved adapter."
        )


def check_trainer(trainer: Trainer, args: TrainingArguments, task: Task, own_task: bool) -> None:
    """Refuse what changes the loss or hides the passes.

    Args:
        trainer: The one that is to be watched.
        args: Its arguments.
        task: What the loss of an example is.
        own_task: The user has said so.

    Raises:
        BadSetting: Says what and why.
    """
    known = trainer.compute_loss_func in (None, soft_cross_entropy) or isinstance(trainer, WeightedTrainer)
    reasons = {
        "label_smoothing_factor": (
            args.label_smoothing_factor > 0 and not own_task,
            "label smoothing makes the loss another one. For rows of that loss pass "
            f"GradientCapture(…, task=label_smoothing({args.label_smoothing_factor}))",
        ),
        "compute_loss_func": (
            not known and not own_task,
            "the loss is one of your own. Say what it is of one example: GradientCapture(…, task=own_loss(function))",
        ),
        "torch_compile": (args.torch_compile, "a compiled model hides the passes of its modules"),
        "n_gpu": (args.n_gpu > 1, "DataParallel runs copies of the model; start one process a GPU with torchrun"),
    }
    for setting, (found, why) in reasons.items():
        if found:
            raise BadSetting(
                f"rows during training cannot be captured with {setting}={getattr(args, setting, '…')!r}: {why}. "
                "Or change it, or capture at the end alone (during=None)."
            )
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    foreign = owner.__module__.split(".")[0] not in ("transformers", "trl", "hf_influence")
    if foreign and not own_task and isinstance(task, Classification) and _one_direction(task):
        raise BadSetting(
            f"{owner.__name__} has a compute_loss of its own, and whatever depends on the probability of the label "
            "alone (a focal loss, say) sends back a gradient that points the way of cross-entropy's, so it cannot be "
            "seen what the loss of an example is. Say so: GradientCapture(…, task=own_loss(function)), with "
            'own_loss(torch.nn.functional.cross_entropy, reduction="none") if it is plain. Or capture at the end alone '
            "(during=None)."
        )
    if foreign and not own_task:
        logger.warning(
            "%s has a compute_loss of its own. Rows are of the examples' own loss, measured at the logits: what it "
            "adds there is refused, and a penalty on anything else (hidden states, weights) would make them wrong. If "
            "there is one, capture at the end alone (during=None)",
            owner.__name__,
        )


def check_apart(model: nn.Module, taps: Sequence[Tap]) -> None:
    """Refuse a model whose examples are mixed in training, though not at rest.

    Raises:
        BadSetting: Batch normalisation comes after a layer that rows are taken of.
    """
    tapped = {tap.module for tap in taps}
    after = False
    for name, module in model.named_modules():
        after |= module in tapped
        if after and isinstance(module, _BatchNorm):
            raise BadSetting(
                f"{name} normalises by the batch in training, so the loss of each example depends on the others and no "
                "row would be that of its own loss. Capture at the end alone (during=None), where it is at rest."
            )


def check_seen(trainer: Trainer, taps: Sequence[Tap]) -> None:
    """Refuse layers whose gradient in a training step is not that of their calls.

    Args:
        trainer: The one that is to be watched.
        taps: Of the parameters that rows will be made of.

    Raises:
        BadSetting: Names the layer and why.
    """
    names = {tap.module: tap for tap in taps}
    for layer, kind in approximated(trainer.model).items():
        if found := next((names[part] for part in layer.modules() if part in names), None):
            raise BadSetting(
                f"{found.module_name} is trained by {kind}, which computes the gradient of its weights from compressed "
                "inputs: what a step does is not the gradient of any example. Train without it, or capture at the end "
                "alone (during=None), where gradients are exact."
            )
    model: Any = unwrapped(trainer.model)
    code = getattr(model.forward, "__code__", None)
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    plain = trainer.compute_loss_func is None and trainer.label_smoother is None
    if code is None or "fused_lm_head" not in code.co_varnames or not owner.__module__.startswith("trl.") or not plain:
        return
    for part in model.get_output_embeddings().modules():
        if part in names:
            raise BadSetting(
                f"{owner.__name__} takes the loss from the weight of {names[part].module_name} without calling it, so "
                f"the gradient of {names[part].parameter} cannot be told apart by example in a training step. Leave it "
                f"out (skip=[{names[part].parameter!r}]), do not train it, or capture at the end alone (during=None)."
            )


def check_same_queries(store: GradientStore, plans: Mapping[str, Any]) -> None:
    """Refuse to resume with other queries than the points before have.

    Args:
        store: With the points of the run that is resumed.
        plans: Split -> how its rows are to be collected; those without examples by position are not looked at.

    Raises:
        StoreMismatch: Rows at some points would be of other queries than at others.
    """
    for split, plan in plans.items():
        if split == "train" or not isinstance(plan, Plan):
            continue
        for point in filter(None, store.points("weights")):
            with suppress(MissingRows):  # where they were not collected to their end, they will be anew
                if store.rows(split, point).dataset == plan.examples.survey()[0]:
                    continue
                raise StoreMismatch(
                    f"{store.path} holds at point {point} rows of other examples of {split!r} than are given now, and "
                    "what compares points needs the same at all of them. Resume with the queries of the run before, or "
                    "capture into another folder."
                )


def _one_direction(task: Classification) -> bool:
    """Whether other losses have gradients at the logits that point the same way."""
    return task.classes == 1 or task.problem == "single_label_classification"


def chooses_rates(group: Mapping[str, Any]) -> bool:
    """Whether the optimizer makes its own learning rates for a group of parameters, as Adafactor does by default."""
    return bool(group.get("relative_step"))


def warn_of_rates(trainer: Trainer) -> None:
    """Say that the learning rate that is kept with a row is not that of all weights, if it is not."""
    groups = [group for group in trainer.optimizer.param_groups if group["params"]]
    rates = {float(group.get("initial_lr", group["lr"])) for group in groups}
    if chooses_rates(groups[0]):
        logger.warning(
            "the optimizer chooses its learning rates itself (relative_step=True), so rows keep none, and what weighs "
            "by them (tracin, tda and their like) will refuse the rows"
        )
        return
    if len(rates) > 1:
        logger.warning(
            "the optimizer has parameter groups with the learning rates %s, and rows keep that of the first, %g: what "
            "weighs by learning rates (tracin, tda and their like) takes it for all weights",
            ", ".join(f"{rate:g}" for rate in sorted(rates)),
            groups[0].get("initial_lr", groups[0]["lr"]),
        )


def check_believed(trainer: Trainer, problem: str | None) -> None:
    """Vectors of class probabilities look like the labels of another problem, and have another loss.

    Args:
        trainer: The one that is to be watched.
        problem: What the labels were taken for.

    Raises:
        BadSetting: They were taken for that other problem.
    """
    own = trainer.compute_loss_func is soft_cross_entropy or isinstance(trainer, WeightedTrainer)
    named = getattr(unwrapped(trainer.model).config, "problem_type", None)
    if own and problem == "multi_label_classification" and named is None:
        raise BadSetting(
            "the labels are vectors of class probabilities, whose loss is not that of several labels an example. For "
            "rows of it pass GradientCapture(…, task=own_loss(torch.nn.functional.cross_entropy, "
            'reduction="none")), with queries whose labels are such vectors as well.'
        )


def check_label_kinds(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse queries whose labels are of another kind than those of the training examples.

    Args:
        tasks: Split -> what the loss of its examples was taken to be.

    Raises:
        BadSetting: Shows both.
    """
    for split, task in tasks.items():
        if task != tasks["train"]:
            ours, theirs = (one.get("problem_type") for one in (tasks["train"], task))
            raise BadSetting(
                f"the labels of the {split} examples are of another kind ({theirs}) than those of the training set "
                f"({ours}), and gradients of another loss cannot be compared. Give both sets labels of one kind: class "
                "numbers, vectors with a number for each class, or for regression floats."
            )


def check_stream(dataset: Any, at_end: bool, budget: float | None) -> None:
    """Refuse of a dataset without a length what takes one.

    Raises:
        BadSetting: Says what.
    """
    kind = type(dataset).__name__
    instead = "Or pass train_dataset=… with the same examples, map-style (Dataset.from_generator makes one)."
    if at_end:
        raise BadSetting(
            f"train_dataset is a {kind}, without a length, and at the end (at_end=True) each of its examples is to "
            'get a row: nobody knows which those are. Pass during="epochs" (or "steps") and at_end=False for the '
            f"rows of the examples that training sees. {instead}"
        )
    if budget is not None:
        raise BadSetting(
            f"budget={budget} chooses how often to capture by the number of examples, and a {kind} has none. "
            f"Set every=… instead. {instead}"
        )
    if world() > 1:
        raise BadSetting(
            f"train_dataset is a {kind}, whose examples are numbered as they turn up, and {world()} processes "
            f"would give the same numbers to different ones. {instead}"
        )


def check_queries(dataset: Any) -> None:
    """Refuse what has no examples by position.

    Raises:
        BadExample: Says what it is.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        raise BadExample(
            f"query_dataset is a {kind} of {list(dataset)} and no dataset of examples. Pass one of these: "
            "query_dataset=splits['validation'], say."
        )
    if isinstance(dataset, str) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise BadExample(
            f"query_dataset is a {kind}, of which examples cannot be had by position. Pass a datasets.Dataset or a "
            "list of examples (of a stream: list(stream.take(n)), or Dataset.from_generator)."
        )


def check_names(train: Any, query: Any) -> None:
    """Refuse queries whose class numbers stand for other names than those of the training examples.

    Raises:
        BadSetting: Shows both.
    """
    for column in LABELS:
        own, other = (getattr(dataset, "features", None) or {} for dataset in (train, query))
        names = [getattr(features.get(column), "names", None) for features in (own, other)]
        if None not in names and names[0] != names[1]:
            raise BadSetting(
                f"the classes of the column {column!r} are {names[0]} in the training set and {names[1]} in the "
                "queries, so one number means two classes. Give both the same: "
                f"query.cast_column({column!r}, train.features[{column!r}]) before the labels become numbers."
            )


def warn_of_classes(train: Any, query: Any) -> None:
    """Say that the queries are all of one class, if they are and the training examples are not."""
    if not isinstance(train, Dataset) or not isinstance(query, Dataset):
        return
    for column in LABELS:
        if all(isinstance(one.features.get(column), (ClassLabel, Value)) for one in (train, query)):
            ours, theirs = (set(one.with_format(None)[column]) for one in (train, query))
            if len(theirs) == 1 < len(ours):
                logger.warning(
                    "all queries have the label %r, so they say nothing of the other classes, and the method 'auto' "
                    "will refuse them. Draw them at random: clean.shuffle(seed=0).select(range(100))",
                    theirs.pop(),
                )


def warn_of_prompts(plans: Mapping[str, Any]) -> None:
    """Say that the loss leaves tokens, as those of prompts, out of the training examples or the queries alone.

    Args:
        plans: How the rows of each split are made.
    """
    train, query = (_leaves_out(plans.get(split)) for split in ("train", "query"))
    if None in (train, query) or train == query:
        return
    logger.warning(
        "the labels of the %s leave tokens out (-100), as those of prompts, and the labels of the %s leave out none, "
        "so their gradients are of other kinds of text. Give both in one format, prompts and completions or "
        "conversations, or both as text",
        *(("training examples", "queries") if train else ("queries", "training examples")),
    )


def _leaves_out(plan: Any) -> bool | None:
    """Whether labels of the first few examples leave tokens out; `None` if they are none of tokens."""
    if not isinstance(plan, Plan) or not isinstance(plan.task, CausalLM):
        return None
    batch = plan.examples.batch(range(min(LOOKED_AT, len(plan.examples))))
    mask, labels = batch.get("attention_mask"), labels_of(dict(batch))
    real = mask.bool() if isinstance(mask, Tensor) and mask.shape == labels.shape else torch.ones_like(labels).bool()
    return bool((labels[real] == IGNORED).any())


def check_places(trainer: Trainer, id_column: str | None) -> None:
    """Refuse a training set whose rows the trainer has put into another order than the user has them in.

    Args:
        trainer: The one that is to be watched, where the rows are to be those of the dataset that it holds.
        id_column: What names them otherwise.

    Raises:
        BadSetting: Their numbers would be those of other rows.
    """
    shuffled = getattr(trainer.args, "shuffle_dataset", False) and hasattr(trainer.args, "packing_strategy")
    dataset = trainer.train_dataset
    if shuffled and isinstance(dataset, Dataset) and id_column not in dataset.column_names:
        raise BadSetting(
            "shuffle_dataset=True: the SFTTrainer holds a shuffled copy of the training set, and the numbers of its "
            "rows are not those of yours. Pass the dataset that you gave it, GradientCapture(…, train_dataset=…), or "
            "leave shuffle_dataset out; the order of training is random without it."
        )


def check_resumed(state: TrainerState, args: TrainingArguments, batches: int) -> None:
    """Refuse a run that is resumed where its steps belong to other epochs than they did.

    Args:
        state: That of the checkpoint.
        args: Of the Trainer that goes on.
        batches: In an epoch, for this process.

    Raises:
        BadSetting: Says how many steps had how many epochs.
    """
    begun = state.global_step // max(1, math.ceil(batches / args.gradient_accumulation_steps))
    if int((state.epoch or 0) + 1e-6) != begun:
        raise BadSetting(
            f"the checkpoint has {state.epoch:g} epochs in {state.global_step} steps, and with these settings as many "
            f"steps would be {begun} epochs: the batch size, gradient_accumulation_steps, the number of processes or "
            "the training set have changed, so rows of one epoch would be of two. Resume with the settings of the "
            "checkpoint, or train into another folder."
        )
