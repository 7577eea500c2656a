"""How many rows go, and which: the rule of a filter, group by group."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_influence.dataset.groups import group_of
from hf_influence.dataset.wording import printable
from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter.wording import quoted
from hf_influence.scores import mean_ranks


def check_amount(name: str, amount: Any, *, fractions: bool = True) -> None:
    """BadSetting unless it is a fraction in [0, 1) or a count."""
    if isinstance(amount, str) and fractions and re.fullmatch(r"\d+(\.\d+)?\s*%", amount):
        share = Fraction(amount.rstrip("% ")) / 100
        raise BadSetting(f"{name}={amount!r} is a text. Give the share as a number: write {float(share):g}.")
    limit = math.inf if isinstance(amount, Integral) else 1
    whole = not fractions and not isinstance(amount, Integral)
    if whole or not isinstance(amount, Real) or isinstance(amount, bool) or not 0 <= float(amount) < limit:
        fraction = f"a float in [0, 1), such as {name}=0.05, or " if fractions else ""
        raise BadSetting(
            f"{name}={amount!r} is neither a fraction nor a count. Give {fraction}an int, such as {name}=100."
        )


def count_of(amount: Any, n: int) -> int:
    """The rows that a fraction (rounded down, 0.29 of 100 being 29) or a count of `n` rows stands for."""
    return int(amount) if isinstance(amount, Integral) else int(Fraction(str(amount)) * n)


def groups_of(dataset: Dataset | None, column: str | None, n: int) -> dict[Hashable, list[int]]:
    """Value of the column, as `group_of` has it -> the rows with it; all of the `n` rows under one without a column.

    Raises:
        BadExample: No such column.
        BadSetting: A column of a stream, whose values are not known before its end.
    """
    if column is None:
        return {None: list(range(n))}
    if dataset is None:
        raise BadSetting(
            f"within={column!r} needs a column of all rows, and a stream has it at its end only. Make a Dataset of it "
            "(Dataset.from_generator), or filter it as a whole."
        )
    if column not in dataset.column_names:
        raise BadExample(f"within={column!r} is no column of the dataset (it has {dataset.column_names}).")
    rows: dict[Hashable, list[int]] = {}
    for i, value in enumerate(dataset.with_format(None)[column][:]):
        rows.setdefault(group_of(value), []).append(i)
    return rows


def lengths_of(dataset: Dataset | None, column: str) -> Tensor:
    """How many tokens each row has, `[n]`.

    Raises:
        BadExample: No such column, or a row without a list in it.
        BadSetting: Of a stream.
    """
    if dataset is None:
        raise BadSetting(
            "keep_tokens counts the tokens of all rows, and a stream has them at its end only. Make a Dataset of it "
            "(Dataset.from_generator), or give drop=… or keep=…."
        )
    if column not in dataset.column_names:
        raise BadExample(
            f"keep_tokens counts the entries of the column {column!r}, and the dataset has "
            f"{dataset.column_names}. Name the column of tokens: DatasetFilter(keep_tokens=…, tokens='…')."
        )
    values = dataset.with_format(None)[column][:]
    if (row := next((i for i, value in enumerate(values) if not isinstance(value, list)), None)) is not None:
        raise BadExample(
            f"row {row} has {printable(repr(values[row]))} in the column {column!r}, which is no list of tokens, so "
            "they cannot be counted. Name the column of tokens: DatasetFilter(keep_tokens=…, tokens='…')."
        )
    return torch.tensor(list(map(len, values)))


def gone_by(values: Tensor, groups: dict[Hashable, list[int]], cut: Callable[[Tensor, list[int]], Tensor]) -> Tensor:
    """Which rows go, `[n]`, if each group is cut for itself.

    Args:
        values: `[n, q]`.
        groups: See `groups_of`.
        cut: Values of a group and its rows -> one flag a row.
    """
    gone = torch.zeros(len(values), dtype=torch.bool)
    for rows in groups.values():
        gone[rows] = cut(values[rows], rows)
    return gone


def reasons_of(
    rule: str, gone: Tensor, groups: dict[Hashable, list[int]], column: str | None
) -> tuple[tuple[str, ...], list[int]]:
    """How the rule falls, as a text for each group, and which of the texts goes with each row."""
    texts, which = [], [0] * len(gone)
    for number, (value, rows) in enumerate(groups.items()):
        place = "" if column is None else f" whose {quoted(column)} is {quoted(value)}"
        texts.append(f"the rule {rule} drops {int(gone[rows].sum())} of the {len(rows)} rows{place}")
        for i in rows:
            which[i] = number
    return tuple(texts), which


def mean_place(values: Sequence[Tensor]) -> Tensor:
    """The mean over rankings `[n, q]` of each row's place, from 0 (lowest) to 1, `[n]`."""
    ranks = torch.stack([mean_ranks(ranking.mean(1)) for ranking in values])
    return ((ranks - 1) / max(1, ranks.shape[1] - 1)).mean(0)
