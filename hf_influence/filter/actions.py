"""What a decision can do: the words for what happens to a row, and a column that is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Features

DONE = {
    "keep": "kept",
    "drop": "dropped",
    "relabel": "relabelled",
    "weight": "weighted",
    "separate": "separated",
}


@dataclass(frozen=True, kw_only=True)
class Written:
    """A column that a decision writes.

    Attributes:
        name: Of the column.
        new: Its value for each row of the dataset, the dropped ones included.
        feature: Its type; `None` leaves it to the values.
        old: What it replaces; `None` for a column that was not there.
        old_feature: The type of that.
    """

    name: str
    new: list[Any]
    feature: Any = None
    old: list[Any] | None = None
    old_feature: Any = None

    def plain(self) -> dict[str, Any]:
        """All of it, types as JSON has them."""
        given = {"feature": self.feature, "old_feature": self.old_feature}
        kinds = {name: None if kind is None else Features({"it": kind}).to_dict()["it"] for name, kind in given.items()}
        return vars(self) | kinds

    @classmethod
    def of_plain(cls, saved: dict[str, Any]) -> Written:
        """What `plain` gave."""
        given = {name: saved[name] for name in ("feature", "old_feature")}
        kinds = {name: None if kind is None else Features.from_dict({"it": kind})["it"] for name, kind in given.items()}
        return cls(**{**saved, **kinds})
