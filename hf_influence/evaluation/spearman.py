"""Rank correlation."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def spearman(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Spearman's ρ of each column of `one` `[k, m]` with the same column of `other` `[k, m]`, `[m]`.

    Ties have their mean rank. NaN where a column is constant: it has no order to compare.
    """
    a, b = (ranks - ranks.mean(0) for ranks in (rankdata(one, axis=0), rankdata(other, axis=0)))
    size = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return np.divide((a * b).sum(0), size, out=np.full(size.shape, np.nan), where=size > 0)
