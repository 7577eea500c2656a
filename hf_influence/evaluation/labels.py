"""Labels brought into the order of the scores, whatever kind of sequence they come in."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from hf_influence.errors import BadExample, BadSetting
from hf_influence.scores import Scores


def labels_for(scores: Scores, labels: Iterable[Any], what: str) -> list[Any]:
    """One label for each of the scored examples, in the order of the scores.

    Ids that are the dataset's own indices (a permutation of 0 … n − 1) pick their labels from dataset order;
    any others, and the values of an id column, take the labels as they come.

    >>> import torch
    >>> labels_for(Scores(torch.zeros(3, 1), [2, 0, 1], "loss"), ["a", "b", "c"], "train_labels")
    ['c', 'a', 'b']

    Raises:
        BadSetting: Not as many labels as scores, or scores of a stream, which has no order.
    """
    if scores.id_column is None and scores.contents is None:
        raise BadSetting(
            f"the scores are of a stream, numbered in the order of training, so it is not known whose the {what} are. "
            "Capture with id_column=…, and give them in the order of scores.ids; or give the capture a map-style "
            "train_dataset of the same examples."
        )
    given = one_each(len(scores), labels, what)
    if scores.id_column is None and set(scores.ids) == set(range(len(scores))):
        return [given[int(i)] for i in scores.ids]
    return given


def one_each(n: int, labels: Iterable[Any], what: str, whose: str = "examples") -> list[Any]:
    """The labels as they come.

    Raises:
        BadSetting: They are not n.
    """
    given = as_list(labels)
    if len(given) != n:
        raise BadSetting(
            f"{what} has {len(given)} entries but the scores cover {n} {whose}, so a label cannot be told for each of "
            "them. Give the labels of exactly what was scored."
        )
    return given


def as_list(values: Iterable[Any]) -> list[Any]:
    """The values of an array, a tensor or any other sequence, numbers of numpy and torch as those of Python."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


def check_single(labels: Sequence[Any], what: str) -> None:
    """Whether each label names one class.

    Raises:
        BadExample: One is a list of labels.
    """
    if (stray := next((label for label in labels if not isinstance(label, Hashable)), None)) is not None:
        raise BadExample(
            f"{what} holds {stray!r}, and each example must have a single label here: the number or the name of its "
            "class. Of examples with several labels take one at a time: [labels[k] for labels in …]."
        )
