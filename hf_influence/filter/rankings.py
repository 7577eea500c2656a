"""What rules are given to decide by: scores, a file of them, or a store that has yet to be scored, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_influence.attribution.attribute import attribute
from hf_influence.errors import BadSetting
from hf_influence.scores import LOG_ODDS, Scores
from hf_influence.store import GradientStore

StoreOrPath = str | Path | GradientStore
Ranking = Scores | StoreOrPath
Given = Ranking | Sequence[Ranking]


def rankings_of(given: Given) -> list[Scores]:
    """Scores as they are, or out of a file; of a store, or the path of one, those of `attribute(store)`, by "auto".

    Raises:
        BadSetting: None, or something else, such as numbers without ids or a dataset.
        StoreError: A path of neither.
    """
    several = [given] if isinstance(given, Ranking) or not isinstance(given, Sequence) else given
    if not several:
        raise BadSetting("no scores were given, so there is nothing to rank the rows by.")
    return [_ranking_of(one) for one in several]


def one_ranking_of(given: Given, rule: str) -> Scores:
    """The scores of a rule that goes by one set of them; errors as in `rankings_of`, and several are refused."""
    first, *others = rankings_of(given)
    if others:
        raise BadSetting(f"{rule} goes by one set of scores, and {len(others) + 1} were given.")
    return first


def store_of(given: Any) -> StoreOrPath | None:
    """The store, or the path of one; `None` of anything else, and of a file, which holds scores."""
    is_file = isinstance(given, (str, Path)) and Path(given).expanduser().is_file()
    return given if isinstance(given, StoreOrPath) and not is_file else None


def _ranking_of(given: Any) -> Scores:
    if isinstance(given, Scores):
        return given
    if (store := store_of(given)) is not None:
        return attribute(store)
    if isinstance(given, (str, Path)):
        return Scores.load(given)
    raise BadSetting(
        f"{type(given).__name__} is no scores. Pass what attribute(store) gives, the file that it was saved to, or the "
        "store, after the dataset; numbers of yours as Scores(values, ids, 'mine'), values [n, 1] and ids the places "
        "of the rows in the dataset."
    )


def estimates_of(rankings: Sequence[Scores]) -> tuple[dict[str, Any], ...]:
    """What scores that are log-odds take for wrong, one by one; nothing of others, or where it is not known.

    `method`, the share that is `wrong`, whether it was `told` (`share_wrong=…`) or is an estimate, and the `auc` with
    which right and wrong labels of the queries are told apart.
    """
    found = []
    for scores in rankings:
        told, auc = scores.settings.get("share_wrong"), scores.report.get(LOG_ODDS, {}).get("auc")
        share = scores.report.get("estimated_share_wrong") if told is None else told
        if auc is not None and share is not None:
            found.append({"method": scores.method, "wrong": share, "told": told is not None, "auc": auc})
    return tuple(found)


def wrong_of(rankings: Sequence[Scores], ids: Sequence[Any]) -> Tensor:
    """The probability that the label of each of the rows `ids` is wrong, `[n]` in float64.

    Raises:
        BadSetting: Several sets of scores, or scores that are no log-odds.
    """
    scores = one_ranking_of(rankings, "how='posterior'")
    wrong = dict(zip(scores.ids, scores.probability_wrong().tolist(), strict=True))
    return torch.tensor([wrong[name] for name in ids], dtype=torch.float64)


def statistic_in(store: StoreOrPath, scores: Scores, name: str, ids: Sequence[Any]) -> Tensor | None:
    """A statistic of the scored rows `ids`, `[n, …]`, by a store of them; `None` unless it has it of every one.

    It is that at the point that was scored. Where several were, the weights after training come first, then the last
    point that has the row.

    Raises:
        StoreError: No store.
    """
    opened = GradientStore.open(store)
    settings, found = scores.settings, dict[Any, Tensor]()
    split = settings.get("train_split", "train")
    points = [settings["point"]] if "point" in settings else settings.get("points", opened.points("weights"))
    for point in points if len(points) == 1 else [0, *sorted(points, reverse=True)]:
        if split in opened.splits(point) and not found.keys() >= set(ids):
            rows = opened.rows(split, point)
            found = dict(zip(rows.ids, rows.stats.get(name, ()), strict=False)) | found
    return torch.stack([found[one] for one in ids]) if found and found.keys() >= set(ids) else None
