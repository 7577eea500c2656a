"""DatasetFilter: scores and a dataset in, a better dataset out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict

from hf_influence.errors import BadExample, BadSetting
from hf_influence.scores import Scores

_ADDED = ("influence", "influence_rank")


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


@dataclass(kw_only=True)
class DatasetFilter:
    """The rows of a dataset that are most worth keeping, in their original order.

    Rows are ranked by their mean score over the queries; the lowest are dropped, the earlier row first where scores
    are equal. A fraction f stands for ⌊f · n⌋ rows, f as written (0.29 of 100 is 29). Cost: one sort.

    >>> train = Dataset.from_dict({"text": ["good", "bad", "fine", "fair"]})
    >>> scores = Scores(torch.tensor([[0.9], [-0.7], [0.4], [0.1]]), ids=[0, 1, 2, 3], method="ip")
    >>> trim = DatasetFilter(drop=0.25)
    >>> trim.apply(train, scores)["text"][:]
    ['good', 'fine', 'fair']
    >>> print(trim.report)
    kept 3 of 4 rows by ip(), drop=0.25
    least worth keeping: 1 (-0.7)

    Raises:
        BadSetting: Not exactly one of `drop` and `keep`, or neither a fraction nor a count.
    """

    drop: float | int | None = None
    """How many rows to drop: a float in [0, 1) is a fraction, an int a count."""
    keep: float | int | None = None
    """How many rows to keep, likewise; give either this or `drop`."""
    columns: bool = False
    """Add `influence` (mean score) and `influence_rank` (0 = least worth keeping, before the drop)."""

    report: FilterReport | None = field(default=None, init=False, repr=False, compare=False)
    """What the last `apply` removed."""

    def __post_init__(self) -> None:
        if (self.drop is None) == (self.keep is None):
            raise BadSetting(
                f"drop={self.drop!r} and keep={self.keep!r}: one of them says how many rows go or stay, the other "
                "follows. Give exactly one."
            )
        name, amount = self._rule()
        limit = math.inf if isinstance(amount, Integral) else 1
        if not isinstance(amount, Real) or isinstance(amount, bool) or not 0 <= float(amount) < limit:
            raise BadSetting(
                f"{name}={amount!r} is neither a fraction nor a count. Give a float in [0, 1), such as {name}=0.05, or "
                f"an int, such as {name}=100."
            )

    def apply(self, dataset: Dataset, scores: Scores) -> Dataset:
        """A new dataset with the same columns (and two more if `columns`); `dataset` itself is left alone.

        Raises:
            BadExample: Not a `datasets.Dataset`, no rows, or a column that is missing or taken.
            BadSetting: Scores of another dataset, or a rule that leaves no row.
        """
        self._check(dataset, scores.id_column)
        position = self._positions(dataset, scores)  # [n], row of the dataset for each row of the scores
        n = len(dataset)
        mean = torch.empty(n, dtype=torch.float64)
        mean[position] = scores.mean().detach().cpu().double()  # [n], in dataset order
        order = mean.argsort(stable=True)  # [n], worst first
        rank = order.argsort()  # [n]

        dropped = order[: self._number_to_drop(n)].tolist()
        gone = set(dropped)
        stay = [i for i in range(n) if i not in gone]
        kept = dataset.select(stay)
        if self.columns:
            for column, values in zip(_ADDED, (mean, rank), strict=True):
                kept = kept.add_column(column, values[stay].tolist())

        name = dict(zip(position.tolist(), scores.ids, strict=True))  # row of the dataset -> id
        self.report = FilterReport(
            before=n,
            rule="{}={!r}".format(*self._rule()),
            method=scores.method,
            settings=dict(scores.settings),
            removed=tuple(Removed(name[i], float(mean[i]), int(rank[i])) for i in dropped),
            groups=_group_sizes(dataset, stay),
        )
        return kept

    def _rule(self) -> tuple[str, Any]:
        return ("drop", self.drop) if self.drop is not None else ("keep", self.keep)

    def _number_to_drop(self, n: int) -> int:
        name, amount = self._rule()
        rows = int(amount) if isinstance(amount, Integral) else int(Fraction(str(amount)) * n)
        drop = rows if name == "drop" else n - rows
        if drop >= n:
            raise BadSetting(f"{name}={amount!r} leaves none of the {n} rows to train on. Drop fewer, or keep more.")
        if drop < 0:
            raise BadSetting(f"{name}={amount!r} asks for more rows than the {n} there are. Keep at most {n}.")
        return drop

    def _check(self, dataset: Dataset, id_column: str | None) -> None:
        if isinstance(dataset, DatasetDict):
            raise BadExample(f"a DatasetDict with the splits {list(dataset)}; scores rank one. Give dataset['train'].")
        if not isinstance(dataset, Dataset):
            raise BadExample(
                f"{type(dataset).__name__} is not a datasets.Dataset, which is what is filtered. Make one with "
                "Dataset.from_list, Dataset.from_pandas or, for a stream, Dataset.from_generator."
            )
        if len(dataset) == 0:
            raise BadExample("the dataset has no rows, so there is nothing to filter. Check how it was loaded.")
        if self.columns and (taken := [column for column in _ADDED if column in dataset.column_names]):
            raise BadExample(f"the dataset has {taken} already. Rename or remove them, or leave columns=False.")
        if id_column is not None and id_column not in dataset.column_names:
            raise BadExample(
                f"no column '{id_column}' among {dataset.column_names}, which the scores name their examples by. "
                "Filter the dataset that was scored, with that column."
            )

    def _positions(self, dataset: Dataset, scores: Scores) -> torch.Tensor:
        """Row of the dataset for each row of the scores, `[n]`; each row exactly once."""
        n, id_column = len(dataset), scores.id_column
        if len(scores) != n:
            raise BadSetting(
                f"the scores cover {len(scores)} examples and the dataset has {n} rows: they belong to another "
                "dataset, or to another version of it. Filter the one that was scored, or score this one."
            )
        ids = range(n) if id_column is None else dataset.with_format(None)[id_column][:]
        row = {id_: i for i, id_ in enumerate(ids)}
        if len(row) < n:
            twice = next(id_ for id_, count in Counter(ids).items() if count > 1)
            raise BadExample(
                f"id {twice!r} occurs more than once in column '{id_column}', so its score could mean either row. Use "
                "a column of unique ids."
            )
        if unknown := [id_ for id_ in scores.ids if id_ not in row]:
            where = f"in column '{id_column}'" if id_column else f"an index of the dataset (0 to {n - 1})"
            raise BadSetting(
                f"{len(unknown)} of the {n} ids of the scores are not {where}; the first is {unknown[0]!r}. Filter the "
                "dataset that was scored."
            )
        if len(set(scores.ids)) < n:
            twice = next(id_ for id_, count in Counter(scores.ids).items() if count > 1)
            raise BadSetting(
                f"the scores have id {twice!r} more than once, so some rows have none. Score the dataset anew."
            )
        return torch.tensor([row[id_] for id_ in scores.ids])


def _group_sizes(dataset: Dataset, stay: list[int]) -> dict[Hashable, tuple[int, int]]:
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
