"""How many rows of each class, task or source a decision leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset

MOST_CLASSES = 50


def group_sizes(
    dataset: Dataset, stay: Sequence[int], written: Mapping[str, Sequence[Any]]
) -> dict[Hashable, tuple[int, int]]:
    """Rows before and after for each class, of the first of the columns label, task and source that holds classes.

    These are the values of a `ClassLabel`, and else integers or text of which few differ: at most 50, and at most half
    as many as there are rows. A column of free text is none, since a report is published and the contents of rows are
    not. Without such a column the result is empty.

    Args:
        dataset: Before.
        stay: The rows that stay.
        written: Columns with new values for all its rows.
    """
    plain = dataset.with_format(None)
    columns = (name for name in ("label", "task", "source") if name in dataset.column_names)
    column = next((name for name in columns if _holds_classes(plain.features[name], plain[name][:])), None)
    if column is None:
        return {}
    values = plain[column][:]
    new = written.get(column, values)
    if not all(isinstance(value, (str, int)) for value in new):  # label vectors
        return {}
    names = getattr(dataset.features[column], "names", None)

    def name(value: Any) -> Hashable:
        return names[value] if names and value >= 0 else value

    before, after = Counter(map(name, values)), Counter(name(new[i]) for i in stay)
    return {group: (before[group], after[group]) for group in {**before, **after}}


def _holds_classes(feature: Any, values: Sequence[Any]) -> bool:
    if not all(isinstance(value, (str, int)) for value in values):  # regression targets, lists, rows without a value
        return False
    return isinstance(feature, ClassLabel) or len(set(values)) <= min(MOST_CLASSES, len(values) / 2)
