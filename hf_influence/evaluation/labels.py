"""Labels brought into the order of the scores, whatever kind of sequence they come in, and wrong ones put in."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Sequence
from typing import Any

from datasets import Dataset, Value

from hf_influence.errors import BadExample, BadSetting
from hf_influence.scores import Scores

ADDED = ("is_wrong", "right_label")
"""The columns of a dataset with wrong labels: where they are, and what was there before."""


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


def with_wrong_labels(dataset: Dataset, label: str, given: Sequence[Any], wrong: Container[int]) -> Dataset:
    """The dataset with other labels in the column `label`, and with the columns `ADDED`.

    Args:
        dataset: With none of these.
        label: The column of labels.
        given: What stands there now, `[n]`.
        wrong: The rows where that is another label than before.
    """
    feature, right = dataset.features[label], list(dataset.with_format(None)[label])
    flags = [i in wrong for i in range(len(right))]
    rows = dataset.add_column(ADDED[0], flags, feature=Value("bool")).add_column(ADDED[1], right, feature=feature)
    rows = rows.remove_columns(label).add_column(label, list(given), feature=feature)
    return rows.select_columns([*dataset.column_names, *ADDED])
