"""Where the gradient of each trainable parameter can be read: which module to watch and which rule to apply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_influence.errors import BadSetting, UnsupportedModel
from hf_influence.gradients.lora import LoraEmbedding, embedding_factors, lora_layers
from hf_influence.gradients.rules import Entries, one_hot_outer, outer, total

Modules = Literal["lora", "trainable"]
Rule = Callable[[Tensor, Tensor, "Entries | None"], Tensor]
"""`(x [b, t, i] or ids [b, t], g [b, t, o], kept entries) -> rows [b, d]`."""


@dataclass(frozen=True)
class Tap:
    """One parameter at one module: watch `module`, and `rule(input, output_gradient, keep)` gives the rows.

    `module_name` is where the module sits in the model, for error messages.
    """

    parameter: str
    shape: list[int]
    module: nn.Module
    module_name: str
    rule: Rule


def find_taps(model: nn.Module, modules: Modules = "lora", skip: Sequence[str] = ()) -> list[Tap]:
    """One tap or more for every trainable parameter.

    Args:
        model: The model with the trainable parameters marked by `requires_grad`.
        modules: "lora" insists on a PEFT LoRA model; "trainable" takes any model.
        skip: Names of parameters to leave out; `*` stands for anything.

    Raises:
        UnsupportedModel: No LoRA, nothing trainable, or a trainable parameter that no rule covers.
        BadSetting: A pattern in `skip` that fits no parameter.
    """
    if modules not in ("lora", "trainable"):
        raise BadSetting(f"modules={modules!r}: choose 'lora' (a PEFT LoRA model) or 'trainable' (any model).")
    if modules == "lora" and not lora_layers(model):
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
            "(inference mode, or loaded without is_trainable=True)?"
        )
    names = {id(weight): name for name, weight in wanted.items()}
    taps = [
        Tap(names[id(weight)], list(weight.shape), module, module_name, rule)
        for module_name, module in model.named_modules()
        for weight, rule in _rules_of(module)
        if id(weight) in names
    ]
    _check_coverage(model, wanted, names, {tap.parameter for tap in taps})
    order = {name: position for position, name in enumerate(wanted)}
    return sorted(taps, key=lambda tap: order[tap.parameter])


def _rules_of(module: nn.Module) -> list[tuple[Tensor, Rule]]:
    """The parameters that a module owns and uses linearly, each with its rule."""
    rules: list[tuple[Tensor | None, Rule]] = []
    if isinstance(module, nn.Linear):
        rules = [
            (module.weight, lambda x, g, keep: outer(g, x, keep)),
            (module.bias, lambda x, g, keep: total(g, keep)),
        ]
    elif isinstance(module, Conv1D):
        rules = [
            (module.weight, lambda x, g, keep: outer(x, g, keep)),
            (module.bias, lambda x, g, keep: total(g, keep)),
        ]
    elif isinstance(module, LoraEmbedding) and not module.lora_variant:
        for adapter in module.active_adapters:
            if adapter in module.lora_embedding_A:
                rules += [
                    (module.lora_embedding_A[adapter], partial(_embedding_a, module, adapter)),
                    (module.lora_embedding_B[adapter], partial(_embedding_b, module, adapter)),
                ]
    return [(weight, rule) for weight, rule in rules if weight is not None]


def _embedding_a(layer: Any, adapter: str, ids: Tensor, g: Tensor, keep: Entries | None) -> Tensor:
    a, b, s = embedding_factors(layer, adapter)
    return one_hot_outer(g @ (b.detach() * s).to(g), ids, a.shape[1], keep)


def _embedding_b(layer: Any, adapter: str, ids: Tensor, g: Tensor, keep: Entries | None) -> Tensor:
    a, _, s = embedding_factors(layer, adapter)
    return outer(g * s, a.detach().T[ids].to(g), keep)


def _check_coverage(model: nn.Module, wanted: dict[str, Any], names: dict[int, str], covered: set[str]) -> None:
    owner = {
        name: type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in wanted if name not in covered
    }
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
