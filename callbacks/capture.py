"""GradientCapture: one callback that gives a Trainer a store of per-example gradients."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_influence.callbacks.checks import (
    check_apart,
    check_believed,
    check_kind,
    check_label_kinds,
    check_names,
    check_places,
    check_queries,
    check_resumed,
    check_same_queries,
    check_seen,
    check_stream,
    check_trainer,
    warn_of_classes,
    warn_of_prompts,
    warn_of_rates,
)
from hf_influence.callbacks.contexts import keeping_the_model, naming, trainer_of, undisturbed_randomness
from hf_influence.callbacks.during import DuringTraining
from hf_influence.callbacks.packing import check_flat, check_ids, check_packing, known_by, prepared
from hf_influence.callbacks.resumed import drop_earlier, drop_outdated
from hf_influence.callbacks.schedule import During, Schedule, endless
from hf_influence.errors import BadSetting
from hf_influence.gradients.batches import forward_arguments
from hf_influence.gradients.collect import collect_planned
from hf_influence.gradients.compress import Compressor
from hf_influence.gradients.during_training.stream import StreamPlan, is_stream
from hf_influence.gradients.mislabelled import SPLIT, mislabelled
from hf_influence.gradients.own_loss import OwnTask
from hf_influence.gradients.plan import Plan, check_collectable, check_folder
from hf_influence.gradients.processes import by_first, first_process_first, rank
from hf_influence.gradients.sweep import BatchSize
from hf_influence.gradients.taps import Modules
from hf_influence.store import Claim, GradientStore, check_room, check_writable
from hf_influence.task import LABELS, Reduction

logger = logging.getLogger(__name__)


class GradientCapture(TrainerCallback):
    """The gradient of every training (and query) example, at the final weights and on the way there, in a store.

        capture = GradientCapture("runs/sst2", query_dataset=validation)
        Trainer(model=peft_model, ..., callbacks=[capture]).train()
        scores = attribute("runs/sst2", method="datainf")

    What could go wrong is looked at before the first step: trainable parameters without a rule, missing labels, labels
    and tokens that the model lacks, a folder that is taken or cannot be written to, a disk that is too small, queries
    of another kind. Training itself is left alone, to the last bit; should rows fail later, the model is saved in
    `trained-<step>` of the Trainer's output folder.

    At the end the rows are collected through the Trainer's own collator, in evaluation mode, at the weights that
    `trainer.model` has then (the best ones with `load_best_model_at_end`); see `collect` for what a row is.

    With `during`, rows come from the Trainer's own backward passes as well, without a pass of our own. Such a row is
    the gradient of the example's own loss at the weights of its step and under the dropout of its step, whatever the
    Trainer divides the batch's loss by; it carries `step`, `epoch` and `learning_rate`. An epoch (or a step) is a
    parameter point of the store, and query rows are collected at its end: `attribute(path, method, point=2)`. What was
    captured is logged after each epoch (`capture/rows`, `capture/seconds` beside the passes, `capture/lost` to overflow
    of half precision). A run that is resumed goes on with its rows; a capture that it did not have before has those of
    the steps since alone, and warns.

    Iterable datasets: their examples are numbered in the order in which they are first captured, and known again by
    their contents (`rows.stats["hash"]`) or their id. Such a dataset has no rows at the end (at_end=False), and an
    epoch is a pass over it. With `train_dataset` of the same examples, map-style, all is as it is elsewhere.

    Args:
        path: Folder of the store.
        query_dataset: Examples that the training examples are judged by: clean, and like what the model is to do
            well. Tokenised like the training set (an SFTTrainer does it); stored as the split "query". Of more than
            two classes, or where their answers name classes (five examples or more for each different answer, on
            average), they are collected at the end under wrong labels as well ("query-mislabelled"), by which `auto`
            tells how probable wrong labels are.
        during: "epochs" for one point an epoch, "steps" for one a step, `None` for the end alone.
        every: Capture every so many epochs or steps, beginning with the first.
        epochs: Capture these epochs only, counted from 1.
        at_end: Collect at the final weights, as point 0.
        budget: GiB on the disk that the rows may take. Where all would take more, every second, third, … epoch or
            step is captured.
        train_dataset: What to take the rows of, where that is not the dataset that the Trainer holds: with an
            `id_column`, say, that `remove_unused_columns` takes away. Under packing the dataset that the
            SFTTrainer is given, which holds the packed rows alone: the rows are those of `prepared(trainer, dataset)`.
        batch_size: As in `collect`, like all that follow.
        loss_reduction: "mean" or "sum" over an example's labelled tokens.
        task: What the loss of one example is, where the Trainer has another than cross-entropy:
            `label_smoothing(0.1)`, `own_loss(function)`, or a `Task` of yours.
        compress: `dropout(r)`, `gaussian(r)`, `sparse_jl(r)` or `logra(r_in, r_out)`; whole rows without.
        modules: "lora" or "trainable".
        skip: Names of trainable parameters to leave out; `*` stands for anything.
        id_column: Column that names the examples. Where the batches of the training run have it
            (`remove_unused_columns=False`, and a collator that keeps it), it says which example a row is of, instead of
            the example's contents; the model does not see it.
        features: As in `collect`; rows from training steps have none.
        other_prompts: As in `collect`, at the end; by default two, where labels leave prompts out. With queries `auto`
            then tells how probable it is that an answer does not belong to its prompt.
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
        budget: float | None = None,
        train_dataset: Any = None,
        batch_size: BatchSize = "auto",
        loss_reduction: Reduction = "mean",
        task: OwnTask | None = None,
        compress: Compressor | None = None,
        modules: Modules = "lora",
        skip: Sequence[str] = (),
        id_column: str | None = None,
        features: bool = False,
        other_prompts: int | None = None,
        overwrite: bool = False,
    ):
        if query_dataset is not None:
            check_queries(query_dataset)
        self.path = Path(path).expanduser()
        self.query_dataset = query_dataset
        self.train_dataset = train_dataset
        self.at_end = at_end
        self.budget = budget
        self.schedule = Schedule.of(during, every, epochs)
        if self.schedule is None and not at_end:
            raise BadSetting(
                "GradientCapture(during=None, at_end=False) captures nothing: choose at least one of both."
            )
        if other_prompts and not at_end:
            raise BadSetting(
                f"other_prompts={other_prompts} with at_end=False: answers are read after other prompts at the end of "
                "training. Leave one of both out."
            )
        self.settings: dict[str, Any] = {
            "loss_reduction": loss_reduction,
            "task": task,
            "compress": compress,
            "modules": modules,
            "skip": skip,
        }
        self.batch_size = batch_size
        self.id_column = id_column
        self.features = features
        self.other_prompts = other_prompts
        self.overwrite = overwrite

        self._train: Any = None  # as the Trainer prepares them
        self._query: Any = None
        self._contents: tuple[int, dict[str, list[Any]]] = 0, {}
        self._claim: Claim | None = None
        self._during: DuringTraining | None = None
        self._plans: dict[str, Plan | StreamPlan] = {}

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
        trainer = trainer_of(state)
        check_kind(trainer)
        if self.schedule is not None:
            self.schedule.check(state)
        overwrite = self.overwrite
        if self._during is not None:  # an earlier run ended in an error
            self._during.stop()
            overwrite |= args.auto_find_batch_size and self._during.trainer is trainer  # out of memory, and begun anew
            self._during = None
        check_ids(trainer, self.id_column)
        check_flat(trainer)
        if self.train_dataset is None:
            check_places(trainer, self.id_column)
        with undisturbed_randomness():
            self._train = prepared(trainer, self.train_dataset)
            with naming("query"):
                self._query = prepared(trainer, self.query_dataset)
            given = trainer.train_dataset if self.train_dataset is None else self.train_dataset
            check_names(given, self.query_dataset)
            warn_of_classes(given, self.query_dataset)
            codes = known_by(trainer, given)
            self._contents = len(given) if codes else 0, codes
            self._plans = {
                split: self._planned(state, model, split, dataset, {**options, "overwrite": overwrite})
                for split, dataset, options in self._splits(args, trainer, train_dataloader)
            }
            if self.settings["task"] is None:
                check_believed(trainer, self._plans["train"].header.task.get("problem_type"))
            check_label_kinds({split: plan.header.task for split, plan in self._plans.items()})
            warn_of_prompts(self._plans)
            need = {split: plan.size for split, plan in self._plans.items() if isinstance(plan, Plan)}
            at_end = sum(need.values()) * int(self.at_end)
            need.pop(SPLIT.format("query"), None)  # collected at the end alone
            schedule, during = self.schedule, 0
            if schedule is not None:
                if endless(state):
                    steps = state.max_steps * args.gradient_accumulation_steps
                    rows = steps * args.train_batch_size * args.world_size
                    need = {**need, "train": rows * self._plans["train"].header.row_bytes()}
                room = None if self.budget is None else int(self.budget * 2**30) - at_end
                schedule = schedule.within(room, state, need)
                during = schedule.size(state, need)
            check_writable(self.path)
            check_room(self.path, at_end + during)
            logger.info("the gradients will take up to %.2f GiB in %s", (at_end + during) / 2**30, self.path)
            self._claim = claim = by_first(partial(Claim.take, self.path))
            try:
                if state.global_step > 0:
                    by_first(partial(drop_outdated, self.path, state, by_steps=self.schedule is not None))
                if schedule is not None:
                    self._start(trainer, schedule, args, state, model, train_dataloader, overwrite, claim)
            except Exception:
                self._release()
                raise

    def _planned(
        self, state: TrainerState, model: nn.Module, split: str, dataset: Any, options: dict[str, Any]
    ) -> Plan | StreamPlan:
        """How the rows of a split are made; says now what would not work later."""
        resumed = state.global_step > 0
        if split != "train" or not is_stream(dataset):
            collected = self.at_end or split != "train"  # or all its rows come out of the training steps
            options = {**options, "batch_size": self.batch_size if collected else state.train_batch_size}
            with naming(split):
                plan = check_collectable(model, dataset, self.path, split, resumed=resumed, **options)
            self._tell(plan, split)
            return plan
        check_stream(dataset, self.at_end or self.schedule is None, self.budget)
        stream = StreamPlan.of(model, **self.settings)
        check_folder(self.path, stream.header, resumed=resumed, overwrite=options["overwrite"])
        return stream

    def _tell(self, plan: Plan, split: str) -> None:
        """Let the training examples be known by all columns, also those that the Trainer, or `prepared`, takes away."""
        rows, codes = self._contents
        if split == "train" and rows == len(plan.examples):
            # a set that the Trainer holds has all columns of the examples, so these are not hashed again
            plan.examples.contents = codes if self.train_dataset is None else plan.examples.contents | codes

    def _start(
        self,
        trainer: Trainer,
        schedule: Schedule,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        train_dataloader: Any,
        overwrite: bool,
        claim: Claim,
    ) -> None:
        plan = self._plans["train"]
        check_trainer(trainer, args, plan.task, own_task=self.settings["task"] is not None)
        check_apart(model, plan.taps)
        check_seen(trainer, plan.taps)
        check_packing(trainer, self._train)
        warn_of_rates(trainer)
        if state.global_step > 0 and not endless(state):
            check_resumed(state, args, len(train_dataloader))
        with first_process_first():
            store = GradientStore.create(self.path, plan.header, overwrite=overwrite)
            if rank() == 0 and state.global_step == 0:
                store.clear()  # checked above: they are to be replaced
        during = DuringTraining(trainer, plan, store, schedule, self.id_column, claim)
        if state.global_step > 0:
            check_same_queries(store, self._plans)
            self._finish_point(during.resume(state), model, args)
            during.warn_of_missing(state)
        during.start()
        self._during = during

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._during is not None:
            self._during.begin_epoch(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._during is None:
            return
        with keeping_the_model(self._during.trainer):
            if self._during.schedule.during == "steps":
                self._finish_point(self._during.close(), model, args)
            if control.should_save or (control.should_evaluate and args.save_strategy == SaveStrategy.BEST):
                self._during.flush()  # before the checkpoint from which training may be resumed

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._during is not None:
            with keeping_the_model(self._during.trainer):
                self._during.flush()  # a callback after this one may have asked for the checkpoint

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._during is not None:
            with keeping_the_model(self._during.trainer):
                self._finish_point(self._during.close(), model, args)
            self._during.log(control)

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
        trainer = trainer_of(state)
        with keeping_the_model(trainer):
            if self._during is not None:
                self._during.close()
                self._during.stop()
                self._during.warn_of_unreached()
                self._during = None
            self._plans = {}
            if self.at_end:
                self._collect_at_end(args, trainer, model, train_dataloader)
        self._release()

    def _release(self) -> None:
        """The store is free for other runs."""
        claim, self._claim = self._claim, None
        if claim is not None and rank() == 0:
            claim.release()

    def _collect_at_end(
        self, args: TrainingArguments, trainer: Trainer, model: nn.Module, train_dataloader: Any
    ) -> None:
        if self._claim is not None:
            self._claim.check()
        if self.overwrite and self.schedule is None:
            by_first(partial(drop_earlier, self.path))
        for split, dataset, options in self._splits(args, trainer, train_dataloader):
            others = options.pop("other_prompts", 0)
            with naming(split):
                plan = Plan.of(model, dataset, **options)  # anew: the model may be another by now
                self._tell(plan, split)
                collect_planned(
                    model,
                    plan,
                    self.path,
                    split,
                    batch_size=self.batch_size,
                    features=self.features,
                    other_prompts=others,
                    overwrite=self.overwrite,
                    quiet=args.disable_tqdm,
                )

    def _finish_point(self, point: int | None, model: nn.Module, args: TrainingArguments) -> None:
        """Collect the query rows at the weights with which a point ends."""
        plan = self._plans.get("query")
        if point is not None and isinstance(plan, Plan):
            with undisturbed_randomness():
                collect_planned(
                    model, plan, self.path, "query", batch_size=self.batch_size, point=point, quiet=args.disable_tqdm
                )

    def _splits(
        self, args: TrainingArguments, trainer: Trainer, train_dataloader: Any
    ) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        common = {"data_collator": train_dataloader.collate_fn, "remove_unused_columns": args.remove_unused_columns}
        common |= self.settings
        train, own = self._train, {}
        if train is None:  # the Trainer has taken the columns away that its collator does not need
            train, own = train_dataloader.dataset, {"remove_unused_columns": False}
            whole = trainer.train_dataset
            left = set(getattr(train, "column_names", None) or ())
            taken = left <= {*forward_arguments(trainer.model), *LABELS}
            if self.id_column in (getattr(whole, "column_names", None) or ()) and self.id_column not in left and taken:
                train, own = whole, {}
        others = {"other_prompts": self.other_prompts} if self.at_end else {}
        yield "train", train, {**common, **own, **others, "id_column": self.id_column}
        if self._query is None:
            return
        has_ids = self.id_column in getattr(self._query, "column_names", ())
        yield "query", self._query, {**common, **others, "id_column": self.id_column if has_ids else None}
        if not self.at_end or self.settings["task"]:
            return
        with naming("query"):
            wrong = mislabelled(trainer.model, self._query, common["data_collator"], args.remove_unused_columns)
        if wrong:
            yield SPLIT.format("query"), wrong[0], {**common, "data_collator": wrong[1], "id_column": None}
