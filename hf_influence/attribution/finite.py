"""Rows that are not finite are refused, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_influence.errors import BadExample
from hf_influence.store import Rows


def check_finite(result: Tensor, *rows: Rows) -> None:
    """Refuse rows that hold NaN or infinity.

    The rows were checked when they were captured, so they are looked at again only if `result`, which was computed
    from them, is not finite. Where they are fine it is the caller's to say what is not.

    Raises:
        BadExample: Names the example, its split and the block.
    """
    if torch.isfinite(result).all():
        return
    for part in rows:
        if part.statistics_only:
            continue
        for block in part.blocks:
            for at, g in part.chunks(block):
                bad = at[~torch.isfinite(g).all(1)]
                if len(bad):
                    raise BadExample(
                        f"example {part.ids[int(bad[0])]!r} in {part.folder} has a gradient that is not finite (block "
                        f"{block}), so nothing can be compared with it. Look at the example and leave it out, or "
                        "collect again in float32."
                    )
