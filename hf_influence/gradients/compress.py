"""Ways to keep a row small. A compressor is a function you pass: `collect(..., compress=dropout(16, seed=0))`.

A compressor works block by block and depends on nothing but its settings and the block's name and size, so rows that
were compressed while they were captured equal whole rows compressed later.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_influence.errors import BadSetting, StoreError


@dataclass(frozen=True)
class Compressor(ABC):
    """Maps the rows of a block from `d` columns to at most `r`."""

    name: ClassVar[str]
    r: int
    """Columns kept a block."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise BadSetting(f"{self.name}(r={self.r}): r counts the columns kept in a block and must be at least 1.")

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def columns(self, block: str, width: int) -> list[int] | None:
        """The entries of the flattened gradient that are kept, or `None` if the columns are no entries."""
        return None

    @abstractmethod
    def fit(self, block: str, width: int) -> Callable[[Tensor], Tensor]:
        """The function that compresses whole rows of a block, `[b, width] -> [b, min(r, width)]`."""


@dataclass(frozen=True)
class Dropout(Compressor):
    """Keep `r` random entries of each block and drop the rest.

    Source: Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 3.
    """

    name: ClassVar[str] = "dropout"

    def columns(self, block: str, width: int) -> list[int]:
        draw = random.Random(f"{self.seed}/{block}/{width}")  # a string seed is stable across runs and versions
        return sorted(draw.sample(range(width), min(self.r, width)))

    def fit(self, block: str, width: int) -> Callable[[Tensor], Tensor]:
        columns = self.columns(block, width)
        return lambda rows: rows[:, columns]


@dataclass(frozen=True)
class Gaussian(Compressor):
    """Project each block with `P ~ N(0, 1/r)`, `[d, r]`, so that inner products are kept in expectation.

    A block that is no wider than `r` is kept as it is.

    Source: Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 2.
    """

    name: ClassVar[str] = "gaussian"

    def fit(self, block: str, width: int) -> Callable[[Tensor], Tensor]:
        if width <= self.r:
            return lambda rows: rows
        seed = random.Random(f"{self.seed}/{block}/{width}").getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(width, self.r, generator=generator) / self.r**0.5  # [d, r]
        return lambda rows: rows @ projection.to(rows)


def dropout(r: int, seed: int = 0) -> Dropout:
    """Keep `r` random entries of each block: nearly free, since the other entries are never computed."""
    return Dropout(r, seed)


def gaussian(r: int, seed: int = 0) -> Gaussian:
    """Project each block onto `r` random directions."""
    return Gaussian(r, seed)


def compressor_of(settings: dict[str, Any] | None) -> Compressor | None:
    """The compressor whose `settings()` a store has recorded; `None` for whole rows.

    Raises:
        StoreError: This version has no such compressor.
    """
    if settings is None:
        return None
    known: dict[str, type[Compressor]] = {kind.name: kind for kind in (Dropout, Gaussian)}
    options = dict(settings)
    name = options.pop("name", None)
    try:
        return known[str(name)](**options)
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"the rows were compressed by {settings}, which this version does not know (it has: {', '.join(known)}). "
            "Read them with the version that wrote them, or collect them again."
        ) from error
