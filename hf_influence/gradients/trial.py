"""A look at two examples before the first batch: is their loss the model's own, and the same beside others?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import BadSetting, UnsupportedModel
from hf_influence.gradients.batches import Examples, alone
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.gradients.modes import autocasts, evaluating
from hf_influence.gradients.objective import has_own_loss
from hf_influence.task import IGNORED, CausalLM, LanguageModel, Task, unwrapped

EXACT, ROUNDED, HALF = 1e-3, 1e-2, 1e-1
"""Of 1 + loss: how far two computations of a loss may differ in float32, in float32 with rounded products, and where
some weights or the products are narrower."""


def try_out(model: nn.Module, task: Task, examples: Examples, several: bool = True) -> None:
    """Compare the loss that rows would be of with the model's own, and with that in a batch of two.

    A model may have another loss than others of its kind, and may read padding; both show here, whatever its name.

    Args:
        model: The model.
        task: What the loss of an example is taken to be.
        examples: The dataset; an example that has no labelled token says nothing.
        several: Rows will be made of several examples at a time.

    Raises:
        UnsupportedModel: They differ.
        BadSetting: The collator pads and does not say where.
    """
    ends = list(dict.fromkeys(examples.ends()))
    tolerance = _tolerance(model)
    found: dict[int, tuple[dict[str, Any], dict[str, Tensor]]] = {}
    with FixedWeights(model, task, RowCatcher([])) as resting:
        for position in ends:
            batch = examples.batch([position])
            single = alone(batch, isinstance(task, CausalLM))
            judged = resting.judge(single)
            if int(judged["n_tokens"][0]):
                found[position] = single, judged
                _same(position, judged["loss"], resting.judge(batch)["loss"], tolerance, _PADDING, model)
        if several and len(found) == 2:
            together = examples.batch(ends)
            both = resting.judge(together)
            for row, position in enumerate(ends):
                single, judged = found[position]
                if _begins_alike(together, row, single):
                    raise BadSetting(
                        "the data_collator pads and gives no attention_mask, so padding counts as part of an example: "
                        "its length and the hash that it is known by depend on the batch. Let it give a mask, 1 for "
                        "tokens and 0 for padding, as DataCollatorWithPadding does."
                    )
                if judged["hash"] == both["hash"][row]:  # or it is drawn anew each time, as with random crops
                    _same(position, judged["loss"], both["loss"][row], tolerance, _PADDING, model)
    if has_own_loss(task):
        return
    for position, (single, judged) in found.items():
        own = _own(model, task, single)
        if own is not None:
            _same(position, own, judged["loss"], tolerance, _KIND, model)


_PADDING = (
    "alone {one:.4g}, in a padded batch {other:.4g}: the model reads padding, so the gradient of an example depends on "
    "what stands beside it. Pass batch_size=1 and a data_collator that pads no further than the batch, and an "
    "attention_mask if the model takes one."
)
_KIND = (
    "by the model itself {one:.4g}, by its logits and labels {other:.4g}: it trains on another loss than other models "
    "of its kind (labels that are not shifted, another loss for several labels, tokens of an image before the text), "
    "and rows would be of the wrong one. Say what it is: task=own_loss(function)."
)


def _begins_alike(batch: dict[str, Any], row: int, single: dict[str, Any]) -> bool:
    """Whether a row of a batch without a mask is an example, and more after it."""
    ids, own = batch.get("input_ids"), single.get("input_ids")
    if "attention_mask" in batch or not isinstance(ids, Tensor) or not isinstance(own, Tensor) or ids.ndim != 2:
        return False
    return ids.shape[1] > own.shape[1] and torch.equal(ids[row, : own.shape[1]], own[0])


def _same(position: int, loss: Any, again: Any, tolerance: float, why: str, model: nn.Module) -> None:
    one, other = float(loss), float(again)
    if abs(one - other) > tolerance * (1 + abs(one)):
        name = type(unwrapped(model)).__name__
        raise UnsupportedModel(f"the loss of example {position} by {name} is " + why.format(one=one, other=other))


def _tolerance(model: nn.Module) -> float:
    if autocasts(model) or any(w.dtype not in (torch.float32, torch.float64) for w in model.parameters()):
        return HALF
    return EXACT if torch.get_float32_matmul_precision() == "highest" else ROUNDED


def _own(model: nn.Module, task: Task, batch: dict[str, Any]) -> float | None:
    """The loss of a batch of one as the model computes it; `None` where it has none, or adds one of its experts."""
    device, config = next(model.parameters()).device, unwrapped(model).config
    problem = getattr(config, "problem_type", None)
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    try:
        with evaluating(model), torch.no_grad():
            out = model(**batch)
    finally:
        config.problem_type = problem  # which some models set when they first see labels
    loss = getattr(out, "loss", None)
    if loss is None or getattr(out, "aux_loss", None) is not None:
        return None
    if isinstance(task, LanguageModel) and task.reduction == "sum":
        return float(loss) * int((task.targets(batch["labels"], None) != IGNORED).sum())
    return float(loss)
