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
from transformers.trainer_utils import SaveStrategy

from hf_influence.callbacks.during import During, DuringTraining, Schedule, check_trainer, trainer_of
from hf_influence.errors import BadSetting
from hf_influence.gradients.collect import Plan, check_collectable, collect
from hf_influence.gradients.compress import Compressor
from hf_influence.gradients.sweep import BatchSize
from hf_influence.gradients.taps import Modules
from hf_influence.store import GradientStore, check_room
from hf_influence.task import Reduction

logger = logging.getLogger(__name__)


class GradientCapture(TrainerCallback):
    """The gradient of every training (and query) example, at the final weights and on the way there, in a store.

        capture = GradientCapture("runs/sst2", query_dataset=validation)
        Trainer(model=peft_model, ..., callbacks=[capture]).train()
        scores = attribute("runs/sst2", method="datainf")

    What could go wrong is looked at before the first step: trainable parameters without a rule, missing labels, a
    folder that is taken, a disk that is too small. Training itself is left alone, to the last bit.

    At the end the rows are collected through the Trainer's own collator, in evaluation mode, at the weights that
    `trainer.model` has then (the best ones with `load_best_model_at_end`); see `collect` for what a row is.

    With `during`, rows come from the Trainer's own backward passes as well, without a pass of our own. Such a row is
    the gradient of the example's own loss at the weights of its step and under the dropout of its step, whatever the
    Trainer divides the batch's loss by; it carries `step`, `epoch` and `learning_rate`. An epoch (or a step) is a
    parameter point of the store, and query rows are collected at its end: `attribute(path, method, point=2)`.

    Args:
        path: Folder of the store.
        query_dataset: Examples that the training examples are judged by: clean, and like what the model is to do
            well. Tokenised like the training set; stored as the split "query".
        during: "epochs" for one point an epoch, "steps" for one a step, `None` for the end alone.
        every: Capture every so many epochs or steps, beginning with the first.
        epochs: Capture these epochs only, counted from 1.
        at_end: Collect at the final weights, as point 0.
        train_dataset: What to take the rows of, where that is not the dataset that the Trainer holds: with an
            `id_column`, say, that `remove_unused_columns` takes away, or unpacked.
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
        during: During | None = None,
        every: int = 1,
        epochs: Sequence[int] | None = None,
        at_end: bool = True,
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
        self.at_end = at_end
        self.schedule = Schedule.of(during, every, epochs)
        if self.schedule is None and not at_end:
            raise BadSetting(
                "GradientCapture(during=None, at_end=False) captures nothing: choose at least one of both."
            )
        self.settings: dict[str, Any] = {
            "loss_reduction": loss_reduction,
            "compress": compress,
            "modules": modules,
            "skip": skip,
        }
        self.batch_size = batch_size
        self.id_column = id_column
        self.overwrite = overwrite

        self._during: DuringTraining | None = None

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
        resumed = state.global_step > 0
        if self._during is not None:  # an earlier run ended in an error
            self._during.stop()
            self._during = None
        with _undisturbed_randomness():
            size = 0
            for split, dataset, options in self._splits(args, train_dataloader):
                need = check_collectable(
                    model, dataset, self.path, split, resumed=resumed, overwrite=self.overwrite, **options
                )
                copies = 0 if self.schedule is None else self.schedule.copies(state, split)
                size += need * (copies + int(self.at_end))
            check_room(self.path, size)
            logger.info("the gradients will take up to %.2f GiB in %s", size / 2**30, self.path)
            if self.schedule is not None:
                self._start(self.schedule, args, state, model, train_dataloader)

    def _start(
        self, schedule: Schedule, args: TrainingArguments, state: TrainerState, model: nn.Module, train_dataloader: Any
    ) -> None:
        trainer = trainer_of(state)
        check_trainer(trainer, args)
        _, dataset, options = next(self._splits(args, train_dataloader))
        plan = Plan.of(model, dataset, **options)
        store = GradientStore.create(self.path, plan.header, overwrite=self.overwrite)
        if state.global_step == 0 and self.overwrite:
            for point in store.points():
                store.drop(point)
        if 0 < state.global_step < state.max_steps:
            store.drop(0)  # the end comes once more
        self._during = during = DuringTraining(trainer, plan, store, schedule, self.settings["compress"])
        if state.global_step > 0:
            self._finish_point(args, model, train_dataloader, during.resume(state))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._during is not None:
            self._during.epoch = int(state.epoch + 1e-6) + 1

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: Any,
        **kwargs: Any,
    ) -> None:
        if self._during is None:
            return
        if self._during.schedule.during == "steps":
            self._finish_point(args, model, train_dataloader, self._during.close())
        if control.should_save or (control.should_evaluate and args.save_strategy == SaveStrategy.BEST):
            self._during.flush()  # before the checkpoint from which training may be resumed

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: Any,
        **kwargs: Any,
    ) -> None:
        if self._during is not None:
            self._finish_point(args, model, train_dataloader, self._during.close())

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
        if self._during is not None:
            self._during.close()
            self._during.stop()
            self._during = None
        if self.at_end:
            for split, dataset, options in self._splits(args, train_dataloader):
                collect(
                    model,
                    dataset,
                    self.path,
                    split,
                    batch_size=self.batch_size,
                    overwrite=self.overwrite,
                    **options,
                )

    def _finish_point(
        self, args: TrainingArguments, model: nn.Module, train_dataloader: Any, point: int | None
    ) -> None:
        """Collect the query rows at the weights with which a point ends."""
        if point is None:
            return
        with _undisturbed_randomness():
            for split, dataset, options in self._splits(args, train_dataloader):
                if split != "train":
                    collect(model, dataset, self.path, split, batch_size=self.batch_size, point=point, **options)

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
