"""LoRA in PEFT: where its parameters sit, and its forward and backward pass in fewer steps at fixed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

__all__ = [
    "LoraEmbedding",
    "active_adapter",
    "adapted_parameters",
    "approximated",
    "embedding_factors",
    "fused_lora",
    "lora_layers",
    "padding_columns",
    "saved_names",
]

Watch = Callable[[nn.Module, Tensor], Callable[[Tensor], None]]
"""Takes a module and its input `[b, t, i]`; gives what is to be called with the gradient at its output `[b, t, o]`."""


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The LoRA layers of a model, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def active_adapter(model: Any) -> str:
    """The name of the active adapter."""
    name: str = model.active_adapters[0]
    return name


def saved_names(model: nn.Module) -> dict[str, list[str]]:
    """The names under which PEFT saves the parameters of the active adapter: name in the file -> names in the model."""
    own: dict[Any, list[str]] = {}
    for name, weight in model.named_parameters():
        own.setdefault(_view_of(weight), []).append(name)
    saved = get_peft_model_state_dict(model, adapter_name=active_adapter(model), save_embedding_layers=False)
    return {key: own[_view_of(value)] for key, value in saved.items() if _view_of(value) in own}


def _view_of(weight: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Tells apart tied adapters, of which one is the other transposed, in the same memory."""
    return weight.data_ptr(), tuple(weight.shape), weight.stride()


def adapted_parameters(model: nn.Module) -> dict[int, str]:
    """Bare parameters under LoRA (`target_parameters`; fused experts, say): `id` of a factor's weight -> their name.

    The factors sit in linear layers that are never called.
    """
    return {
        id(weight): layer.parameter_name
        for _, layer in lora_layers(model)
        if isinstance(layer, ParamWrapper)
        for factors in (layer.lora_A, layer.lora_B)
        for weight in factors.parameters()
    }


def approximated(model: nn.Module) -> dict[nn.Module, str]:
    """Layers whose active adapters have another gradient than their forward pass in training -> the method's name."""
    return {
        layer: "VeLoRA"
        for _, layer in lora_layers(model)
        for name in layer.active_adapters
        if type(getattr(layer, "lora_variant", {}).get(name)).__name__.startswith("Velora")
    }


def padding_columns(model: nn.Module) -> dict[int, int]:
    """Embeddings under LoRA that have a padding token: `id` of `A [r, vocabulary]` -> its column without a gradient."""
    return {
        id(weight): layer.get_base_layer().padding_idx
        for _, layer in lora_layers(model)
        if isinstance(layer, LoraEmbedding) and getattr(layer.get_base_layer(), "padding_idx", None) is not None
        for weight in layer.lora_embedding_A.values()
    }


def embedding_factors(layer: LoraEmbedding, adapter: str) -> tuple[Tensor, Tensor, Tensor | float]:
    """`A [r, vocabulary]`, `B [width, r]` and the scale of the adapter's part of the output of an embedding layer."""
    scale = layer._get_embed_scale()
    return (
        layer.lora_embedding_A[adapter],
        layer.lora_embedding_B[adapter],
        layer.scaling[adapter] * (1.0 if scale is None else scale),
    )


@contextmanager
def fused_lora(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Run plain LoRA linear layers in four products without intermediate copies, and watch their parts.

        y = x Wᵀ + (x Aᵀ) (s B)ᵀ          ∂x = g W + (g s B) A

    The same numbers as PEFT's layer up to rounding of the adapter's part: unlike with a merged weight `W + s B A`, the
    frozen weight is not rounded anew, which a deep model amplifies (SmolLM2: 3e-5 of a row, against 1e-6). Layers that
    are more than that (quantised, DoRA, several active adapters, hooked, under autocast) run as they are.

    Args:
        model: To be run in evaluation mode, its trainable parameters still marked by `requires_grad`.
        watch: Told of every call of `lora_A`, `lora_B` and the base layer.
    """
    patched = [layer for _, layer in lora_layers(model) if _is_plain(layer)]
    trigger = torch.zeros((), requires_grad=True)  # asks for a backward pass where no input does
    try:
        for layer in patched:
            layer.forward = _Fused(layer, trigger, watch)
        yield
    finally:
        for layer in patched:
            del layer.forward


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_plain(layer: Any) -> bool:
    if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear or "forward" in vars(layer):
        return False
    active = _active(layer)
    if len(active) != 1 or layer.lora_variant or layer.merged or layer.disable_adapters:
        return False
    a, b, base = layer.lora_A[active[0]], layer.lora_B[active[0]], layer.base_layer
    if b.bias is not None or not a.weight.dtype == b.weight.dtype == base.weight.dtype:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in (layer, base))


class _Fused:
    """The forward pass of one layer."""

    def __init__(self, layer: Any, trigger: Tensor, watch: Watch):
        (name,) = _active(layer)
        self.layer, self.trigger, self.watch = layer, trigger, watch
        self.base, self.a, self.b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
        self.down = self.a.weight.detach() * layer.scaling[name]  # s A, [r, i]
        self.up = self.b.weight.detach().T.contiguous() * layer.scaling[name]  # s Bᵀ, [r, o]
        self.trained_base = any(weight.requires_grad for weight in self.base.parameters(recurse=False))

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # accelerate switches it on inside the model's forward
            plain: Tensor = type(self.layer).forward(self.layer, x)
            return plain
        out: Tensor = _Products.apply(x, self.trigger, self)  # [N, o]; a view made inside could not be changed in place
        return out.unflatten(0, x.shape[:-1])


class _Products(torch.autograd.Function):
    """Products have their long side last, which is faster."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trigger: Tensor, fused: _Fused) -> Tensor:
        flat = x.flatten(0, -2)  # [N, i]
        xa = (fused.down @ flat.T).T  # [N, r]
        y = F.linear(flat, fused.base.weight, fused.base.bias).addmm_(xa, fused.b.weight.T)  # [N, o]
        n = len(x)
        x3 = flat.view(n, -1, flat.shape[1])  # [b, t, i], N = b t
        ctx.back_a = fused.watch(fused.a, x3)
        ctx.back_b = fused.watch(fused.b, xa.unflatten(0, (n, -1)))
        ctx.back_base = fused.watch(fused.base, x3) if fused.trained_base else None
        ctx.fused, ctx.shape = fused, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        fused: _Fused = ctx.fused
        n = ctx.shape[0]
        gb = (fused.up @ g.T).T  # [N, r]
        g3 = g.view(n, -1, g.shape[1])  # [b, t, o]
        ctx.back_a(gb.unflatten(0, (n, -1)))
        ctx.back_b(g3)
        if ctx.back_base is not None:
            ctx.back_base(g3)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        gx = (g @ fused.base.weight).addmm_(gb, fused.a.weight)  # [N, i]
        return gx.view(ctx.shape), None, None
