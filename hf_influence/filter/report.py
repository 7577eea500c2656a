"""What a filter did, row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset


class Removed(NamedTuple):
    """One example that was dropped: its id, its mean score, its rank (0 = least worth keeping)."""

    id: int | str
    score: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class FilterReport:
    """What a filter removed, and by which rule.

    Attributes:
        before: Rows of the dataset that went in.
        rule: As it was set, e.g. `drop=0.05`.
        method: Of the scores.
        settings: Of the method.
        removed: The dropped examples, worst first.
        groups: Per value of the first of the columns label, task and source that exists: rows before and after.
    """

    before: int
    rule: str
    method: str
    settings: dict[str, Any]
    removed: tuple[Removed, ...]
    groups: dict[Hashable, tuple[int, int]]

    @property
    def after(self) -> int:
        """Rows of the dataset that came out."""
        return self.before - len(self.removed)

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        lines = [f"kept {self.after} of {self.before} rows by {self.method}({settings}), {self.rule}"]
        if self.removed:
            worst = ", ".join(f"{row.id} ({row.score:.3g})" for row in self.removed[:5])
            lines.append(f"least worth keeping: {worst}{', …' if len(self.removed) > 5 else ''}")
        hit_most = sorted(self.groups.items(), key=lambda item: item[1][1] - item[1][0])[:10]
        lines += [f"  {group}: {before} -> {after}" for group, (before, after) in hit_most]
        return "\n".join(lines)


def group_sizes(dataset: Dataset, stay: list[int]) -> dict[Hashable, tuple[int, int]]:
    """Rows before and after for each label, task or source; empty where the dataset has no such column."""
    column = next((name for name in ("label", "task", "source") if name in dataset.column_names), None)
    if column is None:
        return {}
    values = dataset.with_format(None)[column][:]
    if not all(isinstance(value, (str, int)) for value in values):  # regression targets, label vectors
        return {}
    names = getattr(dataset.features[column], "names", None)
    groups = [names[value] if names and value >= 0 else value for value in values]
    after = Counter(groups[i] for i in stay)
    return {group: (before, after[group]) for group, before in Counter(groups).items()}
