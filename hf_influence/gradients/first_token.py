"""A classifier that reads its first token needs no other token of its last layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class FirstToken:
    """Lets the last layer of an encoder go on with the first token alone once its attention is done.

    BERT and its kin put their layers together from an `attention.output`, an `intermediate` and an `output`, which see
    each token by itself. If the classifier reads the first token, the rest of that work is for nothing, forward and
    backward: five sixths of the last layer. Whether it does is not guessed from the architecture: one backward pass is
    watched, and only if what it sends to the other tokens is zero, to the last bit, are they left out from then on.

    Attributes:
        enough: Whether the first token is; `None` as long as no backward pass has told.
    """

    def __init__(self, model: nn.Module):
        layers = [module for module in model.modules() if _is_layer(module)]
        self._layer: Any = layers[-1] if layers else None
        self._handle: Any = None
        self.enough: bool | None = None if layers else False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Find out during the backward pass in this block."""

        def look(_: nn.Module, __: tuple[Any, ...], hidden: Tensor) -> None:
            if hidden.requires_grad and hidden.ndim == 3 and hidden.shape[1] > 1:
                hidden.register_hook(self._judge)

        handle = self._layer.output.register_forward_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def attach(self) -> None:
        """Leave the other tokens out, if the first is enough."""
        if self.enough and self._handle is None:
            self._handle = self._layer.attention.output.register_forward_pre_hook(_first)

    def detach(self) -> None:
        """Everything is as it was; what was found out stays known."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _judge(self, g: Tensor) -> None:
        self.enough = bool(g[:, 0].any()) and not bool(g[:, 1:].any())


def _is_layer(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("attention", "intermediate", "output")]
    return all(isinstance(part, nn.Module) for part in [*parts, getattr(parts[0], "output", None)])


def _first(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if len(args) < 2:  # the residual comes in later, for all tokens
        return args
    return tuple(states[:, :1] for states in args)
