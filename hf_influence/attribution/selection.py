"""Which rows of a store a method looks at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from hf_influence.errors import MissingRows, StoreMismatch
from hf_influence.gradients.compress import Compressor
from hf_influence.store import WEIGHTS, GradientStore, Rows


@dataclass(frozen=True)
class Selection:
    """Training rows and query rows of one store, opened when they are first asked for.

    Attributes:
        store: The store.
        train_split: The split to score.
        query_split: The split to compare with.
        points: The parameter points; one, but for a method that goes over several.
        query_point: That of the query rows; by default they are at the same point as the training rows.
        view: What the rows are seen through.
    """

    store: GradientStore
    train_split: str = "train"
    query_split: str = "query"
    points: tuple[int, ...] = (0,)
    query_point: int | None = None
    view: Callable[[Rows], Rows] = lambda rows: rows

    @cached_property
    def train(self) -> Rows:
        """The rows of the training examples, at the first point; MissingRows if there are none."""
        return self.view(self.store.rows(self.train_split, self.points[0]))

    @cached_property
    def query(self) -> Rows:
        """The rows of the queries, at the first point; MissingRows, which says how to collect, if there are none."""
        point = self.points[0] if self.query_point is None else self.query_point
        return self.view(self.store.rows(self.query_split, point))

    @cached_property
    def parts(self) -> list[Selection]:
        """This selection at each of its points."""
        return [self] if len(self.points) == 1 else [self.at(point) for point in self.points]

    @cached_property
    def positions(self) -> Tensor:
        """Where the examples that any of the points holds stand in the dataset, ascending, `[n]`."""
        return torch.cat([part.train.positions for part in self.parts]).unique()

    @property
    def dataset_size(self) -> int | None:
        """Number of examples of the dataset, those without a row among them; `None` for a stream."""
        return self.train.dataset_size

    @property
    def id_column(self) -> str | None:
        """The column that the ids come from; `None` where they are positions."""
        return self.train.id_column

    @cached_property
    def ids(self) -> list[Any]:
        """The examples that any of the points holds, in dataset order."""
        names = {
            k: v for part in self.parts for k, v in zip(part.train.positions.tolist(), part.train.ids, strict=True)
        }
        return [names[position] for position in self.positions.tolist()]

    def places(self, part: Selection) -> Tensor:
        """Where the training rows of one of the `parts` belong among `ids`, `[rows of the part]`."""
        return torch.searchsorted(self.positions, part.train.positions)

    def share_in(self, part: Selection) -> float:
        """The share of the examples that one of `parts` holds: how often training saw each there, on average."""
        return len(part.train) / max(1, len(self.ids))

    def words(self) -> set[str]:
        """What the first point holds, in the words of `About.needs`; a split that was not filled to its end has none.

        "queries" stands for rows of queries; their statistics are words of their own, such as "query loss".
        """
        rate = self.store.point_about(self.points[0]).details.get("learning_rate")
        words = set() if rate is None else {"learning_rate"}
        with suppress(MissingRows):
            words |= set(self.train.stats)
            words |= set() if self.train.statistics_only else {"rows"}
            words |= {"labels"} if "label" in words else set()
        with suppress(MissingRows):
            words |= {f"query {name}" for name in self.query.stats}
            words |= {"queries"} if len(self.query) and not self.query.statistics_only else set()
        return words

    def at(self, point: int) -> Selection:
        """The same splits at one point."""
        return replace(self, points=(point,))

    def over(self, points: Sequence[int] | None, *, queries: bool) -> Selection:
        """The same splits at several points in the order of training, as far as they know their steps, 0 last.

        Args:
            points: Which; by default all whose training rows were captured in training steps.
            queries: Query rows are wanted as well.

        Raises:
            MissingRows: There are no such points, or one of them lacks what is wanted.
            StoreMismatch: The points hold rows of different datasets.
        """
        chosen = self.training_points() or self._none_of_training() if points is None else sorted(set(points))
        several = self._in_order(chosen)
        first = several.parts[0]
        for part in several.parts:
            _same_examples(first.train, part.train)
            if queries:
                part._check_queries(first)
        return several

    def of_step(self, name: str) -> Tensor | None:
        """Step or learning rate of the training rows at the first point, `[n]`; `None` if not known.

        That of the step which each row was captured in, else that of the checkpoint.
        """
        if name in self.train.stats:
            return self.train.stats[name]
        value = self.store.point_about(self.points[0]).details.get(name)
        return None if value is None else torch.full((len(self.train),), value, dtype=torch.float64)

    def step_range(self) -> tuple[int, int] | None:
        """The first and the last step of the training rows at the first point; `None` if not known, and of no rows."""
        steps = self.of_step("step")
        return None if steps is None or not len(steps) else (int(steps.min()), int(steps.max()))

    def last_step_after(self, before: int) -> int:
        """The last step of the training rows at the first point; `before` where that is not known.

        Args:
            before: The last step of the point before it.

        Raises:
            StoreMismatch: Its rows are not all of later steps.
        """
        span = self.step_range()
        if span is None:
            return before
        if span[0] <= before:
            raise StoreMismatch(
                f"{self.train.folder} holds rows of step {span[0]}, and the point before it goes up to step {before}, "
                "so they are of several runs, and not consecutive parts of one. Name the points that are with "
                "points=[…]."
            )
        return span[1]

    def _in_order(self, points: Sequence[int]) -> Selection:
        """At these points by their first steps, those without rows first; by their numbers if a step is not known.

        Point 0, the weights after training, is last.
        """
        points = sorted(points, key=lambda point: (not point, point))
        several = replace(self, points=tuple(points))
        first: dict[int, float] = {0: math.inf}
        for part in several.parts:
            if not part.points[0]:
                continue
            span = part.step_range()
            if span is None and len(part.train):
                return several
            first[part.points[0]] = -1 if span is None else span[0]
        ordered = tuple(sorted(points, key=first.__getitem__))
        return several if ordered == several.points else replace(self, points=ordered)  # whose rows are open already

    def compressed(self, compressor: Compressor) -> Selection:
        """The same whole rows, compressed while they are read."""
        shapes = self.store.header.blocks
        maps = {name: compressor.fit(name, shape) for name, shape in shapes.items()}
        widths = {name: compressor.width(shape) for name, shape in shapes.items()}
        return replace(self, view=lambda rows: rows.mapped(maps, widths))

    def training_points(self) -> list[int]:
        """The points with rows from training steps: those carry the step. Point 0 is never one of them.

        Raises:
            MissingRows: One of them is cut short.
        """
        return self._training_points

    @cached_property
    def _training_points(self) -> list[int]:
        chosen, cut_short = [], None
        for point in filter(None, self._held(WEIGHTS)):
            try:
                rows = self.store.rows(self.train_split, point)
            except MissingRows as error:
                cut_short = error
                continue
            if "step" in rows.stats or not len(rows):
                chosen.append(point)
        if cut_short:
            instead = f" Or go over the other points of training alone: points={chosen}." if chosen else ""
            raise MissingRows(f"{cut_short}{instead}") from cut_short
        return chosen

    def _held(self, kind: str | None = None) -> list[int]:
        """The points with training rows, those of one kind or all."""
        return [point for point in self.store.points(kind) if self.train_split in self.store.splits(point)]

    def _none_of_training(self) -> NoReturn:
        path = str(self.store.path)
        raise MissingRows(
            f"{path} holds no rows of the split {self.train_split!r} from training steps (points with rows of it: "
            f"{', '.join(map(str, self._held())) or 'none'}), and the method goes over the points of training. Capture "
            f'them: GradientCapture({path!r}, during="epochs"). Checkpoints of the run will do too: collect_at(model, '
            f"{{{self.train_split!r}: dataset}}, {path!r}, checkpoints(output_dir))."
        )

    def _check_queries(self, first: Selection) -> None:
        """The queries are there, and are those of the first point."""
        point, split, path = self.points[0], self.query_split, str(self.store.path)
        if split not in self.store.splits(point):
            of_training = self.store.point_about(point).kind == WEIGHTS
            capture = (
                f'GradientCapture({path!r}, query_dataset=…, during="epochs"); or, with the weights of that point, '
                f"collect(model, dataset, {path!r}, split={split!r}, point={point})"
            )
            at_points = f"collect_at(model, {{{split!r}: dataset}}, {path!r}, points)"
            raise MissingRows(
                f"{path} holds no rows of the split {split!r} at point {point} (it has: "
                f"{', '.join(self.store.splits(point)) or 'none'}), and the method compares each point's training rows "
                f"with queries at that point. Capture both: {capture if of_training else at_points}; or leave "
                "the point out with points=[…]."
            )
        _same_examples(first.query, self.query)
        if odd := sorted(set(first.query.positions.tolist()) ^ set(self.query.positions.tolist())):
            raise MissingRows(
                f"{path}: the points {first.points[0]} and {point} do not hold the same queries of the split {split!r} "
                f"(first that only one of them has: position {odd[0]} in the dataset), so there is no sum over the "
                "points for each query. Collect all queries at every point, or choose points with points=[…]."
            )


def _same_examples(one: Rows, other: Rows) -> None:
    """Rows at two points can be put side by side.

    Raises:
        StoreMismatch: They are of different datasets.
    """
    if one.dataset != other.dataset or one.id_column != other.id_column:
        raise StoreMismatch(
            f"{one.folder} and {other.folder} hold rows of different datasets (fingerprints {one.dataset} and "
            f"{other.dataset}, id columns {one.id_column!r} and {other.id_column!r}), so their examples cannot be "
            "brought together. Name the points that belong together with points=[…], or use a store for each."
        )
