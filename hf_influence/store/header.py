"""What all rows of a store share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import torch

from hf_influence.errors import StoreMismatch
from hf_influence.saving import as_kept


@dataclass(frozen=True, kw_only=True)
class Header:
    """What all rows of a store share; rows that differ in any of it cannot be compared.

    Attributes:
        model: Class of the model and hash of its frozen weights.
        task: Kind of loss and how it is reduced over the tokens of an example.
        blocks: Parameter name as in `model.named_parameters()` -> shape of the parameter.
        compress: The compressor's name and settings; `None` for whole rows.
        columns: For a compressor that keeps entries, which: parameter name -> positions in the flattened gradient.
        widths: For a compressor, parameter name -> number of stored columns.
        dtype: Of the rows, "float32" or "float64".
    """

    model: dict[str, Any]
    task: dict[str, Any]
    blocks: dict[str, list[int]]
    compress: dict[str, Any] | None = None
    columns: dict[str, list[int]] | None = None
    dtype: str = "float32"
    widths: dict[str, int] | None = None

    def __post_init__(self) -> None:
        if self.compress is not None and self.widths is None:
            raise TypeError("compress without widths")
        object.__setattr__(self, "task", as_kept(self.task))  # as it comes back from the disk

    def width(self, name: str) -> int:
        """Number of stored columns of a block."""
        return prod(self.blocks[name]) if self.widths is None else self.widths[name]

    def row_bytes(self) -> int:
        return sum(self.width(name) for name in self.blocks) * getattr(torch, self.dtype).itemsize

    def check(self, other: Header, path: Path) -> None:
        """Refuse `other` (the model at hand) where it differs from this header (the store at `path`).

        Raises:
            StoreMismatch: Says what differs.
        """
        mine, theirs = list(self.blocks), list(other.blocks)
        if mine != theirs:
            odd = next(
                (name for name in (*mine, *theirs) if (name in mine) != (name in theirs)), "none, the order differs"
            )
            raise StoreMismatch(
                f"{path} holds rows of {len(mine)} blocks, the model at hand has {len(theirs)} (first that only one of "
                f"them has: {odd}). Rows of different adapters cannot be compared: collect all splits with the same "
                "target modules, or into another folder."
            )
        for what in fields(self):
            was, now = getattr(self, what.name), getattr(other, what.name)
            if was == now or what.name in ("columns", "widths"):  # both follow from compress
                continue
            if isinstance(was, dict) and isinstance(now, dict):
                key = next(k for k in (*was, *now) if was.get(k) != now.get(k))
                was, now = f"{key} = {was.get(key)}", f"{key} = {now.get(key)}"
            raise StoreMismatch(
                f"{path} holds rows with another {what.name} (stored: {was}; now: {now}). Collect into another folder, "
                "or delete this one."
            )
