"""What is passed with a setting, a value for each example: checked, and recorded by a fingerprint or by value."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.dataset.groups import group_of
from hf_influence.errors import BadSetting
from hf_influence.store import Rows


@dataclass(kw_only=True)
class Labelled(Method):
    """A method that asks for the class of each training example."""

    labels: Sequence[Any] | None = None
    """The class of each training example in dataset order; by default the statistic "label" of the rows."""

    def record(self, rows: Selection) -> dict[str, Any]:
        """The settings, with a fingerprint in place of labels that were passed: they are as many as the rows."""
        if self.labels is None:
            return super().record(rows)
        classes = self.classes(rows.train)
        return replace(self, labels=None).record(rows) | {
            "labels": f"{len(set(classes))} classes, {fingerprint(classes)}"
        }

    def classes(self, train: Rows) -> list[Any]:
        """The class of each training example in dataset order.

        Raises:
            BadSetting: It is not stored and was not passed, or was passed for other examples.
        """
        labels = train.stats.get("label") if self.labels is None else self.labels
        if labels is None:
            if not len(train):
                return []
            raise BadSetting(
                f"method '{self.name}' needs the class of each training example, and {train.folder} does not hold the "
                "statistic 'label'. Pass labels=[...], one for each example in dataset order."
            )
        given = one_for_each(labels, train, self.name, "labels", "classes", "training example")
        return [group_of(label) for label in given]


class Examples(Protocol):
    """Rows, or a selection of them."""

    @property
    def positions(self) -> Tensor:
        """In the dataset, `[n]`."""

    @property
    def dataset_size(self) -> int | None:
        """Of the whole dataset, if it has one."""

    @property
    def id_column(self) -> str | None:
        """What names them."""


def one_for_each(values: Any, rows: Examples, method: str, setting: str, what: str, whose: str) -> list[Any]:
    """The values as a list, one for each row in dataset order; of values for the whole dataset, those of the rows.

    Raises:
        BadSetting: They are not as many, no sequence, or of a stream whose examples have no ids.
    """
    if rows.dataset_size is None and rows.id_column is None:
        raise BadSetting(
            f"method '{method}': {setting} goes by the order of the dataset, and these rows are of a stream, numbered "
            "in the order of training. Capture with id_column=…, and give one for each of rows.ids; or give the "
            "capture a map-style train_dataset of the same examples."
        )
    values = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    plain = hasattr(values, "__len__") and not isinstance(values, str | Mapping | Set)
    listed = list(values) if plain else None  # by place: a column of pandas would be asked for its labels
    if listed is not None and len(listed) == rows.dataset_size:
        listed = [listed[position] for position in rows.positions.tolist()]
    if listed is None or len(listed) != len(rows.positions):
        recorded = isinstance(values, str) and "sha256" in values
        hint = f" That is the fingerprint that scores keep of them: pass the {what} themselves." if recorded else ""
        raise BadSetting(
            f"method '{method}': {setting}={reprlib.repr(values)} is not a sequence of {len(rows.positions)} {what}, "
            f"one for each {whose} in dataset order.{hint}"
        )
    return listed


def fingerprint(values: Sequence[Any]) -> str:
    """Tells the values of one run from those of another."""
    return f"sha256 {hashlib.sha256(json.dumps(list(map(str, values))).encode()).hexdigest()}"
