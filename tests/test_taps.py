"""Which modules hold the trainable parameters, and which of them have no rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import autograd_row, bert, labelled, llama, lora, prompts, stored, tiny, worst_error
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from hf_influence.errors import UnsupportedModel
from hf_influence.gradients.taps import find_taps

QUERY = "layer.1.attention.self.query.base_layer"


def freed(model: Any, *parts: str) -> Any:
    """With some parameters of the base trainable as well."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.requires_grad or any(part in name for part in parts))
    return model


def shared() -> Any:
    """A weight that is used with an adapter by one layer and without by the other."""
    base: Any = llama()
    first, second = (layer.self_attn.o_proj for layer in base.model.layers)
    second.weight = first.weight
    return freed(lora(base, r".*layers\.0\.self_attn\.o_proj"), "o_proj.base_layer.weight")


MODELS: dict[str, Any] = {
    "weight": (lambda: freed(tiny(), "layers.1.self_attn.q_proj.base_layer.weight"), prompts()),
    "weight and bias": (lambda: freed(lora(bert(), ["query"], bias="lora_only"), QUERY), labelled(lambda i: i % 2)),
    "weight used by another layer": (shared, prompts()),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("modules", ["lora", "trainable"])
def test_a_base_layer_is_trained_beside_its_adapter(tmp_path: Path, kind: str, modules: Any) -> None:
    make, examples = MODELS[kind]
    model = make()
    reference = [autograd_row(model, example) for example in examples]
    rows = stored(model, examples, tmp_path, batch_size=3, modules=modules)
    assert list(rows.blocks) == list(reference[0])
    assert worst_error(rows, reference) < 1e-10


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]])
@pytest.mark.parametrize("modules", ["lora", "trainable"])
def test_adapters_that_take_no_part_are_refused(targets: list[str], modules: Any) -> None:
    model = lora(llama(), targets)
    model.merge_adapter()
    with pytest.raises(UnsupportedModel, match=rf"{targets[0]} is merged, so .*lora_.*unmerge_adapter\(\) first"):
        find_taps(model, modules)
    model.unmerge_adapter()
    taps = find_taps(model, modules)
    model.disable_adapter_layers()
    with pytest.raises(UnsupportedModel, match=r"no trainable parameter left .*disabled"):
        find_taps(model, modules)
    freed(model, "lora_")
    with pytest.raises(UnsupportedModel, match=rf"{targets[0]} is disabled, so .*enable_adapter_layers\(\) first"):
        find_taps(model, modules)
    model.enable_adapter_layers()
    assert [tap.parameter for tap in find_taps(model, modules)] == [tap.parameter for tap in taps]


class Rounded(nn.Linear):
    """Another layer than the one it inherits from, as those that quantise while they train."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + ((8 * input).round() / 8 - input).detach())


class Named(nn.Linear):
    """The same under another name."""


def with_layer(kind: Any) -> nn.Module:
    """A model of which one linear layer is of that kind, and alone trainable."""
    model: Any = llama().requires_grad_(False)
    model.model.layers[1].mlp.up_proj = kind(16, 24)
    return model.double()


def test_a_linear_layer_with_another_forward_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight \(Rounded\), .*up_proj\.bias \(Rounded\)"):
        find_taps(with_layer(Rounded), "trainable")


@pytest.mark.parametrize("kind", [Named, FalconLinear])
def test_a_linear_layer_by_another_name_has_exact_rows(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    model = with_layer(kind)
    reference = [autograd_row(model, example) for example in prompts()]
    assert worst_error(stored(model, prompts(), tmp_path, modules="trainable"), reference) < 1e-10
