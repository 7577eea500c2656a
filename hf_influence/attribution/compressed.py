"""Methods on compressed rows, whether they were compressed while they were captured or are while they are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from hf_influence.attribution.fisher import Fisher
from hf_influence.attribution.inner_product import InnerProduct
from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.tracin import TracIn
from hf_influence.errors import StoreMismatch
from hf_influence.gradients import compress


@dataclass(kw_only=True)
class Compressed(Method):
    """A method that looks at its rows through a `compressor`; comes before the method that it is otherwise.

    The settings of the compressor are settings of the method. Left open, they are those of the stored rows, and
    `usual` for whole rows.
    """

    compressor: ClassVar[type[compress.Compressor]]
    usual: ClassVar[dict[str, int]] = {"r": 16, "seed": 0}

    seed: int | None = field(default=None, metadata={"least": 0})
    """Seed of the compressor; by default that of the stored rows, and 0 for whole rows."""

    def select(self, rows: Selection, point: int | None) -> Selection:
        """The rows that the method looks at, compressed.

        Raises:
            StoreMismatch: They are compressed already, and in another way.
        """
        selected, wanted = super().select(rows, point), self._settle(rows)
        return selected if rows.store.header.compress else selected.compressed(wanted)

    def record(self, rows: Selection) -> dict[str, Any]:
        return super().record(rows) | asdict(self._settle(rows))

    def _settle(self, rows: Selection) -> compress.Compressor:
        """The compressor with the settings that were left open taken from the store."""
        stored = rows.store.header.compress
        names = [setting.name for setting in fields(self.compressor)]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        known = {name: value for name, value in (stored or {}).items() if name in names}
        wanted = self.compressor(**(self.usual | known | given))
        if stored not in (None, wanted.settings()):
            plain = next(vars(kind)["name"] for kind in type(self).__mro__[1:] if "name" in vars(kind))
            raise StoreMismatch(
                f"{rows.store.path} holds rows compressed by {_call(stored)}, and method '{self.name}' is asked for "
                f"{_call(wanted.settings())}, which cannot be computed from them. Use method='{plain}', which takes "
                "the rows as they are, or collect whole rows, which serve every one."
            )
        return wanted


@dataclass(kw_only=True)
class ToColumns(Compressed):
    """With a compressor that keeps `r` columns a block."""

    r: int | None = field(default=None, metadata={"least": 1})
    """Columns kept a block; by default as many as are stored, and 16 of whole rows."""


@dataclass(kw_only=True)
class Dropout(ToColumns, Fisher, name="dropout"):
    """Influence with the exact damped Fisher matrix of `r` randomly kept entries a block.

        score[i, q] = Σ_blocks ⟨g̃_i, (λI + G̃ᵀG̃/n)⁻¹ ṽ_q⟩,   g̃ = r random entries of g

    Cost: O(n r (q + r) + r³) a block: next to nothing once the rows are compressed.
    Use when: the rows were collected with `compress=dropout(r)`, or whole rows take too long.
    See also: Gaussian (keeps inner products better, dearer to compress), Fisher (all entries).
    Source: Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 3.
    """

    compressor = compress.Dropout


@dataclass(kw_only=True)
class Gaussian(ToColumns, Fisher, name="gaussian"):
    """Influence with the exact damped Fisher matrix of `r` random projections a block.

        score[i, q] = Σ_blocks ⟨g̃_i, (λI + G̃ᵀG̃/n)⁻¹ ṽ_q⟩,   g̃ = Pᵀ g,   P ~ N(0, 1/r), d × r

    Cost: O(n r (q + r) + r³) a block, and O(n d r) to compress whole rows while they are read.
    Use when: the rows were collected with `compress=gaussian(r)`, or to check what dropout loses.
    See also: Dropout (cheaper to compress), LoGra (both sides of each parameter), Fisher (whole rows).
    Source: Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 2.
    """

    compressor = compress.Gaussian


@dataclass(kw_only=True)
class LoGra(Compressed, Fisher, name="logra"):
    """Influence with the exact damped Fisher matrix of gradients projected on both sides of each parameter.

        score[i, q] = Σ_blocks ⟨g̃_i, (λI + G̃ᵀG̃/n)⁻¹ ṽ_q⟩,   g̃ = P_outᵀ g P_in for g as a matrix,   P ~ N(0, 1/r)

    A side no longer than its r is kept as it is, such as that of a LoRA rank.

    Cost: that of `fisher` on r_out r_in columns a block, fewer where a side is shorter.
    Use when: the rows were collected with `compress=logra(…)`, as for whole weights of large layers.
    See also: Gaussian and Dropout (fewer columns, any block), Fisher (whole rows).
    Source: Choe et al., LoGra, 2024; Toward Efficient Influence Function: Dropout as a Compression Tool, eq. 13.
    """

    compressor = compress.LoGra
    usual: ClassVar[dict[str, int]] = {"r_in": 64, "r_out": 64, "seed": 0}

    r_in: int | None = field(default=None, metadata={"least": 1})
    """Kept of the input side; by default what is stored, and 64 of whole rows."""
    r_out: int | None = field(default=None, metadata={"least": 1})
    """Kept of the output side; by default what is stored, and 64 of whole rows."""


@dataclass(kw_only=True)
class RandProj(ToColumns, InnerProduct, name="rand_proj"):
    """The inner product of randomly projected gradients, an unbiased estimate of that of the whole ones.

        score[i, q] = Σ_blocks ⟨Pᵀ g_i, Pᵀ v_q⟩,   P ~ N(0, 1/r), d × r

    A projection for each block, where the sources have one for all; the variance is that of r directions a block.

    Cost: that of the inner product on r columns a block, and O(n d r) to compress whole rows while they are read.
    Use when: the rows were collected with `compress=gaussian(r)`; as a baseline for what curvature adds.
    See also: InnerProduct (whole rows), RandSelect, Gaussian (with curvature), TracInRP (over training).
    Source: Schioppa et al., Scaling Up Influence Functions, AAAI 2022; GEX, eq. 6.
    """

    compressor = compress.Gaussian


@dataclass(kw_only=True)
class RandSelect(ToColumns, InnerProduct, name="rand_select"):
    """The inner product of `r` randomly kept entries of the gradients.

        score[i, q] = Σ_blocks Σ_k g_i[k] v_q[k],   k over r random entries of the block

    Cost: that of the inner product on r columns a block.
    Use when: the rows were collected with `compress=dropout(r)`; as a baseline.
    See also: RandProj (mixes all entries), Dropout (with curvature).
    Source: Schioppa et al., Scaling Up Influence Functions, AAAI 2022, eq. 2.
    """

    compressor = compress.Dropout


@dataclass(kw_only=True)
class TracInRP(ToColumns, TracIn, name="tracin_rp"):
    """The inner product of randomly projected gradients, summed over the points of training.

        score[i, q] = Σ_c η_c(i) Σ_blocks ⟨Pᵀ g_i(θ_c), Pᵀ v_q(θ_c)⟩,   P ~ N(0, 1/r), d × r, the same at all points

    Cost: that of `rand_proj` at each point.
    Use when: rows were captured during training with `compress=gaussian(r)`, as whole rows of many points fill disks.
    See also: TracIn (whole rows), RandProj (one point).
    Source: GEX, eq. 6; Pruthi et al., TracIn, NeurIPS 2020.
    """

    compressor = compress.Gaussian


def _call(settings: dict[str, Any]) -> str:
    rest = ", ".join(f"{key}={value!r}" for key, value in settings.items() if key != "name")
    return f"{settings['name']}({rest})"
