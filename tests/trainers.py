"""A Trainer of a tiny language model that notes what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from models import padding, prompts, tiny
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

EXAMPLES = prompts(12, seed=3)
PLACE = {tuple(row["input_ids"]): at for at, row in enumerate(EXAMPLES)}
QUERIES = Dataset.from_list(prompts(3, seed=1))


class Recording(Trainer):
    """Notes which examples every batch held."""

    batches: list[list[int]]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        self.batches.append([PLACE[tuple(ids[real].tolist())] for ids, real in rows])
        return super().training_step(model, inputs, *args, **kwargs)


def trainer(
    folder: Path,
    callbacks: list[TrainerCallback],
    data: Any = None,
    kind: type[Trainer] = Recording,
    collate: Any = None,
    dropout: float = 0.1,
    **options: Any,
) -> Any:
    settings = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        **options,
    }
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    data = Dataset.from_list(EXAMPLES) if data is None else data
    run = kind(
        tiny(torch.float32, lora_dropout=dropout),
        args,
        data_collator=collate or padding(),
        train_dataset=data,
        callbacks=callbacks,
    )
    run.batches = []
    return run


def weights(run: Any) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in run.model.named_parameters() if w.requires_grad}
