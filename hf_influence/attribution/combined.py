"""Several rankings as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_influence.attribution.auto.auto import agreement, digits
from hf_influence.attribution.given import fingerprint
from hf_influence.attribution.method import methods
from hf_influence.dataset.groups import group_of
from hf_influence.dataset.matching import in_order_of_first
from hf_influence.errors import BadSetting
from hf_influence.scores import Scores, ranks_within

WITH_QUERIES = "with_queries"
"""In the report: whether any of the scores compares with queries."""


def combined(*scores: Scores, groups: Sequence[Any] | None = None) -> Scores:
    """The mean rank over several scores of the same examples.

        score[i] = 1/|P| Σ_p (rank_p(i) − ½) / n,   ranks of the mean over the queries, from 1 to n

    As `auto` does for its parts, here for scores of any origin: of several stores, runs or seeds, of `out_of_fold`, or
    numbers of yours.

    Args:
        *scores: At least one.
        groups: The task, source or class of each example, in the order of the first scores, within which it is ranked.

    Returns:
        Scores of method "combined" in (0, 1), in the order of the first; the report says how far they agree, and
        whether any of them compares with queries. Of the groups the settings keep a fingerprint.

    Raises:
        BadSetting: No scores, something else, scores of different examples, or groups that do not fit.

    >>> import torch
    >>> a = Scores(torch.tensor([[0.9], [-0.4], [0.2]]), ["x", "y", "z"], "ip")
    >>> b = Scores(torch.tensor([[-3.0], [-1.0], [-2.0]]), ["y", "x", "z"], "loss")
    >>> combined(a, b).lowest(3)
    ['y', 'z', 'x']
    """
    if not scores:
        raise BadSetting("no scores were given, so there is nothing to combine.")
    if others := [type(one).__name__ for one in scores if not isinstance(one, Scores)]:
        raise BadSetting(f"{others[0]} is no scores. Give each as an argument: combined(a, b), or combined(*several).")
    ids, values = scores[0].ids, in_order_of_first(scores)
    within = [None] * len(ids) if groups is None else list(map(group_of, groups))
    if len(within) != len(ids):
        raise BadSetting(f"{len(within)} groups for {len(ids)} examples; give one for each.")
    used = {} if groups is None else {"groups": f"{len(set(within))} groups, {fingerprint(within)}"}
    ranks = {
        f"{k} {one.method}": ranks_within(digits(own.mean(1), one.values.dtype), within)
        for k, (one, own) in enumerate(zip(scores, values, strict=True))
    }
    return Scores(
        torch.stack(list(ranks.values()), 1).mean(1, keepdim=True),
        ids,
        "combined",
        {"of": [{"method": one.method, "settings": dict(one.settings)} for one in scores]} | used,
        id_column=scores[0].id_column,
        report={
            "agreement": {name: agreement(name, ranks) for name in ranks if len(ranks) > 1},
            WITH_QUERIES: any(map(compare_with_queries, scores)),
        },
        contents=scores[0].contents,
    )


def compare_with_queries(scores: Scores) -> bool:
    """Whether the scores, or some that they were made of, say how far an example helps queries."""
    parts = [name for name in scores.report.get("parts", {}) if name in methods()]  # of "auto"
    asked = scores.query_ids is not None or any("queries" in methods()[name].needs for name in parts)
    return asked or bool(scores.report.get(WITH_QUERIES))
