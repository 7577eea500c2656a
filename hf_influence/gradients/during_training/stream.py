"""Training data without a length or an order: examples are numbered as they turn up."""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from hf_influence.errors import BadExample, BadSetting
from hf_influence.gradients.answers import OF_TEXT
from hf_influence.gradients.compress import Compressor
from hf_influence.gradients.during_training.training import main_input
from hf_influence.gradients.own_loss import OwnTask, task_of
from hf_influence.gradients.plan import header_of
from hf_influence.gradients.taps import Modules, Tap, find_taps
from hf_influence.store import GradientStore, Header
from hf_influence.task import Classification, Reduction, Task

STREAM = "stream"
"""Stands for the fingerprint of a dataset that nobody has read to its end."""


def is_stream(dataset: Any) -> bool:
    """Whether examples can be had from it one after the other alone, not by position."""
    by_position = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return isinstance(dataset, IterableDataset) or (hasattr(dataset, "__iter__") and not by_position)


@dataclass(frozen=True)
class StreamPlan:
    """What is decided before the first batch of a stream; not one example is taken from it for that."""

    task: Task
    taps: list[Tap]
    header: Header
    compress: Compressor | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        loss_reduction: Reduction = "mean",
        task: OwnTask | None = None,
        compress: Compressor | None = None,
        modules: Modules = "lora",
        skip: Sequence[str] = (),
    ) -> StreamPlan:
        """See `collect` for the arguments and errors."""
        chosen = task_of(model, loss_reduction, task)
        taps = find_taps(model, modules, skip)
        if isinstance(chosen, Classification):  # labels of another kind are refused when they come
            chosen = chosen.settled(torch.zeros(1, dtype=torch.long))
        return cls(chosen, taps, header_of(model, taps, chosen, compress), compress)


class Sightings:
    """Content hash, or id, -> number of an example in the order in which they were first captured.

    The counterpart of `Positions` for a stream. What comes again in a later pass, with the same contents or the same
    id, keeps its number; what comes again in the same pass is not taken twice.

    Args:
        id_column: A column of ids that every batch has; without it contents tell examples apart.

    Attributes:
        dataset: Stands for its fingerprint.
        n: `None`, as nobody knows how many there are.
        ids: The ids so far, by number; `None` without an id column.
        id_column: See above.
        contents: Nothing is known of the dataset.
        classes: Nor of these.
        duplicates: 0, as what is equal counts as one example.
    """

    def __init__(self, id_column: str | None = None):
        self.dataset = STREAM
        self.n: int | None = None
        self.ids: list[Any] | None = None if id_column is None else []
        self.id_column = id_column
        self.contents: dict[str, list[Any]] = {}
        self.classes: list[str] | None = None
        self.duplicates = 0
        self._numbers: dict[Hashable, int] = {}
        self._next = 0

    def restore(self, store: GradientStore) -> None:
        """Know again what the stored points know."""
        numbers: dict[Hashable, int] = {}
        for point in store.points("weights"):
            if point and "train" in store.splits(point):
                numbers |= store.sighted("train", point)
        self._numbers = numbers
        self._next = max(numbers.values(), default=-1) + 1
        if self.ids is not None:
            self.ids[:] = sorted(numbers, key=numbers.__getitem__)

    def copies(self, code: int) -> Sequence[int]:
        """None: an example that was seen is one, however often it comes."""
        return ()

    def check_inputs(self, inputs: Mapping[str, Any], arguments: Container[str]) -> None:
        """Refuse a batch without ids whose examples may differ in what they are not told apart by.

        Args:
            inputs: Of the model.
            arguments: What its forward method takes.

        Raises:
            BadSetting: Names it.
        """
        main = main_input(inputs)
        if unread := [name for name in inputs if name in arguments and name != main and name not in OF_TEXT]:
            raise BadSetting(
                "the examples of a stream are told apart by their tokens and labels, and the model is given "
                f"{unread[0]!r} as well, in which equal ones may differ. Keep a column of ids in the batch "
                "(id_column=…, remove_unused_columns=False), or pass train_dataset=… with the same examples, map-style."
            )

    def find(
        self, codes: Sequence[int], taken: AbstractSet[int], names: Sequence[Any] | None = None
    ) -> list[int | None]:
        """The number of each example of a batch, a new one for a new example; `None` for one among those `taken`.

        Args:
            codes: Content hash of each example.
            taken: Numbers that are not to be given out.
            names: The id of each, where the batch has the id column.

        Raises:
            BadSetting: No ids, where there should be.
            BadExample: One that is neither an integer nor a string.
        """
        if self.ids is not None and names is None:
            raise BadSetting(
                f"a training batch has no column {self.id_column!r}. Of a stream, ids come with the batch: pass "
                "remove_unused_columns=False and a data_collator that keeps the column, or leave id_column out."
            )
        here: set[int] = set()
        found: list[int | None] = []
        for key in codes if self.ids is None or names is None else names:
            if self.ids is not None and not isinstance(key, (int, str)):
                raise BadExample(f"the id column {self.id_column!r} holds {key!r}; ids are integers or strings.")
            if key not in self._numbers:
                self._numbers[key] = self._next
                self._next += 1
                if self.ids is not None:
                    self.ids.append(key)
            number = self._numbers[key]
            free = number not in taken and number not in here
            here.add(number)
            found.append(number if free else None)
        return found
