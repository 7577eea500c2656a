"""CurateEachEpoch: training that leaves out, or weighs, examples by the scores of the epochs before."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_influence.attribution.attribute import attribute
from hf_influence.attribution.method import class_of, make_method
from hf_influence.attribution.over_points import OverPoints
from hf_influence.callbacks.capture import GradientCapture
from hf_influence.callbacks.contexts import log, trainer_of
from hf_influence.callbacks.draws import Draws, drawn_through
from hf_influence.callbacks.rule_checks import (
    NOT_WHILE_TRAINING,
    check_actions,
    check_decides,
    check_method,
    check_rule,
)
from hf_influence.callbacks.schedule import chosen_epochs
from hf_influence.errors import BadSetting, StoreMismatch
from hf_influence.filter.decision import Decision
from hf_influence.filter.rule import Decides
from hf_influence.filter.thresholds import doubtful
from hf_influence.filter.whole import decide_on_scored
from hf_influence.gradients.processes import first_process_first, rank, wait_for_all
from hf_influence.scores import Scores
from hf_influence.store import GradientStore

logger = logging.getLogger(__name__)


class CurateEachEpoch(TrainerCallback):
    """After each epoch the examples are scored by what was captured, and the next one trains on the better part.

        capture = GradientCapture("runs/mine", clean, during="epochs")
        curate = CurateEachEpoch(capture, DatasetFilter(drop=0.1), "loss_mean", after=2)
        Trainer(model=peft_model, ..., callbacks=[capture, curate]).train()
        print(curate.decisions[3].explain(17))

    What changes is which examples the batches are made of. An epoch keeps its number of steps, so `max_steps`, the
    learning rate schedule, evaluation, saving and resuming are those of the plain run: with n of N examples kept each
    comes once or twice, N/n times on average (`Draws`). With weights an example comes as often as its weight says, w
    times on average, so a plain Trainer will do. To spend fewer steps, set fewer epochs. Until the first decision
    training is the plain one, to the last bit.

    A decision is about all examples, each time: a share is a share of the whole set and does not add up over the
    epochs. A method that looks at one point scores the examples of the epoch that has ended; those that were left out
    keep the score they had last, and come back once it is no longer among the lowest (losses fall while training goes
    on, so by `loss` they hardly do; a cosine has no such drift). A method over several points (`loss_mean`, `aum`,
    `tracin`, …) takes all epochs up to now, and of each example those that it took part in. An example that comes twice
    has the row of its first time; of examples with equal contents, any may have the row.

    An example without a score (its gradient overflowed, `dataloader_drop_last`) stays until it has one.

    Decisions and scores are kept in the folder of the store, `curation/after-0002.json` and `.safetensors`, so that a
    resumed run goes on with them. Logged are `curate/kept`, `curate/dropped` and `curate/returned` (of those dropped
    before), with the epoch that has ended.

    Args:
        capture: What takes the rows, with `during="epochs"`; it must be among the Trainer's callbacks as well. Where
            it skips epochs (`every`, `epochs`, `budget`), the decision before goes on.
        rule: What decides: `DatasetFilter`, `Reweight`, `Prune`, or an object with `decide(dataset, scores)`. It is
            tried out on random scores before the first step, lest a missing column end the run after an epoch.
        method: As in `attribute`, any that needs no more than rows during training.
        after: The first decision is made after so many epochs.
        epochs: Decide after these epochs only, counted from 1.
        **settings: Of the method. `labels` and `groups` are those of the whole training set.

    Attributes:
        decisions: Epoch after which it was made -> decision about the Trainer's training set.

    Raises:
        BadSetting: When it is made or training starts: what cannot work, and why.

    See also: curate_and_retrain (train, score, drop, and train anew from fresh weights: the protocol of the papers).
    """

    def __init__(
        self,
        capture: GradientCapture,
        rule: Decides,
        method: str = "auto",
        *,
        after: int = 1,
        epochs: Sequence[int] | None = None,
        **settings: Any,
    ):
        check_rule(rule)
        drop = getattr(rule, "drop", None)
        if getattr(rule, "how", None) == "posterior" or drop is doubtful or drop == "doubtful":
            raise BadSetting(
                "how='posterior' and drop=\"doubtful\" go by probabilities, and whether the queries tell any is not "
                "known before an epoch has ended. Use another rule here, or curate between two runs "
                "(curate_and_retrain)."
            )
        make_method(method, settings)
        if capture.schedule is None or capture.schedule.during != "epochs":
            raise BadSetting(
                "the decision after an epoch is made by the rows of that epoch, and this capture takes none: "
                'GradientCapture(…, during="epochs").'
            )
        check_method(method, settings, capture, NOT_WHILE_TRAINING, "curate between two runs (curate_and_retrain)")
        if "points" in settings:
            raise BadSetting("points are chosen after each epoch: all up to then. Leave points=… out.")
        if not isinstance(after, int) or after < 1 or (epochs is not None and after != 1):
            raise BadSetting(
                f"after={after!r}, epochs={epochs!r}: give after=… (from 1) or the epochs (counted from 1), not both."
            )
        self.capture = capture
        self.rule = rule
        self.method = method
        self.settings = settings
        self.after = after
        self.epochs = chosen_epochs(epochs)
        self.decisions: dict[int, Decision] = {}

        self._dataset: Dataset | None = None
        self._draws: Draws | None = None
        self._ended: int | None = None

    @property
    def folder(self) -> Path:
        """Where decisions and scores are kept."""
        return self.capture.path / "curation"

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        train_dataloader: Any,
        **kwargs: Any,
    ) -> None:
        trainer = trainer_of(state)
        first = self.after if self.epochs is None else min(self.epochs)
        if first >= state.num_train_epochs:
            raise BadSetting(
                f"the first decision would be made after epoch {first}, and training has {state.num_train_epochs}: "
                "there is none left to train by it. Decide earlier, after=…, or train longer."
            )
        self._dataset = self._check(trainer, train_dataloader)
        seed = args.seed if args.data_seed is None else args.data_seed
        self._draws = drawn_through(train_dataloader, seed)
        self._ended = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Not at the end of the epoch before: by now the capture has closed it, whichever callback comes first.
        assert self._draws is not None
        # counted, as in the capture: a callback may end an epoch before `state.epoch` has a whole number
        first = self._ended is None
        self._ended = ended = int(state.epoch + 1e-6) if self._ended is None else self._ended + 1
        if first:
            self._take_up(ended)
        if self._due(ended):
            started = time.perf_counter()
            self._decide(ended)
            self._log(trainer_of(state), control, ended, time.perf_counter() - started)
        weights = self.decisions[max(self.decisions)] if self.decisions else None
        self._draws.weigh(None if weights is None else weights_of(weights), ended + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._dataset = self._draws = None

    def _check(self, trainer: Trainer, loader: Any) -> Dataset:
        """The training set, if all is as it must be."""
        dataset = trainer.train_dataset
        if all(callback is not self.capture for callback in trainer.callback_handler.callbacks):
            raise BadSetting(
                "the capture that decisions are made by is not among the Trainer's callbacks: callbacks=[capture, …]."
            )
        if not isinstance(dataset, Dataset):
            raise BadSetting(
                f"the training set is a {type(dataset).__name__}: the examples that are left out are known by their "
                "places in a datasets.Dataset, and a stream has none. Make one (Dataset.from_list, "
                "Dataset.from_generator), or filter the stream between two runs."
            )
        if getattr(trainer.args, "packing", False):
            raise BadSetting(
                "packing=True: a row that is trained on holds several examples, so one of them cannot be left out of "
                "it. Set packing=False (padding_free=True packs each batch when it is made, which is fine), or curate "
                "between two runs (curate_and_retrain)."
            )
        if self.capture.train_dataset is not None or len(loader.dataset) != len(dataset):
            raise BadSetting(
                "the capture has a train_dataset of its own, and which of its examples is which of those that the "
                "Trainer draws is not known. Give the Trainer that dataset, and leave it out of the capture."
            )
        check_decides(self.rule, dataset, self.method, self.settings, self.capture)
        return dataset

    def _take_up(self, ended: int) -> None:
        """The decisions of the run that is resumed; those after the step where it goes on are forgotten."""
        with first_process_first():
            files = {int(file.stem.removeprefix("after-")): file for file in self.folder.glob("after-*.json")}
            if rank() == 0:
                for epoch in [epoch for epoch in files if epoch > ended]:
                    files[epoch].unlink()
                    self._scores_file(epoch).unlink(missing_ok=True)
            self.decisions = {epoch: self._read(epoch) for epoch in sorted(files) if epoch <= ended}

    def _due(self, ended: int) -> bool:
        if ended in self.decisions:
            return False
        if self.epochs is not None:
            return ended in self.epochs
        return ended >= self.after

    def _decide(self, ended: int) -> None:
        assert self._dataset is not None
        if rank() == 0 and (scores := self._scores(ended)) is not None:
            decision = decide_on_scored(self.rule, self._dataset, scores)
            check_actions(decision)
            scores.save(self._scores_file(ended))
            decision.save(self._file(ended))
        wait_for_all()
        if self._file(ended).is_file():
            self.decisions[ended] = self._read(ended)

    def _scores(self, ended: int) -> Scores | None:
        """Of all examples that were seen up to now; `None` if nothing was captured since the last decision."""
        store = GradientStore.open(self.capture.path)
        points = [point for point in store.points("weights") if 0 < point <= ended and "train" in store.splits(point)]
        last = max(self.decisions, default=0)
        if not points or points[-1] <= last:
            return None
        if issubclass(class_of(self.method), OverPoints):
            return attribute(store, self.method, points=points, **self.settings)
        scores = attribute(store, self.method, point=points[-1], **self.settings)
        return scores if last == 0 else with_earlier(scores, Scores.load(self._scores_file(last)))

    def _log(self, trainer: Trainer, control: TrainerControl, ended: int, seconds: float) -> None:
        """Say through the Trainer what was decided."""
        if ended not in self.decisions:
            return
        decision = self.decisions[ended]
        earlier = self.decisions.get(max((epoch for epoch in self.decisions if epoch < ended), default=0))
        returned = set(decision.kept) - set(decision.kept if earlier is None else earlier.kept)
        numbers = {"kept": decision.after, "dropped": decision.before - decision.after, "returned": len(returned)}
        logger.info("after epoch %d (%.1f s): %s", ended, seconds, numbers)
        log(trainer, control, {f"curate/{name}": value for name, value in numbers.items()})

    def _read(self, epoch: int) -> Decision:
        decision = Decision.load(self._file(epoch))
        assert self._dataset is not None
        if decision.before != len(self._dataset):
            raise StoreMismatch(
                f"{self._file(epoch)} is a decision about {decision.before} examples, and the training set has "
                f"{len(self._dataset)}: it belongs to another run. Resume with the same training set, or train into "
                "another folder."
            )
        return decision

    def _file(self, epoch: int) -> Path:
        return self.folder / f"after-{epoch:04d}.json"

    def _scores_file(self, epoch: int) -> Path:
        return self.folder / f"after-{epoch:04d}.safetensors"


def weights_of(decision: Decision) -> list[float]:
    """How often each example of the dataset is to come: 0 for the dropped ones, 1 or its weight for the others."""
    weights = decision.writes[0].new if "weight" in decision.actions else [1.0] * decision.before
    return [0.0 if action == "drop" else weight for action, weight in zip(decision.actions, weights, strict=True)]


def with_earlier(scores: Scores, earlier: Scores) -> Scores:
    """The scores, and those of examples that only the earlier ones have."""
    known = set(scores.ids)
    at = [row for row, name in enumerate(earlier.ids) if name not in known]
    ids: Any = [*scores.ids, *(earlier.ids[row] for row in at)]
    return replace(scores, values=torch.cat([scores.values, earlier.values[at].to(scores.values)]), ids=ids)
