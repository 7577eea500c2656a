"""The loss of each example as something to differentiate, twice if need be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_influence.task import IGNORED, Classification, LanguageModel, Task


def own_losses(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    """The same losses as `task.outcome(logits, targets).loss`, `[b]`, with a graph behind them.

    Args:
        task: A settled task: for a classification the kind of problem is known.
        logits: `[b, k, v]`, or `[b, c]` for a classification.
        targets: `[b, k]` with -100 for none, or the labels of a classification.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if isinstance(task, LanguageModel):
        labelled = targets != IGNORED
        tokens = F.cross_entropy(z.flatten(0, 1), targets.clamp(min=0).flatten(), reduction="none")
        total = torch.where(labelled, tokens.view_as(targets), 0).sum(1)
        return total / labelled.sum(1).clamp(min=1) if task.reduction == "mean" else total
    assert isinstance(task, Classification)
    if task.problem == "single_label_classification":
        return F.cross_entropy(z, targets.reshape(-1), reduction="none")
    y = targets.reshape(z.shape).to(z)
    if task.problem == "regression":
        return (z - y).square().mean(1)
    return F.binary_cross_entropy_with_logits(z, y, reduction="none").mean(1)
