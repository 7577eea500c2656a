"""Wrong labels that are wrong against one group of people, planted so that it is known where they are."""

from __future__ import annotations

from random import Random
from typing import Any

from datasets import Dataset

from hf_influence.errors import BadExample, BadSetting
from hf_influence.evaluation.labels import ADDED, with_wrong_labels
from hf_influence.evaluation.shares import share_of


def biased_labels(
    dataset: Dataset,
    share: float,
    *,
    within: str,
    group: Any,
    label: str = "label",
    right: Any = 1,
    wrong: Any = 0,
    seed: int = 0,
) -> Dataset:
    """A copy of `dataset` in which a share of the rows, all of one group and one label, has another label.

    ⌊share · n⌋ of the rows with that group and the label `right` get the label `wrong`, drawn at random. A model that
    learns them treats the group worse: demographic parity and the fair score rise.

    Args:
        dataset: With a label and a group an example.
        share: Of all rows, in [0, 1].
        within: The column of groups.
        group: The group that is wronged.
        label: The column of labels.
        right: The label that some of the group lose.
        wrong: The label that they get.
        seed: The same seed chooses the same rows.

    Returns:
        The dataset with two more columns: `is_wrong`, and `right_label` with what was there before.

    Raises:
        BadSetting: A share out of range, or one label as both the right and the wrong one.
        BadExample: A column is missing or there already, or fewer rows than wanted have that group and label.

    >>> rows = Dataset.from_dict({"sex": ["f", "f", "m", "m"], "label": [1, 1, 1, 1]})
    >>> biased = biased_labels(rows, 0.25, within="sex", group="f")
    >>> sum(biased["is_wrong"]), biased["label"][2:]
    (1, [1, 1])

    See also: flipped_labels (wrong labels against no one in particular), demographic_parity, fair_score.
    """
    wanted = int(share_of(share) * len(dataset))
    if wrong == right:
        raise BadSetting(
            f"right={right!r} and wrong={wrong!r} are one label, so no row would be wronged. Pass as wrong= the label "
            "that rows are to get, and as right= the one that they lose."
        )
    if missing := [name for name in (within, label) if name not in dataset.column_names]:
        raise BadExample(f"the dataset has the columns {dataset.column_names} but no {missing}. Name yours.")
    if taken := [name for name in ADDED if name in dataset.column_names]:
        raise BadExample(f"the dataset has {taken} already: wrong labels were planted before. Plant once.")
    plain = dataset.with_format(None)
    given = list(plain[label])
    able = [i for i, (g, y) in enumerate(zip(plain[within], given, strict=True)) if g == group and y == right]
    if wanted > len(able):
        raise BadExample(
            f"{wanted} of {len(given)} rows are to get the label {wrong!r}, and only {len(able)} have "
            f"{within}={group!r} and {label}={right!r}. Choose a smaller share."
        )
    chosen = set(Random(seed).sample(able, wanted))
    return with_wrong_labels(dataset, label, [wrong if i in chosen else y for i, y in enumerate(given)], chosen)
