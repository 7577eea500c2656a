"""Clean queries under a wrong label: what the gradient of a mislabelled example looks like."""

from __future__ import annotations

from random import Random
from typing import Any

from torch import nn

from hf_influence.task import LABELS, Classification, task_of

SPLIT = "{}-mislabelled"
"""Where they are kept, beside the split of the queries."""


class Mislabelled:
    """A map-style classification set in which every label is that of another class, drawn evenly from the others.

    Args:
        dataset: `len()` and `[i]`, with dictionaries that hold the label.
        label: Its name.
        classes: Their number.
        seed: The same seed draws the same classes.
    """

    def __init__(self, dataset: Any, label: str, classes: int, seed: int = 0):
        draw = Random(seed)
        self.dataset, self.label, self.classes = dataset, label, classes
        self.shifts = [draw.randrange(1, classes) for _ in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, at: int) -> dict[str, Any]:
        row = dict(self.dataset[at])
        row[self.label] = (row[self.label] + self.shifts[at]) % self.classes
        return row


def mislabelled(model: nn.Module, dataset: Any) -> Mislabelled | None:
    """The dataset under wrong labels, where these cannot be told from the right ones: for more than two classes.

    For two, a wrong label turns the sign of the gradient. `None` there, for tasks of another kind, and where a row of
    the dataset has no class number.
    """
    task = task_of(model)
    if not isinstance(task, Classification) or task.classes < 3 or len(dataset) == 0:
        return None
    if task.problem not in (None, "single_label_classification"):
        return None
    first = dataset[0]
    label = next((name for name in LABELS if name in first), None)
    if label is None or not _is_number(first[label]):
        return None
    return Mislabelled(dataset, label, task.classes)


def _is_number(label: Any) -> bool:
    """Whether it is one whole number, of Python, NumPy or torch."""
    value = label.item() if getattr(label, "ndim", None) == 0 else label
    return isinstance(value, int)
