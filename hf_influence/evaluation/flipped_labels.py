"""Wrong labels, planted in a classification set so that it is known where they are."""

from __future__ import annotations

from random import Random

from datasets import ClassLabel, Dataset

from hf_influence.dataset.groups import group_of
from hf_influence.errors import BadExample
from hf_influence.evaluation.labels import ADDED, check_single, with_wrong_labels
from hf_influence.evaluation.shares import share_of


def flipped_labels(dataset: Dataset, share: float = 0.2, *, seed: int = 0, label: str = "label") -> Dataset:
    """A copy of `dataset` in which a share of the rows has the label of another class, drawn evenly from the others.

    ⌊share · n⌋ rows are chosen at random (share as written: 0.29 of 100 rows is 29).

    Args:
        dataset: With one label an example.
        share: In [0, 1].
        seed: The same seed flips the same labels.
        label: The column of labels, of any type but lists.

    Returns:
        The dataset with two more columns: `is_wrong`, and `right_label` with what was there before.

    Raises:
        BadSetting: A share out of range.
        BadExample: A column is missing or there already, a row has no label or several, or all have the same.

    See also: corrupt_answers (for text), mislabel_detection.

    >>> flipped = flipped_labels(Dataset.from_dict({"label": [0, 1, 1, 0]}), share=0.25)
    >>> sum(flipped["is_wrong"]), sum(a != b for a, b in zip(flipped["label"], flipped["right_label"]))
    (1, 1)
    """
    wanted = int(share_of(share) * len(dataset))
    if label not in dataset.column_names:
        raise BadExample(f"the dataset has the columns {dataset.column_names} but no {label!r}. Name it: label=….")
    if taken := [name for name in ADDED if name in dataset.column_names]:
        raise BadExample(f"the dataset has {taken} already: its labels were flipped before. Flip once.")
    right = list(dataset.with_format(None)[label])
    check_single(right, f"column {label!r}")
    feature = dataset.features[label]
    classes = list(range(feature.num_classes)) if isinstance(feature, ClassLabel) else list(dict.fromkeys(right))
    missing = (i for i, own in enumerate(right) if group_of(own) is None or own not in classes)
    if (row := next(missing, None)) is not None:
        raise BadExample(f"row {row} has no label ({label}={right[row]!r}), so none can be wrong. Leave such rows out.")
    if wanted and len(classes) < 2:
        raise BadExample(f"all {len(right)} labels are {right[0]!r}, so there is no other class to flip one to.")
    rng = Random(seed)
    wrong = set(rng.sample(range(len(right)), wanted))
    given = list(right)
    for i in sorted(wrong):
        given[i] = rng.choice([other for other in classes if other != right[i]])
    return with_wrong_labels(dataset, label, given, wrong)
