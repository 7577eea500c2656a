"""Outliers among gradients, by how soon random cuts isolate them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from sklearn.ensemble import IsolationForest
from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim
from torch import Tensor

from hf_influence.attribution.finite import check_finite
from hf_influence.attribution.given import Labelled
from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.store import Rows

FEW = 3
"""Examples of a class below which a forest gives all queries the same middling score."""


@dataclass(kw_only=True)
class OutlierForest(Method, name="outlier_iforest"):
    """How many random cuts it takes to isolate the gradient from the others: outliers come lowest.

        score[i] = −2^(−E[depth of g_i] / c(min(n, 256))),   the `score_samples` of an isolation forest, in [−1, 0]

    Rows wider than the Johnson-Lindenstrauss bound for `eps` are projected first, sparsely and block by block. The
    scores do not depend on the order of the dataset.

    Cost: O(n √D k) to project D columns to k = O(log n / eps²), O(trees · n) for the forest; an n × k matrix.
    Use when: labels may be wrong in ways that the length of the gradient does not show.
    See also: OutlierL1, OutlierL2 (the length alone), OutlierClasswise (against queries).
    Source: Chhabra et al., Outlier Gradient Analysis, ICML 2025, alg. 1 and app. A.2.6.
    """

    needs: ClassVar[tuple[str, ...]] = ("rows",)

    trees: int = field(default=100, metadata={"least": 1})
    """Trees in a forest."""
    seed: int = field(default=0, metadata={"least": 0})
    """Of the projection and the forest."""
    eps: float = field(default=0.1, metadata={"above": 0, "below": 1})
    """Largest relative error of squared distances that the width of the projection allows."""

    def score(self, rows: Selection) -> Tensor:
        train = rows.train
        features = _sketch(train, self.eps, self.seed)(train)
        return self.typicality(features, features).to(train.dtype)[:, None] if len(train) else torch.zeros(0, 1)

    def typicality(self, fitted: np.ndarray, scored: np.ndarray) -> Tensor:
        """`score_samples` of `scored` `[m, k]` by a forest fitted on `fitted` `[n, k]`; `[m]`.

        The forest draws examples by their place, so they are put in an order that depends on nothing but themselves.
        """
        scale = np.ldexp(fitted.dtype.type(1), -np.frexp(np.abs(fitted).max(initial=0))[1])
        fitted, scored = fitted * scale, scored * scale  # by a power of two: what is near 0 would count as constant
        key = fitted @ np.random.default_rng(self.seed).standard_normal(fitted.shape[1:], fitted.dtype)
        forest = IsolationForest(n_estimators=self.trees, random_state=self.seed).fit(fitted[key.argsort()])
        return torch.from_numpy(forest.score_samples(scored)) if len(scored) else torch.zeros(0)


@dataclass(kw_only=True)
class OutlierClasswise(Labelled, OutlierForest, name="outlier_classwise"):
    """How typical the query is of the example's class, by a forest for each class.

        score[i, q] = score_samples of v_q by the isolation forest fitted on {g_k : class of k = class of i}

    All examples of a class get the same score. A class of fewer than three examples has no forest: it gets −1 for each
    query, with a warning.

    Cost: that of `outlier_iforest`, and as many forests as classes.
    Use when: each query should find the class of examples that it belongs to.
    See also: OutlierForest (without queries).
    Source: Chhabra et al., Outlier Gradient Analysis, ICML 2025, sec. 7.
    """

    needs = ("rows", "queries", "labels")

    def score(self, rows: Selection) -> Tensor:
        train, query = rows.train, rows.query
        classes = self.classes(train)
        sketch = _sketch(train, self.eps, self.seed)
        features, targets = sketch(train), sketch(query)
        out = torch.zeros(len(train), len(query), dtype=train.dtype)
        few = []
        for label in dict.fromkeys(classes):
            member = torch.tensor([other == label for other in classes])  # [n]
            if member.sum() < FEW:
                few.append(label)
                out[member] = -1
                continue
            out[member] = self.typicality(features[member.numpy()], targets).to(out.dtype)
        if few:
            warnings.warn(
                f"method '{self.name}' cannot tell what is typical of a class of fewer than {FEW} examples, and "
                f"{len(few)} of the {len(set(classes))} classes are so small (first: {few[0]!r}). They get −1, the "
                "lowest score, for every query.",
                stacklevel=3,
            )
        return out


def _sketch(train: Rows, eps: float, seed: int) -> Callable[[Rows], np.ndarray]:
    """A function that puts the blocks of rows side by side, `[n, D]`, or projects that to `[n, k]` if D is large.

    k is the Johnson-Lindenstrauss bound for as many examples as `train` has. The projection has about k √D entries that
    are not zero, and the blocks are added up one chunk after the other: the n × D matrix never exists.
    """
    width = sum(train.blocks.values())
    bound = int(johnson_lindenstrauss_min_dim(max(2, len(train)), eps=eps))
    projection = None
    if width > bound:
        dtype = torch.empty(0, dtype=train.dtype).numpy().dtype
        drawn = SparseRandomProjection(n_components=bound, random_state=seed).fit(np.zeros((1, width), dtype))
        projection = drawn.components_.T.tocsr()  # [D, k]

    def sketch(rows: Rows) -> np.ndarray:
        out = torch.zeros(len(rows), min(width, bound), dtype=rows.dtype)
        start = 0
        for block, size in rows.blocks.items():
            columns = slice(start, start + size)
            for at, g in rows.chunks(block):
                if projection is None:
                    out[at, columns] = g
                else:
                    out[at] += torch.from_numpy(g.numpy() @ projection[columns])  # [b, k]
            start += size
        check_finite(out, rows)
        return out.numpy()

    return sketch
