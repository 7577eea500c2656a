"""Where the gradient of each trainable parameter can be read: which module to watch and which rule to apply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_influence.errors import BadSetting, UnsupportedModel
from hf_influence.gradients.lora import LoraEmbedding, adapted_parameters, embedding_factors, lora_layers
from hf_influence.gradients.rules import Rule, bias, linear, looked_up, one_hot, transposed

Modules = Literal["lora", "trainable"]

LINEAR_TOO = {"FalconLinear.forward", "Linear4bit.forward", "Linear8bitLt.forward"}
"""Forward methods of subclasses of `nn.Linear` that give `x Wᵀ + b`, of Falcon and bitsandbytes."""


@dataclass(frozen=True)
class Tap:
    """One parameter at one module: watch `module`, and `rule` makes the rows of its input and output gradient.

    `module_name` is where the module sits in the model, for error messages.
    """

    parameter: str
    shape: list[int]
    module: nn.Module
    module_name: str
    rule: Rule
    weight: Tensor


def find_taps(model: nn.Module, modules: Modules = "lora", skip: Sequence[str] = ()) -> list[Tap]:
    """One tap or more for every trainable parameter.

    Args:
        model: The model with the trainable parameters marked by `requires_grad`.
        modules: "lora" insists on a PEFT LoRA model; "trainable" takes any model.
        skip: Names of parameters to leave out; `*` stands for anything.

    Raises:
        UnsupportedModel: No LoRA, nothing trainable, an adapter that is merged or disabled, or a trainable parameter
            that no rule covers.
        BadSetting: A pattern in `skip` that fits no parameter.
    """
    if modules not in ("lora", "trainable"):
        raise BadSetting(f"modules={modules!r}: choose 'lora' (a PEFT LoRA model) or 'trainable' (any model).")
    if modules == "lora" and not lora_layers(model):
        kinds = {config.peft_type.value for config in getattr(model, "peft_config", {}).values()}
        if kinds - {"LORA"}:
            raise UnsupportedModel(
                f"the adapters of this {type(model).__name__} are of the kind {', '.join(sorted(kinds))}, and LoRA is "
                "covered. Use LoraConfig, or modules='trainable' for what else is trainable."
            )
        raise UnsupportedModel(
            f"{type(model).__name__} has no LoRA layers. Wrap it: get_peft_model(model, LoraConfig(...)), or pass "
            "modules='trainable' for the trainable linear layers of a model without adapters."
        )
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in trainable):
            raise BadSetting(
                f"skip={pattern!r} fits no trainable parameter (the first is {next(iter(trainable), None)!r})."
            )
    wanted = {name: w for name, w in trainable.items() if not any(fnmatchcase(name, pattern) for pattern in skip)}
    if not wanted:
        raise UnsupportedModel(
            f"{type(model).__name__} has no trainable parameter left to take gradients of. Is the adapter frozen "
            "(inference mode, disabled, or loaded without is_trainable=True)?"
        )
    names = {id(weight): name for name, weight in wanted.items()}
    _check_taking_part(model, names)
    uncalled = adapted_parameters(model)
    taps = [
        Tap(names[id(weight)], list(weight.shape), module, module_name, rule, weight)
        for module_name, module in model.named_modules()
        for weight, rule in _rules_of(module)
        if id(weight) in names and id(weight) not in uncalled
    ]
    _check_coverage(model, wanted, names, {tap.parameter for tap in taps})
    order = {name: position for position, name in enumerate(wanted)}
    return sorted(taps, key=lambda tap: order[tap.parameter])


def _rules_of(module: nn.Module) -> list[tuple[Tensor, Rule]]:
    """The parameters that a module owns and uses linearly, each with its rule."""
    rules: list[tuple[Tensor | None, Rule]] = []
    if isinstance(module, nn.Linear) and _is_linear(module):
        rules = [(module.weight, linear()), (module.bias, bias())]
    elif isinstance(module, Conv1D):
        rules = [(module.weight, transposed()), (module.bias, bias())]
    elif isinstance(module, LoraEmbedding) and not module.lora_variant:
        for adapter in module.active_adapters:
            if adapter in module.lora_embedding_A:
                down, _, _ = embedding_factors(module, adapter)  # [r, vocabulary]
                padding = getattr(module.get_base_layer(), "padding_idx", None)
                left = partial(_before_up, module, adapter)
                rules += [
                    (module.lora_embedding_A[adapter], one_hot(left, down.shape[1], padding)),
                    (module.lora_embedding_B[adapter], looked_up(partial(_scaled_down, module, adapter))),
                ]
    return [(weight, rule) for weight, rule in rules if weight is not None]


def _is_linear(module: nn.Linear) -> bool:
    """Whether the module does what `nn.Linear` does; a subclass may quantise, or do more than one product."""
    forward = type(module).forward
    return forward is nn.Linear.forward or forward.__qualname__ in LINEAR_TOO


def _before_up(layer: Any, adapter: str, g: Tensor) -> Tensor:
    """The gradient behind `B`, `[b, t, r]`."""
    _, up, scale = embedding_factors(layer, adapter)
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    return g @ (up.detach() * scale).to(g)


def _scaled_down(layer: Any, adapter: str) -> Tensor:
    """What `B` sees of each token, `[vocabulary, r]`."""
    down, _, scale = embedding_factors(layer, adapter)
    return down.detach().T * scale


def _check_taking_part(model: nn.Module, names: dict[int, str]) -> None:
    for layer_name, layer in lora_layers(model):
        if not (layer.merged or layer.disable_adapters):
            continue
        state, remedy = ("merged", "unmerge_adapter") if layer.merged else ("disabled", "enable_adapter_layers")
        parts = (getattr(layer, part) for part in layer.adapter_layer_names)
        wanted = [names[id(weight)] for part in parts for weight in part.parameters() if id(weight) in names]
        if wanted:
            raise UnsupportedModel(
                f"the adapter of {layer_name} is {state}, so {wanted[0]} takes no part in the forward pass and has no "
                f"gradient. Call model.{remedy}() first."
            )


def _check_coverage(model: nn.Module, wanted: dict[str, Any], names: dict[int, str], covered: set[str]) -> None:
    owner = {
        name: type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in wanted if name not in covered
    }
    for weight, adapted in adapted_parameters(model).items():
        if weight in names:
            owner[names[weight]] = f"LoRA on the parameter {adapted}"
    for module in model.modules():  # a weight that is tied to a covered one is used here as well
        if not isinstance(module, nn.ParameterDict):
            known = {id(weight) for weight, _ in _rules_of(module)}
            uses = (id(weight) for weight in module.parameters(recurse=False) if id(weight) not in known)
            owner |= {names[use]: type(module).__name__ for use in uses if use in names}
    missing = [name for name in wanted if name in owner]
    if not missing:
        return
    some = ", ".join(f"{name} ({owner[name]})" for name in missing[:5])
    raise UnsupportedModel(
        f"{len(missing)} trainable parameter(s) have no exact per-example rule: "
        f"{some}{', …' if len(missing) > 5 else ''}. Their part of the gradient would silently be missing. Freeze them "
        f"(requires_grad_(False)), or leave them out on purpose with skip=[{missing[0]!r}, …] (patterns such as "
        "'*norm*' work)."
    )
