"""A share of the rows, as it is written."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from hf_influence.errors import BadSetting


def share_of(share: float) -> Fraction:
    """0.29 as 29/100, so that ⌊share · 100⌋ is 29, which it is not in floating point.

    Raises:
        BadSetting: Not a number from 0 to 1.
    """
    if isinstance(share, bool) or not 0 <= share <= 1:
        raise BadSetting(f"share={share!r} is not a share of the rows; give a number from 0 to 1.")
    return Fraction(str(np.asarray(share)))  # in its own precision, also of numpy and torch
