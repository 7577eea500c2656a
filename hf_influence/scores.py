"""Scores: what a method returns, and the one place that fixes their direction."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from scipy.stats import rankdata
from torch import Tensor

from hf_influence.errors import BadSetting, MissingRows, StoreError
from hf_influence.saving import as_json, save_tensors

LOG_ODDS = "log_odds"
"""In the report of scores that are the log-odds of a right label, ln((1 − p) / p) for a wrong one's probability p."""

RANKS_ONLY = "ranks_only"
"""In the report of scores by "auto" that are no log-odds: why, and what would make them so."""


def mean_ranks(values: Tensor) -> Tensor:
    """The rank of each value, 1 for the lowest, ties at their mean rank, `[n]` in float64 on the CPU."""
    return torch.from_numpy(rankdata(values.detach().to("cpu", torch.float64).numpy()))


def ranks_within(values: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """(rank − ½) / n among the n of the same group, 1 for the lowest, ties at their mean rank, `[n]` in float64."""
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    ranks = torch.zeros(len(values), dtype=torch.float64)
    for at in members.values():
        ranks[at] = (mean_ranks(values[at]) - 0.5) / len(at)
    return ranks


@dataclass(frozen=True)
class Scores:
    """One number per training example and query. **Higher = more worth keeping.**

    With queries: removing the example is predicted to raise the query loss. Without queries
    (self-influence, outliers, baselines): the example is more typical. So for every method the
    lowest scores are the ones to trim.

    Attributes:
        values: `[n_train, n_query]`; one column for a method without queries.
        ids: The training examples in the order of the rows: index in the dataset, or value of the id column.
        method: Name in the method table.
        settings: The settings of the method, enough to compute the scores again; of lists with an entry for each
            example (`groups`, `labels`, texts) a fingerprint.
        query_ids: The queries in the order of the columns; `None` for a method without queries.
        id_column: The column of the dataset that holds the ids; `None` where they are its indices.
        report: What the method found on the way and is no setting: iterations and residuals, the choice of a damping.
        contents: What the dataset that was scored is known by, so that no other is taken for it: column -> how many
            values are distinct, and hashes of them all. `{}` where nothing is known, `None` of a stream.
    """

    values: Tensor
    ids: list[int] | list[str]
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    query_ids: list[int] | list[str] | None = None
    id_column: str | None = None
    report: dict[str, Any] = field(default_factory=dict)
    contents: dict[str, list[Any]] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.query_ids is not None and not len(self.query_ids) and len(self.ids):
            raise MissingRows(
                f"method '{self.method}' compares with queries, and the query split holds no examples, so there is no "
                "score. Collect some queries."
            )
        columns = 1 if self.query_ids is None else len(self.query_ids)
        if self.values.ndim != 2 or self.values.shape != (len(self.ids), columns):
            raise BadSetting(
                f"scores of shape {list(self.values.shape)} for {len(self.ids)} training examples and {columns} "
                "column(s): values must be [n_train, n_query], with one column where there are no queries."
            )
        if not torch.isfinite(self.values).all():
            row = int((~torch.isfinite(self.values)).any(1).nonzero()[0])
            raise BadSetting(
                f"method '{self.method}' gave a score that is not finite for training example {self.ids[row]!r}. The "
                "rows or the damping are out of range; look at the example, or raise the damping."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        """How many, by which method, and the lowest ids: not the numbers themselves."""
        columns = "" if self.query_ids is None else f" × {len(self.query_ids)} queries"
        lowest = ", ".join(map(repr, self.lowest(5)))
        wrong = f", {float(self.probability_wrong().mean()):.0%} probably wrong" if LOG_ODDS in self.report else ""
        return f"Scores({len(self)} examples{columns} by '{self.method}'{wrong}; lowest {lowest or 'none'})"

    def mean(self) -> Tensor:
        """Mean over the queries, `[n_train]` in float64, as a filter ranks by it."""
        return self.values.double().contiguous().mean(1)

    def lowest(self, k: int) -> list[int] | list[str]:
        """Ids of the `k` examples least worth keeping, worst first; ties in dataset order.

        Raises:
            BadSetting: `k` is negative, or no whole number.
        """
        if not isinstance(k, Integral) or k < 0:
            raise BadSetting(f"lowest({k!r}): how many examples to give is a whole number of 0 or more.")
        order = self.mean().argsort(stable=True)[:k].tolist()
        return [self.ids[i] for i in order]

    def probability_wrong(self) -> Tensor:
        """Of wrong labels or answers the probability, `[n_train]`: 1 / (1 + exp(score)), of scores that are log-odds.

        Raises:
            BadSetting: They are not; those by "auto" are, of single labels or of answers to prompts, with clean
                queries that tell right from wrong.
        """
        if LOG_ODDS not in self.report:
            why = self.report.get(RANKS_ONLY) or (
                "those by 'auto' are, of single labels or of prompts and answers, where clean queries at the end of "
                "training tell right from wrong (collect(…) takes wrong_labels=True or other_prompts=2 for that)"
            )
            raise BadSetting(f"scores by '{self.method}' rank the examples and are no probabilities: {why}.")
        return torch.sigmoid(-self.mean())

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file (values as a tensor, the rest as JSON metadata).

        Raises:
            BadSetting: A setting or an id that JSON cannot hold; nothing is written then.
            StoreError: It cannot be written there; an earlier file stays.
        """
        about = as_json({field.name: getattr(self, field.name) for field in fields(self) if field.name != "values"})
        advice = "Make room there, or name another file."
        save_tensors(Path(path).expanduser(), {"values": self.values}, about={"scores": about}, advice=advice)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            StoreError: No such file, or not a file of scores.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise StoreError(f"{path} is not a file. Scores are written by `scores.save(path)`.")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["scores"])
                return cls(values=file.get_tensor("values"), **about)
        except (SafetensorError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path} does not hold scores ({error}). Scores are written by `scores.save(path)`."
            ) from error
