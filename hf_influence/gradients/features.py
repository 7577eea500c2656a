"""What a model makes of an example before it decides: the input of the layer whose output are the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import UnsupportedModel
from hf_influence.task import IGNORED, Classification, Task


class HeadInput:
    """Watches the last layer and keeps what it was given.

    For a language model that is the output embedding, and an example has the mean over the positions that predict its
    labels. For a classifier it is the linear layer whose output the logits are; where that layer sees every token, an
    example has the token that its logits were taken from.
    """

    def __init__(self, model: nn.Module, task: Task):
        self._model = model
        self._task = task
        self._calls: list[tuple[Tensor, Tensor]] = []
        self._handles: list[Any] = []

    def attach(self) -> None:
        if isinstance(self._task, Classification):
            classes = self._task.classes
            heads = [module for module in self._model.modules() if getattr(module, "out_features", None) == classes]
        else:
            heads = [self._model.get_output_embeddings()]  # type: ignore[operator]
        self._handles = [head.register_forward_hook(self._note) for head in heads]

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._calls.clear()

    def take(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The features of the batch that was just run, `[b, h]`, in float32 or wider.

        Args:
            logits: `[b, c]`, or `[b, k, v]` of a language model.
            targets: Labels; of a language model those of each position, `[b, k]`, -100 for none.

        Raises:
            UnsupportedModel: No linear layer has the logits as its output.
        """
        calls, self._calls = self._calls, []
        if not isinstance(self._task, Classification):
            return _mean(calls[-1][0], targets)
        for x, y in reversed(calls):
            features = _of_logits(x, y, logits.detach())
            if features is not None:
                return features
        raise UnsupportedModel(
            f"{type(self._model).__name__} has no linear layer whose output are its logits {list(logits.shape)}, so it "
            "is not known what stands for an example before the decision. Collect without features=True."
        )

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and args:
            self._calls.append((args[0].detach(), output.detach()))


def _mean(hidden: Tensor, targets: Tensor) -> Tensor:
    """Over the labelled positions, `[b, k, h] -> [b, h]`; 0 without any."""
    labelled = (targets != IGNORED).to(torch.promote_types(hidden.dtype, torch.float32))
    return (hidden * labelled[..., None]).sum(1) / labelled.sum(1, keepdim=True).clamp(min=1)


def _of_logits(x: Tensor, y: Tensor, logits: Tensor) -> Tensor | None:
    """The part `[b, h]` of the input `x [b, h]` or `[b, t, h]` whose output in `y` are the logits `[b, c]`, if any."""
    if len(y) != len(logits) or y.shape[-1] != logits.shape[-1] or y.ndim not in (2, 3) or x.shape[:-1] != y.shape[:-1]:
        return None
    z = logits.to(y.dtype)
    outputs, inputs = (y[:, None], x[:, None]) if y.ndim == 2 else (y, x)  # [b, t, c], [b, t, h]
    same = ((outputs == z[:, None]) | (outputs.isnan() & z[:, None].isnan())).all(-1)  # [b, t]
    if not bool(same.any(1).all()):
        return None
    at = same.to(torch.uint8).argmax(1)
    picked = inputs[torch.arange(len(at), device=at.device), at]
    return picked.to(torch.promote_types(picked.dtype, torch.float32))
