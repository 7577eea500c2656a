"""The loss of every example of a batch alone, by plain autograd: a brick for targets of one's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_influence.gradients.batches import inputs_of
from hf_influence.gradients.objective import own_losses
from hf_influence.task import Classification, LanguageModel, Reduction, Task, task_of


def example_losses(model: nn.Module, batch: dict[str, Any], loss_reduction: Reduction = "mean") -> Tensor:
    """The loss of each example as if it were alone, in the model's autograd graph.

    Args:
        model: As in `collect`.
        batch: A collated batch with labels, on the model's device.
        loss_reduction: "mean" over an example's labelled tokens, or "sum".

    Returns:
        `[b]`, in float32 at least. The sum of their gradients is that of the rows of `collect`.
    """
    return losses_by(task_of(model, loss_reduction), model, batch)


def losses_by(task: Task, model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The same by a task that may have another loss than the model; errors as in `own_losses`."""
    inputs, labels, mask = inputs_of(model, batch, task)
    logits = model(**inputs).logits
    if isinstance(task, LanguageModel):
        return own_losses(task, logits, task.targets(labels, mask))
    return own_losses(task.settled(labels) if isinstance(task, Classification) else task, logits, labels)
