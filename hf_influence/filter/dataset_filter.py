"""DatasetFilter: scores and a dataset in, a better dataset out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, IterableDataset, Value
from torch import Tensor

from hf_influence.dataset.matching import aligned
from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter.actions import Written
from hf_influence.filter.cutting import check_amount, count_of, gone_by, groups_of, lengths_of, reasons_of
from hf_influence.filter.decision import Decision
from hf_influence.filter.rankings import Given, estimates_of, rankings_of
from hf_influence.filter.rule import Rule
from hf_influence.filter.streams import By
from hf_influence.filter.thresholds import THRESHOLDS, Threshold, check_scale, goes_by_odds, name_of

_ADDED = {"influence": Value("float64"), "influence_rank": Value("int64")}


@dataclass(kw_only=True)
class DatasetFilter(Rule):
    """The rows of a dataset that are most worth keeping, in their original order.

    Rows are ranked by their mean score over the queries; the lowest are dropped, the earlier row first where scores
    are equal. A fraction f stands for ⌊f · n⌋ rows, f as written (0.29 of 100 is 29). Several scores drop a row only if
    they agree; its score is then the mean of its places in the rankings, from 0 (worst) to 1. Cost: one sort.

    >>> train = Dataset.from_dict({"text": ["good", "bad", "fine", "fair"]})
    >>> from hf_influence.scores import Scores
    >>> scores = Scores(torch.tensor([[0.9], [-0.7], [0.4], [0.1]]), ids=[0, 1, 2, 3], method="ip")
    >>> trim = DatasetFilter(drop=0.25)
    >>> trim.apply(train, scores)["text"][:]
    ['good', 'fine', 'fair']
    >>> print(trim.report)
    kept 3 of 4 rows by ip(), drop=0.25
    least worth keeping: 1 (-0.7)
    >>> print(trim.report.explain(1))
    row 1 was dropped: its score -0.7 by ip ranks 0 of 4, the rule drop=0.25 drops 1 of the 4 rows

    Raises:
        BadSetting: More than one of `drop`, `keep` and `keep_tokens`, or an amount that is none.
    """

    drop: float | int | str | Threshold | None = field(default=None, kw_only=False)
    """How many rows to drop: a float in [0, 1) is a fraction, an int a count. "doubtful", "negative", "otsu",
    "mixture" or a function such as `discovery(0.1)` look at the scores for a place to cut; see
    `hf_influence.filter.thresholds`. By default, without `keep` and `keep_tokens`, "doubtful": what is not twice as
    probably right as wrong, by scores by "auto" with clean queries."""
    keep: float | int | None = None
    """How many rows to keep, as a fraction or a count."""
    keep_tokens: int | None = None
    """How many tokens to keep at most, by the lengths of the lists in `tokens`: the best rows, down to the first that
    does not fit in. With `within` each group gets as large a part of the budget as it has of the rows."""
    tokens: str = "input_ids"
    """The column whose lists `keep_tokens` counts."""
    within: str | None = None
    """A column of classes, tasks or sources: each is cut for itself, so that none is emptied because it is harder. A
    fraction or a count leaves at least one row of each."""
    agree: int | None = None
    """With several scores: how many of them must drop a row; by default all."""
    columns: bool = False
    """Add `influence` (mean score) and `influence_rank` (0 = least worth keeping, before the drop). The other splits of
    a `DatasetDict` do not get them, and the hub takes splits with the same columns: push that split alone."""

    def __post_init__(self) -> None:
        given = [name for name in ("drop", "keep", "keep_tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise BadSetting(
                f"{' and '.join(f'{name}={getattr(self, name)!r}' for name in given)}: one of them says how much goes "
                "or stays, the rest follows. Give one."
            )
        if not given:
            self.drop = "doubtful"
        name, amount = self._rule()
        if name == "drop" and callable(amount):
            return
        if name == "drop" and isinstance(amount, str) and not amount.endswith("%"):
            if amount not in THRESHOLDS:
                raise BadSetting(f"drop={amount!r} is no threshold. Give one of {', '.join(THRESHOLDS)}, or a number.")
            return
        check_amount(name, amount, fractions=name != "keep_tokens")

    def decide(self, dataset: Dataset | IterableDataset, scores: Given, by: By = None) -> Decision:
        """What `apply` would do with each row; arguments and errors as there."""
        rankings = rankings_of(scores)
        needed = self._votes(len(rankings))
        for ranking in rankings:
            check_scale(self.drop, ranking)
        values, ids = aligned(dataset, rankings)  # each [n, q]
        decision = Decision.keeping_all(dataset, rankings, by, known=(values, ids))
        n = decision.before
        if self.columns and (taken := [column for column in _ADDED if column in (dataset.column_names or ())]):
            raise BadExample(f"the dataset has {taken} already. Rename or remove them, or leave columns=False.")
        groups = groups_of(decision.dataset, self.within, n)
        lengths = lengths_of(decision.dataset, self.tokens) if self.keep_tokens is not None else None

        def cut(values: Tensor, rows: list[int]) -> Tensor:
            return self._gone(values, None if lengths is None else lengths[rows], n)

        votes = torch.stack([gone_by(ranking, groups, cut) for ranking in values]).sum(0)  # [n]
        gone = votes >= needed
        rule = self._described()
        if n and gone.all():
            raise BadSetting(f"{rule} leaves none of the {n} rows to train on. Drop fewer, or keep more.")
        if len(values) == 1:
            reasons, reason = reasons_of(rule, gone, groups, self.within)
        else:
            asks = f"of {len(values)} rankings would drop it, the rule {rule} asks for {needed}"
            reasons, reason = tuple(f"{k} {asks}" for k in range(len(values) + 1)), votes.tolist()
        added: dict[str, list[Any]] = {}
        if self.columns:
            added = dict(zip(_ADDED, (decision.scores, decision.ranks), strict=True))
        return decision.but(
            rule=rule,
            actions=["drop" if flag else "keep" for flag in gone.tolist()],
            reasons=reasons,
            reason=reason,
            estimates=estimates_of(rankings) if goes_by_odds(self.drop) else (),
            writes=tuple(Written(name=name, new=list(new), feature=_ADDED[name]) for name, new in added.items()),
        )

    def _rule(self) -> tuple[str, Any]:
        name = next(name for name in ("drop", "keep", "keep_tokens") if getattr(self, name) is not None)
        return name, getattr(self, name)

    def _described(self) -> str:
        name, amount = self._rule()
        rule = f"{name}={name_of(amount) if callable(amount) else repr(amount)}"
        rule += f", within={self.within!r}" if self.within else ""
        return rule + (f", agree={self.agree}" if self.agree is not None else "")

    def _votes(self, rankings: int) -> int:
        needed = rankings if self.agree is None else self.agree
        if not 1 <= needed <= rankings:
            raise BadSetting(f"agree={self.agree} of {rankings} score(s): ask for 1 to {rankings} of them.")
        return needed

    def _gone(self, values: Tensor, lengths: Tensor | None, n: int) -> Tensor:
        """Which rows of a group one ranking `[b, q]` drops, `[b]`; `n` rows there are in all groups."""
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
        rows = count_of(amount, n)
        drop = rows if name == "drop" else n - rows
        if drop >= n and not self.within:
            raise BadSetting(f"{name}={amount!r} leaves none of the {n} rows to train on. Drop fewer, or keep more.")
        if drop < 0 and not self.within:
            raise BadSetting(f"{name}={amount!r} asks for more rows than the {n} there are. Keep at most {n}.")
        return min(max(drop, 0), n - 1)
