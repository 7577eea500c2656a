"""Training and evaluation mode, module by module, and mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for as long as the block lasts; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def autocasts(model: nn.Module) -> bool:
    """Whether the forward pass computes in half precision, whatever the weights are: accelerate has wrapped it so.

    That is how a Trainer does it with `bf16` or `fp16`, and it stays so when training is over.
    """
    kind = next(model.parameters()).device.type
    return "_original_forward" in vars(model) or torch.is_autocast_enabled(kind)
