"""Labels brought into the order of the scores, whatever kind of sequence they come in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_influence.errors import BadSetting


def labels_for(ids: list[int] | list[str], labels: Iterable[Any], what: str, id_column: str | None = None) -> list[Any]:
    """One label for each of `ids`, in their order.

    Ids that are the dataset's own indices (a permutation of 0 … n − 1) pick their labels from dataset order;
    any others, and the values of an id column, take the labels as they come.

    >>> labels_for([2, 0, 1], ["a", "b", "c"], "train_labels")
    ['c', 'a', 'b']

    Raises:
        BadSetting: Not as many labels as ids.
    """
    plain = labels.tolist() if hasattr(labels, "tolist") else list(labels)  # arrays and tensors as Python numbers
    if len(plain) != len(ids):
        raise BadSetting(
            f"{what} has {len(plain)} entries but the scores cover {len(ids)} examples, so a label cannot be told for "
            "each of them. Give the labels of exactly the dataset that was scored."
        )
    if id_column is None and set(ids) == set(range(len(ids))):
        return [plain[int(i)] for i in ids]
    return plain
