"""DatasetFilter: scores and a dataset in, a better dataset out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, overload

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter.matching import ids_of, in_dataset_order
from hf_influence.filter.report import FilterReport, Removed, group_sizes
from hf_influence.filter.thresholds import THRESHOLDS, Threshold, name_of
from hf_influence.scores import Scores, mean_ranks

_ADDED = ("influence", "influence_rank")


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
        BadSetting: Not exactly one of `drop`, `keep` and `keep_tokens`, or an amount that is none.
    """

    drop: float | int | str | Threshold | None = None
    """How many rows to drop: a float in [0, 1) is a fraction, an int a count. "otsu", "mixture", "negative" or a
    function such as `discovery(0.1)` look at the scores for a place to cut; see `hf_influence.filter.thresholds`."""
    keep: float | int | None = None
    """How many rows to keep, as a fraction or a count."""
    keep_tokens: int | None = None
    """How many tokens to keep: the best rows that fit in, by the lengths of the lists in `tokens`."""
    tokens: str = "input_ids"
    """The column whose lists `keep_tokens` counts."""
    within: str | None = None
    """A column of classes, tasks or sources: each is cut for itself, so that none is emptied because it is harder."""
    agree: int | None = None
    """With several scores: how many of them must drop a row; by default all."""
    columns: bool = False
    """Add `influence` (mean score) and `influence_rank` (0 = least worth keeping, before the drop)."""

    report: FilterReport | None = field(default=None, init=False, repr=False, compare=False)
    """What the last `apply` removed."""

    def __post_init__(self) -> None:
        given = [name for name in ("drop", "keep", "keep_tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise BadSetting(
                f"drop={self.drop!r}, keep={self.keep!r} and keep_tokens={self.keep_tokens!r}: one of them says how "
                "much goes or stays, the rest follows. Give exactly one."
            )
        name, amount = self._rule()
        if name == "drop" and callable(amount):
            return
        if name == "drop" and isinstance(amount, str):
            if amount not in THRESHOLDS:
                raise BadSetting(f"drop={amount!r} is no threshold. Give one of {', '.join(THRESHOLDS)}, or a number.")
            return
        limit = math.inf if isinstance(amount, Integral) else 1
        whole = name == "keep_tokens" and not isinstance(amount, Integral)
        if whole or not isinstance(amount, Real) or isinstance(amount, bool) or not 0 <= float(amount) < limit:
            fraction = "" if name == "keep_tokens" else f"a float in [0, 1), such as {name}=0.05, or "
            raise BadSetting(
                f"{name}={amount!r} is neither a fraction nor a count. Give {fraction}an int, such as {name}=100."
            )

    @overload
    def apply(self, dataset: Dataset, scores: Scores | Sequence[Scores]) -> Dataset: ...

    @overload
    def apply(self, dataset: DatasetDict, scores: Scores | Sequence[Scores], split: str = ...) -> DatasetDict: ...

    def apply(
        self, dataset: Dataset | DatasetDict, scores: Scores | Sequence[Scores], split: str = "train"
    ) -> Dataset | DatasetDict:
        """A new dataset with the same columns (and two more if `columns`); `dataset` itself is left alone.

        Args:
            dataset: What was scored, or a `DatasetDict` of which one split was; its other splits stay as they are.
            scores: Of every row; several of them drop a row only if they agree. A row's score is then the mean of its
                places in the rankings, from 0 (worst) to 1.
            split: Which of a `DatasetDict`.

        Raises:
            BadExample: Not a dataset, no rows, or a column that is missing or taken.
            BadSetting: Scores of another dataset, or a rule that leaves no row.
        """
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise BadExample(f"the DatasetDict has the splits {list(dataset)} and no {split!r}. Pass split=….")
            return DatasetDict({**dataset, split: self.apply(dataset[split], scores)})
        rankings = [scores] if isinstance(scores, Scores) else list(scores)
        needed = self._votes(len(rankings))
        values = [in_dataset_order(dataset, one) for one in rankings]  # each [n, q]
        n = len(dataset)
        names = ids_of(dataset, rankings[0].id_column)
        if self.columns and (taken := [column for column in _ADDED if column in dataset.column_names]):
            raise BadExample(f"the dataset has {taken} already. Rename or remove them, or leave columns=False.")
        mean = values[0].mean(1) if len(values) == 1 else _mean_place(values)
        order = mean.argsort(stable=True)  # [n], worst first
        rank = order.argsort()  # [n]

        gone = torch.stack([self._gone(v, dataset) for v in values]).sum(0) >= needed  # [n]
        if n and gone.all():
            raise BadSetting(f"{self._described()} leaves none of the {n} rows to train on. Drop fewer, or keep more.")
        stay = (~gone).nonzero()[:, 0].tolist()
        kept = dataset.select(stay)
        if self.columns:
            for column, added in zip(_ADDED, (mean, rank), strict=True):
                kept = kept.add_column(column, added[stay].tolist())
        self.report = FilterReport(
            before=n,
            rule=self._described(),
            method=" + ".join(one.method for one in rankings),
            settings={} if len(rankings) > 1 else dict(rankings[0].settings),
            removed=tuple(Removed(names[i], float(mean[i]), int(rank[i])) for i in order.tolist() if gone[i]),
            groups=group_sizes(dataset, stay),
        )
        return kept

    def _rule(self) -> tuple[str, Any]:
        name = next(name for name in ("drop", "keep", "keep_tokens") if getattr(self, name) is not None)
        return name, getattr(self, name)

    def _described(self) -> str:
        name, amount = self._rule()
        rule = f"{name}={name_of(amount) if callable(amount) else repr(amount)}"
        rule += f", within={self.within!r}" if self.within else ""
        return rule + (f", agree={self.agree}" if self.agree is not None else "")

    def _votes(self, rankings: int) -> int:
        if not rankings:
            raise BadSetting("no scores were given, so there is nothing to rank the rows by.")
        needed = rankings if self.agree is None else self.agree
        if not 1 <= needed <= rankings:
            raise BadSetting(f"agree={self.agree} of {rankings} score(s): ask for 1 to {rankings} of them.")
        return needed

    def _gone(self, values: Tensor, dataset: Dataset) -> Tensor:
        """Which rows one ranking `[n, q]` drops, `[n]`, group by group."""
        gone = torch.zeros(len(values), dtype=torch.bool)
        lengths = self._lengths(dataset) if self.keep_tokens is not None else None
        for rows in self._groups(dataset):
            gone[rows] = self._gone_of(values[rows], None if lengths is None else lengths[rows], len(values))
        return gone

    def _gone_of(self, values: Tensor, lengths: Tensor | None, n: int) -> Tensor:
        name, amount = self._rule()
        if name == "drop" and (callable(amount) or isinstance(amount, str)):
            return (THRESHOLDS[amount] if isinstance(amount, str) else amount)(values)
        order = values.mean(1).argsort(stable=True)  # worst first
        gone = torch.zeros(len(values), dtype=torch.bool)
        if lengths is not None:
            budget = int(amount) * len(values) // n if self.within else int(amount)
            taken = lengths[order.flip(0)].cumsum(0) > budget  # the best rows first
            gone[order.flip(0)[taken]] = True
        else:
            gone[order[: self._number_to_drop(len(values))]] = True
        return gone

    def _number_to_drop(self, n: int) -> int:
        name, amount = self._rule()
        rows = int(amount) if isinstance(amount, Integral) else int(Fraction(str(amount)) * n)
        drop = rows if name == "drop" else n - rows
        if drop >= n and not self.within:
            raise BadSetting(f"{name}={amount!r} leaves none of the {n} rows to train on. Drop fewer, or keep more.")
        if drop < 0 and not self.within:
            raise BadSetting(f"{name}={amount!r} asks for more rows than the {n} there are. Keep at most {n}.")
        return min(max(drop, 0), n)

    def _groups(self, dataset: Dataset) -> list[list[int]]:
        if self.within is None:
            return [list(range(len(dataset)))]
        if self.within not in dataset.column_names:
            raise BadExample(f"within={self.within!r} is no column of the dataset (it has {dataset.column_names}).")
        rows: dict[Hashable, list[int]] = {}
        for i, value in enumerate(dataset.with_format(None)[self.within][:]):
            rows.setdefault(value if isinstance(value, Hashable) else str(value), []).append(i)
        return list(rows.values())

    def _lengths(self, dataset: Dataset) -> Tensor:
        if self.tokens not in dataset.column_names:
            raise BadExample(
                f"keep_tokens counts the entries of the column {self.tokens!r}, and the dataset has "
                f"{dataset.column_names}. Name the column of tokens: DatasetFilter(keep_tokens=…, tokens='…')."
            )
        return torch.tensor([len(value) for value in dataset.with_format(None)[self.tokens]])


def _mean_place(values: list[Tensor]) -> Tensor:
    """The mean over rankings `[n, q]` of each row's place, from 0 (lowest) to 1, `[n]`."""
    ranks = torch.stack([mean_ranks(ranking.mean(1)) for ranking in values])
    return ((ranks - 1) / max(1, ranks.shape[1] - 1)).mean(0)
