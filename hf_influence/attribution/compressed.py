"""Influence on compressed rows: few columns a block make the exact Fisher matrix small."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from hf_influence.attribution.fisher import Fisher
from hf_influence.attribution.selection import Selection
from hf_influence.errors import StoreMismatch
from hf_influence.gradients import compress


@dataclass(kw_only=True)
class CompressedFisher(Fisher):
    """`Fisher` on rows compressed by `compressor`, while they were captured or while they are read."""

    compressor: ClassVar[type[compress.Compressor]]

    r: int | None = field(default=None, metadata={"least": 1})
    """Columns kept a block; by default as many as are stored, and 16 of whole rows."""
    seed: int | None = field(default=None, metadata={"least": 0})
    """Seed of the compressor; by default that of the stored rows, and 0 for whole rows."""

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, q]`.

        Raises:
            StoreMismatch: The rows are compressed already, and in another way.
        """
        wanted = self._settle(rows)
        return super().score(rows if rows.store.header.compress else rows.compressed(wanted))

    def record(self, rows: Selection) -> dict[str, Any]:
        wanted = self._settle(rows)
        return super().record(rows) | {"r": wanted.r, "seed": wanted.seed}

    def _settle(self, rows: Selection) -> compress.Compressor:
        """The compressor with the settings that were left open taken from the store."""
        stored = rows.store.header.compress
        given = {key: value for key, value in (("r", self.r), ("seed", self.seed)) if value is not None}
        defaults = {"r": 16, "seed": 0} | {key: value for key, value in (stored or {}).items() if key in ("r", "seed")}
        wanted = self.compressor(**(defaults | given))
        if stored not in (None, wanted.settings()):
            raise StoreMismatch(
                f"{rows.store.path} holds rows compressed by {_call(stored)}, and method '{self.name}' is asked for "
                f"{_call(wanted.settings())}, which cannot be computed from them. Use method='fisher', which takes the "
                "rows as they are, or collect whole rows, which serve every one."
            )
        return wanted


@dataclass(kw_only=True)
class Dropout(CompressedFisher, name="dropout"):
    """Influence with the exact damped Fisher matrix of `r` randomly kept entries a block.

        score[i, q] = Σ_blocks ⟨g̃_i, (λI + G̃ᵀG̃/n)⁻¹ ṽ_q⟩,   g̃ = r random entries of g

    Cost: O(n r (q + r) + r³) a block: next to nothing once the rows are compressed.
    Use when: the rows were collected with `compress=dropout(r)`, or whole rows take too long.
    See also: Gaussian (keeps inner products better, dearer to compress), Fisher (all entries).
    Source: Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 3.
    """

    compressor = compress.Dropout


@dataclass(kw_only=True)
class Gaussian(CompressedFisher, name="gaussian"):
    """Influence with the exact damped Fisher matrix of `r` random projections a block.

        score[i, q] = Σ_blocks ⟨g̃_i, (λI + G̃ᵀG̃/n)⁻¹ ṽ_q⟩,   g̃ = Pᵀ g,   P ~ N(0, 1/r), d × r

    Cost: O(n r (q + r) + r³) a block, and O(n d r) to compress whole rows while they are read.
    Use when: the rows were collected with `compress=gaussian(r)`, or to check what dropout loses.
    See also: Dropout (cheaper to compress), Fisher (whole rows).
    Source: Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 2.
    """

    compressor = compress.Gaussian


def _call(settings: dict[str, Any]) -> str:
    rest = ", ".join(f"{key}={value!r}" for key, value in settings.items() if key != "name")
    return f"{settings['name']}({rest})"
