"""From what a store holds to the methods that can run on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hf_influence.attribution.method import About, class_of, make_method, methods
from hf_influence.attribution.over_members import OverMembers
from hf_influence.attribution.over_points import OverPoints
from hf_influence.attribution.selection import Selection
from hf_influence.errors import MissingRows, StoreMismatch
from hf_influence.store import WEIGHTS, GradientStore
from hf_influence.store.artifacts import COLLECTED_BY, has_artifact


def lacking(
    store: str | Path | GradientStore, *, train_split: str = "train", query_split: str = "query"
) -> dict[str, tuple[str, ...]]:
    """What each method needs and the store does not hold; nothing for those that can run now.

    >>> lacking("runs/mine")["datainf"]                                # doctest: +SKIP
    ()
    >>> lacking("runs/mine")["loss_mean"]                              # doctest: +SKIP
    ('points',)

    "labels" and "texts" are things to pass: `attribute(store, method, labels=[...])`.

    Where all of it is held somewhere and the method cannot run on it as it is, one word says why; the error of
    `attribute` says more:

    | word                        | what is wrong                                                                     |
    |-----------------------------|-----------------------------------------------------------------------------------|
    | "examples at point 0"       | not there at the final weights, or not to their end                               |
    | "complete points"           | a point of training, or the end, is cut short or has no queries                   |
    | "complete ensemble"         | a member, or the end, is cut short, has no queries, or does not say how far it is |
    | "uncompressed rows"         | the rows are compressed, or in another way than the method's                      |
    | "rows that belong together" | points of several datasets, ensembles or parameters                               |

    Args:
        store: A store, or the path of one.
        train_split: The split to score.
        query_split: The split to compare with.

    Returns:
        Method -> what it lacks with the settings that it has by default, in the words of `About.needs` and those above,
        in the order of the table.

    Raises:
        StoreError: There is no store, or it is damaged.
    """
    store = GradientStore.open(store)
    rows = Selection(store, train_split, query_split)
    words = {point: _words(rows.at(point)) for point in {0, *store.points()}}
    artifacts = {name for name in COLLECTED_BY if has_artifact(store, name)}
    return {name: _lacks(about, rows, words, artifacts) for name, about in methods().items()}


def _words(rows: Selection) -> set[str]:
    """Words for what a point holds, and for what it is: one of "points", or its kind."""
    words, kind = rows.words(), rows.store.point_about(rows.points[0]).kind
    of_training = kind == "checkpoint" or (kind == WEIGHTS and rows.points[0] and "step" in words)
    return words | {"points" if of_training else kind}


def _lacks(about: About, rows: Selection, words: Mapping[int, set[str]], artifacts: set[str]) -> tuple[str, ...]:
    """What one method lacks: at the points that it would go over or, if it refuses them, anywhere."""
    kind = class_of(about.name)
    why: tuple[str, ...] = ()
    try:
        chosen = make_method(about.name, {}).select(rows, None)
        parts = [part for part in chosen.parts if len(part.train)] or chosen.parts[:1]
    except (MissingRows, StoreMismatch) as error:
        held, why = set().union(*words.values()), (_why(error, about, rows),)
        if getattr(kind, "kind", None) in held:
            held.add("members")
    else:
        held = set.intersection(*(words[part.points[0]] for part in parts)) | {"points", "members"}
        at_end: frozenset[str] = getattr(kind, "at_end", frozenset())
        last = 0 if 0 in chosen.points else chosen.points[-1]
        held = held - at_end | words[last if chosen.query_point is None else chosen.query_point] & at_end
    if "rows" not in about.needs and "query loss" in held:
        held.add("queries")  # without their rows
    return tuple(need for need in about.needs if need not in held | artifacts) or why


def _why(error: MissingRows | StoreMismatch, about: About, rows: Selection) -> str:
    """A word for what a method refuses."""
    kind = class_of(about.name)
    if isinstance(error, StoreMismatch):
        compressed = "rows" in about.needs and rows.store.header.compress is not None
        return "uncompressed rows" if compressed else "rows that belong together"
    if issubclass(kind, OverMembers):
        return "complete ensemble"
    return "complete points" if issubclass(kind, OverPoints) else "examples at point 0"
