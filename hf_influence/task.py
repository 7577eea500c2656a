"""What one example's own loss is, and its gradient at the logits.

A task turns the logits of a batch into one `Outcome`: the loss of each example as if it were alone, the gradient of
their sum at the logits (where the backward pass starts), and per-example statistics that come for free.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from hf_influence.errors import BadExample, BadSetting, UnsupportedModel

Reduction = Literal["mean", "sum"]
IGNORED = -100
LABELS = ("labels", "label", "label_ids")
CAUSAL = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
SEQ2SEQ = {*MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values()}
TOKENS_AT_ONCE = 64
TOKENS_AT_ONCE_ACCELERATOR = 4096


@dataclass(frozen=True)
class Outcome:
    """The examples of one batch, each judged alone.

    Attributes:
        loss: `[b]`.
        logit_gradient: Gradient of `loss.sum()` at the logits, of their shape.
        stats: Name -> `[b]`. `margin` is the target's logit minus the best other one and `el2n` the distance
            ‖p − onehot‖₂ of the predicted distribution, both the mean over labelled tokens; `correct` is the share
            of labelled tokens predicted right; `n_tokens` counts the labelled tokens. Where an example has one label,
            that is `label`, and `probabilities` `[b, c]` are those of all classes.
    """

    loss: Tensor
    logit_gradient: Tensor
    stats: dict[str, Tensor]


class Task(ABC):
    """A kind of loss."""

    name: ClassVar[str]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the store records; rows of tasks with other settings cannot be compared."""

    @abstractmethod
    def outcome(self, logits: Tensor, labels: Tensor) -> Outcome:
        """Judge each example of a batch alone."""


@dataclass(frozen=True)
class LanguageModel(Task):
    """Cross-entropy over an example's labelled tokens (label not -100), averaged or summed over them.

    The gradient at the logits of token t is `w (softmax(z_t) − onehot(y_t))` with `w = 1/n_tokens` (mean) or 1 (sum).
    """

    reduction: Reduction = "mean"

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "loss_reduction": self.reduction}

    @staticmethod
    @abstractmethod
    def targets(labels: Tensor, mask: Tensor | None) -> Tensor:
        """The label that each position of the output predicts, `[b, t]`, -100 for none.

        Args:
            labels: `[b, t]`.
            mask: 0 for padding of the input, `[b, t]`.
        """

    def outcome(self, logits: Tensor, labels: Tensor) -> Outcome:
        """Judge each example.

        Args:
            logits: `[b, k, v]`.
            labels: `[b, k]`, the token that each position is to predict, -100 for none.
        """
        labelled = labels != IGNORED
        check_labels(labels, logits.shape[-1], (IGNORED,))
        n_tokens = labelled.sum(1)  # [b]
        weight = labelled.to(torch.promote_types(logits.dtype, torch.float32))
        if self.reduction == "mean":
            weight = weight / n_tokens.clamp(min=1)[:, None]
        gradient, numbers = _cross_entropy(logits.detach(), labels.clamp(min=0), weight)
        loss, margin, correct, el2n = numbers.where(labelled, 0).sum(2)  # each [b]
        count = n_tokens.clamp(min=1)
        stats = {"n_tokens": n_tokens, "margin": margin / count, "correct": correct / count, "el2n": el2n / count}
        return Outcome(loss / count if self.reduction == "mean" else loss, gradient, stats)


class CausalLM(LanguageModel):
    """Every token predicts the next one."""

    name: ClassVar[str] = "causal_lm"

    @staticmethod
    def targets(labels: Tensor, mask: Tensor | None) -> Tensor:
        """The next label, -100 where that is padding or unlabelled."""
        if mask is not None:
            labels = labels.masked_fill(mask == 0, IGNORED)
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


class Seq2SeqLM(LanguageModel):
    """A decoder predicts the labels, which are its own input one place to the right."""

    name: ClassVar[str] = "seq2seq_lm"

    @staticmethod
    def targets(labels: Tensor, mask: Tensor | None) -> Tensor:
        """The labels themselves; the mask is the encoder's.

        Raises:
            BadExample: They are padded on the left.
        """
        if bool(((labels[:, 0] == IGNORED) & (labels != IGNORED).any(1)).any()):
            raise BadExample(
                "labels begin with -100, which the decoder reads as padding tokens, so the loss of an example depends "
                "on the batch it is in. Pad the labels on the right: tokenizer.padding_side = 'right'."
            )
        return labels


@dataclass(frozen=True)
class Classification(Task):
    """One label a sequence or image: cross-entropy, or the mean of binary cross-entropies or of squared errors."""

    name: ClassVar[str] = "classification"
    problem: str | None = None
    """As in `config.problem_type`; `None` derives it from the labels as transformers does."""
    classes: int = 2

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "problem_type": self.problem, "num_labels": self.classes}

    def outcome(self, logits: Tensor, labels: Tensor) -> Outcome:
        """Judge each example.

        Args:
            logits: `[b, c]`.
            labels: `[b]`, or `[b, c]` for multi-label problems.
        """
        z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        problem = self.problem or self._problem_of(labels)
        judge = {"regression": _squared_error, "multi_label_classification": _binary_cross_entropy}
        loss, gradient, stats = judge.get(problem, _label_cross_entropy)(z, labels)
        stats = {"n_tokens": torch.ones_like(loss, dtype=torch.long), **stats}
        return Outcome(loss, gradient.to(logits.dtype), stats)

    def settled(self, labels: Tensor) -> Classification:
        """The same with the kind of problem named, so that it is one task before and after the model has named it."""
        return replace(self, problem=self.problem or self._problem_of(labels))

    def _problem_of(self, labels: Tensor) -> str:
        if self.classes == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def task_of(model: nn.Module, loss_reduction: Reduction = "mean") -> Task:
    """The task that a transformers model was made for.

    Args:
        model: A transformers model, bare or wrapped by PEFT.
        loss_reduction: How the tokens of one example are reduced; classification has one loss an example.

    Raises:
        UnsupportedModel: The model's head is neither that of a language model nor that of a classifier.
    """
    if loss_reduction not in ("mean", "sum"):
        raise BadSetting(
            f"loss_reduction={loss_reduction!r}: choose 'mean' or 'sum' over an example's labelled tokens."
        )
    base, name = unwrapped(model), type(unwrapped(model)).__name__
    # a subclass has the head of its class, and a model of one's own may name its loss
    names = {kind.__name__ for kind in type(base).__mro__} | {str(getattr(base, "loss_type", None))}
    if any(one.endswith(("ForSequenceClassification", "ForImageClassification")) for one in names):
        return Classification(base.config.problem_type, base.config.num_labels)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        if names & SEQ2SEQ or hasattr(base, "prepare_decoder_input_ids_from_labels"):
            return Seq2SeqLM(loss_reduction)
    elif names & CAUSAL or any(one.endswith("ForCausalLM") for one in names):
        return CausalLM(loss_reduction)
    raise UnsupportedModel(
        f"{name} has neither the head of a language model nor that of a sequence or image classifier, so the loss of a "
        "single example is not known. Load the model with AutoModelForCausalLM, AutoModelForSeq2SeqLM, "
        "AutoModelForSequenceClassification or AutoModelForImageClassification."
    )


def two_classes(settings: dict[str, Any]) -> bool:
    """Whether each example has one of two labels, by the settings of its task."""
    return settings.get("num_labels") == 2 and settings.get("problem_type") in (None, "single_label_classification")


def unwrapped(model: Any) -> Any:
    """The transformers model below a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: Any) -> Any:
    """The configuration of the model, of one that reads more than text that of its language model; `None` if none."""
    config: Any = getattr(unwrapped(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def labels_of(batch: dict[str, Any]) -> Tensor:
    """The labels of a collated batch, taken out of it.

    Raises:
        BadExample: The batch has none.
    """
    for name in LABELS:
        if isinstance(batch.get(name), Tensor):
            return batch.pop(name)
    there = [name for name, value in batch.items() if value is not None]
    raise BadExample(
        f"the collated batch has no labels (it has: {', '.join(there)}). Give the dataset a column 'labels' (or "
        "'label'), or a data_collator that makes one, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)."
    )


def check_labels(labels: Tensor, classes: int, others: tuple[int, ...] = ()) -> None:
    """Refuse labels that are none of the classes or tokens.

    Raises:
        BadExample: Names the first of them.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise BadExample(
            f"the labels are of the type {labels.dtype}, and whole numbers are wanted: one of {classes} classes or "
            "tokens. Cast the column, or set model.config.problem_type for several labels an example or regression."
        )
    known = (labels >= 0) & (labels < classes)
    for other in others:
        known |= labels == other
    if not bool(known.all()):
        besides = f", or {others[0]} for none" if others else ""
        raise BadExample(
            f"a label is {int(labels[~known][0])}, and they must be from 0 to {classes - 1}{besides}. Look at the "
            "labels of the dataset and at num_labels or the size of the vocabulary."
        )


Judged = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Loss `[b]`, its gradient at the logits `[b, c]`, statistics `[b]` or `[b, c]`."""


def _squared_error(z: Tensor, labels: Tensor) -> Judged:
    error = z - labels.reshape(z.shape).to(z)  # [b, c]
    return error.square().mean(1), error * (2 / z.shape[1]), {}


def _binary_cross_entropy(z: Tensor, labels: Tensor) -> Judged:
    y = labels.reshape(z.shape).to(z)  # [b, c]
    side = z * (2 * y - 1)  # positive where right
    error = z.sigmoid() - y
    stats = {"margin": side.mean(1), "correct": (side > 0).to(z).mean(1), "el2n": error.norm(dim=1)}
    loss = F.binary_cross_entropy_with_logits(z, y, reduction="none")  # of labels between 0 and 1 as well
    return loss.mean(1), error / z.shape[1], stats


def _label_cross_entropy(z: Tensor, labels: Tensor) -> Judged:
    if labels.numel() != len(z):
        raise BadExample(
            f"the labels are of the shape {list(labels.shape)}, and one class number an example is wanted. For several "
            'labels an example set model.config.problem_type = "multi_label_classification", and let them be floats.'
        )
    labels = labels.reshape(-1)
    check_labels(labels, z.shape[1])
    y = labels[:, None]
    log_p = z.log_softmax(1)
    log_p_y = log_p.gather(1, y)[:, 0]
    margin = log_p_y - log_p.scatter(1, y, -torch.inf).amax(1)
    p = log_p.exp()
    error = p.scatter_add(1, y, torch.full_like(y, -1, dtype=z.dtype))  # p - onehot
    stats = {"margin": margin, "correct": (margin > 0).to(z), "el2n": torch.linalg.vector_norm(error, dim=1)}
    return -log_p_y, error, {**stats, "label": labels, "probabilities": p}


def _cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in one sweep: its gradient, and loss, margin, correct and EL2N of each token.

    Takes a few tokens at a time, so that the vocabulary-wide intermediates stay in the cache. The probabilities come
    from `log_softmax`, as in plain autograd: over 49,152 entries in float32 they sum to 1 within 3e-5 only, and a
    more careful sum would move the rows away from the gradients that training sees.

    Args:
        logits: `[b, k, v]`.
        labels: `[b, k]`, all of them valid.
        weight: `[b, k]`, the weight of each token in the loss.

    Returns:
        The gradient, `[b, k, v]`, and the numbers, `[4, b, k]`.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    gradient = torch.empty_like(logits)
    numbers = torch.empty(4, labels.numel(), dtype=exact, device=logits.device)
    flat, out = logits.flatten(0, 1), gradient.flatten(0, 1)  # [b k, v]
    target, scale = labels.flatten()[:, None], weight.flatten()[:, None]
    step = TOKENS_AT_ONCE if logits.device.type == "cpu" else TOKENS_AT_ONCE_ACCELERATOR
    for start in range(0, len(flat), step):
        piece = slice(start, start + step)
        y = target[piece]
        log_p = F.log_softmax(flat[piece], dim=1, dtype=exact)
        log_p_y = log_p.gather(1, y)
        best_other = log_p.scatter(1, y, -torch.inf).max(1, keepdim=True).values
        p = torch.exp(log_p, out=out[piece] if out.dtype == exact else None)
        p_y = p.gather(1, y)
        others = torch.linalg.vector_norm(p.scatter_(1, y, 0), dim=1, keepdim=True)
        p.scatter_(1, y, p_y)
        margin = log_p_y - best_other
        el2n = torch.hypot(others, torch.expm1(log_p_y))  # 1 - p_y would cancel in float32 where it is small
        numbers[:, piece] = torch.stack([-log_p_y, margin, (margin > 0).to(exact), el2n])[..., 0]
        p.mul_(scale[piece]).scatter_add_(1, y, -scale[piece])
        if out.dtype != exact:
            out[piece] = p.to(out.dtype)
    return gradient, numbers.unflatten(1, labels.shape)
