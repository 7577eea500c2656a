"""LoRA in PEFT: where its parameters sit, and its forward and backward pass in fewer steps at fixed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

__all__ = ["LoraEmbedding", "embedding_factors", "fused_lora", "lora_layers"]

Form = Callable[[nn.Module, Tensor, Tensor], None]
"""Takes a module, its input `[b, t, i]` and the gradient at its output `[b, t, o]`, and forms the rows."""


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The LoRA layers of a model, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def embedding_factors(layer: LoraEmbedding, adapter: str) -> tuple[Tensor, Tensor, Tensor | float]:
    """`A [r, vocabulary]`, `B [width, r]` and the scale of the adapter's part of the output of an embedding layer."""
    scale = layer._get_embed_scale()
    return (
        layer.lora_embedding_A[adapter],
        layer.lora_embedding_B[adapter],
        layer.scaling[adapter] * (1.0 if scale is None else scale),
    )


@contextmanager
def fused_lora(model: nn.Module, form: Form) -> Iterator[None]:
    """Run plain LoRA linear layers in four products without intermediate copies, and form their rows on the way back.

        y = x Wᵀ + (x Aᵀ) (s B)ᵀ          ∂x = g W + (g s B) A

    The same numbers as PEFT's layer up to rounding of the adapter's part: unlike with a merged weight `W + s B A`, the
    frozen weight is not rounded anew, which a deep model amplifies (SmolLM2: 3e-5 of a row, against 1e-6). Layers that
    are more than that (quantised, DoRA, several active adapters, hooked) run as they are.

    Args:
        model: To be run in evaluation mode, its trainable parameters still marked by `requires_grad`.
        form: Called on the way back for `lora_A`, `lora_B` and the base layer, with what each would have seen.
    """
    patched = [layer for _, layer in lora_layers(model) if _is_plain(layer)]
    trigger = torch.zeros((), requires_grad=True)  # asks for a backward pass where no input does
    try:
        for layer in patched:
            (name,) = _active(layer)
            down = layer.lora_A[name].weight.detach() * layer.scaling[name]
            up = layer.lora_B[name].weight.detach().T.contiguous() * layer.scaling[name]
            bias = layer.base_layer.bias
            trained_bias = bias is not None and bias.requires_grad
            layer.forward = partial(_forward, layer, name, down, up, trained_bias, trigger, form)
        yield
    finally:
        for layer in patched:
            del layer.forward


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _forward(
    layer: Any, name: str, down: Tensor, up: Tensor, trained_bias: bool, trigger: Tensor, form: Form, x: Tensor
) -> Tensor:
    out: Tensor = _PlainLora.apply(x, trigger, layer, name, down, up, trained_bias, form)
    return out


def _is_plain(layer: Any) -> bool:
    if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear or "forward" in vars(layer):
        return False
    active = _active(layer)
    if len(active) != 1 or layer.lora_variant or layer.merged or layer.disable_adapters:
        return False
    a, b, base = layer.lora_A[active[0]], layer.lora_B[active[0]], layer.base_layer
    if b.bias is not None or not a.weight.dtype == b.weight.dtype == base.weight.dtype:
        return False
    if torch.is_autocast_enabled(base.weight.device.type):
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in (layer, base))


class _PlainLora(torch.autograd.Function):
    """`down` is `s A`, `up` is `s Bᵀ`, both `[r, ·]`; products have their long side last, which is faster."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        trigger: Tensor,
        layer: Any,
        name: str,
        down: Tensor,
        up: Tensor,
        trained_bias: bool,
        form: Form,
    ) -> Tensor:
        base, b = layer.base_layer, layer.lora_B[name]
        flat = x.flatten(0, -2)  # [N, i]
        xa = (down @ flat.T).T  # [N, r]
        y = F.linear(flat, base.weight, base.bias).addmm_(xa, b.weight.T)  # [N, o]
        ctx.save_for_backward(flat, xa, up)
        ctx.layer = base, layer.lora_A[name], b, form
        ctx.trained_bias = trained_bias
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, up = ctx.saved_tensors
        base, a, b, form = ctx.layer
        flat, n = g.flatten(0, -2), len(g)  # [N, o], N = n t
        gb = (up @ flat.T).T  # [N, r]
        x3, g3 = x.view(n, -1, x.shape[1]), flat.view(n, -1, flat.shape[1])  # [b, t, i], [b, t, o]
        form(a, x3, gb.unflatten(0, (n, -1)))
        form(b, xa.unflatten(0, (n, -1)), g3)
        if ctx.trained_bias:
            form(base, x3, g3)
        if not ctx.needs_input_grad[0]:
            return (None,) * 8
        gx = (flat @ base.weight).addmm_(gb, a.weight)  # [N, i]
        return gx.unflatten(0, g.shape[:-1]), None, None, None, None, None, None, None
