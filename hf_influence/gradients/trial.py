"""A look at two examples before the first batch: are their loss and rows right, and the same beside others?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import hypot, inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_influence.errors import BadSetting, UnsupportedModel
from hf_influence.gradients.batches import Examples, alone, on_device
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.compress import logra
from hf_influence.gradients.fixed import FixedWeights, Seen
from hf_influence.gradients.modes import autocasts, evaluating
from hf_influence.gradients.objective import has_own_loss
from hf_influence.gradients.sweep import sweep
from hf_influence.gradients.taps import Tap
from hf_influence.task import IGNORED, CausalLM, LanguageModel, Outcome, Seq2SeqLM, Task, unwrapped

EXACT, ROUNDED, HALF = (1e-3, 1e-3), (1e-2, 1e-2), (1e-1, 3e-1)
"""How far two computations of a loss, of 1 + loss, and of a row, of its length, may differ in float32, in float32 with
rounded products, and where some weights or the products are narrower: there a mixture may choose other experts."""
SIDE = 16
"""To how many both sides of a block are projected, so that the rows of large layers need not exist whole."""
LEVEL = 0.7
"""Of all logits where rows start: a target of 0 or 1 is an error there, too."""


class Look(NamedTuple):
    """A batch, and what a pass over it gave."""

    batch: dict[str, Any]
    stats: dict[str, Tensor]
    rows: dict[str, Tensor]


class Trial(FixedWeights):
    """Rows as they would be if all logits were equal.

    That way they show what the model does to a gradient, and nothing else: the gradient of an example that the model is
    sure of begins as a difference of nearly equal numbers, and rounding is a large part of it.
    """

    def look(self, batch: dict[str, Any]) -> Look:
        """A pass forward, and backward if there are rows to be made."""
        stats = self.backward(batch) if self.catcher.shapes else self.judge(batch)
        return Look(batch, stats, self.rows(batch))

    def judged(self, seen: Seen) -> tuple[Outcome, dict[str, Tensor]]:
        """As in `FixedWeights`, but for where the backward pass begins."""
        outcome, stats = super().judged(seen)
        level = torch.full_like(outcome.logit_gradient, LEVEL)
        return replace(outcome, logit_gradient=self.task.outcome(level, seen.targets).logit_gradient), stats


def try_out(model: nn.Module, task: Task, examples: Examples, taps: Sequence[Tap], several: bool = True) -> None:
    """Compare the loss that rows would be of with the model's own, and loss and rows with those in a batch of two.

    A model may have another loss than others of its kind, may read padding, and may mix the examples of a batch; all
    that shows here, whatever its name. The model comes back as it was.

    Args:
        model: The model.
        task: What the loss of an example is taken to be.
        examples: The dataset; an example that has no labelled token says nothing.
        taps: Of the parameters that rows will be made of; without any, losses alone are compared.
        several: Rows will be made of several examples at a time.

    Raises:
        UnsupportedModel: They differ, or no rows can be made.
        BadSetting: The collator pads and does not say where, or pads labels with something that counts.
    """
    short, long = examples.ends()
    ends = [position for position in dict.fromkeys((long, short, 1)) if position < len(examples)][:2]
    as_they_come, tolerance = [0] * len(examples), _tolerance(model)
    found: dict[int, Look] = {}
    trial = Trial(model, task, RowCatcher(taps, logra(SIDE, SIDE)))
    with trial:

        def by_itself(batch: dict[str, Any]) -> tuple[Look, Look]:
            single = alone(batch, isinstance(task, CausalLM))
            one = trial.look(single)
            return one, trial.look(batch) if _wider(batch, single) else one

        for (position,), (one, padded) in sweep(by_itself, examples, ends, as_they_come, 1, trial.device, None):
            if int(one.stats["n_tokens"][0]):
                found[position] = one
                _alike(position, one, padded, 0, tolerance, model)
        pair = ends if several else []
        for positions, both in sweep(trial.look, examples, pair, as_they_come, 2, trial.device, None):
            for row, position in enumerate(positions):
                if len(positions) == 2 and position in found:  # or memory does not hold both
                    _check_labels(trial, examples, position, found[position], both, row)
                    if found[position].stats["hash"] == both.stats["hash"][row]:  # or it is drawn anew each time
                        _alike(position, found[position], both, row, tolerance, model)
    if never := [tap.parameter for tap in taps if tap.parameter not in trial.catcher.reached]:
        _refuse_unreached(list(dict.fromkeys(never)), ends)
    if has_own_loss(task):
        return
    for position, look in found.items():
        own = _own(model, task, look.batch)
        if own is not None:
            _same(position, own, look.stats["loss"][0], tolerance[0], _KIND, model)


_PADDING = (
    "the model reads padding, so the gradient of an example depends on what stands beside it. Pass batch_size=1 and a "
    "data_collator that pads no further than the batch, and an attention_mask if the model takes one."
)
_BESIDE = "alone {one:.4g}, in a padded batch {other:.4g}: " + _PADDING
_KIND = (
    "by the model itself {one:.4g}, by its logits and labels {other:.4g}: it trains on another loss than other models "
    "of its kind (labels that are not shifted, another loss for several labels, tokens of an image before the text), "
    "and rows would be of the wrong one. Say what it is: task=own_loss(function)."
)


def _refuse_unreached(names: Sequence[str], tried: Sequence[int]) -> None:
    which = " and ".join(map(str, sorted(tried)))
    raise UnsupportedModel(
        f"no gradient reached {len(names)} parameter(s) (first: {names[0]}): none of the examples that were tried out "
        f"({which}) comes to them. The layer is not used, is used by other examples only, or its weights are used "
        f"without calling it, and such rows would be wrong. Leave it out with skip=[{names[0]!r}, …]; if it is for "
        "some examples only, let one of those be the first and the longest of the dataset, which is tried out."
    )


def _wider(batch: dict[str, Any], single: dict[str, Any]) -> bool:
    """Whether a batch of one holds more than the example alone."""
    names = (name for name, value in batch.items() if isinstance(value, Tensor) and name in single)
    return any(batch[name].shape != single[name].shape for name in names)


def _check_labels(trial: Trial, examples: Examples, position: int, one: Look, both: Look, row: int) -> None:
    """Refuse padding that counts as a part of an example, of which its hash tells."""
    if _begins_alike(both.batch, row, one.batch):
        raise BadSetting(
            "the data_collator pads and gives no attention_mask, so padding counts as part of an example: its length "
            "and the hash that it is known by depend on the batch. Let it give a mask, 1 for tokens and 0 for padding, "
            "as DataCollatorWithPadding does."
        )
    few, many = int(one.stats["n_tokens"][0]), int(both.stats["n_tokens"][row])
    if few >= many or not isinstance(trial.task, Seq2SeqLM):  # elsewhere the mask says what is padding
        return
    again = trial.judge(alone(examples.batch([position]), labels_too=False))
    if one.stats["hash"] == again["hash"]:  # or the collator draws
        raise BadSetting(
            f"example {position} has {few} labelled tokens alone and {many} beside another: the data_collator pads "
            "labels with something other than -100 (the padding token, it seems), which counts as part of the answer, "
            "so the gradient of an example depends on what stands beside it. Let it pad labels with -100, as "
            "DataCollatorForSeq2Seq does."
        )


def _begins_alike(batch: dict[str, Any], row: int, single: dict[str, Any]) -> bool:
    """Whether a row of a batch without a mask is an example, and more after it."""
    ids, own = batch.get("input_ids"), single.get("input_ids")
    if "attention_mask" in batch or not isinstance(ids, Tensor) or not isinstance(own, Tensor) or ids.ndim != 2:
        return False
    return ids.shape[1] > own.shape[1] and torch.equal(ids[row, : own.shape[1]], own[0])


def _alike(position: int, one: Look, other: Look, row: int, tolerance: tuple[float, float], model: nn.Module) -> None:
    _same(position, one.stats["loss"][0], other.stats["loss"][row], tolerance[0], _BESIDE, model)
    apart = _apart(one.rows, {name: block[row] for name, block in other.rows.items()})
    if apart > tolerance[1]:
        raise UnsupportedModel(
            f"the gradient of example {position} by {type(unwrapped(model)).__name__} alone differs from that in a "
            f"padded batch by {apart:.2g} of its length: {_PADDING}"
        )


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """‖a − b‖ / max(‖a‖, ‖b‖) of two rows, all blocks together; 0 if both are 0."""
    a, b, difference = (
        hypot(*(float(torch.linalg.vector_norm(part)) for part in parts))
        for parts in (one.values(), other.values(), [one[name] - other[name] for name in one])
    )
    return difference / max(a, b) if difference else 0.0


def _same(position: int, loss: Any, again: Any, tolerance: float, why: str, model: nn.Module) -> None:
    one, other = float(loss), float(again)
    if abs(one - other) > tolerance * (1 + abs(one)):
        name = type(unwrapped(model)).__name__
        raise UnsupportedModel(f"the loss of example {position} by {name} is " + why.format(one=one, other=other))


def _tolerance(model: nn.Module) -> tuple[float, float]:
    kinds = {weight.dtype for weight in model.parameters()}
    if torch.int8 in kinds:  # LLM.int8() looks at the whole batch to say what is too large for eight bits
        return HALF[0], inf
    if autocasts(model) or not kinds <= {torch.float32, torch.float64}:
        return HALF
    return EXACT if torch.get_float32_matmul_precision() == "highest" else ROUNDED


def _own(model: nn.Module, task: Task, batch: dict[str, Any]) -> float | None:
    """The loss of a batch of one as the model computes it; `None` where it has none, or adds one of its experts."""
    config = unwrapped(model).config
    problem = getattr(config, "problem_type", None)
    batch = on_device(batch, next(model.parameters()).device)
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
