"""From stored rows to scores."""

from __future__ import annotations

import warnings
from numbers import Integral
from pathlib import Path
from typing import Any

from hf_influence.attribution.auto.auto import Auto
from hf_influence.attribution.finite import check_finite
from hf_influence.attribution.method import Method, class_of, make_method
from hf_influence.attribution.selection import Selection
from hf_influence.errors import BadSetting, MissingRows
from hf_influence.gradients.processes import world
from hf_influence.scores import Scores
from hf_influence.store import Claim, GradientStore


def attribute(
    store: str | Path | GradientStore,
    method: str = "auto",
    *,
    train_split: str = "train",
    query_split: str = "query",
    point: int | None = None,
    **settings: Any,
) -> Scores:
    """Score every training example of a store. Higher = more worth keeping.

    The model is not needed: rows are read, in chunks that fit into memory, and the store is not changed.
    `attribute(store, scores.method, **scores.settings)` computes the same scores again; lists with an entry for each
    example (`groups`, `labels`, texts), of which scores keep a fingerprint, are passed again.

    Args:
        store: A store, or the path of one.
        method: A name in the table of methods; `hf-influence methods` lists them. By default "auto", which combines
            what the store holds.
        train_split: The split to score.
        query_split: The split to compare with, for a method that compares with queries.
        point: The parameter point at which the gradients were taken; by default 0, the weights after training. A method
            over several points has a setting `points` instead: by default all points of training, or all members of
            its ensemble.
        **settings: The settings of the method.

    Returns:
        `Scores` of shape `[n_train, n_query]` in dataset order; one column for a method without queries. A method over
        several points scores the examples that any of them holds.

    Raises:
        UnknownMethod: No method of that name.
        BadSetting: A setting that the method does not have, or a value that it cannot use.
        MissingRows: The store does not hold what the method needs, queries or points of training for instance.
        StoreMismatch: The store is compressed in a way that the method cannot use, or its points are of different
            datasets.
        BadExample: A row holds NaN or infinity.
        NotConverged: A method that iterates did not come to a result.
    """
    if point is not None and (isinstance(point, bool) or not isinstance(point, Integral)):
        raise BadSetting(
            f"point={point!r} is no number of a parameter point. GradientStore.open(path).points() has them."
        )
    chosen = make_method(method, settings)
    opened = GradientStore.open(store)
    if query_split != "query" and _looks_at_queries(chosen):
        _check_split(opened, query_split)
    if query_split == "query" and isinstance(chosen, Auto) and chosen.parts is None:
        _tell_of_others(opened, train_split)
    _tell_of_unfinished(opened)
    rows = chosen.select(Selection(opened, train_split, query_split), None if point is None else int(point))
    values = chosen.score(rows)
    with_queries = "queries" in chosen.needs
    check_finite(values, *(part.train for part in rows.parts), *(part.query for part in rows.parts if with_queries))
    where: dict[str, Any] = {"train_split": train_split}
    settings_used = chosen.record(rows)
    where |= {} if "points" in settings_used else {"point": rows.points[0]}
    where |= {"query_split": query_split} if _looks_at_queries(chosen) else {}
    columns = chosen.columns(rows)
    return Scores(
        values,
        rows.ids,
        method,
        where | settings_used,
        columns,
        rows.train.id_column,
        chosen.report,
        _contents(rows),
    )


def _contents(rows: Selection) -> dict[str, list[Any]] | None:
    """What the dataset is known by: all columns that any of the points was shown, as the end has them if it does."""
    known = [part.train.contents for part in sorted(rows.parts, key=lambda part: part.points, reverse=True)]
    if None in known:
        return None
    return {name: codes for contents in known for name, codes in (contents or {}).items()}


def _looks_at_queries(method: Method) -> bool:
    """Whether it asks for queries; by default "auto" does where they are there."""
    parts = method.parts if isinstance(method, Auto) else (method.name,)
    return parts is None or any("queries" in class_of(name).needs for name in parts)


def _tell_of_others(store: GradientStore, train_split: str) -> None:
    """Say so where "auto" has to do without queries, though there is a split that may hold some."""
    splits = store.splits_anywhere()
    if train_split in splits and "query" not in splits and (others := sorted(splits - {train_split})):
        warnings.warn(
            f"{store.path} has no split 'query', so 'auto' goes without clean queries. If {others[0]!r} holds some: "
            f"attribute(…, query_split={others[0]!r}).",
            stacklevel=3,
        )


def _tell_of_unfinished(store: GradientStore) -> None:
    """Say so where a training run, not this one, still fills the store, or was cut short."""
    if world() > 1:  # this may be a process beside the one that fills it
        return
    if run := Claim.of_another(store.path):
        warnings.warn(
            f"the training run that fills {store.path} ({run.whose}) goes on or was cut short, so the scores are by "
            "what it has captured so far. Wait for its end; a run that died goes on from its last checkpoint with "
            "trainer.train(resume_from_checkpoint=True). If it is to stay as it is, delete the file run.json there.",
            stacklevel=3,
        )


def _check_split(store: GradientStore, split: str) -> None:
    """A split that was asked for by name is there, so that "auto" does not go without it in silence.

    Raises:
        MissingRows: It is at no point.
    """
    splits = store.splits_anywhere()
    if split not in splits:
        raise MissingRows(
            f"{store.path} holds no rows of the split {split!r} at any point (it has: "
            f"{', '.join(sorted(splits)) or 'none'}). Name one of those with query_split=…, or collect it: "
            f"collect(model, dataset, {str(store.path)!r}, split={split!r})."
        )
