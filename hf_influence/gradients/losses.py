"""The loss of every example alone, without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.gradients.batches import Collator, Examples
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.gradients.own_loss import OwnTask, task_of
from hf_influence.gradients.sweep import BatchSize, check_batch_size, sweep
from hf_influence.task import Reduction


def losses(
    model: nn.Module,
    dataset: Any,
    *,
    data_collator: Collator | None = None,
    batch_size: BatchSize = "auto",
    loss_reduction: Reduction = "mean",
    remove_unused_columns: bool = True,
    task: OwnTask | None = None,
) -> dict[str, Tensor]:
    """Loss, margin, share of right tokens and more of every example by itself, from forward passes alone.

    The same numbers as the statistics that `collect` stores, in evaluation mode. Cost: a forward pass over the dataset.

    Args:
        model: A language model (causal or encoder-decoder) or a classifier of sequences or images of transformers, with
            or without an adapter.
        dataset: As in `collect`, like all that follow.
        data_collator: See there.
        batch_size: See there.
        loss_reduction: See there.
        remove_unused_columns: See there.
        task: See there: of a model that was trained by a loss of your own, that loss.

    Returns:
        Statistic -> `[n]` in dataset order: loss, n_tokens, margin, correct, el2n, length, hash; with one label
            an example also label, and probabilities `[n, c]`.

    Raises:
        UnsupportedModel: The model is of no such kind.
        BadExample: An empty dataset, or missing labels.
        BadSetting: A task that does not suit the model.
    """
    check_batch_size(batch_size)
    examples = Examples(dataset, model, data_collator, None, remove_unused_columns)
    _, lengths = examples.survey()
    order: list[int] = []
    parts: list[dict[str, Tensor]] = []
    with FixedWeights(model, task_of(model, loss_reduction, task), RowCatcher([])) as resting:
        todo = range(len(examples))
        for positions, stats in sweep(resting.judge, examples, todo, lengths, batch_size, resting.device, "losses"):
            order += positions
            parts.append({name: value.cpu() for name, value in stats.items()})
    back = torch.tensor(order).argsort()
    return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
