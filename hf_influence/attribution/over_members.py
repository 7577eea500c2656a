"""Methods that go over the members of an ensemble: points around the final weights, made on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_influence.attribution.over_points import OverPoints
from hf_influence.attribution.selection import Selection
from hf_influence.errors import BadSetting, MissingRows, StoreMismatch

MADE_BY = {
    "parameter_dropout": "parameter_dropout()",
    "continued_sgd": "continued_sgd(model, train, folder=…), rows=False",
    "laplace": "laplace(model, train), rows=False",
}
"""What makes the points of a kind; with what else `collect_at` takes them for the methods over them."""


@dataclass(kw_only=True)
class OverMembers(OverPoints):
    """A method over members that were made from the final weights, by default all of one kind."""

    kind: ClassVar[str]

    def chosen(self, rows: Selection) -> list[int]:
        """The points of the members.

        Raises:
            BadSetting: Point 0 is among those asked for.
            MissingRows: There are none.
            StoreMismatch: They were made from different weights.
        """
        store, path = rows.store, str(rows.store.path)
        members = store.points(self.kind) if self.points is None else sorted(set(self.points))
        if not members:
            raise MissingRows(
                f"{path} holds no points of the kind {self.kind!r} that method '{self.name}' goes over (it has: "
                f"{', '.join(sorted({store.point_about(point).kind for point in store.points()})) or 'none'}). Make "
                f"them: collect_at(model, {{{rows.train_split!r}: …, {rows.query_split!r}: …}}, {path!r}, "
                f"{MADE_BY.get(self.kind, f'points of the kind {self.kind}')})."
            )
        if 0 in members:
            raise BadSetting(
                f"method '{self.name}': points={self.points!r} has point 0, the weights that the members were made "
                "from, and it is no member. Leave it out."
            )
        starts = {store.point_about(point).start for point in members} | {store.adapter()}
        if len(starts - {None}) > 1:
            raise StoreMismatch(
                f"{path}: the points {members} were not all made from the weights of point 0 (hashes of the weights: "
                f"{', '.join(sorted(start for start in starts if start is not None))}), so they are not members of one "
                "ensemble. Collect them again with overwrite=True, or name those that belong together with points=[…]."
            )
        return members
