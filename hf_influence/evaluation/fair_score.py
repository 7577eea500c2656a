"""How often a classifier decides otherwise because a text speaks of other people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_influence.errors import BadSetting
from hf_influence.evaluation.labels import as_list


def fair_score(predictions: Iterable[Any], swapped: Iterable[Any]) -> float:
    """The share of examples whose predicted class changes when their demographic terms are swapped.

        1/n Σ_i 1[C(x_i) ≠ C(x̃_i)],   for two classes the papers' 1/n Σ_i |C(x_i) − C(x̃_i)|

    From 0 to 1. Despite its name, lower is fairer.

    Args:
        predictions: The predicted class of each example, any values.
        swapped: That of the same examples after `swap_terms`, in the same order.

    Raises:
        BadSetting: No examples, unlike numbers of them, or probabilities in place of classes.

    >>> fair_score([1, 0, 1, 1], [1, 0, 0, 1])
    0.25

    See also: demographic_parity, swap_terms.
    Source: Revisiting Inner Product (IP Ensemble), section 6, after Qian et al., Perturbation Augmentation for Fairer
    NLP, EMNLP 2022.
    """
    before, after = as_list(predictions), as_list(swapped)
    if not before or len(before) != len(after):
        raise BadSetting(
            f"there are {len(before)} predictions and {len(after)} after swapping: give both of the same examples, in "
            "the same order, and at least one."
        )
    for value in (*before, *after):
        if isinstance(value, list) or (isinstance(value, float) and not value.is_integer()):
            raise BadSetting(
                f"a prediction is {value!r}, which is no class: probabilities change a little with every word. Give "
                "the predicted classes, logits.argmax(1)."
            )
    return sum(a != b for a, b in zip(before, after, strict=True)) / len(before)
