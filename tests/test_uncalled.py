"""Layers that a batch does not reach have a gradient of 0; a weight that is used without a call is no such layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ENCODER, lora, prompts
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from watched import Recording, train

from hf_influence.callbacks import GradientCapture
from hf_influence.errors import UnsupportedModel
from hf_influence.gradients import collect, dropout, logra
from hf_influence.store import GradientStore, Rows

REACHING = 7
"""The token at which the layer is used."""


class Branching(LlamaForCausalLM):
    """Has a layer that only some examples reach; by its weight alone, where it is `hidden`."""

    hidden = False

    def __init__(self, config: Any):
        super().__init__(config)
        self.branch = nn.Linear(16, 16)

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **rest: Any) -> Any:
        x = self.get_input_embeddings()(input_ids)
        at = input_ids == REACHING
        if at.any():
            x = x + self.branch(x) * at[..., None]
        elif self.hidden and self.training:
            x = x + x @ self.branch.weight * 0.1
        return super().forward(inputs_embeds=x, attention_mask=attention_mask, labels=labels, use_cache=False)


def branching(**config: Any) -> Any:
    torch.manual_seed(0)
    base = Branching(LlamaConfig(**ENCODER, num_key_value_heads=1))
    config = {"lora_dropout": 0.0, "modules_to_save": ["branch"], **config}
    return lora(base, ["q_proj"], dtype=torch.float32, **config)


def examples(reaching: Any) -> list[dict[str, Any]]:
    rows = []
    for i, row in enumerate(prompts(9, shortest=4)):
        ids = [8 if token == REACHING else token for token in row["input_ids"]]
        rows.append({**row, "input_ids": [REACHING if reaching(i) else 9, *ids[1:]]})
    return rows


SOME = examples(lambda i: i in (0, 1, 2, 7))


def own(model: nn.Module, example: dict[str, Any]) -> dict[str, Tensor]:
    """The gradient of its own loss, 0 where it does not depend on a weight."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss = model.eval()(**{name: torch.tensor([value]) for name, value in example.items()}).loss
    loss = loss + sum(0 * weight.sum() for weight in weights.values())
    found = torch.autograd.grad(loss, list(weights.values()))
    return dict(zip(weights, found, strict=True))


def assert_own(rows: Rows, model: nn.Module, data: list[dict[str, Any]]) -> None:
    want = [own(model, data[position]) for position in rows.positions.tolist()]
    for block in rows.blocks:
        whole = torch.stack([row[block].flatten() for row in want])
        torch.testing.assert_close(rows.block(block), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_rows_of_a_layer_that_a_batch_does_not_reach_are_0(tmp_path: Path, size: int) -> None:
    model = branching()
    kept = [torch.ones_like(weight) for weight in model.parameters()]
    for weight, gradient in zip(model.parameters(), kept, strict=True):
        weight.grad = gradient
    rows = collect(model, SOME, tmp_path, batch_size=size).rows("train")
    assert all(weight.grad is gradient for weight, gradient in zip(model.parameters(), kept, strict=True))
    assert all(bool((gradient == 1).all()) for gradient in kept)
    assert_own(rows, model, SOME)
    branch = torch.cat([rows.block(block) for block in rows.blocks if "branch" in block], 1)
    assert [i for i, row in enumerate(branch) if row.any()] == [0, 1, 2, 7]


def test_rows_of_training_steps_are_0_as_well(tmp_path: Path) -> None:
    model = branching()
    capture = GradientCapture(tmp_path / "rows", during="epochs")
    options: dict[str, Any] = {"learning_rate": 0.0, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    train(model, tmp_path, capture, data=SOME, kind=Trainer, per_device_train_batch_size=2, **options)
    for point in (0, 1, 2, 3):
        assert_own(GradientStore.open(capture.path).rows("train", point), model, SOME)


def test_an_adapter_that_only_some_examples_reach_is_all_there_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora(Branching(LlamaConfig(**ENCODER, num_key_value_heads=1)), ["branch"], dtype=torch.float32)
    assert_own(collect(model, SOME, tmp_path, batch_size=1).rows("train"), model, SOME)


@pytest.mark.parametrize("compress", [dropout(5), logra(2, 3)])
def test_compressed_rows_of_such_a_layer_are_0(tmp_path: Path, compress: Any) -> None:
    rows = collect(branching(), SOME, tmp_path, batch_size=1, compress=compress).rows("train")
    for block, width in rows.blocks.items():
        assert rows.block(block).shape == (len(SOME), width)


def test_a_layer_that_no_example_at_hand_reaches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModel, match=r"2 parameter.*branch.*none of .* tried out.*other examples only.*skip="
    ):
        collect(branching(), examples(lambda i: i == 4), tmp_path, batch_size=2)


def test_a_weight_that_is_used_without_a_call_is_refused(tmp_path: Path) -> None:
    model = branching()
    model.get_base_model().hidden = True
    with pytest.raises(UnsupportedModel, match=r"no gradient reached 1 parameter.*branch.*used without calling it"):
        train(model, tmp_path, GradientCapture(tmp_path / "rows", during="epochs"), data=SOME, kind=Trainer)


def test_layers_dropped_at_random_do_not_stop_training(tmp_path: Path) -> None:
    class Dropping(Recording):
        """Leaves the first layer of the model out of every other step."""

        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            layers, out = self.model.get_base_model().model.layers, self.state.global_step % 2
            kept = layers[0]
            try:
                if out:
                    self.model.get_base_model().model.layers = layers[1:]
                return super().training_step(model, inputs, *args, **kwargs)
            finally:
                self.model.get_base_model().model.layers = layers
                assert layers[0] is kept

    torch.manual_seed(0)
    model = lora(LlamaForCausalLM(LlamaConfig(**ENCODER, num_key_value_heads=1)), ["q_proj"], dtype=torch.float32)
    capture = GradientCapture(tmp_path / "rows", during="steps", at_end=False)
    train(model, tmp_path, capture, data=SOME, kind=Dropping)
    store = GradientStore.open(capture.path)
    for step in store.points():
        rows = store.rows("train", step)
        first = torch.cat([rows.block(block) for block in rows.blocks if "layers.0" in block], 1)
        other = torch.cat([rows.block(block) for block in rows.blocks if "layers.1" in block], 1)
        assert bool(first.any()) == (step % 2 == 1)
        assert bool(other.any(1).all())
