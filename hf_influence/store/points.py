"""What a parameter point is: the weights after training, an epoch of it, a checkpoint, a member of an ensemble."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_influence.store.files import read_json

SPAN = 1_000_000
"""Points that are no weights of training are numbered from here on, each kind in a span of its own."""
WEIGHTS = "weights"


@dataclass(frozen=True)
class PointAbout:
    """What a store says of a point.

    Attributes:
        kind: "weights" for those after training, or of an epoch or step of it; "checkpoint", "parameter_dropout",
            "continued_sgd" and others for points that were made on purpose.
        details: What tells points of a kind apart: rate, seed, step, learning rate, … Plain JSON.
        start: Hash of the trainable values that it was made from; `None` if from none.
    """

    kind: str = WEIGHTS
    details: dict[str, Any] = field(default_factory=dict)
    start: str | None = None

    @classmethod
    def read(cls, folder: Path) -> PointAbout:
        """What is said of the point in a folder; a folder that says nothing holds rows at weights of training."""
        file = folder / "point.json"
        content = read_json(file) if file.is_file() else {}
        return cls(content.get("kind", WEIGHTS), content.get("details", {}), content.get("start"))


def point_folder(path: Path, point: int) -> Path:
    return path / "points" / f"{point:04d}"


def point_numbers(path: Path) -> list[int]:
    """The points that the store at `path` holds, ascending."""
    return sorted(int(entry.parent.name) for entry in (path / "points").glob("*/point.json"))


def number_of(path: Path, about: PointAbout) -> int:
    """Where a point of this kind and these details belongs: its number if it is there, a free one if not.

    The weights after training are point 0. A new kind begins at the next multiple of a million, out of the way of
    epochs and steps.

    Args:
        path: Of a store, which need not be there yet.
        about: The point.
    """
    if about.kind == WEIGHTS:
        return 0
    stored = {point: PointAbout.read(point_folder(path, point)) for point in point_numbers(path)}
    alike = [point for point, other in stored.items() if other.kind == about.kind]
    for point in alike:
        if stored[point].details == json.loads(json.dumps(about.details)):
            return point
    if alike:
        return max(alike) + 1
    return (max(stored, default=0) // SPAN + 1) * SPAN
