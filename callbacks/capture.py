"""GradientCapture: one callback that gives a Trainer a store of per-example gradients."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_influence.errors import BadSetting
from hf_influence.gradients.collect import check_collectable, collect
from hf_influence.gradients.compress import Compressor
from hf_influence.gradients.sweep import BatchSize
from hf_influence.gradients.taps import Modules
from hf_influence.store import check_room
from hf_influence.task import Reduction

logger = logging.getLogger(__name__)


class GradientCapture(TrainerCallback):
    """The gradient of every training (and query) example at the final weights, in a store.

        capture = GradientCapture("runs/sst2", query_dataset=validation)
        Trainer(model=peft_model, ..., callbacks=[capture]).train()
        scores = attribute("runs/sst2", method="datainf")

    What could go wrong at the end is looked at before the first step: trainable parameters without a rule, a collator
    that mixes examples, missing labels, a folder that is taken, a disk that is too small. Training itself is left
    alone. At its end the rows are collected through the Trainer's own collator, in evaluation mode, at the weights
    that `trainer.model` has then (the best ones with `load_best_model_at_end`); see `collect` for what a row is.

    Args:
        path: Folder of the store.
        query_dataset: Examples that the training examples are judged by: clean, and like what the model is to do
            well. Tokenised like the training set; stored as the split "query".
        train_dataset: What to take the rows of, where that is not the dataset that the Trainer holds: with an
            `id_column`, say, that `remove_unused_columns` takes away.
        batch_size: As in `collect`, like all that follow.
        loss_reduction: "mean" or "sum" over an example's labelled tokens.
        compress: `dropout(r)` or `gaussian(r)`; whole rows without.
        modules: "lora" or "trainable".
        skip: Names of trainable parameters to leave out; `*` stands for anything.
        id_column: Column that names the examples.
        overwrite: Replace rows of an earlier training run in the same folder.

    Attributes:
        path: The folder, for `attribute(capture.path, ...)`.
    """

    def __init__(
        self,
        path: str | Path,
        query_dataset: Any = None,
        *,
        train_dataset: Any = None,
        batch_size: BatchSize = "auto",
        loss_reduction: Reduction = "mean",
        compress: Compressor | None = None,
        modules: Modules = "lora",
        skip: Sequence[str] = (),
        id_column: str | None = None,
        overwrite: bool = False,
    ):
        self.path = Path(path)
        self.query_dataset = query_dataset
        self.train_dataset = train_dataset
        self.settings: dict[str, Any] = {
            "loss_reduction": loss_reduction,
            "compress": compress,
            "modules": modules,
            "skip": skip,
            "overwrite": overwrite,
        }
        self.batch_size = batch_size
        self.id_column = id_column

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: Any,
        **kwargs: Any,
    ) -> None:
        if args.world_size > 1 or args.fsdp or args.deepspeed:
            raise BadSetting(
                f"GradientCapture runs in one process, this is one of {args.world_size} (or sharded by FSDP or "
                "DeepSpeed). Train without it, then call collect(model, dataset, path) in one process."
            )
        with _undisturbed_randomness():
            size = 0
            for split, dataset, options in self._splits(args, train_dataloader):
                size += check_collectable(model, dataset, self.path, split, resumed=state.global_step > 0, **options)
        check_room(self.path, size)
        logger.info("the gradients will take %.2f GiB in %s", size / 2**30, self.path)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: Any,
        **kwargs: Any,
    ) -> None:
        for split, dataset, options in self._splits(args, train_dataloader):
            collect(model, dataset, self.path, split, batch_size=self.batch_size, **options)

    def _splits(self, args: TrainingArguments, train_dataloader: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        common = {"data_collator": train_dataloader.collate_fn, "remove_unused_columns": args.remove_unused_columns}
        common |= self.settings
        train = train_dataloader.dataset if self.train_dataset is None else self.train_dataset
        yield "train", train, {**common, "id_column": self.id_column}
        if self.query_dataset is not None:
            has_ids = self.id_column in getattr(self.query_dataset, "column_names", ())
            yield "query", self.query_dataset, {**common, "id_column": self.id_column if has_ids else None}


@contextmanager
def _undisturbed_randomness() -> Iterator[None]:
    """Trying out a collator that draws random numbers must not move the training run."""
    python, numpy_ = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_)
