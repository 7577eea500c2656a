"""Linear datamodeling score: do sums of scores predict what training on a part of the data gives?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.utils import Bunch
from torch import Tensor

from hf_influence.dataset.contents import content_of
from hf_influence.errors import BadSetting
from hf_influence.evaluation.labels import labels_for
from hf_influence.evaluation.runs import Runs
from hf_influence.evaluation.shares import share_of
from hf_influence.evaluation.spearman import spearman
from hf_influence.scores import Scores

FEWEST = 32
"""Subsets below which a rank correlation over them says little: by chance alone it has a deviation of 1/√(k − 1)."""
SAME = 1e-12
"""Sums of scores that differ by less are the same, relative to the sum of |score| over all rows."""


def draw_subsets(n: int, count: int = 64, share: float = 0.5, seed: int = 0) -> Tensor:
    """Random subsets of n rows, each of ⌊share · n⌋ of them, `[count, n]`, true where a row is in.

    More subsets with the same seed begin with the same ones.

    Raises:
        BadSetting: Fewer than 32 subsets, or subsets that are empty or whole.
    """
    size = int(share_of(share) * n)
    if count < FEWEST:
        raise BadSetting(
            f"{count} subsets give a rank correlation that is ±{(max(count, 2) - 1) ** -0.5:.2f} by chance alone. Draw "
            f"at least {FEWEST}."
        )
    if not 0 < size < n:
        raise BadSetting(f"share={share} of {n} rows are {size}: each subset must have some and leave some.")
    draw = torch.Generator().manual_seed(seed)
    subsets = torch.zeros(count, n, dtype=torch.bool)
    for subset in subsets:
        subset[torch.randperm(n, generator=draw)[:size]] = True
    return subsets


def retrain_on_subsets(
    dataset: Dataset,
    retrain: Callable[[Dataset], Sequence[float] | Tensor],
    subsets: Tensor,
    folder: str | Path | None = None,
) -> Tensor:
    """What `retrain` gives for each subset, `[k, m]` in float64.

    Args:
        dataset: The n training rows.
        retrain: Trains a fresh model on what it is given and returns its loss on each of the m queries.
        subsets: `[k, n]`, of `draw_subsets`.
        folder: Where the result of every subset is kept at once; the same call goes on after an interruption, and with
            more subsets trains on the new ones alone. One folder for each way of training: `retrain` cannot be checked.

    Raises:
        BadSetting: Subsets of another number of rows, or results that are not as many or not finite.
        StoreMismatch: The folder holds results for other rows.
    """
    if subsets.ndim != 2 or subsets.dtype != torch.bool or subsets.shape[1] != len(dataset):
        raise BadSetting(
            f"subsets is {subsets.dtype} {list(subsets.shape)} for {len(dataset)} rows; give a bool tensor with a row "
            f"for each subset, draw_subsets({len(dataset)}) for instance."
        )
    runs = Runs(folder, {"dataset": content_of(dataset)})
    losses: list[list[float]] = []
    for subset in subsets:
        rows = subset.nonzero()[:, 0].tolist()

        def train(rows: list[int] = rows) -> list[float]:
            out = torch.as_tensor(retrain(dataset.select(rows)), dtype=torch.float64)
            if out.ndim != 1 or not out.isfinite().all():
                raise BadSetting(
                    f"retrain gave {list(out.shape)} numbers, {int((~out.isfinite()).sum())} of them not finite. It "
                    "must give one for each query: the loss of a model trained on what it was given."
                )
            return out.tolist()

        losses.append(runs.do({"subset": content_of(Dataset.from_dict({"row": rows}))}, train))
        if len(losses[-1]) != len(losses[0]):
            raise BadSetting(
                f"retrain gave {len(losses[-1])} losses for subset {len(losses) - 1} and {len(losses[0])} for the "
                "first. Evaluate the same queries each time."
            )
    return torch.tensor(losses, dtype=torch.float64)


def lds(
    scores: Scores, losses: Tensor | np.ndarray, subsets: Tensor | np.ndarray, *, seed: int = 0, draws: int = 500
) -> Bunch:
    """Mean over the queries of the rank correlation between foretold and measured losses over subsets of the data.

        LDS = mean_q Spearman_S( Σ_{i ∈ S} score[i, q],  −loss_q(model trained on S) )

    1 is a perfect forecast of the order, 0 chance. Even perfect scores fall short of 1 where training again on the same
    rows gives another loss; several trainings a subset, averaged in `losses`, show how far. A score without queries is
    held against every query.

    Cost: trainings, one a subset; then O(k n q).
    Use when: there is no planted answer, and retraining is affordable.
    See also: removal_curve, draw_subsets, retrain_on_subsets.
    Source: Park et al., TRAK, ICML 2023, section 2; Ilyas et al., Datamodels, ICML 2022.

    Args:
        scores: `[n, m]`, or one column of a method without queries.
        losses: `[k, m]`, of `retrain_on_subsets`: lower is better.
        subsets: `[k, n]`, in dataset order.
        seed: Of the bootstrap.
        draws: Its number of draws.

    Returns:
        `lds`, its bootstrap `spread` (standard deviation when subsets and queries are both drawn anew) and
        95% interval `low`, `high`; `per_query`, a list; `skipped`, the number of queries whose loss is the same after
        every training. A query for which the scores predict no order counts 0.

    Raises:
        BadSetting: Shapes that do not belong together, losses that are not finite, or nothing to correlate.

    >>> truth = torch.tensor([[3.0], [-1.0], [2.0], [0.5]])
    >>> subsets = torch.combinations(torch.arange(4), 2)
    >>> subsets = torch.zeros(6, 4).scatter(1, subsets, 1.0).bool()
    >>> round(lds(Scores(truth, [0, 1, 2, 3], "ip", query_ids=[0]), -subsets.float() @ truth, subsets).lds, 9)
    1.0
    """
    if draws < 2:
        raise BadSetting(f"draws={draws}: a spread takes at least 2 of them, an interval some hundred.")
    losses, subsets = torch.as_tensor(losses), torch.as_tensor(subsets)
    k, n = subsets.shape if subsets.ndim == 2 else (0, 0)
    fits = k > 2 and losses.ndim == 2 and len(losses) == k and len(scores) == n
    if not fits or (scores.query_ids is not None and losses.shape[1] != scores.values.shape[1]):
        raise BadSetting(
            f"scores {list(scores.values.shape)}, losses {list(losses.shape)} and subsets {list(subsets.shape)} do not "
            "belong together: they must be [n, m] (or one column without queries), [k, m] and [k, n], k at least 3. "
            "For one column that stands for all queries together, pass losses.mean(1, keepdim=True)."
        )
    if not losses.isfinite().all():
        raise BadSetting("losses has a value that is not finite, which has no rank. Look at the training that gave it.")
    place = labels_for(scores, range(n), "subsets")
    members = subsets[:, place].double()  # [k, n] in the order of the scores
    measured = -losses.double().cpu().numpy()  # [k, m]
    foretold = np.broadcast_to(_sums(members, scores.values.detach().cpu().double()), measured.shape)
    moves = measured.min(0) < measured.max(0)
    if not moves.any():
        raise BadSetting(
            f"the loss of all {losses.shape[1]} queries is the same after every training, so there is nothing to "
            "predict. Check that retrain trains on what it is given."
        )
    foretold, measured = foretold[:, moves], measured[:, moves]
    per_query = np.nan_to_num(spearman(foretold, measured))  # [m]
    means = np.array(_bootstrap(foretold, measured, draws, np.random.default_rng(seed)))
    low, high = np.quantile(means, [0.025, 0.975])
    found: dict[str, Any] = {
        "lds": float(per_query.mean()),
        "spread": float(means.std(ddof=1)),
        "low": float(low),
        "high": float(high),
        "per_query": per_query.tolist(),
        "skipped": int((~moves).sum()),
    }
    return Bunch(**found)


def _sums(members: Tensor, values: Tensor) -> np.ndarray:
    """How far the sum of the scores over each subset is from that over the first, `[k, m]`, in whole steps.

    What adds up to the same differs by rounding alone, which is less than a step and must not be ranked.
    """
    sums = members @ values
    step = SAME * values.abs().sum(0).clamp_min(torch.finfo(values.dtype).tiny)
    return ((sums - sums[0]) / step).round().numpy()


def _bootstrap(foretold: np.ndarray, measured: np.ndarray, draws: int, draw: np.random.Generator) -> list[float]:
    k, m = measured.shape
    means = []
    for _ in range(draws):
        rows, columns = draw.integers(k, size=k), draw.integers(m, size=m)
        some = np.ix_(rows, columns)
        means.append(float(np.nan_to_num(spearman(foretold[some], measured[some])).mean()))
    return means
