"""Prune: clean data without what it says twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from hf_influence.attribution.combined import compare_with_queries
from hf_influence.dataset.contents import row_codes
from hf_influence.errors import BadSetting
from hf_influence.filter.cutting import check_amount, count_of, gone_by, groups_of, reasons_of
from hf_influence.filter.decision import Decision
from hf_influence.filter.rankings import Given, one_ranking_of
from hf_influence.filter.rule import Rule, check_no_stream
from hf_influence.filter.streams import By
from hf_influence.scores import Scores


@dataclass(kw_only=True)
class Prune(Rule):
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
        BadSetting: `drop` is neither a fraction nor a count; when it is applied, scores with queries, or several.
    """

    drop: float | int = 0.3
    """How many rows to drop, copies among them: a float in [0, 1) is a fraction, an int a count."""
    copies: bool = True
    """Drop rows with the contents of an earlier one, all of them even if they are more than `drop`."""
    within: str | None = None
    """A column of classes, tasks or sources: each is pruned for itself."""

    def __post_init__(self) -> None:
        check_amount("drop", self.drop)

    def decide(self, dataset: Dataset | IterableDataset, scores: Given, by: By = None) -> Decision:
        """What `apply` would do with each row; arguments and errors as there."""
        ranking = one_ranking_of(scores, "Prune")
        check_without_queries(ranking, "Prune drops the highest scores")
        check_no_stream(dataset, "Prune")
        decision = Decision.keeping_all(dataset, [ranking], by)
        n, mean = decision.before, decision.scores
        first = self._copies(dataset, ranking.id_column)
        is_copy = torch.tensor([i in first for i in range(n)])
        order = sorted(range(n), key=lambda i: (i not in first, -mean[i], i))
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
        return decision.but(
            rule=rule,
            actions=["drop" if flag else "keep" for flag in gone.tolist()],
            ranks=rank.tolist(),
            from_highest=True,
            reasons=reasons,
            reason=reason,
            copies=first,
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
