"""The model at hand against the store that its rows lie in."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_influence.errors import StoreMismatch
from hf_influence.gradients.batches import Collator
from hf_influence.gradients.identity import adapter_identity
from hf_influence.gradients.own_loss import OwnTask
from hf_influence.gradients.plan import Plan
from hf_influence.store import GradientStore


def matching_plan(
    store: GradientStore,
    model: nn.Module,
    dataset: Any,
    point: int,
    data_collator: Collator | None = None,
    remove_unused_columns: bool = True,
    task: OwnTask | None = None,
) -> Plan:
    """How the rows of a point would be collected from this model and dataset.

    Parameters that the store has no block for are left out.

    Raises:
        StoreMismatch: The model, its adapter or its task is not that of the rows.
    """
    plan = Plan.again(store, model, dataset, data_collator, None, remove_unused_columns, task)
    was, now = store.adapter(point), adapter_identity(model)
    if was not in (None, now):
        raise StoreMismatch(
            f"{store.path} holds rows at other values of the adapter at point {point} (stored hash {was}, now {now}), "
            "so the model at hand has nothing to say about them. Pass the model that the rows were collected from."
        )
    return plan
