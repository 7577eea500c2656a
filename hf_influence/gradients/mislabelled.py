"""Clean queries under a wrong label: what the gradient of a mislabelled example looks like."""

from __future__ import annotations

from random import Random
from typing import Any

from torch import nn

from hf_influence.errors import BadExample, BadSetting
from hf_influence.gradients.answers import parts_of
from hf_influence.gradients.batches import Collator, Examples
from hf_influence.task import LABELS, CausalLM, Classification, LanguageModel, Task, task_of

SPLIT = "{}-mislabelled"
"""Where they are kept, beside the split of the queries."""

REPEATED = 5
"""Examples for each of the different answers, for these to be names of classes."""


class Mislabelled:
    """A map-style classification set in which every label is that of another class, drawn evenly from the others.

    Args:
        dataset: `len()` and `[i]`, with dictionaries that hold the label.
        label: Its name.
        classes: Their number.
    """

    def __init__(self, dataset: Any, label: str, classes: int):
        self.dataset, self.label, self.classes = dataset, label, classes
        self.shifts = _shifts(len(dataset), classes)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, at: int) -> dict[str, Any]:
        row = dict(self.dataset[at])
        row[self.label] = (row[self.label] + self.shifts[at]) % self.classes
        return row


def mislabelled(
    model: nn.Module, dataset: Any, data_collator: Collator | None, remove_unused_columns: bool = True
) -> tuple[Any, Collator | None] | None:
    """The dataset under wrong labels, where these cannot be told from the right ones, and a collator for it.

    That is so for more than two classes; for two, a wrong label turns the sign of the gradient. It is so for a language
    model whose answers name classes, too: after each prompt then stands another of these names.

    Returns:
        `None` for two classes, for tasks of another kind, where a row has no class number, and for answers that are no
        names of classes: fewer than two different ones, or more than one for every five examples.
    """
    task = task_of(model)
    if len(dataset) == 0:
        return None
    if isinstance(task, LanguageModel):
        rows = _misnamed(task, Examples(dataset, model, data_collator, None, remove_unused_columns))
        return None if rows is None else (rows, None)
    if not isinstance(task, Classification) or task.classes < 3:
        return None
    if task.problem not in (None, "single_label_classification"):
        return None
    first = dataset[0]
    label = next((name for name in LABELS if name in first), None)
    if label is None or not _is_number(first[label]):
        return None
    return Mislabelled(dataset, label, task.classes), data_collator


def _misnamed(task: Task, examples: Examples) -> list[dict[str, list[int]]] | None:
    """The examples with the answer of another class, drawn evenly from the others; `None` if answers name none."""
    try:
        parts = parts_of(task, examples, range(len(examples)))
    except (BadExample, BadSetting):
        return None
    given = [(tuple(own.answer), tuple(own.labels)) for own in parts]
    names = sorted(set(given))
    if not 2 <= len(names) <= len(parts) // REPEATED:
        return None
    place = {name: at for at, name in enumerate(names)}
    wrong = []
    for own, name, shift in zip(parts, given, _shifts(len(parts), len(names)), strict=True):
        answer, labels = names[(place[name] + shift) % len(names)]
        wrong.append(own._replace(answer=list(answer), labels=list(labels)).row(isinstance(task, CausalLM)))
    return wrong


def _shifts(n: int, classes: int) -> list[int]:
    """How far from its own class the wrong one of each example is, `[n]`; always the same ones."""
    draw = Random(0)
    return [draw.randrange(1, classes) for _ in range(n)]


def _is_number(label: Any) -> bool:
    """Whether it is one whole number, of Python, NumPy or torch."""
    value = label.item() if getattr(label, "ndim", None) == 0 else label
    return isinstance(value, int)
