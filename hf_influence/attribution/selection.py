"""Which rows of a store a method looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from hf_influence.gradients.compress import Compressor
from hf_influence.store import GradientStore, Rows


@dataclass(frozen=True)
class Selection:
    """Training rows and query rows of one store, opened when they are first asked for.

    Attributes:
        store: The store.
        train_split: The split to score.
        query_split: The split to compare with.
        point: The parameter point.
        view: What the rows are seen through.
    """

    store: GradientStore
    train_split: str = "train"
    query_split: str = "query"
    point: int = 0
    view: Callable[[Rows], Rows] = lambda rows: rows

    @cached_property
    def train(self) -> Rows:
        """The rows of the training examples; MissingRows if there are none."""
        return self.view(self.store.rows(self.train_split, self.point))

    @cached_property
    def query(self) -> Rows:
        """The rows of the queries; MissingRows, which says how to collect them, if there are none."""
        return self.view(self.store.rows(self.query_split, self.point))

    def compressed(self, compressor: Compressor) -> Selection:
        """The same whole rows, compressed while they are read."""
        blocks = {name: self.store.header.width(name) for name in self.store.blocks}
        maps = {name: compressor.fit(name, width) for name, width in blocks.items()}
        widths = {name: min(compressor.r, width) for name, width in blocks.items()}
        return replace(self, view=lambda rows: rows.mapped(maps, widths))
