"""Ways to keep a row small. A compressor is a function you pass: `collect(..., compress=dropout(16, seed=0))`.

A compressor works block by block and depends on nothing but its settings and the block's name and shape, so rows that
were compressed while they were captured equal whole rows compressed later.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil, log1p, prod
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from hf_influence.errors import BadSetting, StoreError

Shape: TypeAlias = Sequence[int] | int
"""Of a parameter; a number of entries stands for a vector."""
Sides: TypeAlias = tuple[Tensor | None, Tensor | None]
"""What the rows `[m, m']` and the columns `[n, n']` of a parameter `[m, n]` are projected by; `None` to keep them."""


@dataclass(frozen=True)
class Compressor(ABC):
    """Maps the rows of a block from `d` columns to fewer."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in ("r", "r_in", "r_out") and value < 1:
                raise BadSetting(
                    f"{self.name}({name}={value}): {name} counts the columns kept in a block and must be at least 1."
                )

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def columns(self, block: str, shape: Shape) -> list[int] | None:
        """The entries of the flattened gradient that are kept, or `None` if the columns are no entries."""
        return None

    def sides(self, block: str, shape: Shape) -> Sides | None:
        """The projections of the two sides of a parameter, or `None` if the compressor is not of that kind."""
        return None

    @abstractmethod
    def width(self, shape: Shape) -> int:
        """Columns kept of a block of that shape; never more than it has."""

    @abstractmethod
    def fit(self, block: str, shape: Shape) -> Callable[[Tensor], Tensor]:
        """The function that compresses whole rows of a block, `[b, d] -> [b, width]`."""


@dataclass(frozen=True)
class ToColumns(Compressor):
    """Keeps `r` columns of a block, or the block as it is if it is no wider than that."""

    r: int
    """Columns kept a block."""
    seed: int = 0

    def width(self, shape: Shape) -> int:
        return min(self.r, _size(shape))


@dataclass(frozen=True)
class Dropout(ToColumns):
    """Keep `r` random entries of each block and drop the rest.

    Source: Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 3.
    """

    name: ClassVar[str] = "dropout"

    def columns(self, block: str, shape: Shape) -> list[int]:
        size = _size(shape)
        draw = random.Random(f"{self.seed}/{block}/{size}")  # a string seed is stable across runs and versions
        return sorted(draw.sample(range(size), min(self.r, size)))

    def fit(self, block: str, shape: Shape) -> Callable[[Tensor], Tensor]:
        columns = self.columns(block, shape)
        return lambda rows: rows[:, columns]


@dataclass(frozen=True)
class Gaussian(ToColumns):
    """Project each block with `P ~ N(0, 1/r)`, `[d, r]`, so that inner products are kept in expectation.

    A block that is no wider than `r` is kept as it is.

    Source: Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 2.
    """

    name: ClassVar[str] = "gaussian"

    def fit(self, block: str, shape: Shape) -> Callable[[Tensor], Tensor]:
        size = _size(shape)
        projection = _normal(size, self.r, f"{self.seed}/{block}/{size}")
        return lambda rows: rows if projection is None else rows @ projection.to(rows)


@dataclass(frozen=True)
class SparseJL(ToColumns):
    """Project each block with a sparse `P`, `[d, r]`, so that inner products are kept in expectation.

    An entry of `P` is 0 but with probability `density`, and then ±1/√(density r). Only those are drawn and held, about
    `density d r` of them. A block that is no wider than `r` is kept as it is.

    Source: Li, Hastie and Church, Very Sparse Random Projections, KDD 2006; Achlioptas, JCSS 2003 (density 1/3).
    """

    name: ClassVar[str] = "sparse_jl"
    density: float | None = None
    """In (0, 1]; by default 1/√d for a block of `d` entries, as in the source."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density is not None and not 0 < self.density <= 1:
            raise BadSetting(
                f"{self.name}(density={self.density}): it is the share of entries that are not 0, above 0 and at most "
                "1. Leave it out for 1/√d."
            )

    def fit(self, block: str, shape: Shape) -> Callable[[Tensor], Tensor]:
        size = _size(shape)
        if size <= self.r:
            return lambda rows: rows
        density = self.density or size**-0.5
        draw = _generator(f"{self.seed}/{block}/{size}")
        at = _places(size * self.r, density, draw)  # of the entries that are not 0, in the flattened P
        sign = torch.randint(0, 2, at.shape, generator=draw) * 2.0 - 1
        projection = torch.sparse_coo_tensor(
            torch.stack([at // self.r, at % self.r]),
            sign / (density * self.r) ** 0.5,
            (size, self.r),
            is_coalesced=True,
            check_invariants=False,
        )
        return lambda rows: rows @ projection.to(rows.device, rows.dtype)


@dataclass(frozen=True)
class LoGra(Compressor):
    """Project both sides of each parameter, `P_outᵀ G P_in`, with entries `N(0, 1/r_out)` and `N(0, 1/r_in)`.

    Inner products are kept in expectation. A side no longer than what is to be kept of it stays as it is, such as that
    of a LoRA rank; a vector has one side only. While rows are captured both factors of a gradient are projected before
    they are multiplied, so the whole row never exists.

    Source: Choe et al., What is Your Data Worth to GPT? (LoGra), 2024; Toward Efficient Influence Function: Dropout as
    a Compression Tool, eq. 13.
    """

    name: ClassVar[str] = "logra"
    r_in: int
    """Kept of the columns of a parameter `[m, n]`: the input side of a linear layer."""
    r_out: int
    """Kept of its rows: the output side of a linear layer, and a vector."""
    seed: int = 0

    def width(self, shape: Shape) -> int:
        m, n = _sides(shape)
        return min(self.r_out, m) * min(self.r_in, n)

    def sides(self, block: str, shape: Shape) -> Sides:
        m, n = _sides(shape)
        left = _normal(m, self.r_out, f"{self.seed}/{block}/out/{m}")
        return left, _normal(n, self.r_in, f"{self.seed}/{block}/in/{n}")

    def fit(self, block: str, shape: Shape) -> Callable[[Tensor], Tensor]:
        m, n = _sides(shape)
        left, right = self.sides(block, shape)

        def project(rows: Tensor) -> Tensor:
            g = rows.unflatten(1, (m, n))
            g = g if right is None else g @ right.to(g)  # [b, m, n']
            return (g if left is None else left.T.to(g) @ g).flatten(1)  # [b, m' n']

        return project


def dropout(r: int, seed: int = 0) -> Dropout:
    """Keep `r` random entries of each block: nearly free, since the other entries are never computed."""
    return Dropout(r, seed)


def gaussian(r: int, seed: int = 0) -> Gaussian:
    """Project each block onto `r` random directions."""
    return Gaussian(r, seed)


def sparse_jl(r: int, seed: int = 0, density: float | None = None) -> SparseJL:
    """Project each block onto `r` random directions with few entries: where `gaussian` takes too much memory."""
    return SparseJL(r, seed, density)


def logra(r_in: int = 64, r_out: int = 64, seed: int = 0) -> LoGra:
    """Project both sides of each parameter: the whole gradient is never computed."""
    return LoGra(r_in, r_out, seed)


def compressor_of(settings: dict[str, Any] | None) -> Compressor | None:
    """The compressor whose `settings()` a store has recorded; `None` for whole rows.

    Raises:
        StoreError: This version has no such compressor.
    """
    if settings is None:
        return None
    known: dict[str, type[Compressor]] = {kind.name: kind for kind in (Dropout, Gaussian, SparseJL, LoGra)}
    options = dict(settings)
    name = options.pop("name", None)
    try:
        return known[str(name)](**options)
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"the rows were compressed by {settings}, which this version does not know (it has: {', '.join(known)}). "
            "Read them with the version that wrote them, or collect them again."
        ) from error


def _size(shape: Shape) -> int:
    return shape if isinstance(shape, int) else prod(shape)


def _sides(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a parameter; a vector is one column."""
    m = shape if isinstance(shape, int) else shape[0]
    return m, _size(shape) // m


def _generator(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(seed).getrandbits(63))


def _normal(size: int, r: int, seed: str) -> Tensor | None:
    """`P ~ N(0, 1/r)`, `[size, r]`; `None` if there is nothing to gain."""
    return None if size <= r else torch.randn(size, r, generator=_generator(seed)) / r**0.5


def _places(total: int, density: float, draw: torch.Generator) -> Tensor:
    """Each of `total` places with probability `density`, ascending, by drawing the gaps between them."""
    if density == 1:
        return torch.arange(total)
    pieces, last = [], -1
    while last < total:
        n = ceil(density * (total - last)) + 16
        u = 1 - torch.rand(n, generator=draw, dtype=torch.float64)  # in (0, 1]
        piece = last + (u.log() / log1p(-density)).floor().long().add_(1).cumsum(0)
        pieces.append(piece)
        last = int(piece[-1])
    places = torch.cat(pieces)
    return places[places < total]
