"""Rules: what becomes of each row of a dataset, by scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from hf_influence.dataset.reading import of_split
from hf_influence.errors import BadExample
from hf_influence.filter.carrying_out import carried_out
from hf_influence.filter.decision import Decision
from hf_influence.filter.rankings import Given
from hf_influence.filter.streams import By
from hf_influence.scores import Scores

Data = TypeVar("Data", bound=Any)
"""A `Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict`; the same kind comes back."""


class Decides(Protocol):
    """What decides: a `Rule`, or an object of yours that is none."""

    def decide(self, dataset: Any, scores: Scores) -> Decision:
        """What happens to each row of the dataset that was scored."""


@dataclass(kw_only=True)
class Rule(ABC):
    """What becomes of each row of a dataset: one of yours has its settings as fields, and `decide`.

    >>> import torch
    >>> class KeepAll(Rule):
    ...     def decide(self, dataset, scores, by=None):
    ...         return Decision.keeping_all(dataset, [scores], by)
    >>> rule = KeepAll()
    >>> train, scores = Dataset.from_dict({"text": ["good"]}), Scores(torch.ones(1, 1), ids=[0], method="mine")
    >>> rule.apply(DatasetDict(train=train), scores)["train"]["text"][:]
    ['good']
    >>> rule.report.actions
    ['keep']
    """

    report: Decision | None = field(default=None, init=False, repr=False, compare=False)
    """What the last `apply` decided: `report.explain(id)`, `report.save(path)`, `report.replay(dataset)`, …"""

    def apply(self, dataset: Data, scores: Given, *, split: str = "train", by: By = None) -> Data:
        """A new dataset, as the rule makes it; `dataset` itself is left alone.

        Args:
            dataset: What was scored, or a `DatasetDict` of which one split was; its other splits stay as they are. Of
                an `IterableDataset` the rows are dropped, or written into, as they come.
            scores: Of every row, or a file of them, or a store, which then is scored by "auto"; several of them in a
                list, where the rule takes several. Where an id column names the rows, some that were scored may have
                been left out since: ranks, shares and weights, and `replay` and `undo` of the report, are then about
                the rows that are there.
            split: Which of a `DatasetDict`.
            by: For a stream whose scores have no id column: how its rows are known; see `StreamRows`, or the store.

        Raises:
            BadExample: Not a dataset, no rows, a column that is missing or taken, or a stream where all rows are
                needed at once.
            BadSetting: Scores of another dataset, or that the rule cannot go by; a rule that leaves no row.
        """
        if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
            return type(dataset)({**dataset, split: self.apply(of_split(dataset, split), scores, by=by)})
        self.report = self.decide(dataset, scores, by)
        return carried_out(self.report, dataset, by)

    @abstractmethod
    def decide(self, dataset: Dataset | IterableDataset, scores: Given, by: By = None) -> Decision:
        """What `apply` would do with each row; arguments and errors as there."""


def check_no_stream(dataset: Any, rule: str) -> None:
    """BadExample of a stream, for a rule that needs all rows at once."""
    if isinstance(dataset, IterableDataset):
        raise BadExample(
            f"an IterableDataset has all its rows at its end only, and {rule} needs them before, however they are "
            "known (by=…). Make a Dataset of it: Dataset.from_generator(lambda: iter(stream))."
        )
