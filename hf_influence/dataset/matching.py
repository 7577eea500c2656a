"""Which row of a dataset a score belongs to."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor

from hf_influence.dataset.contents import column_codes
from hf_influence.errors import BadExample, BadSetting
from hf_influence.scores import Scores
from hf_influence.task import LABELS

MANY = 10
"""Distinct values of a column of which no other is likely to hold each as often."""


def in_dataset_order(dataset: Dataset, scores: Scores) -> Tensor:
    """The values of the scores, `[n, q]` in float64, one row for each row of the dataset; errors as in `positions`."""
    return _ordered(scores, positions(dataset, scores))


def aligned(dataset: Dataset | IterableDataset, rankings: Sequence[Scores]) -> tuple[list[Tensor], Sequence[Any]]:
    """The values of several scores, each `[n, q]`, and the ids, in the order of the dataset.

    A stream has no order that could be known before its end: that of the first of the scores stands for it.

    Raises:
        BadExample: As in `positions`.
        BadSetting: As there; of a stream, scores of different examples.
    """
    if not isinstance(dataset, IterableDataset):
        values = [in_dataset_order(dataset, one) for one in rankings]
        return values, ids_of(dataset, rankings[0].id_column)
    return in_order_of_first(rankings), rankings[0].ids


def in_order_of_first(rankings: Sequence[Scores]) -> list[Tensor]:
    """The values of several scores of the same examples, each `[n, q]` in float64, in the order of the first.

    Raises:
        BadSetting: They are of different examples, or have one twice.
    """
    ids = rankings[0].ids
    place = {name: i for i, name in enumerate(ids)}
    for one in rankings:
        if len(one) != len(ids) or set(one.ids) != set(ids) or one.id_column != rankings[0].id_column:
            raise BadSetting(
                f"the scores by {one.method} and by {rankings[0].method} are of different examples, or name them by "
                "different columns. Score the same rows with each."
            )
    if len(place) < len(ids):
        raise BadSetting("the scores have an id more than once. Score the dataset anew.")
    return [_ordered(one, torch.tensor([place[name] for name in one.ids], dtype=torch.long)) for one in rankings]


def _ordered(scores: Scores, at: Tensor) -> Tensor:
    ordered = torch.empty(scores.values.shape, dtype=torch.float64)
    ordered[at] = scores.values.detach().cpu().double()
    return ordered


def positions(dataset: Dataset, scores: Scores) -> Tensor:
    """Row of the dataset for each row of the scores, `[n]`; each row exactly once.

    Raises:
        BadExample: Not a `datasets.Dataset`, no rows, or no such id column.
        BadSetting: Scores of another dataset.
    """
    _check(dataset, scores.id_column)
    if scores.id_column is None and scores.contents is None:
        raise BadSetting(
            "the scores are of a stream, whose examples are numbered in the order of training, and that need not be "
            "the order of the dataset. Apply them to a stream of its rows, DatasetFilter(…).apply("
            "dataset.to_iterable_dataset(), scores, by=StreamRows(store='runs/…', data_collator=…)), which knows them "
            "by their contents; or capture with id_column=…."
        )
    n, id_column = len(dataset), scores.id_column
    if len(scores) != n:
        raise BadSetting(
            f"the scores cover {len(scores)} examples and the dataset has {n} rows: they belong to another "
            "dataset, or to another version of it. Filter the one that was scored, or score this one. (An SFTTrainer "
            "leaves out rows that are too long: pass GradientCapture(…, train_dataset=…) the rows that you have. With "
            'packing_strategy="bfd_split" it cuts rows to pieces, and the scores are of those: train with "bfd".)'
        )
    ids = ids_of(dataset, id_column)
    row = {id_: i for i, id_ in enumerate(ids)}
    if len(row) < n:
        twice = next(id_ for id_, count in Counter(ids).items() if count > 1)
        raise BadExample(
            f"id {twice!r} occurs more than once in column '{id_column}', so its score could mean either row. Use "
            "a column of unique ids."
        )
    if unknown := [id_ for id_ in scores.ids if id_ not in row]:
        where = f"in column '{id_column}'" if id_column else f"an index of the dataset (0 to {n - 1})"
        raise BadSetting(
            f"{len(unknown)} of the {n} ids of the scores are not {where}; the first is {unknown[0]!r}. Filter the "
            "dataset that was scored."
        )
    if len(set(scores.ids)) < n:
        twice = next(id_ for id_, count in Counter(scores.ids).items() if count > 1)
        raise BadSetting(
            f"the scores have id {twice!r} more than once, so some rows have none. Score the dataset anew."
        )
    if id_column is None:
        _check_contents(dataset, scores.contents or {})
    return torch.tensor([row[id_] for id_ in scores.ids])


def _check_contents(dataset: Dataset, scored: dict[str, list[Any]]) -> None:
    """Whether it looks like the dataset that was scored, by the columns with the most distinct values that both have.

    Warns where they have none such.

    Raises:
        BadSetting: Its rows are in another order.
    """
    dataset = _labelled_as(scored, dataset)
    shared = {name: codes[0] for name, codes in scored.items() if name in dataset.column_names and codes[0] > 1}
    telling = [name for name, distinct in shared.items() if distinct > max(shared.values()) / 2]
    now = column_codes(dataset, telling)
    moved = [name for name in telling if now[name] != scored[name] and now[name][2] == scored[name][2]]
    if moved and shared[moved[0]] > min(MANY, len(dataset) / 2):
        raise BadSetting(
            f"the column {moved[0]!r} holds what was scored in another order: the dataset was shuffled or sorted "
            "since, and its rows are known by their places. Filter it in the order in which it was scored, or score it "
            "with id_column=…, a column that names the examples wherever they are."
        )
    if scored and not telling and len(dataset) > 1:
        by = [name for name, codes in scored.items() if codes[0] > 1] or "no column"
        warnings.warn(
            f"what was scored is told apart by {by}, of which the dataset with {dataset.column_names} has nothing to "
            "compare, so whether it was shuffled since is not known. If it is in the order in which it was scored, all "
            "is well. To be sure filter the dataset that was scored, such as the tokenised one, or score it with "
            "id_column=…, a column that names the examples wherever they are.",
            stacklevel=5,
        )
    if telling and all(now[name] != scored[name] for name in telling):
        warnings.warn(
            f"the column {telling[0]!r} does not hold what was scored, so the scores may be of other rows. Filter the "
            "dataset that was scored; if it is, and its values were changed on purpose, all is well.",
            stacklevel=5,
        )


def _labelled_as(scored: dict[str, list[Any]], dataset: Dataset) -> Dataset:
    """The dataset with its labels under the name that they had when they were scored, if these are the same labels."""
    then, now = (next((name for name in LABELS if name in names), None) for names in (scored, dataset.column_names))
    if then is None or now is None or then in dataset.column_names:
        return dataset
    renamed = dataset.with_format(None).rename_column(now, then)
    return renamed if column_codes(renamed, [then])[then][2] == scored[then][2] else dataset


def ids_of(dataset: Dataset, id_column: str | None) -> Sequence[Any]:
    """What the rows of the dataset are called, in its order."""
    return range(len(dataset)) if id_column is None else dataset.with_format(None)[id_column][:]


def _check(dataset: Any, id_column: str | None) -> None:
    if isinstance(dataset, IterableDataset):
        raise BadExample(
            "an IterableDataset has all its rows at its end only, and they are needed before. Make a Dataset of it: "
            "Dataset.from_generator(lambda: iter(stream))."
        )
    if isinstance(dataset, DatasetDict):
        raise BadExample(f"a DatasetDict is several datasets. Give the split that was scored, of {list(dataset)}.")
    if not isinstance(dataset, Dataset):
        raise BadExample(
            f"{type(dataset).__name__} is not a datasets.Dataset (or IterableDataset), which is what is filtered. Make "
            "one with Dataset.from_list, Dataset.from_pandas or, for a stream, IterableDataset.from_generator."
        )
    if len(dataset) == 0:
        raise BadExample("the dataset has no rows, so there is nothing to filter. Check how it was loaded.")
    if id_column is not None and id_column not in dataset.column_names:
        raise BadExample(
            f"no column '{id_column}' among {dataset.column_names}, which the scores name their examples by. "
            "Filter the dataset that was scored, with that column."
        )
