"""A loss other than cross-entropy: what one example's own loss is, where training says so.

GradientCapture("runs/sst2", during="epochs", task=label_smoothing(0.1))      # label_smoothing_factor=0.1
GradientCapture("runs/sst2", during="epochs", task=own_loss(focal))           # compute_loss_func of your own
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_influence.errors import BadSetting
from hf_influence.saving import as_kept
from hf_influence.task import IGNORED, CausalLM, Classification, LanguageModel, Outcome, Reduction, Seq2SeqLM, Task
from hf_influence.task import task_of as model_task

Loss = Callable[..., Tensor]
"""Logits `[m, c]`, labels (`[m]`, or `[m, c]` for multi-label problems), settings -> the loss of each row, `[m]`."""

OwnTask = Task | Callable[[Task], Task]
"""A task, or what makes one of the model's own."""


def own_loss(loss: Loss, **about: Any) -> Callable[[Task], Task]:
    """The task whose loss of one example is `loss`, for `GradientCapture(task=…)` and `collect(task=…)`.

        def focal(logits, labels, gamma=2.0):
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            return (1 - torch.exp(-loss)) ** gamma * loss

        task = own_loss(focal, gamma=2.0)

    During training what flows back from the batch's loss is compared with it: another direction than that of its
    gradient is refused. Its length is that of the function, whatever the batch is divided by and each example of it
    weighed with. Cost: another forward and backward pass of the loss function.

    Args:
        loss: Logits `[m, c]` and labels `[m]` (`[m, c]` for multi-label problems) -> `[m]`, differentiable, each row by
            itself: of examples for a classifier, of labelled tokens for a language model, where `loss_reduction` makes
            one number of those of an example.
        about: Passed to `loss` by name, and recorded in the store beside its name: rows of other settings are not
            compared.

    Raises:
        BadSetting: Not a function with a name, or a setting that JSON cannot hold.
    """
    name = getattr(loss, "__name__", "<lambda>")
    if not callable(loss) or name == "<lambda>":
        raise BadSetting(
            f"own_loss({loss!r}): pass a function of logits and labels that has a name. The store records it to tell "
            "rows of different losses apart; what would be a partial(...) is own_loss(function, setting=value)."
        )
    return partial(_with_loss, loss=partial(loss, **about), about=as_kept({"loss": name, **about}))


def label_smoothing(epsilon: float) -> Callable[[Task], Task]:
    """The task of `TrainingArguments(label_smoothing_factor=epsilon)`.

    A share `epsilon` of the target is spread over all classes or tokens:

        ℓ = (1 − ε) · −log p_y + ε · mean_v(−log p_v)

    Raises:
        BadSetting: Not in (0, 1).
    """
    if not 0 < epsilon < 1:
        raise BadSetting(f"label_smoothing({epsilon!r}): pass the label_smoothing_factor of training, in (0, 1).")
    return own_loss(smoothed_cross_entropy, label_smoothing=float(epsilon))


def task_of(model: nn.Module, loss_reduction: Reduction = "mean", task: OwnTask | None = None) -> Task:
    """The model's own task, or the one that was given.

    Raises:
        BadSetting: It does not suit the model.
    """
    default = model_task(model, loss_reduction)
    if task is None:
        return default
    chosen = task if isinstance(task, Task) else task(default)
    kind = type(default)
    suits = isinstance(chosen, kind) if isinstance(default, LanguageModel) else not isinstance(chosen, LanguageModel)
    if not isinstance(chosen, Task) or not suits:
        raise BadSetting(
            f"task={type(chosen).__name__} for {type(model).__name__}: its labels and logits are those of "
            f"{kind.__name__}. Pass a {kind.__name__} with another outcome(logits, labels), or task=own_loss(function)."
        )
    return chosen


def kept_task(settings: Mapping[str, Any]) -> OwnTask | None:
    """The task of rows that a store describes so, where it is one of this library; `None` for the model's own.

    Raises:
        BadSetting: It is a function, which a store does not keep.
    """
    if (name := settings.get("loss")) is None:
        return None
    if name == smoothed_cross_entropy.__name__ and "label_smoothing" in settings:
        return label_smoothing(settings["label_smoothing"])
    raise BadSetting(
        f"the rows are gradients of the loss function {name!r}, of which the store knows the name alone. Pass it: "
        f"task=own_loss({name}, …), as when they were captured."
    )


def known_of(task: OwnTask) -> dict[str, Any]:
    """What tells a task from others before there is a model, as plain values."""
    if isinstance(task, Task):
        return as_kept(task.settings())
    about = getattr(task, "keywords", {}).get("about")  # of `own_loss`
    return about or {"name": getattr(task, "__name__", type(task).__name__)}


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


@dataclass(frozen=True, kw_only=True)
class OwnLoss(Task):
    """A task as it is, but for the loss; the statistics beside it stay those of the predictions."""

    loss: Loss = F.cross_entropy
    about: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **self.about}  # type: ignore[safe-super] # that of the kind of task beside this one

    def outcome(self, logits: Tensor, labels: Tensor) -> Outcome:
        """As in `Task`."""
        stats = super().outcome(logits, labels).stats  # type: ignore[safe-super] # as above
        if not isinstance(self, LanguageModel):
            loss, gradient = self._judged(logits, labels)
            return Outcome(loss, gradient.to(logits.dtype), stats)
        labelled = labels != IGNORED
        loss, gradient = self._judged(logits[labelled], labels[labelled])
        weight = labelled.to(loss.dtype)  # [b, k]
        if self.reduction == "mean":
            weight = weight / labelled.sum(1).clamp(min=1)[:, None]
        whole = torch.zeros_like(logits)
        whole[labelled] = (gradient * weight[labelled][:, None]).to(logits.dtype)
        own = weight.clone()
        own[labelled] *= loss
        return Outcome(own.sum(1), whole, stats)

    def _judged(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row, `[m]`, and its gradient at the logits, `[m, c]`."""
        z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
        with torch.enable_grad():
            loss = self.loss(z, labels)
            if loss.shape != (len(z),):
                raise BadSetting(
                    f"the loss function {self.about['loss']} gave a result of shape {list(loss.shape)} for "
                    f"{len(z)} rows of logits: it must give one number for each row (reduction='none')."
                )
            return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@dataclass(frozen=True)
class _Classification(OwnLoss, Classification):
    pass


@dataclass(frozen=True)
class _CausalLM(OwnLoss, CausalLM):
    pass


@dataclass(frozen=True)
class _Seq2SeqLM(OwnLoss, Seq2SeqLM):
    pass


def _with_loss(task: Task, loss: Loss, about: dict[str, Any]) -> Task:
    if isinstance(task, Classification):
        return _Classification(task.problem, task.classes, loss=loss, about=about)
    assert isinstance(task, LanguageModel)
    kind = _CausalLM if isinstance(task, CausalLM) else _Seq2SeqLM
    return kind(task.reduction, loss=loss, about=about)
