"""The loss of each example as something to differentiate, twice if need be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_influence.errors import UnsupportedModel
from hf_influence.gradients.own_loss import OwnLoss
from hf_influence.task import IGNORED, Classification, LanguageModel, Task


def has_own_loss(task: Task) -> bool:
    """Whether it is another than the one that the model computes."""
    return type(task).outcome not in (LanguageModel.outcome, Classification.outcome)


def own_losses(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    """The same losses as `task.outcome(logits, targets).loss`, `[b]`, with a graph behind them.

    Args:
        task: A settled task: for a classification the kind of problem is known.
        logits: `[b, k, v]`, or `[b, c]` for a classification.
        targets: `[b, k]` with -100 for none, or the labels of a classification.

    Raises:
        UnsupportedModel: A task of one's own, which says what the loss is, but not how to differentiate it.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = task.loss if isinstance(task, OwnLoss) else None
    if own is None and has_own_loss(task):
        raise UnsupportedModel(
            f"{type(task).__name__} is a task of your own: its outcome() gives numbers, and here its loss has to be "
            "differentiated once more. Say what it is as a function: task=own_loss(function)."
        )
    if isinstance(task, LanguageModel):
        labelled = targets != IGNORED
        tokens = (own or _cross_entropy)(z[labelled], targets[labelled])
        total = z.new_zeros(len(z)).index_add(0, labelled.nonzero()[:, 0], tokens)
        return total / labelled.sum(1).clamp(min=1) if task.reduction == "mean" else total
    if own is not None:
        return own(z, targets)
    assert isinstance(task, Classification)
    if task.problem == "single_label_classification":
        return _cross_entropy(z, targets.reshape(-1))
    y = targets.reshape(z.shape).to(z)
    if task.problem == "regression":
        return (z - y).square().mean(1)
    return F.binary_cross_entropy_with_logits(z, y, reduction="none").mean(1)


def _cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(z, targets, reduction="none")
