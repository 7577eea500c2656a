"""From what a store holds to the methods that can run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_influence.attribution.method import class_of, methods
from hf_influence.attribution.selection import Selection
from hf_influence.store import GradientStore
from hf_influence.store.artifacts import COLLECTED_BY, has_artifact


def lacking(
    store: str | Path | GradientStore, *, train_split: str = "train", query_split: str = "query"
) -> dict[str, tuple[str, ...]]:
    """What each method needs and the store does not hold; nothing for those that can run now.

    >>> lacking("runs/mine")["datainf"]                                # doctest: +SKIP
    ()
    >>> lacking("runs/mine")["tracin"]                                 # doctest: +SKIP
    ('points',)

    "labels" and "texts" are things to pass: `attribute(store, method, labels=[...])`.

    Args:
        store: A store, or the path of one.
        train_split: The split to score.
        query_split: The split to compare with.

    Returns:
        Method -> what it lacks, in the words of `About.needs`, in the order of the table.

    Raises:
        StoreError: There is no store, or it is damaged.
    """
    store = store if isinstance(store, GradientStore) else GradientStore.open(store)
    held = _held(store, train_split, query_split)
    found = {}
    for name, about in methods().items():
        own = held["points" if "points" in about.needs else "final"] | held["store"]
        own = own | (held["end"] & getattr(class_of(name), "at_end", frozenset()))
        if getattr(class_of(name), "kind", None) in held["kinds"]:
            own = own | {"members"}
        found[name] = tuple(need for need in about.needs if need not in own)
    return found


def _held(store: GradientStore, train_split: str, query_split: str) -> dict[str, set[Any]]:
    """Words for what there is: in the store, at point 0, at all points of training, at one of both ends, as members."""
    rows = Selection(store, train_split, query_split)
    final = rows.words()
    training = [point for point in store.points("weights") if point and train_split in store.splits(point)]
    points = [rows.at(point).words() for point in training]
    points = [words for words in points if "step" in words]
    points = points or [rows.at(point).words() for point in store.points("checkpoint")]
    return {
        "store": {name for name in COLLECTED_BY if has_artifact(store, name)},
        "final": final,
        "end": final.union(*points[-1:]),
        "points": set.intersection(*points) | {"points"} if points else final,
        "kinds": {store.point_about(point).kind for point in store.points()},
    }
