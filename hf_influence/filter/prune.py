"""Prune: clean data without what it says twice."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from hf_influence.attribution.combined import compare_with_queries
from hf_influence.dataset.contents import row_codes
from hf_influence.dataset.matching import ids_of, in_dataset_order
from hf_influence.errors import BadSetting
from hf_influence.filter.carrying_out import carried_out, of_split
from hf_influence.filter.cutting import check_amount, count_of, gone_by, groups_of, reasons_of
from hf_influence.filter.dataset_filter import Data
from hf_influence.filter.decision import Decision, sources_of
from hf_influence.filter.group_sizes import group_sizes
from hf_influence.filter.rankings import Given, one_ranking_of
from hf_influence.scores import Scores


@dataclass(kw_only=True)
class Prune:
    """A smaller dataset that teaches about as much: rows that the others already teach are dropped.

    Scores without queries (`self_…`, losses, norms) are the higher the more typical a row is, and the most typical rows
    are the redundant ones: so here the *highest* go. Copies of an earlier row go first, whatever their score. Meant for
    clean data: among mislabelled data it keeps the mislabelled rows, which `DatasetFilter` drops.

    >>> train = Dataset.from_dict({"text": ["common", "rare", "common", "usual"]})
    >>> scores = Scores(torch.tensor([[-0.1], [-9.0], [-0.1], [-0.2]]), ids=[0, 1, 2, 3], method="self_ip")
    >>> prune = Prune(drop=0.5)
    >>> prune.apply(train, scores)["text"][:]
    ['rare', 'usual']
    >>> print(prune.report.explain(2))
    row 2 was dropped: its score -0.1 by self_ip ranks 0 of 4 from the highest, it has the contents of row 0

    Source: GEX, section 5.3; Feldman & Zhang, What Neural Networks Memorize and Why, NeurIPS 2020.

    Raises:
        BadSetting: `drop` is neither a fraction nor a count.
    """

    drop: float | int = 0.3
    """How many rows to drop, copies among them: a float in [0, 1) is a fraction, an int a count."""
    copies: bool = True
    """Drop rows with the contents of an earlier one, all of them even if they are more than `drop`."""
    within: str | None = None
    """A column of classes, tasks or sources: each is pruned for itself."""

    report: Decision | None = field(default=None, init=False, repr=False, compare=False)
    """What the last `apply` decided, row by row."""

    def __post_init__(self) -> None:
        check_amount("drop", self.drop)

    def apply(self, dataset: Data, scores: Given, *, split: str = "train") -> Data:
        """A new dataset with the same columns.

        Args:
            dataset: What was scored, or a `DatasetDict` of which one split was; its other splits stay as they are.
            scores: Of every row, or a file of them, or a store, which then is scored by "auto".
            split: Which of a `DatasetDict`.

        Raises:
            BadExample: Not a dataset, a stream, no rows, or no such column.
            BadSetting: Scores with queries, several, or of another dataset, or a rule that leaves no row.
        """
        if isinstance(dataset, DatasetDict):
            return DatasetDict({**dataset, split: self.apply(of_split(dataset, split), scores)})
        self.report = self.decide(dataset, scores)
        return carried_out(self.report, dataset)

    def decide(self, dataset: Dataset, scores: Given) -> Decision:
        """What `apply` would do with each row; arguments and errors as there."""
        scores = one_ranking_of(scores, "Prune")
        check_without_queries(scores, "Prune drops the highest scores")
        mean = in_dataset_order(dataset, scores).mean(1)  # [n]
        n, names = len(mean), ids_of(dataset, scores.id_column)
        first = self._copies(dataset, scores.id_column)
        is_copy = torch.tensor([i in first for i in range(n)])
        order = sorted(range(n), key=lambda i: (i not in first, -float(mean[i]), i))
        rank = torch.tensor(order).argsort()  # [n], 0 goes first

        def cut(places: Tensor, rows: list[int]) -> Tensor:
            most = len(rows) - 1 if self.within else len(rows)
            lowest = places[:, 0].argsort()[: min(most, count_of(self.drop, len(rows)))]
            return is_copy[rows].index_fill(0, lowest, True)

        groups = groups_of(dataset, self.within, n)
        gone = gone_by(rank[:, None], groups, cut)
        within = f", within={self.within!r}" if self.within else ""
        rule = f"prune drop={self.drop!r}, copies={self.copies!r}{within}"
        if gone.all():
            raise BadSetting(f"{rule} leaves none of the {n} rows to train on. Drop fewer.")
        reasons, reason = reasons_of(rule, gone, groups, self.within)
        return Decision(
            rule=rule,
            sources=sources_of(scores),
            ids=list(names),
            id_column=scores.id_column,
            actions=["drop" if flag else "keep" for flag in gone.tolist()],
            scores=mean.tolist(),
            ranks=rank.tolist(),
            from_highest=True,
            reasons=reasons,
            reason=reason,
            copies=first,
            groups=group_sizes(dataset, (~gone).nonzero()[:, 0].tolist()),
            columns=tuple(dataset.column_names),
            dataset=dataset,
        )

    def _copies(self, dataset: Dataset, id_column: str | None) -> dict[int, int]:
        """Row -> the earlier row that it is a copy of, but for its id."""
        if not self.copies:
            return {}
        columns = [name for name in dataset.column_names if name != id_column]
        seen: dict[str, int] = {}
        return {i: at for i, code in enumerate(row_codes(dataset, columns)) if (at := seen.setdefault(code, i)) != i}


def check_without_queries(scores: Scores, what: str) -> None:
    """BadSetting if the scores compare with queries."""
    if compare_with_queries(scores):
        raise BadSetting(
            f"{what}, and those by {scores.method} are of the rows that help the queries most. Use a method without "
            "queries, such as self_ip or self_gex, which says how typical a row is."
        )
