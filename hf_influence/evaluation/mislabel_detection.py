"""Mislabel detection: are the examples with the lowest scores the ones whose label is wrong?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.utils import Bunch

from hf_influence.dataset.groups import group_of
from hf_influence.errors import BadSetting
from hf_influence.evaluation.labels import labels_for
from hf_influence.scores import LOG_ODDS, Scores, ranks_within

BINS = 10
"""In which probabilities are compared with what is wrong."""


def mislabel_detection(
    scores: Scores,
    is_mislabeled: Sequence[bool],
    *,
    within: Sequence[Any] | None = None,
    kinds: Sequence[Hashable] | None = None,
) -> Bunch:
    """AUC and average precision of "a low mean score means a wrong label (or answer)".

    The suspicion of training example i is −mean_j score[i, j]. With `within`, its place in its own group instead:

        suspicion_i = (rank_i − ½) / size of the group,   rank 1 … size, ties at their mean rank

    which takes away what differs between groups only because one task is harder than another. Ties count
    half, so the order of the rows never matters. Cost: one sort, and one for each kind.

        data = corrupt_answers(right, within="task")
        mislabel_detection(scores, data["is_wrong"], within=data["task"], kinds=data["kind"])

    Use it where the wrong labels are known, usually because they were planted. See also: class_detection,
    corrupt_answers and flipped_labels (which plant them), biases.
    Source: Kwon et al., DataInf, ICLR 2024, section 4.2.

    Args:
        scores: Any method, with or without queries.
        is_mislabeled: n flags in dataset order; in the order of `scores.ids` where these are not dataset indices.
        within: n groups (class, task, source), ordered likewise; None and NaN are one of them.
        kinds: What sort of mistake each wrong example has, ordered likewise; those of right examples are ignored.

    Returns:
        `auc` (½ = chance) and `average_precision` (share of wrong labels = chance), read as `result["auc"]`
        or `result.auc`; with `kinds` also `auc_by_kind`, the AUC of each kind alone against all right examples. Of
        scores that are log-odds also `calibration_error`, how far `scores.probability_wrong()` is off on average (0 =
        best): Σ_b n_b / n |mean p − share that is wrong| over ten bins of p with as many examples each.

    Raises:
        BadSetting: Flags or groups that do not fit the scores, flags other than true and false, or all the same.

    >>> import torch
    >>> scores = Scores(torch.tensor([[0.9], [-0.4], [0.2]]), ids=[0, 1, 2], method="self_ip")
    >>> mislabel_detection(scores, [False, True, False]).auc
    1.0
    """
    flags = labels_for(scores, is_mislabeled, "is_mislabeled")
    if stray := [flag for flag in flags if flag not in (0, 1)]:
        raise BadSetting(
            f"is_mislabeled holds {stray[0]!r}; it must say of each example whether its label is wrong (True or "
            "False). Compare the labels in use with the right ones: [a != b for a, b in zip(used, right)]."
        )
    wrong = np.array(flags, dtype=bool)
    if wrong.all() or not wrong.any():
        raise BadSetting(
            f"{int(wrong.sum())} of {len(wrong)} examples are flagged as mislabeled, and detection needs both right "
            "and wrong ones to tell apart. Flip some labels first, with a seed."
        )
    suspicion = -scores.mean().cpu()  # [n]
    groups = None
    if within is not None:
        groups = [group_of(value) for value in labels_for(scores, within, "within")]
    place = (suspicion if groups is None else ranks_within(suspicion, groups)).numpy()
    result = Bunch(
        auc=float(roc_auc_score(wrong, place)), average_precision=float(average_precision_score(wrong, place))
    )
    if LOG_ODDS in scores.report:
        result["calibration_error"] = _calibration_error(scores.probability_wrong().numpy(), wrong)
    if kinds is not None:
        kind = np.array(list(map(str, labels_for(scores, kinds, "kinds"))))
        result["auc_by_kind"] = {}
        for name in sorted(set(kind[wrong])):
            rows = np.flatnonzero(~wrong | (kind == name))  # the other kinds are out of the ranking within groups, too
            own = [groups[i] for i in rows] if groups is not None else None
            place = (suspicion[rows] if own is None else ranks_within(suspicion[rows], own)).numpy()
            result["auc_by_kind"][str(name)] = float(roc_auc_score(wrong[rows], place))
    return result


def _calibration_error(p: np.ndarray, wrong: np.ndarray) -> float:
    _, group = np.unique(p, return_inverse=True)
    share = (np.bincount(group, weights=wrong) / np.bincount(group))[group]  # among rows of equal p, in whatever order
    bins = np.array_split(np.argsort(p, kind="stable"), min(BINS, len(p)))
    return float(sum(len(rows) * abs(p[rows].mean() - share[rows].mean()) for rows in bins) / len(p))
