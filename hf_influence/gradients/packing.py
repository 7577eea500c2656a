"""Several examples in one row of a batch: where each begins and ends, and how to tell their tokens apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import UnsupportedModel
from hf_influence.gradients.modes import evaluating
from hf_influence.task import unwrapped

LEAK = 2e-2
"""Relative change of a hidden state that is no rounding; a leak changes it by some .3, rounding by 1e-7 or nothing."""


@dataclass(frozen=True)
class Packing:
    """The examples that a batch is made of, in reading order, where they are not simply its rows.

    Attributes:
        owner: `[b, t]`, the number of the example that a token belongs to, -1 for padding.
        place: `[b, t]`, the position of a token in its example.
        source: `[n, l]`, the tokens of each example in the flattened batch; `b t` where there is none.
    """

    owner: Tensor
    place: Tensor
    source: Tensor

    @classmethod
    def of(cls, position_ids: Tensor, mask: Tensor | None = None) -> Packing | None:
        """Cut where the positions start again from 0.

        Args:
            position_ids: `[b, t]`.
            mask: 0 for padding, `[b, t]`.

        Returns:
            `None` if every row is one example.
        """
        real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask != 0
        starts = (position_ids == 0) & real
        starts[:, 0] |= real[:, 0]
        if bool((starts.sum(1) <= 1).all()):
            return None
        return cls._of((starts.flatten().cumsum(0) - 1).view_as(position_ids).masked_fill(~real, -1))

    @classmethod
    def one_a_row(cls, mask: Tensor) -> Packing:
        """One example a row behind or before its padding, `[b, t]`."""
        rows = torch.arange(len(mask), device=mask.device)[:, None]
        return cls._of(rows.expand_as(mask).masked_fill(mask == 0, -1))

    @classmethod
    def _of(cls, owner: Tensor) -> Packing:
        flat = owner.flatten()
        n = int(flat.max()) + 1
        at = (flat >= 0).nonzero()[:, 0]  # [k], real tokens
        lengths = torch.bincount(flat[at], minlength=n)  # [n]
        first = lengths.cumsum(0) - lengths
        place = torch.arange(len(at), device=at.device) - first[flat[at]]
        source = torch.full((n, int(lengths.max())), flat.numel(), device=at.device)
        source[flat[at], place] = at
        places = torch.zeros_like(flat)
        places[at] = place
        return cls(owner, places.view_as(owner), source)

    def seconds(self) -> Tensor:
        """The tokens that have another example before them in their row, `[b, t]`."""
        first = self.owner.masked_fill(self.owner < 0, len(self.source)).amin(1, keepdim=True)
        return self.owner > first

    def apart(self) -> Tensor:
        """The tokens that must not see the first example of their row, `[b, t]`: those of others, or else padding."""
        seconds = self.seconds()
        return seconds if bool(seconds.any()) else self.owner < 0

    def unpack(self, values: Tensor) -> Tensor:
        """One example a row, zeros behind its end: `[b, t, …] -> [n, l, …]`."""
        flat = values.flatten(0, 1)
        return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[self.source]


@contextmanager
def kept_apart(model: nn.Module, packing: Packing) -> Iterator[None]:
    """See to it that the examples of a packed batch do not see each other, nor padding them, in the model's first call.

    Whether they do depends on the attention, on the cache and on the version of both, so it is tried out: the backbone
    runs once more on what it was called with, and again with other tokens in the first example of each row. Neither
    gradients nor random numbers nor modes are touched.

    Raises:
        UnsupportedModel: The other examples came out different, or it could not be tried out.
    """
    backbone = getattr(unwrapped(model), "base_model", unwrapped(model))
    changes: list[float] = []

    def try_out(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, Tensor) and ids.shape == packing.owner.shape:
            changes.append(_leak(module, ids, args[1:], {k: v for k, v in kwargs.items() if k != "input_ids"}, packing))
            if not changes[0] <= LEAK and not packing.seconds().any():
                raise UnsupportedModel(
                    "padding on the left sees the example behind it: with other tokens in that, the hidden states of "
                    f"the padding change by up to {changes[0]:.0%}. Padding predicts the first token, which has a "
                    "label, so training depends on how much there is of it, and no row would be the gradient of its "
                    "example alone. Set the label of the first token to -100, pad on the right, or load the model with "
                    'attn_implementation="sdpa".'
                )
            if not changes[0] <= LEAK:
                raise UnsupportedModel(
                    "the examples of a packed batch see each other: with other tokens in the first one, the hidden "
                    f"states of those behind it change by up to {changes[0]:.0%}. So no row would be the gradient of "
                    "its example alone, and training itself mixes the examples. Load the model with "
                    'attn_implementation="flash_attention_2", or train without a cache (use_cache=False in '
                    "TrainingArguments and model.config: with eager and sdpa attention a cache hides where examples "
                    "begin), or pad instead of packing."
                )

    handle = backbone.register_forward_pre_hook(try_out, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not changes:
        raise UnsupportedModel(
            f"the input_ids of a packed batch do not reach {type(backbone).__name__}, so whether it keeps the examples "
            "apart cannot be tried out. Train without packing, or capture at the end alone (during=None)."
        )


def _leak(module: nn.Module, ids: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], packing: Packing) -> float:
    """How much a hidden state that should not changes with the first example of its row, relative to its length."""
    apart = packing.apart()
    other = torch.where(apart | (packing.owner < 0), ids, (ids + 1) % (ids.max() + 1))
    randomness = torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else [])
    with torch.no_grad(), randomness, evaluating(module):
        was, now = (module(tokens, *args, **kwargs)[0][apart].float() for tokens in (ids, other))  # [k, d]
    tiny = torch.finfo(was.dtype).tiny
    return float(((now - was).norm(dim=1) / was.norm(dim=1).clamp(min=tiny)).max())
