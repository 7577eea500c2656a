"""Which epochs or steps of a training run are captured."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

from transformers import TrainerState

from hf_influence.errors import BadSetting, StoreError

logger = logging.getLogger(__name__)

During = Literal["epochs", "steps"]


@dataclass(frozen=True)
class Schedule:
    """Which part of a training run is captured, and under which point number."""

    during: During
    every: int
    epochs: tuple[int, ...] | None

    @classmethod
    def of(cls, during: During | None, every: int, epochs: Sequence[int] | None) -> Schedule | None:
        """From the settings of the callback.

        Raises:
            BadSetting: One of them makes no sense.
        """
        if during is None:
            if every != 1 or epochs is not None:
                raise BadSetting(f"every={every} and epochs={epochs} choose among rows during training: set during=….")
            return None
        if during not in ("epochs", "steps"):
            raise BadSetting(f"during={during!r}: choose 'epochs' (one point an epoch), 'steps' or None.")
        if not isinstance(every, int) or every < 1:
            raise BadSetting(f"every={every!r}: pass a whole number, at least 1.")
        if epochs is not None and (during != "epochs" or every != 1):
            raise BadSetting(f"epochs={epochs!r} goes with during='epochs' and every=1.")
        return cls(during, every, chosen_epochs(epochs))

    def check(self, state: TrainerState) -> None:
        """Refuse epochs that training does not have; of data without a length nobody knows how many that are.

        Raises:
            BadSetting: Says how many it has.
        """
        if self.epochs is None or endless(state):
            return
        if max(self.epochs) > math.ceil(state.num_train_epochs):
            raise BadSetting(
                f"epochs={list(self.epochs)} and training has {state.num_train_epochs}, so of epoch {max(self.epochs)} "
                "there would be no rows. Choose epochs that are trained, counted from 1, or train longer."
            )

    def point(self, epoch: int, step: int) -> int | None:
        """The point of a step, `None` if it is not captured.

        Args:
            epoch: From 1.
            step: Of the optimizer, from 1.
        """
        if self.epochs is not None:
            return epoch if epoch in self.epochs else None
        number = epoch if self.during == "epochs" else step
        return number if (number - 1) % self.every == 0 else None

    def ended(self, state: TrainerState) -> int | None:
        """The point that ends where training stands, if one does."""
        epoch = round(state.epoch or 0)
        if self.during == "epochs" and abs((state.epoch or 0) - epoch) > 1e-6:
            return None
        return self.point(epoch, state.global_step)

    def begun(self, state: TrainerState) -> int | None:
        """The epoch in the middle of which training stands, if it is captured."""
        return self.point(int((state.epoch or 0) + 1e-6) + 1, 0) if self.during == "epochs" else None

    def size(self, state: TrainerState, need: Mapping[str, int]) -> int:
        """Bytes that will be written at most.

        Args:
            state: Of the Trainer, for the length of the run.
            need: Split -> bytes for a row of each of its examples; without a length, "train" -> for all steps.
        """
        if endless(state):
            points = 1 if self.during == "epochs" else math.ceil(state.max_steps / self.every)
            return sum(size * (1 if split == "train" else points) for split, size in need.items())
        epochs = math.ceil(state.num_train_epochs)
        if self.during == "epochs":
            return sum(need.values()) * sum(self.point(epoch, 0) is not None for epoch in range(1, epochs + 1))
        steps = math.ceil(state.max_steps / self.every)
        return sum(
            size * (math.ceil(epochs / self.every) if split == "train" else steps) for split, size in need.items()
        )

    def within(self, room: int | None, state: TrainerState, need: Mapping[str, int]) -> Schedule:
        """This schedule, or one that captures less often and takes at most `room` bytes.

        Raises:
            StoreError: One point alone takes more, or the epochs were chosen one by one.
        """
        if room is None or self.size(state, need) <= room:
            return self
        most = math.ceil(state.num_train_epochs) if self.during == "epochs" else state.max_steps
        for every in range(self.every + 1, most + 1):
            sparser = replace(self, every=every)
            if self.epochs is None and sparser.size(state, need) <= room:
                logger.warning("the budget has room for every %d. of the %s only", every, self.during)
                return sparser
        raise StoreError(
            f"the rows during training need {self.size(state, need) / 2**30:.2f} GiB, the budget leaves "
            f"{max(0, room) / 2**30:.2f}, and capturing less often does not help. Keep fewer columns "
            "(compress=dropout(16)), choose fewer epochs, or raise the budget."
        )


def chosen_epochs(epochs: Any) -> tuple[int, ...] | None:
    """Those that were chosen one by one; `None` where they were not.

    Raises:
        BadSetting: Not a list of numbers of epochs.
    """
    if epochs is None:
        return None
    chosen = tuple(epochs) if isinstance(epochs, Iterable) else ()
    if not chosen or not all(isinstance(epoch, Integral) and int(epoch) >= 1 for epoch in chosen):
        raise BadSetting(f"epochs={epochs!r}: pass a list of whole numbers, counted from 1, such as epochs=[1, 3].")
    return chosen


def endless(state: TrainerState) -> bool:
    """Whether the data have no length, so that training goes over them as often as `max_steps` need.

    `state.epoch` is a share of those steps then, and passes over the data have to be counted.
    """
    return state.num_train_epochs == sys.maxsize
