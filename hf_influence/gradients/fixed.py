"""The model at rest: one batch in, exact rows and statistics out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_influence.errors import UnsupportedModel
from hf_influence.gradients.batches import forward_arguments, inputs_of, on_device
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.features import HeadInput
from hf_influence.gradients.first_token import FirstToken
from hf_influence.gradients.identity import content_hash
from hf_influence.gradients.lora import fused_lora
from hf_influence.gradients.modes import evaluating
from hf_influence.task import IGNORED, CausalLM, LanguageModel, Outcome, Task, unwrapped

LARGEST = 2.0**6
"""The size of an example's gradient at the logits where float16 takes it on, far from both of its ends."""


class Seen(NamedTuple):
    """The logits of a batch and what is known about it; labels and mask are those of the batch, padded on the right."""

    logits: Tensor
    targets: Tensor
    main: Tensor
    mask: Tensor | None
    labels: Tensor


class FixedWeights:
    """Per-example gradients at weights that stand still, as a context manager.

    Inside it the model is in evaluation mode and every parameter is frozen, so the backward pass carries gradients of
    activations alone; the rows are formed by the catcher's hooks. On the way out everything is as it was.

    Only the loss of the labelled tokens is computed: a language model's head sees the labelled positions of each
    example and nothing else; the last layer of an encoder, the first token alone where the classifier reads no other.
    With `features` the input of the last layer becomes a statistic.
    """

    def __init__(self, model: nn.Module, task: Task, catcher: RowCatcher, features: bool = False):
        self.model = model
        self.task = task
        self.catcher = catcher
        self.head = HeadInput(model, task) if features else None
        self.first_token = FirstToken(model)
        self.device = next(model.parameters()).device
        catcher.float16 = _computes_in_float16(model)
        self._arguments = set(forward_arguments(model))
        self._stack = ExitStack()

    def __enter__(self) -> FixedWeights:
        with ExitStack() as stack:
            stack.enter_context(fused_lora(self.model, self.catcher.watch))
            stack.enter_context(_resting(self.model))
            stack.callback(self.catcher.detach)
            stack.callback(self.first_token.detach)
            self.first_token.attach()
            self.catcher.attach()
            if self.head is not None:
                stack.callback(self.head.detach)
                self.head.attach()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def run(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rows and statistics of a collated batch.

        Returns:
            Parameter name -> `[b, d]`, and statistic -> `[b]` (`probabilities` `[b, c]`, `features` `[b, h]`).
        """
        known = self.first_token.enough is not None
        with nullcontext() if known else self.first_token.watched():
            stats = self.backward(batch)
        if not known and self.first_token.enough:
            self.first_token.attach()
            try:
                stats = self.backward(batch)  # again, so that a batch has the same rows wherever a pass began
            except (IndexError, ValueError, RuntimeError):  # the model cuts tokens off that are no longer there
                self.first_token.detach()
                self.first_token.enough = False
                stats = self.backward(batch)
        rows = self.rows(batch)
        return rows, {**stats, "grad_norm": _norm(list(rows.values()))}

    def rows(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Of a batch that went backward: parameter name -> `[b, d]`.

        Where it calls none of the modules of a parameter, it goes through once more, to see whether a gradient comes to
        that another way: without one the rows are 0.
        """
        if idle := self.catcher.uncalled():
            with _thawed([tap.weight for tap in idle]):
                self.backward(batch)
        return self.catcher.take()

    def backward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Let the catcher see a batch go forward and backward; its statistics -> `[b]`.

        Float16 loses what is small, such as the gradient of a long answer or of one that the model is sure of. That of
        each example is multiplied by a power of two first, which the catcher divides out again. The batch goes through
        once more, with a sixteenth of it, for examples for which it was too much.
        """
        scale: Tensor | None = None
        while True:
            self.catcher.clear()
            with torch.enable_grad():
                seen = self.forward(batch)
                self.catcher.ask_uncalled()
                outcome, stats = self.judged(seen)
                gradient = outcome.logit_gradient
                if self.catcher.float16:
                    scale = _scale(gradient) if scale is None else scale
                    gradient = gradient * scale.view(-1, *[1] * (gradient.ndim - 1))
                self.catcher.scale = scale
                if seen.logits.requires_grad:  # or no tapped module took part, and the catcher says so
                    torch.autograd.backward(seen.logits, gradient.to(seen.logits.dtype))
            if scale is None or (overflowed := self.catcher.overflow()) is None or not overflowed.any():
                return stats
            scale = torch.where(overflowed, (scale / 16).clamp(min=1), scale)

    def judge(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The statistics alone, without a backward pass: loss, margin, correct, ... -> `[b]`."""
        with torch.no_grad():
            return self.judged(self.forward(batch))[1]

    def judged(self, seen: Seen) -> tuple[Outcome, dict[str, Tensor]]:
        """What the task makes of the logits, and the statistics."""
        logits, main, mask = seen.logits, seen.main, seen.mask
        exact = torch.promote_types(logits.dtype, torch.float32) if self.catcher.float16 else logits.dtype
        outcome = self.task.outcome(logits.to(exact), seen.targets)
        size = torch.full((len(main),), main[0].numel(), device=main.device)
        stats = {
            "loss": outcome.loss,
            **outcome.stats,
            "length": mask.sum(1) if isinstance(mask, Tensor) and mask.ndim == 2 else size,
            "hash": content_hash(main, mask, seen.labels, isinstance(self.task, CausalLM) and main.ndim == 2),
        }
        if self.head is not None:
            stats["features"] = self.head.take(logits, seen.targets)
        return outcome, stats

    def forward(self, batch: dict[str, Any]) -> Seen:
        """What the model makes of a collated batch; a language model's logits at labelled positions alone."""
        inputs, labels, mask = inputs_of(self.model, on_device(batch, self.device), self.task, self._arguments)
        main = inputs["input_ids"] if "input_ids" in inputs else next(iter(inputs.values()))
        self.catcher.rows_in_batch = len(main)
        if isinstance(self.task, LanguageModel):
            logits, targets = self._labelled_logits(inputs, self.task.targets(labels, mask))
        else:
            logits, targets = self.model(**inputs).logits, labels
        return Seen(logits, targets, main, mask, labels)

    def _labelled_logits(self, inputs: dict[str, Any], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[b, k, v]` at the labelled positions of each example, and their targets `[b, k]`."""
        shape = targets.shape
        position, targets = _labelled_first(targets)
        with _head_sees(self.model, position, shape):
            logits = self.model(**inputs).logits
        if logits.shape[:2] != targets.shape:
            raise UnsupportedModel(
                f"{type(self.model).__name__} gave logits of shape {list(logits.shape)} for {list(targets.shape)} "
                "labelled positions. Its output embedding is not the last layer on the way to the logits."
            )
        return logits, targets


def _norm(rows: list[Tensor]) -> Tensor:
    """Length of each example's whole row, `[b]`."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(row, dim=1) for row in rows]), dim=0)


def _computes_in_float16(model: nn.Module) -> bool:
    """Whether some weights are in float16, or some quantised ones turn to it; under autocast, the catcher sees it."""
    kinds = [weight.dtype for weight in model.parameters()]
    return torch.float16 in [*kinds, *(getattr(module, "compute_dtype", None) for module in model.modules())]


def _scale(gradient: Tensor) -> Tensor:
    """The power of two, at least 1, that brings the largest entry of each `gradient[i]` up to `LARGEST`, `[b]`."""
    room = (LARGEST / torch.linalg.vector_norm(gradient.flatten(1), torch.inf, dim=1)).clamp(1, 2.0**40).nan_to_num(1)
    return room / (2 * room.frexp().mantissa)


def _labelled_first(targets: Tensor) -> tuple[Tensor, Tensor]:
    """The labelled positions of each example, `[b, k]`, filled up with others to the most that one example has."""
    labelled = targets != IGNORED
    k = max(1, int(labelled.sum(1).max()))
    position = labelled.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :k]
    return position, targets.gather(1, position)


@contextmanager
def _head_sees(model: nn.Module, position: Tensor, shape: torch.Size) -> Iterator[None]:
    """Let the output embedding see the hidden states `[b, t, d]` at `position [b, k]` alone.

    Args:
        model: The model.
        position: Where.
        shape: `[b, t]`.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise UnsupportedModel(f"{type(model).__name__} names no output embedding (get_output_embeddings() is None).")

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        if hidden.ndim != 3 or hidden.shape[:2] != shape:
            raise UnsupportedModel(
                f"the output embedding of {type(unwrapped(model)).__name__} is given {list(hidden.shape)} for a batch "
                f"of {shape[0]} examples of {shape[1]} tokens, so it is not known what belongs to which token."
            )
        return (hidden.gather(1, position[..., None].expand(-1, -1, hidden.shape[-1])), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters, for as long as the block lasts."""
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    with evaluating(model):
        try:
            for weight, _ in flags:
                weight.requires_grad_(False)
            yield
        finally:
            for weight, flag in flags:
                weight.requires_grad_(flag)


@contextmanager
def _thawed(weights: Sequence[Tensor]) -> Iterator[None]:
    """Let some frozen weights have a gradient for a while, and none of it stay."""
    kept = [(weight, weight.grad) for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        yield
    finally:
        for weight, gradient in kept:
            weight.requires_grad_(False)
            weight.grad = gradient
