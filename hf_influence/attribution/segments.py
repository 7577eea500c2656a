"""Training cut into stretches of gradient descent, each with one curvature and one sum of learning rates."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_influence.attribution.selection import Selection
from hf_influence.curvature import Apply, by_dense_side, by_gram_side
from hf_influence.errors import BadSetting, MissingRows


@dataclass(frozen=True)
class Segment:
    """Consecutive points of training, for which the curvature H, the gradients and the step mass T are one.

    Attributes:
        whole: All points of training, whose examples are scored.
        parts: Those of the segment, in the order of training.
        mass: T, the sum of the learning rates of the optimizer steps.
    """

    whole: Selection
    parts: Sequence[Selection]
    mass: float

    @cached_property
    def places(self) -> list[Tensor]:
        """Where the rows of each of the parts belong among the scored examples, `[b]` each."""
        return [self.whole.places(part) for part in self.parts]

    @cached_property
    def times(self) -> Tensor:
        """How many of the points hold each scored example, `[n]`."""
        return torch.bincount(torch.cat(self.places), minlength=len(self.whole.ids))

    def rows(self, block: str) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows of one block in pieces: where they belong among the scored examples `[b]`, and `[b, d]`."""
        for part, places in zip(self.parts, self.places, strict=True):
            for at, g in part.train.chunks(block):
                yield places[at], g

    def curvature(self, block: str, thin: bool) -> Apply:
        """Functions of `H = 1/N Σ g gᵀ` over the N rows of a block.

        With `thin`, a block with more columns than there are examples takes the row of each example from one of its
        points, drawn by its id: every example counts the same, every point as well on average, and the matrix to
        take apart has as many rows as examples and not as rows.
        """
        width, rows = self.parts[0].train.blocks[block], int(self.times.sum())
        if thin and width > int(self.times.count_nonzero()):
            return by_gram_side(self._picked(block, self._drawn))
        if width > rows:
            return by_gram_side(self._picked(block, [torch.ones_like(at, dtype=torch.bool) for at in self.places]))
        return by_dense_side((g for _, g in self.rows(block)), width, rows)

    def moved(self, values: Tensor) -> Tensor:
        """φ(σ) = (1 − exp(−T σ)) / σ, T at 0: how far a constant pull moves an eigenvector, `[k] -> [k]`."""
        x = self.mass * values
        return self.mass * torch.where(x == 0, 1, -torch.expm1(-x) / torch.where(x == 0, 1, x))

    def kept(self, values: Tensor) -> Tensor:
        """exp(−T σ): what the segment leaves of a displacement along an eigenvector, `[k] -> [k]`."""
        return torch.exp(-self.mass * values)

    def _picked(self, block: str, picks: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.train.block(block)[pick] for part, pick in zip(self.parts, picks, strict=True)])

    @cached_property
    def _drawn(self) -> list[Tensor]:
        """Which rows of each of the parts are taken, so that each example is taken once; `[b]` each."""
        share = torch.tensor([random.Random(str(id)).random() for id in self.whole.ids], dtype=torch.float64)
        turn, passed = (share * self.times).long(), torch.zeros_like(self.times)
        picks = []
        for places in self.places:
            picks.append(turn[places] == passed[places])
            passed[places] += 1
        return picks


def segments(whole: Selection, number: int, step_mass: Sequence[float] | None, method: str) -> list[Segment]:
    """Training in `number` segments of as many points each, the first ones of one more; fewer if there are few points.

    An optimizer step without rows of its own, between two points or before the first one, counts with the rate of the
    next step that has rows.

    Args:
        whole: All points of training.
        number: Of segments.
        step_mass: That of each segment, if the stored rates are not to be asked.
        method: Who asks, for the message.

    Raises:
        MissingRows: Step or learning rate are not known.
        StoreMismatch: The points are not of one run.
        BadSetting: The masses are not as many as the segments.
    """
    parts = [part for part in whole.parts if len(part.train)]
    number = min(number, len(parts))
    if step_mass is not None and len(step_mass) != number:
        raise BadSetting(
            f"method '{method}': step_mass={list(step_mass)} has {len(step_mass)} numbers for {number} segments of "
            f"{len(parts)} points. Pass the sum of the learning rates of each segment, or choose segments=…."
        )
    masses = _masses(parts) if step_mass is None else []
    cuts = torch.arange(len(parts)).tensor_split(number) if number else ()
    return [
        Segment(
            whole,
            [parts[i] for i in cut.tolist()],
            sum(masses[i] for i in cut.tolist()) if step_mass is None else float(step_mass[k]),
        )
        for k, cut in enumerate(cuts)
    ]


def _rates(part: Selection) -> dict[int, float | None]:
    """The optimizer steps that the rows of a point were taken in, or after, and their learning rates."""
    steps, rates = part.of_step("step"), part.of_step("learning_rate")
    if steps is None:
        return {}
    return dict(zip(steps.tolist(), [None] * len(steps) if rates is None else rates.tolist(), strict=True))


def _masses(parts: Sequence[Selection]) -> list[float]:
    """The sum of the learning rates that belongs to each point."""
    masses, before = [], 0
    for part in parts:
        rates, folder = _rates(part), part.train.folder
        if not rates or None in rates.values():
            raise MissingRows(
                f"{folder} holds rows without a step or a learning rate, as rows have that were not captured in a "
                "training step, or at a checkpoint up to which the Trainer had logged none, and the method needs the "
                "sum of the rates in each segment of training. Pass them: step_mass=[…], one for each segment."
            )
        part.last_step_after(before)
        masses.append(0.0)
        for step, rate in sorted(rates.items()):
            masses[-1] += rate * (step - before)  # type: ignore[operator]
            before = step
    return masses
