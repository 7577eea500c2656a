"""A Trainer that remembers its steps, and the gradients that their rows must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch
from datasets import Dataset
from models import bert, llama, lora, padding, prompts
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_influence.store import Rows

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


class HalfPrecision(Recording):
    """A Trainer for fp16 on the CPU, where accelerate leaves out what it does on a GPU: autocast and scaled losses."""

    scale = 2.0**10

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, backoff_factor=2.0**-30)


class Overflowing(HalfPrecision):
    """Its first step overflows, as happens until the scale has come down."""

    scale = 2.0**40


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
    run: Any,
    rows: Rows,
    data: list[dict[str, Any]],
    epoch: int,
    tolerance: float = 1e-5,
    missing: int = 0,
    **settings: Any,
) -> None:
    """Every row of an epoch against autograd; so many of the examples that were seen have none."""
    seen = {}
    model = run.model
    model.activation_checkpointing_disable()  # the gradients are the same, and autograd.grad works
    after = {name: w.detach().clone() for name, w in model.named_parameters()}
    for micro in run.micros:
        if micro.epoch == epoch:
            seen |= own_gradients(model, micro, **settings)
    model.load_state_dict(after, strict=False)  # tied weights have one name
    want = [seen[key(data[position])] for position in rows.positions.tolist()]
    assert len(want) == len(seen) - missing
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


def adapted(targets: list[str], make: Callable[[], nn.Module] = llama, **config: Any) -> Callable[[], Any]:
    def made() -> Any:
        torch.manual_seed(0)
        return lora(make(), targets, dtype=torch.float32, **config)

    return made


def weights_and_logs(run: Any) -> tuple[dict[str, Tensor], Any, list[Any]]:
    optimizer = run.optimizer.state_dict()["state"]
    logs = [(log["loss"], log["grad_norm"]) for log in run.state.log_history if "loss" in log]
    return {name: w.detach().clone() for name, w in run.model.named_parameters()}, optimizer, logs


class Stumbling(Trainer):
    """Fails in the middle of a step."""

    error: BaseException
    where = "forward"
    steps = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        type(self).steps += 1
        if type(self).steps % 3 == 0 and self.where == "step":
            raise self.error
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().compute_loss(model, inputs, *args, **kwargs)
        if type(self).steps % 3 == 0 and self.where == "forward":
            raise self.error
        return out
