"""A decision about some rows of a dataset, as one about all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset

from hf_influence.dataset.matching import ids_of
from hf_influence.filter.actions import Written
from hf_influence.filter.decision import Decision
from hf_influence.filter.rule import Decides
from hf_influence.scores import Scores

UNSCORED = "it has no score yet, so nothing is done about it"


def decide_on_scored(rule: Decides, dataset: Dataset, scores: Scores) -> Decision:
    """What a rule says of a dataset of which not every row has a score.

    Those without one are kept, with the label that they have, or weight 1; they come last in the ranks and have the
    score NaN. The rule looks at the others alone: a share is a share of them.

    Args:
        rule: See `Decides`.
        dataset: All rows.
        scores: Of some of them, known by index or by the values of the id column.
    """
    row = {name: i for i, name in enumerate(ids_of(dataset, scores.id_column))}
    at = sorted(row[name] for name in scores.ids)
    if len(at) == len(dataset):
        return rule.decide(dataset, scores)
    if scores.id_column is None:
        place = {i: k for k, i in enumerate(at)}
        scores = replace(scores, ids=[place[row[name]] for name in scores.ids], contents={})
    return on_whole(rule.decide(dataset.select(at), scores), dataset, at)


def on_whole(decision: Decision, dataset: Dataset, at: Sequence[int], before: Decision | None = None) -> Decision:
    """The same decision, about a dataset that has more rows.

    Args:
        decision: About `dataset.select(at)`.
        dataset: All rows.
        at: Where the rows that were decided on stand in it.
        before: An earlier decision about all of them, which holds for the others: they keep its score and its reason,
            and come first in the ranks, in its order. Without one the others are kept, and come last.

    Returns:
        A decision that `replay` carries out on `dataset`.
    """
    n, decided = len(dataset), set(at)
    rest = [i for i in range(n) if i not in decided]
    scores, ranks, reason = [math.nan] * n, [0] * n, [len(decision.reasons)] * n
    actions = ["weight" if "weight" in decision.actions else "keep"] * n
    reasons = (*decision.reasons, UNSCORED)
    copies = {at[copy]: at[original] for copy, original in decision.copies.items()}
    if before is not None:
        rest.sort(key=before.ranks.__getitem__)
        reasons = (*decision.reasons, *before.reasons)
        copies = before.copies | copies
        for i in rest:
            actions[i], scores[i] = before.actions[i], before.scores[i]
            reason[i] = len(decision.reasons) + before.reason[i]
    first, others = (0, len(at)) if before is None else (len(rest), 0)
    for k, i in enumerate(at):
        actions[i], scores[i], reason[i] = decision.actions[k], decision.scores[k], decision.reason[k]
        ranks[i] = first + decision.ranks[k]
    for k, i in enumerate(rest):
        ranks[i] = others + k
    return decision.but(
        ids=list(ids_of(dataset, decision.id_column)),
        actions=actions,
        scores=scores,
        ranks=ranks,
        reasons=reasons,
        reason=reason,
        copies=copies,
        columns=tuple(dataset.column_names),
        writes=tuple(_of_all(column, dataset, at) for column in decision.writes),
        dataset=dataset,
        known_contents=None,
    )


def _of_all(column: Written, dataset: Dataset, at: Sequence[int]) -> Written:
    """A column that is written for the rows `at`; others keep the label they have, or get the weight 1."""
    old = None if column.old is None else list(dataset.with_format(None)[column.name])
    new: list[Any] = [1.0] * len(dataset) if old is None else old.copy()
    if old is not None and column.new and isinstance(column.new[0], list):
        new = [[float(label == k) for k in range(len(column.new[0]))] for label in old]
    for i, value in zip(at, column.new, strict=True):
        new[i] = value
    return replace(column, new=new, old=old)
