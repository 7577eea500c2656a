"""Which row of a dataset a score belongs to."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from numbers import Integral
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
PACKED, PIECES = "seq_lengths", "piece_of"
"""The columns of rows that TRL has packed, and of pieces into which it would cut long ones."""


def in_dataset_order(dataset: Dataset, scores: Scores) -> Tensor:
    """The values of the scores, `[n, q]` in float64, one row for each row of the dataset; errors as in `positions`."""
    return _values(scores, positions(dataset, scores))


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
    return [in_order(one, ids) for one in rankings]


def in_order(scores: Scores, ids: Sequence[Any]) -> Tensor:
    """The values of the examples `ids`, all of which have a score, `[n, q]` in float64."""
    place = {name: i for i, name in enumerate(scores.ids)}
    return _values(scores, torch.tensor([place[name] for name in ids], dtype=torch.long))


def _values(scores: Scores, at: Tensor) -> Tensor:
    return scores.values.detach().cpu().double().index_select(0, at)


def positions(dataset: Dataset, scores: Scores) -> Tensor:
    """Row of the scores for each row of the dataset, `[n]`.

    Without an id column each has to be the other's, row by row. With one every row of the dataset needs a score; scores
    of rows that were left out since are left aside.

    Raises:
        BadExample: Not a `datasets.Dataset`, no rows, no such id column, or an id twice.
        BadSetting: Scores of another dataset, or of another order, as far as that can be told.
    """
    _check(dataset, scores.id_column)
    if scores.id_column is None and scores.contents is None:
        raise BadSetting(
            "the scores are of a stream, whose examples are numbered in the order of training, and that need not be "
            "the order of the dataset. Apply them to a stream of its rows, DatasetFilter(…).apply("
            "dataset.to_iterable_dataset(), scores, by='runs/…'), which the store knows by their tokens (of an "
            "SFTTrainer those of trainer.train_dataset); or capture with id_column=…."
        )
    n, id_column = len(dataset), scores.id_column
    if id_column is None and PACKED in (scores.contents or {}) and PACKED not in dataset.column_names:
        raise BadSetting(
            f"the scores cover {len(scores)} rows into which an SFTTrainer has packed several examples each "
            f"(packing=True), and the dataset has {n} examples. Capture with GradientCapture(…, train_dataset=…), the "
            "examples that you have, which then are told apart."
        )
    if id_column is None and len(scores) != n:
        raise BadSetting(_other_length(n, scores))
    ids = ids_of(dataset, id_column)
    if len(set(ids)) < n:
        raise BadExample(
            f"id {_first_twice(ids)!r} occurs more than once in column '{id_column}', so its score could mean either "
            "row. Use a column of unique ids."
        )
    place = {id_: i for i, id_ in enumerate(scores.ids)}
    if len(place) < len(scores):
        raise BadSetting(
            f"the scores have id {_first_twice(scores.ids)!r} more than once, so some rows have none. Score the "
            "dataset anew."
        )
    if missing := [id_ for id_ in ids if id_ not in place]:
        raise BadSetting(_without_score(missing, n, scores))
    if id_column is None:
        _check_contents(dataset, scores.contents or {})
    return torch.tensor([place[id_] for id_ in ids])


def _first_twice(ids: Sequence[Any]) -> Any:
    return next(id_ for id_, count in Counter(ids).items() if count > 1)


def _without_score(missing: Sequence[Any], n: int, scores: Scores) -> str:
    """What to say of rows that have no score."""
    if scores.id_column is None:
        unknown = [id_ for id_ in scores.ids if not isinstance(id_, Integral) or not 0 <= id_ < n]
        return (
            f"{len(unknown)} of the {n} ids of the scores are not an index of the dataset (0 to {n - 1}); the first is "
            f"{unknown[0]!r}. Filter the dataset that was scored."
        )
    named = ", ".join(repr(id_) for id_ in missing[:5]) + (", …" if len(missing) > 5 else "")
    return (
        f"{len(missing)} of the {n} rows of the dataset have no score: {named} in column '{scores.id_column}' are not "
        f"among the {len(scores)} ids of the scores (the first of these is {scores.ids[0]!r}), and what becomes of "
        "such rows would be chance. Score them too, or leave them out: ids = set(scores.ids); "
        f"dataset.filter(lambda row: row['{scores.id_column}'] in ids). If it was training that left rows out, "
        "filter trainer.train_dataset."
    )


def _other_length(n: int, scores: Scores) -> str:
    """What to say where a dataset has not as many rows as were scored."""
    known = scores.contents or {}
    found = f"the scores cover {len(scores)} examples and the dataset has {n} rows: "
    if len(scores) > n and (PIECES in known or not known):
        return found + (
            "they belong to another dataset, or to another version of it, or to pieces: with "
            'packing_strategy="bfd_split" an SFTTrainer cuts long rows, and the scores are of the pieces. Train with '
            '"bfd"; otherwise filter the dataset that was scored, or score this one.'
        )
    if len(scores) > n:
        return found + (
            "rows were left out since, and which is not known, or it is another one. Filter the dataset that was "
            "scored and leave rows out afterwards, or score with id_column=…, a column that names the examples."
        )
    return found + (
        "rows were left out before they were scored, by a map or a filter or by an SFTTrainer (those of which no "
        "answer is left within max_length), and which is not known, or it is another one. Filter what was trained on, "
        "trainer.train_dataset; or capture with id_column=…, a column that names the examples, or from an SFTTrainer "
        "with GradientCapture(…, train_dataset=…), the rows that you have."
    )


def _check_contents(dataset: Dataset, scored: dict[str, list[Any]]) -> None:
    """Whether it looks like the dataset that was scored, by the columns with the most distinct values that both have.

    Warns where they have none such, where these have few distinct values and hold others, as labels that were turned,
    and where some hold other values and some the same, as an edited text beside its tokens.

    Raises:
        BadSetting: Its rows are in another order, or other rows: none of these columns holds what it did.
    """
    dataset = _labelled_as(scored, dataset)
    shared = {name: codes[0] for name, codes in scored.items() if name in dataset.column_names and codes[0] > 1}
    most = max(shared.values(), default=0)
    telling = [name for name, distinct in shared.items() if distinct > most / 2]
    many = most > min(MANY, len(dataset) / 2)
    now = {name: _codes_of(dataset, name, *scored[name][3:]) for name in telling}
    other = [name for name in telling if now[name][1] != scored[name][1]]
    moved = [name for name in other if now[name][2] == scored[name][2]]
    if moved and many:
        raise BadSetting(
            f"the column {moved[0]!r} holds what was scored in another order: the dataset was shuffled or sorted "
            "since, and its rows are known by their places. Filter it in the order in which it was scored, or score it "
            "with an id column, GradientCapture(…, id_column=…) or collect(…, id_column=…), which names the examples "
            "wherever they are."
        )
    if other and other == telling and many:
        raise BadSetting(
            f"{_columns(other)} of the dataset do not hold what was scored, so the scores are of other rows: a row "
            "would be dropped for what another is. Filter the dataset that was scored. If this is it and its rows were "
            "changed on purpose, filter first and change what is left, or score with an id column (GradientCapture(…, "
            "id_column=…)); where row i is still row i for sure, dataclasses.replace(scores, contents={}) goes by that."
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
    if other and (same := [name for name in telling if name not in other]):
        warnings.warn(
            f"{_columns(other)} of the dataset do not hold what was scored, and {_columns(same)} do, so its rows may "
            "be the same ones or numbered alike. Filter the dataset that was scored; if it is, and its values were "
            "changed on purpose, all is well.",
            stacklevel=5,
        )
    elif other:
        warnings.warn(
            f"{_columns(other)} of the dataset do not hold what was scored, so the scores may be of other rows. Filter "
            "the dataset that was scored; if it is, and its values were changed on purpose, all is well.",
            stacklevel=5,
        )


def _codes_of(dataset: Dataset, name: str, ending: str = "") -> list[Any]:
    """What a column is known by, its texts with the ending that was theirs when they were scored."""
    if ending:
        texts = dataset.with_format(None)[name][:]
        if all(isinstance(text, str) for text in texts):
            dataset = Dataset.from_dict({name: [text if text.endswith(ending) else text + ending for text in texts]})
    return column_codes(dataset, [name])[name]


def _columns(names: Sequence[str]) -> str:
    return f"the values of {', '.join(map(repr, names))}"


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
