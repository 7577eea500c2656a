"""How far the predictions of a classifier differ between groups of people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hf_influence.dataset.groups import group_of
from hf_influence.errors import BadSetting
from hf_influence.evaluation.labels import as_list


def demographic_parity(predictions: Any, groups: Iterable[Any]) -> float:
    """The largest gap between the mean predictions of two groups.

        max_{a, b} |E[ŷ | g = a] − E[ŷ | g = b]|

    0 where all groups are treated alike; lower is fairer. Whether the groups deserve it is not looked at: measure it on
    people who differ in nothing but their group (see `swap_terms`), and look at the accuracy beside it.

    Args:
        predictions: One number an example, `[n]`: the predicted probability of the positive class, or the predicted
            class 0 or 1.
        groups: The group of each example, any values; those without one (None, NaN) are a group together.

    Raises:
        BadSetting: Not one finite number an example, or less than two groups.

    >>> round(demographic_parity([0.9, 0.7, 0.4, 0.2], ["f", "f", "m", "m"]), 6)
    0.5

    See also: fair_score, hf_influence.fairness (the same as a target for scores).
    Source: Revisiting Inner Product (IP Ensemble), eq. 3.
    """
    y = torch.as_tensor(as_list(predictions), dtype=torch.float64)
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group_of(group), []).append(i)
    count = sum(map(len, members.values()))
    if y.shape != (count,) or not bool(torch.isfinite(y).all()):
        raise BadSetting(
            f"predictions of shape {list(y.shape)} for {count} groups: give one finite number for each example, such "
            "as the probability of the positive class, logits.softmax(1)[:, 1]."
        )
    if len(members) < 2:
        raise BadSetting(f"all {count} examples are of the groups {list(members)}; it takes two to compare.")
    means = [float(y[rows].mean()) for rows in members.values()]
    return max(means) - min(means)
