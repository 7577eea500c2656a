"""Which model, which adapter, which dataset, which example: short hashes of what they contain."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.gradients.packing import Packing
from hf_influence.task import IGNORED, unwrapped

SAMPLED = 4096


def model_identity(model: nn.Module) -> dict[str, Any]:
    """Class of the model and a hash of its frozen weights.

    Of each frozen tensor the name, shape, dtype and 4,096 evenly spaced values count, which tells models apart in
    seconds at any size.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            flat = weight.detach().flatten()
            digest.update(json.dumps([name, list(weight.shape), str(weight.dtype)]).encode())
            digest.update(_bytes(flat[:: max(1, len(flat) // SAMPLED)]))
    return {"class": type(unwrapped(model)).__name__, "frozen": digest.hexdigest()[:16]}


def adapter_identity(model: nn.Module) -> str:
    """Hash of all trainable values."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            digest.update(json.dumps([name, list(weight.shape), str(weight.dtype)]).encode())
            digest.update(_bytes(weight.detach().flatten()))
    return digest.hexdigest()[:16]


def content_hash(
    ids: Tensor, mask: Tensor | None, labels: Tensor, per_token: bool, packing: Packing | None = None
) -> Tensor:
    """One number for the real tokens and labels of each example, `[b]` int64, wherever it stands in a batch.

    Neither padding on either side nor packing changes it, nor does the label of the first token, which nothing
    predicts, nor a label of -100 of a decoder. Computed on the device of the batch. Two examples share it (but for a
    chance of 2⁻⁶⁴) only if they are the same.

    Args:
        ids: Token ids `[b, t]`, or any other input `[b, …]` that stands for the example.
        mask: 0 for padding, `[b, t]`.
        labels: `[b]`, `[b, c]` (a decoder's too) or, with the shape of `ids`, a label a token.
        per_token: Which of these.
        packing: Of a batch whose rows hold several examples; `[n]` comes back then.
    """
    value = _integers(ids).flatten(1)  # [b, t]
    if packing is not None:
        real, place = packing.owner >= 0, packing.place
    elif mask is not None and mask.shape == value.shape:
        real = mask != 0
        place = real.cumsum(1) - 1
    else:
        real, place = None, torch.arange(value.shape[1], device=ids.device).expand_as(value)
    value = value * _ODD[0] + place * _ODD[1]
    if per_token:
        value = value + _integers(labels).flatten(1).masked_fill(place == 0, IGNORED) * _ODD[2]
    value = _mixed(value)
    if real is not None:
        value = value * real
    if packing is not None:
        code = value.new_zeros(len(packing.source))
        return code.index_add_(0, packing.owner.clamp(min=0).flatten(), value.flatten())  # padding adds 0
    code = value.sum(1)
    if not per_token:
        label = _integers(labels).reshape(len(ids), -1)  # [b, c]
        mixed = _mixed(label * _ODD[2] + torch.arange(label.shape[1], device=ids.device) * _ODD[1] + 1)
        code = code + mixed.masked_fill(label == IGNORED, 0).sum(1)
    return code


_ODD = (-7046029254386353131, -4417276706812531889, 3935559000370003845)
"""Odd 64-bit numbers without structure; products wrap around."""


def _mixed(value: Tensor) -> Tensor:
    """A bijection of 64-bit integers that scatters neighbours (the splitmix64 finaliser)."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


def _integers(values: Tensor) -> Tensor:
    if values.is_floating_point():
        values = values.to(torch.float64).view(torch.int64)
    return values.to(torch.int64)


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().cpu().view(torch.uint8).numpy().tobytes()
