"""Rows from the training steps of a running Trainer, one parameter point for each chosen epoch or step."""

from __future__ import annotations

import logging
import math
import reprlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState

from hf_influence.callbacks.checks import chooses_rates
from hf_influence.callbacks.contexts import keeping_the_model, log
from hf_influence.callbacks.resumed import captured, drop_open, drop_queries, forget_after
from hf_influence.callbacks.schedule import Schedule, endless
from hf_influence.errors import BadExample, BadSetting, InfluenceError, StoreMismatch
from hf_influence.gradients.batches import forward_arguments, on_device
from hf_influence.gradients.during_training.positions import Positions
from hf_influence.gradients.during_training.stream import Sightings, StreamPlan
from hf_influence.gradients.during_training.training import Caught, TrainingWatch
from hf_influence.gradients.plan import Plan
from hf_influence.gradients.processes import by_first, first_process_first, rank, wait_for_all
from hf_influence.store import Claim, GradientStore, RowWriter
from hf_influence.task import CausalLM

logger = logging.getLogger(__name__)

ALL = sys.maxsize
"""Of the rows of a shard."""


class DuringTraining:
    """Stands around `Trainer.training_step` while the callback says so.

    The hooks are on the model only while a captured step runs, so none is left behind however training ends.
    """

    def __init__(
        self,
        trainer: Trainer,
        plan: Plan | StreamPlan,
        store: GradientStore,
        schedule: Schedule,
        id_column: str | None,
        claim: Claim,
    ):
        self.trainer = trainer
        self.store = store
        self.schedule = schedule
        self.id_column = id_column
        self.claim = claim
        self.watch = TrainingWatch(trainer.model, plan.task, plan.taps, plan.compress)
        self.positions: Positions | Sightings
        if isinstance(plan, StreamPlan):
            self.positions = Sightings(id_column)
        else:
            self.positions = Positions(plan.examples, isinstance(plan.task, CausalLM))
        if self.positions.duplicates:
            logger.warning("%d training examples are equal to earlier ones", self.positions.duplicates)
        self._arguments = frozenset(forward_arguments(trainer.model))
        self.rows = self.lost = 0
        self.seconds = 0.0
        self.epoch = 0
        self._point: int | None = None
        self._writer: RowWriter | None = None
        self._state = trainer.state
        self._before = vars(trainer).get("training_step")
        self._plain_step: Callable[..., Tensor] = trainer.training_step

    def start(self) -> None:
        """From now on the steps are watched."""
        self.trainer.training_step = self._training_step

    def begin_epoch(self, state: TrainerState) -> None:
        """Another pass over the data begins."""
        # counted, as a callback may end one before `state.epoch` has a whole number
        self.epoch = self.epoch + 1 if self.epoch or endless(state) else int(state.epoch + 1e-6) + 1

    def _training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.trainer.state is not self._state:  # of another run: this one ended in an error, and nobody took it off
            return self._plain_step(model, inputs, *args, **kwargs)
        names = None
        if self.id_column is not None and self.id_column in inputs:  # no model takes it
            names = list(inputs[self.id_column])
            names = [name.item() if isinstance(name, Tensor) else name for name in names]
            inputs = {name: value for name, value in inputs.items() if name != self.id_column}
        step = self.trainer.state.global_step + 1
        point = self.schedule.point(self.epoch, step)
        if point is None:
            return self._plain_step(model, inputs, *args, **kwargs)
        if isinstance(self.positions, Sightings) and names is None:
            self.positions.check_inputs(inputs, self._arguments)
        with keeping_the_model(self.trainer, InfluenceError):
            return self._watched_step(point, step, names, model, inputs, *args, **kwargs)

    def _watched_step(
        self,
        point: int,
        step: int,
        names: list[Any] | None,
        model: nn.Module,
        inputs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        self.open(point)
        started = time.perf_counter()
        with self.watch.step(on_device(inputs, self.trainer.args.device)) as caught:
            ready = time.perf_counter()
            loss = self._plain_step(model, inputs, *args, **kwargs)
            done = time.perf_counter()
        self._keep(caught, step, names)
        self.seconds += time.perf_counter() - done + ready - started
        return loss

    def _keep(self, caught: Caught, step: int, names: list[Any] | None) -> None:
        assert self._writer is not None
        codes = caught.stats["hash"].tolist()
        if names is not None and len(names) != len(codes):
            raise BadSetting(
                f"a training batch has {len(names)} values in the column {self.id_column!r} for {len(codes)} examples. "
                "Let the data_collator give one for each example, or drop the column."
            )
        found = self.positions.find(codes, self._writer.done, names)
        good = (torch.isfinite(caught.stats["loss"]) & torch.isfinite(caught.stats["grad_norm"])).tolist()
        if not all(good):
            self._not_finite(caught, found, good.index(False))
        seen = (~caught.missing).tolist()
        at = [row for row, position in enumerate(found) if position is not None and good[row] and seen[row]]
        if not at:
            return
        rows, stats = caught.rows, caught.stats
        if len(at) < len(found):
            rows = {name: values[at] for name, values in rows.items()}
            stats = {name: values[at] for name, values in stats.items()}
        stats |= {"step": torch.full((len(at),), step), "epoch": torch.full((len(at),), self.epoch)}
        group = self.trainer.optimizer.param_groups[0]
        if not chooses_rates(group):
            stats["learning_rate"] = torch.full((len(at),), float(group["lr"]), dtype=torch.float64)
        self._writer.append([position for row in at if (position := found[row]) is not None], rows, stats)
        self.rows += len(at)

    def _not_finite(self, caught: Caught, found: list[int | None], row: int) -> None:
        if self.trainer.args.fp16:  # the loss scale is too high now and then; the optimizer skips such a step as well
            self.lost += 1
            return
        assert self._writer is not None
        self._writer.flush()
        position, ids = found[row], self.positions.ids
        name = position if ids is None or position is None else ids[position]
        raise BadExample(
            f"training example {name!r} has loss {caught.stats['loss'][row].item():g} and a gradient that is not "
            "finite. Look at its text and labels, and at the learning rate if many are so; the rows before it are kept."
        )

    def open(self, point: int) -> None:
        """Let the rows go to this point from now on."""
        if self._point == point:
            return
        self.close()
        self.claim.check()
        with first_process_first():
            if rank() == 0:
                drop_queries(self.store, point)
            self._writer = self._writer_of(point)
            if self.positions.n is None and self.positions.ids is not None:
                self._writer.name(self.positions.ids)
            self._writer.reopen()
            self._writer.before_writing = self.claim.check
        self._point = point

    def _writer_of(self, point: int) -> RowWriter:
        examples = self.positions
        return self.store.writer(
            "train",
            adapter=None,
            dataset=examples.dataset,
            n=examples.n,
            ids=examples.ids,
            id_column=examples.id_column,
            contents=examples.contents,
            classes=examples.classes,
            point=point,
            rank=rank(),
        )

    def flush(self) -> None:
        """What has been captured is on the disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> int | None:
        """The point is complete; its number."""
        point, writer = self._point, self._writer
        if writer is not None:
            self._complete(writer)
        self._point = self._writer = None
        return point

    def _complete(self, writer: RowWriter) -> None:
        self.claim.check()
        writer.flush()
        wait_for_all()
        if rank() == 0:
            writer.gather(self.positions.copies)
            writer.close()
        wait_for_all()

    def resume(self, state: TrainerState) -> int | None:
        """Forget what an earlier run captured after the step where training goes on.

        Returns:
            A point that ends at this very step: the earlier run may have died before it was complete.
        """
        points = by_first(partial(self._forget_after, state.global_step))
        counted = endless(state) and self.schedule.during == "epochs"
        last = points[-1] if counted and points else None
        ended = None if counted else self.schedule.ended(state)
        begun = last if counted else self.schedule.begun(state)
        going_on = {
            point for point in (ended, begun) if point is not None and self.schedule.point(point, point) == point
        }
        by_first(partial(drop_open, self.store, state.global_step, but=going_on))
        if isinstance(self.positions, Sightings):
            self.positions.restore(self.store)
            wait_for_all()  # until all have read what process 0 goes on to change
        if last is not None:
            self.epoch = last
            if self.trainer.args.ignore_data_skip:  # another pass begins
                ended = last
            else:
                self.epoch -= 1  # the last one goes on
                if last in going_on:
                    self.open(last)
        if ended not in going_on or ended not in points:
            return None
        self._complete(self._writer_of(ended))
        return ended

    def _forget_after(self, step: int) -> list[int]:
        """Of all points; those that are left."""
        points = captured(self.store)
        self._check_numbering(points)
        for point in points:
            forget_after(self.store, point, step)
        return captured(self.store)

    def warn_of_missing(self, state: TrainerState) -> None:
        """Say which epochs or steps before the one where training goes on have no rows, if the schedule has them."""
        begun = state.global_step
        if self.schedule.during == "epochs":
            begun = 1 if endless(state) else math.ceil((state.epoch or 0) - 1e-6)
        points = captured(self.store)
        missing = [n for n in range(1, begun + 1) if self.schedule.point(n, n) is not None and n not in points]
        if missing:
            logger.warning(
                "training goes on at step %d, and %s has no rows of the %s %s before: what goes over points of "
                "training knows the later ones alone. For all of them, train from the beginning",
                state.global_step,
                self.store.path,
                self.schedule.during,
                reprlib.repr(missing),
            )

    def warn_of_unreached(self) -> None:
        """Say which of the chosen epochs training did not come to, and which weights no captured step has used."""
        chosen = self.schedule.epochs or ()
        points = captured(self.store) if chosen else ()  # which opens a file of each
        if late := [epoch for epoch in chosen if epoch not in points]:
            logger.warning("training has ended, and %s has no rows of the epochs %s", self.store.path, late)
        catcher = self.watch.catcher
        unused = [name for name in catcher.shapes if name not in catcher.reached]
        if self.rows and unused:
            logger.warning(
                "no captured step has used %d parameter(s) (first: %s), so their columns are 0. Leave them out with "
                "skip=[…]",
                len(unused),
                unused[0],
            )

    def _check_numbering(self, points: Sequence[int]) -> None:
        """Refuse points that an earlier run has numbered by steps where this one does by epochs, or the reverse.

        Raises:
            StoreMismatch: Rows of two epochs would meet in one point.
        """
        kind = self.schedule.during.removesuffix("s")
        for point in points:
            writer = self._writer_of(point)
            for part in (writer, *writer.parts()):
                odd = [number for number in part.some(kind, ALL).values() if number != point]
                if odd:
                    raise StoreMismatch(
                        f"{self.store.path} holds rows of {kind} {odd[0]} at point {point}: the run that is resumed "
                        f"has captured with another setting than during={self.schedule.during!r}, and its points would "
                        "be mixed up with those of this run. Resume with its setting, or capture into another folder."
                    )

    def log(self, control: TrainerControl) -> None:
        """Say through the Trainer what has been captured."""
        numbers = {"capture/rows": self.rows, "capture/seconds": round(self.seconds, 3), "capture/lost": self.lost}
        log(self.trainer, control, numbers)

    def stop(self) -> None:
        """The Trainer is as it was, and nothing more is written."""
        own = vars(self.trainer)
        if own.get("training_step") == self._training_step:  # or another capture stands around this one
            del own["training_step"]
            if self._before is not None and not isinstance(getattr(self._before, "__self__", None), DuringTraining):
                own["training_step"] = self._before
        if self._writer is not None:
            self._writer.abandon()
            self._point = self._writer = None
