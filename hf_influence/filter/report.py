"""How the classes, tasks or sources of a dataset fared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from datasets import Dataset


class Removed(NamedTuple):
    """One example that was dropped: its id, its mean score, its rank (0 = the first to go)."""

    id: int | str
    score: float
    rank: int


def group_sizes(
    dataset: Dataset, stay: list[int], written: dict[str, Sequence[Any]] | None = None
) -> dict[Hashable, tuple[int, int]]:
    """Rows before and after for each label, task or source; empty where the dataset has no such column.

    Args:
        dataset: Before.
        stay: The rows that stay.
        written: Columns with new values for all its rows.
    """
    column = next((name for name in ("label", "task", "source") if name in dataset.column_names), None)
    if column is None:
        return {}
    values = dataset.with_format(None)[column][:]
    new = values if written is None else written.get(column, values)
    if not all(isinstance(value, (str, int)) for value in (*values, *new)):  # regression targets, label vectors
        return {}
    names = getattr(dataset.features[column], "names", None)

    def name(value: Any) -> Hashable:
        return names[value] if names and value >= 0 else value

    before, after = Counter(map(name, values)), Counter(name(new[i]) for i in stay)
    return {group: (before[group], after[group]) for group in {**before, **after}}
