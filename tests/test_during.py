"""Rows from the Trainer's own backward passes: each is the gradient of its example's own loss, whatever the setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from datasets import Dataset
from models import bert, labelled, llama, lora, padding, prompts, tiny
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from hf_influence.callbacks import GradientCapture
from hf_influence.store import GradientStore, Rows

EXAMPLES = prompts(10)
QUERIES = prompts(3, seed=1)


@dataclass
class Micro:
    """A micro-batch before its training step: weights, randomness and what the model is given."""

    epoch: int
    weights: dict[str, Tensor]
    randomness: Tensor
    inputs: dict[str, Tensor]


class Recording(Trainer):
    """A Trainer that remembers what every step started from."""

    micros: list[Micro]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        weights = {name: w.detach().clone() for name, w in self.model.named_parameters() if w.requires_grad}
        self.micros.append(Micro(int(self.state.epoch + 1e-6) + 1, weights, torch.get_rng_state(), dict(inputs)))
        return super().training_step(model, inputs, *args, **kwargs)


def train(
    model: nn.Module,
    folder: Path,
    *callbacks: TrainerCallback,
    data: Any = EXAMPLES,
    collate: Any = None,
    kind: type[Trainer] = Recording,
    resume: str | None = None,
    **options: Any,
) -> Any:
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        **options,
    }
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    data = Dataset.from_list(data) if isinstance(data, list) else data
    run = kind(model, args, data_collator=collate or padding(), train_dataset=data, callbacks=list(callbacks))
    run.micros = []
    run.train(resume_from_checkpoint=resume)
    return run


def key(example: dict[str, Any]) -> tuple[Any, ...]:
    """What tells the examples of a test apart."""
    return tuple(example["input_ids"])


def examples_of(inputs: dict[str, Tensor]) -> list[tuple[tuple[int, ...], tuple[int, slice]]]:
    """The examples of a batch, padded or packed, and where they are in it."""
    found = []
    for row, ids in enumerate(inputs["input_ids"]):
        if "attention_mask" in inputs:
            real = inputs["attention_mask"][row].nonzero()[:, 0].tolist()
            found.append((tuple(ids[real].tolist()), (row, slice(real[0], real[-1] + 1))))
            continue
        starts = (inputs["position_ids"][row] == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            found.append((tuple(ids[start:end].tolist()), (row, slice(start, end))))
    return found


def own_gradients(model: nn.Module, micro: Micro, autocast: torch.dtype | None = None) -> dict[Any, dict[str, Tensor]]:
    """The gradient of each example's own loss in this batch, by plain autograd under the dropout of the step."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, value in micro.weights.items():
            weights[name].copy_(value)
    torch.set_rng_state(micro.randomness)
    model.train()
    labels = micro.inputs["labels"]
    inputs = {name: value for name, value in micro.inputs.items() if name != "labels"}
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        logits = model(**inputs, use_cache=False).logits if "position_ids" in inputs else model(**inputs).logits
    rows = {}
    for ids, (row, place) in examples_of(micro.inputs):
        if logits.ndim == 2:
            loss = nn.functional.cross_entropy(logits[row, None].float(), labels[row, None])
        else:
            z, y = logits[row, place], labels[row, place]
            loss = nn.functional.cross_entropy(z[:-1].float(), y[1:])
        gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        rows[ids] = dict(zip(weights, gradients, strict=True))
    return rows


def assert_exact(
    run: Any, rows: Rows, data: list[dict[str, Any]], epoch: int, tolerance: float = 1e-5, **settings: Any
) -> None:
    """Every row of an epoch against autograd."""
    seen = {}
    model = run.model
    model.activation_checkpointing_disable()  # the gradients are the same, and autograd.grad works
    after = {name: w.detach().clone() for name, w in model.named_parameters()}
    for micro in run.micros:
        if micro.epoch == epoch:
            seen |= own_gradients(model, micro, **settings)
    model.load_state_dict(after)
    want = [seen[key(data[position])] for position in rows.positions.tolist()]
    assert len(want) == len(seen)
    assert models.worst_error(rows, want) <= tolerance


def packed_llama(**config: Any) -> Any:
    torch.manual_seed(0)
    base = llama(attn_implementation="eager")
    base.config.use_cache = False
    return lora(base, ["q_proj", "v_proj"], dtype=torch.float32, **config)


def classifier() -> Any:
    torch.manual_seed(0)
    return lora(
        bert(num_labels=3), ["query", "value"], dtype=torch.float32, modules_to_save=["classifier"], task_type="SEQ_CLS"
    )


@dataclass
class Setting:
    """One row of the matrix."""

    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], Any] = lambda: tiny(torch.float32)
    data: list[dict[str, Any]] = field(default_factory=lambda: EXAMPLES)
    collate: Any = None
    tolerance: float = 1e-5
    autocast: torch.dtype | None = None


def checkpointed(reentrant: bool) -> dict[str, Any]:
    return {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}


BF16: dict[str, Any] = {"tolerance": 2e-2, "autocast": torch.bfloat16}
MATRIX = {
    "plain": Setting(),
    "left padding": Setting(collate=padding("left")),
    "accumulation": Setting({"gradient_accumulation_steps": 3}),
    "accumulation, batch of one": Setting({"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}),
    "by token": Setting({"gradient_accumulation_steps": 2, "average_tokens_across_devices": False}),
    "checkpointing": Setting(checkpointed(False)),
    "reentrant checkpointing": Setting(checkpointed(True)),
    "bf16": Setting({"bf16": True}, **BF16),
    "bf16, checkpointing": Setting({"bf16": True, **checkpointed(False)}, **BF16),
    "bf16, accumulation": Setting({"bf16": True, "gradient_accumulation_steps": 2}, **BF16),
    "by length": Setting({"train_sampling_strategy": "group_by_length"}),
    "workers": Setting({"dataloader_num_workers": 2}),
    "drop last": Setting({"dataloader_drop_last": True}),
    "clipping": Setting({"max_grad_norm": 1e-3}),
    "adafactor": Setting({"optim": "adafactor"}),
    "classes": Setting(make=classifier, data=labelled(lambda i: i % 3, 10)),
    "classes, accumulation": Setting(
        {"gradient_accumulation_steps": 2}, classifier, labelled(lambda i: i % 3, 10), padding("left")
    ),
    "packing": Setting(make=packed_llama, collate=DataCollatorWithFlattening()),
    "packing, accumulation": Setting(
        {"gradient_accumulation_steps": 2}, packed_llama, collate=DataCollatorWithFlattening()
    ),
    "packing, no dropout": Setting(make=lambda: packed_llama(lora_dropout=0.0), collate=DataCollatorWithFlattening()),
}


@pytest.mark.parametrize("name", MATRIX)
def test_every_row_equals_autograd(tmp_path: Path, name: str) -> None:
    s = MATRIX[name]
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    run = train(s.make(), tmp_path, capture, data=s.data, collate=s.collate, **s.options)
    store = GradientStore.open(capture.path)
    assert store.points() == [1, 2]
    for epoch in (1, 2):
        rows = store.rows("train", epoch)
        assert len(rows) == len(s.data) - (len(s.data) % 3 if name == "drop last" else 0)
        assert_exact(run, rows, s.data, epoch, s.tolerance, autocast=s.autocast)
        assert (rows.stats["epoch"] == epoch).all()
