"""Which model, which adapter, which dataset, which example: short hashes of what they contain."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.task import unwrapped

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


def content_hash(ids: Tensor, mask: Tensor | None, labels: Tensor, per_token: bool) -> Tensor:
    """One number for the real tokens and labels of each example, `[b]` int64; padding does not change it.

    Computed on the device of the batch. Two examples share it (but for a chance of 2⁻⁶⁴) only if they are the same.

    Args:
        ids: Token ids `[b, t]`, or any other input `[b, …]` that stands for the example.
        mask: 0 for padding, `[b, t]`, on the right.
        labels: `[b]`, `[b, c]` or, with the shape of `ids`, a label a token.
        per_token: Which of these.
    """
    value = _integers(ids).flatten(1)  # [b, t]
    value = value * _ODD[0] + torch.arange(value.shape[1], device=ids.device) * _ODD[1]
    if per_token:
        value = value + _integers(labels).flatten(1) * _ODD[2]
    value = _mixed(value)
    if mask is not None and mask.shape == ids.shape:
        value = value * mask
    code = value.sum(1)
    if not per_token:
        label = _integers(labels).reshape(len(ids), -1)  # [b, c]
        code = code + _mixed(label * _ODD[2] + torch.arange(label.shape[1], device=ids.device) * _ODD[1] + 1).sum(1)
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
