"""Rows from the passes of a training loop, while it trains: no pass of our own, and not a bit of it changed.

watch = TrainingWatch(model, task, taps, compress)
with watch.step(inputs) as caught:
    loop.forward_and_backward(inputs)
caught.rows, caught.stats        # the gradient of each example's own loss, whatever the loop divides it by
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import BadExample, BadSetting, UnsupportedModel
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.compress import Compressor
from hf_influence.gradients.during_training.scale import (
    Measured,
    of_log_probabilities,
    of_outcome,
    of_own_loss,
    of_tokens,
)
from hf_influence.gradients.identity import content_hash
from hf_influence.gradients.packing import Packing, kept_apart
from hf_influence.gradients.taps import Tap
from hf_influence.task import IGNORED, CausalLM, Classification, LanguageModel, Task, labels_of, unwrapped

NARROW = 1024
"""Columns up to which copying a block costs less than the two calls of its own."""
MAIN_INPUTS = ("input_ids", "pixel_values", "inputs_embeds")


def main_input(names: Container[str]) -> str | None:
    """Which of the inputs of a model holds the example itself."""
    return next((name for name in MAIN_INPUTS if name in names), None)


@dataclass
class Caught:
    """The examples of one batch.

    Attributes:
        rows: Parameter name -> `[n, d]`.
        stats: Name -> `[n]`, with the `hash` of the contents of each example.
        missing: `[n]`, where the loss of the step leaves the example out, and there is no row of it.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    missing: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))


@dataclass(frozen=True)
class Batch:
    """What the model is given in one training step.

    Attributes:
        labels: `[b]`, `[b, c]` or, for a language model, `[b, t]` (a decoder has a `t` of its own).
        code: Hash of the contents of each example, `[n]`.
        length: Tokens of each example, `[n]`.
        packing: Where several examples share a row.
    """

    labels: Tensor
    code: Tensor
    length: Tensor
    packing: Packing | None

    @classmethod
    def of(cls, inputs: dict[str, Any], per_token: bool) -> Batch:
        """From the arguments of the model.

        Raises:
            BadExample: No labels, no input, or labels on padding.
        """
        labels = labels_of(dict(inputs))
        main = next((inputs[name] for name in MAIN_INPUTS if isinstance(inputs.get(name), Tensor)), None)
        if main is None:
            raise BadExample(f"the batch has none of {', '.join(MAIN_INPUTS)} (it has: {', '.join(inputs)}).")
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        mask = mask if isinstance(mask, Tensor) and mask.shape == main.shape else None
        packing = None
        if per_token and isinstance(positions, Tensor) and positions.shape == main.shape:
            packing = Packing.of(positions, mask)
        if per_token and mask is not None:
            if bool(((labels != IGNORED) & (mask == 0)).any()):
                raise BadExample(
                    "labels other than -100 stand on padding (attention_mask 0), so the loss of an example depends on "
                    "the batch it is in. Set the labels of padding to -100; a collator that copies input_ids does not."
                )
            if packing is None and bool(((CausalLM.targets(labels, None) != IGNORED) & (mask == 0)).any()):
                # padding on the left predicts the first token; what flows from there to the example is none of its own
                packing = Packing.one_a_row(mask)
        if packing is not None:
            first = (packing.place == 0) & (packing.owner >= 0)
            first[:, 0] = False
            if mask is None and bool((first & (labels != IGNORED)).any()):
                raise BadExample(
                    "in a packed batch the first token of an example has a label, which the last token of the example "
                    "before it is trained to predict, so their gradients cannot be told apart. Set the labels where "
                    "position_ids == 0 to -100, as DataCollatorWithFlattening does."
                )
            length = (packing.source < main.numel()).sum(1)
        else:
            length = torch.full((len(main),), main[0].numel(), device=main.device) if mask is None else mask.sum(1)
        return cls(labels, content_hash(main, mask, labels, per_token, packing), length, packing)


class TrainingWatch:
    """Per-example gradients out of the forward and backward passes of somebody else's training step."""

    def __init__(self, model: nn.Module, task: Task, taps: Sequence[Tap], compress: Compressor | None = None):
        self.model = model
        self.task = task
        self.catcher = RowCatcher(taps, compress)
        self._recomputing = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._batch: Batch | None = None
        self._measured: Measured | None = None
        self._tried = False

    @contextmanager
    def step(self, inputs: dict[str, Any]) -> Iterator[Caught]:
        """Watch one forward and backward pass; no hook outlives the block.

        Args:
            inputs: What the model is given, labels included.

        Yields:
            What was caught, filled in when the block ends.
        """
        caught = Caught()
        self._batch = batch = Batch.of(inputs, isinstance(self.task, CausalLM))
        self._measured = None
        single = isinstance(self.task, Classification) and self.task.problem == "single_label_classification"
        if single and batch.labels.is_floating_point():
            raise BadSetting(
                "a training batch has labels that are no whole numbers, which is another problem than that of one "
                'class an example. Set model.config.problem_type = "multi_label_classification" (or "regression") '
                "before training."
            )
        self.catcher.packing = batch.packing
        self.catcher.rows_in_batch = len(batch.code)
        self.catcher.recomputed = any(module.gradient_checkpointing for module in self._recomputing)
        # below PEFT, as accelerate turns the outputs of the outermost model into float32 copies
        handle = unwrapped(self.model).register_forward_hook(self._watch_output)
        untried = batch.packing if not self._tried and batch.packing and batch.packing.apart().any() else None
        try:
            self.catcher.attach()
            with kept_apart(self.model, untried) if untried else nullcontext():
                yield caught
            self._tried |= untried is not None
            caught.rows, caught.stats, caught.missing = self._take(batch)
        finally:
            handle.remove()
            self.catcher.detach()
            self._batch = self._measured = None

    def _take(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        rows = self.catcher.take()
        if self._measured is None:
            raise UnsupportedModel(
                f"the loss did not reach the output of {type(self.model).__name__} in this step, so its scale is not "
                "known. Capture at the end alone (during=None)."
            )
        rows, norm = _scaled(rows, self._measured.scale)
        stats = {**self._measured.stats, "length": batch.length, "hash": batch.code, "grad_norm": norm}
        return rows, stats, self._measured.missing

    def _watch_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (torch.is_grad_enabled() and module.training) or self._batch is None:
            return
        if isinstance(aux := getattr(output, "aux_loss", None), Tensor) and aux.requires_grad:
            raise UnsupportedModel(
                f"{type(module).__name__} adds a load-balancing loss of its experts, which is one of the whole batch "
                "and not of any example. Set model.config.output_router_logits = False (router_aux_loss_coef=0.0 in "
                "SFTConfig), or capture at the end alone (during=None)."
            )
        self.catcher.ask_uncalled()
        batch = self._batch
        log_p, logits = getattr(output, "log_probs", None), getattr(output, "logits", None)
        if logits is None and isinstance(output, tuple):
            logits = output[1] if len(output) > 1 else None
        if isinstance(logits, Tensor) and logits.requires_grad:
            self._watch_logits(batch, logits)
        elif isinstance(log_p, Tensor) and log_p.requires_grad:
            self._watch_log_probabilities(batch, log_p, getattr(output, "is_top1", None))
        else:
            raise UnsupportedModel(
                f"{type(module).__name__} gives neither logits nor log-probabilities in training, so the scale of its "
                "loss cannot be measured. A fused loss does this: pass use_liger_kernel=False (or liger_kernel_config="
                '{"fused_linear_cross_entropy": False}), or capture at the end alone (during=None).'
            )

    def _check_once(self) -> None:
        if self._measured is not None:
            raise UnsupportedModel(
                f"the step runs {type(self.model).__name__} forward and backward more than once, as SAM and R-Drop do, "
                "and its gradients are no longer those of one pass each. Capture at the end alone (during=None)."
            )

    def _watch_logits(self, batch: Batch, logits: Tensor) -> None:
        z = logits.detach()
        task = self.task

        def back(g: Tensor) -> None:
            self._check_once()
            if isinstance(task, LanguageModel):
                targets, owner, n = self._targets(batch)
                if z.shape[:2] != targets.shape:
                    raise BadSetting(f"logits of shape {list(z.shape)} for labels of shape {list(targets.shape)}.")
                if _plain(task):
                    self._measured = of_tokens(z, targets, owner, n, g, task.reduction)
                else:
                    self._measured = of_own_loss(task, z, targets, owner, n, g)
            else:
                self._measured = of_outcome(task, z, batch.labels, g)

        logits.register_hook(back)

    def _watch_log_probabilities(self, batch: Batch, log_p: Tensor, top: Tensor | None) -> None:
        assert isinstance(self.task, LanguageModel)
        if not _plain(self.task):
            raise UnsupportedModel(
                f"{type(self.model).__name__} gives log-probabilities of the labels and no logits in training, and at "
                "those only cross-entropy can be measured, not the loss of the task. Let it make logits "
                "(use_liger_kernel=False), or leave task out."
            )
        reduction = self.task.reduction
        values = log_p.detach()

        def back(g: Tensor) -> None:
            self._check_once()
            targets, owner, n = self._targets(batch)
            targets, owner = targets[:, : values.shape[1]], owner[:, : values.shape[1]]
            self._measured = of_log_probabilities(values, targets != IGNORED, owner, n, g, reduction, top)

        log_p.register_hook(back)

    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """What each position predicts `[b, t]`, whose token it is `[b, t]`, and the number of examples."""
        assert isinstance(self.task, LanguageModel)
        targets = self.task.targets(batch.labels, None)
        if batch.packing is None:
            owner = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
            return targets, owner, len(targets)
        owner = batch.packing.owner
        return targets.masked_fill(owner < 0, IGNORED), owner.clamp(min=0), len(batch.packing.source)


def _plain(task: LanguageModel) -> bool:
    """Whether its loss is cross-entropy."""
    return type(task).outcome is LanguageModel.outcome


def _scaled(rows: dict[str, Tensor], scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Every example's row times its number, `[n]`, and the length of the whole row then, `[n]`."""
    widths = [row.shape[1] for row in rows.values()]
    if len({row.dtype for row in rows.values()}) == 1 and max(widths) <= NARROW:  # many small blocks: all in one
        whole = torch.cat(list(rows.values()), 1)
        whole *= scale.to(whole.dtype)[:, None]
        return dict(zip(rows, whole.split(widths, 1), strict=True)), torch.linalg.vector_norm(whole, dim=1)
    norms = []
    for row in rows.values():
        row *= scale.to(row.dtype)[:, None]
        norms.append(torch.linalg.vector_norm(row, dim=1))
    return rows, torch.stack(norms).norm(dim=0)
