"""Where in the dataset an example stands that turned up in a batch, told by its contents or by its id."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_influence.errors import BadExample, BadSetting
from hf_influence.gradients.batches import Examples, by_token
from hf_influence.gradients.during_training.training import Batch, main_input
from hf_influence.task import LABELS, labels_of

AT_ONCE = 32


class Positions:
    """Content hash -> positions in the dataset; samplers, workers, shards and packing do not matter.

    Examples of equal content share a hash and a gradient; they are given out in dataset order. Where the collator
    keeps the id column, its values say which example it is, and contents do not matter.

    Args:
        examples: The dataset, behind the collator that training uses.
        per_token: Whether labels go by token.

    Attributes:
        dataset: Fingerprint of the dataset.
        n: Number of its examples.
        ids: Their ids, where they are not 0 … n-1.
        id_column: The column that holds those.
        contents: What the dataset is known by when scores are applied to it.
        classes: The names of the classes, where it has them.
        duplicates: Number of examples that are equal to an earlier one; not known where ids tell them apart.

    Raises:
        BadSetting: The collator makes more or fewer examples than it gets, or examples of equal contents are not the
            same to the model, as two images are under one question and answer.
    """

    def __init__(self, examples: Examples, per_token: bool):
        self.dataset, lengths = examples.survey()
        self.n: int | None = len(examples)
        self.ids, self.id_column = examples.ids, examples.id_column
        self.contents, self.classes = examples.contents, examples.classes
        self.duplicates = 0
        self._table: dict[Hashable, list[int]] = {}
        self._named = self.ids is not None and self.id_column in examples.collated([0])
        if self._named:
            self._table = {name: [position] for position, name in enumerate(self.ids or ())}
            return
        for start in range(0, len(examples), AT_ONCE):
            at = range(start, min(start + AT_ONCE, len(examples)))
            batch = examples.collated(at)
            if per_token and len(labels_of(dict(batch))) != len(at):
                _check_tokens(at, lengths)
            codes = Batch.of(batch, per_token).code.tolist()
            if len(codes) != len(at):
                raise BadSetting(
                    f"the data_collator made {len(codes)} examples of {len(at)}, so the rows of a batch cannot be told "
                    "apart. A collator that packs must give position_ids that start at 0 with each example, as "
                    "DataCollatorWithFlattening does."
                )
            for position, code in zip(at, codes, strict=True):
                self._table.setdefault(code, []).append(position)
        self.duplicates = sum(len(positions) - 1 for positions in self._table.values())
        for positions in self._table.values():
            _check_equal(examples, positions)

    def find(
        self, codes: Sequence[int], taken: AbstractSet[int], names: Sequence[Any] | None = None
    ) -> list[int | None]:
        """The position of each example of a batch; `None` for one whose every copy is among those `taken`.

        Args:
            codes: Content hash of each example.
            taken: Positions that are not to be given out.
            names: The id of each, where the batch has the id column.

        Raises:
            BadExample: The dataset has no such example.
        """
        if self._named and names is None:
            raise BadExample(
                f"a training batch has no column {self.id_column!r}, which the data_collator kept when it was tried "
                "out. Keep it in every batch or in none."
            )
        here: set[int] = set()
        found: list[int | None] = []
        for place, key in enumerate(names if self._named and names is not None else codes):
            if key not in self._table:
                raise BadExample(self._unknown(place, key))
            free = next(
                (position for position in self._table[key] if position not in taken and position not in here), None
            )
            if free is not None:
                here.add(free)
            found.append(free)
        return found

    def copies(self, code: int) -> Sequence[int]:
        """The positions of the examples with this content hash; none where ids tell them apart."""
        return () if self._named else self._table.get(code, ())

    def _unknown(self, place: int, key: Hashable) -> str:
        if self._named:
            return (
                f"example {place} of a training batch has the id {key!r}, which is not in the column "
                f"{self.id_column!r} of the dataset of {self.n}. Pass train_dataset=… with the examples that training "
                "sees."
            )
        return (
            f"example {place} of a training batch is not in the dataset of {self.n}. Rows find their way "
            "home by their tokens and labels: a collator or transform that changes an "
            "example at random (masking, augmentation) or cuts it anew hides it, and so does packing that "
            "was done before the Trainer saw the data. Keep a column of ids in the batch (id_column=…, "
            "remove_unused_columns=False), pass train_dataset=… with the examples as the model "
            "sees them, unpacked, or capture at the end alone (during=None)."
        )


def _check_tokens(positions: Sequence[int], lengths: Sequence[int]) -> None:
    """Refuse examples without tokens, which are nothing where a collator lays examples end to end."""
    if empty := [position for position in positions if not lengths[position]]:
        raise BadExample(
            f"training example {empty[0]} has no tokens, and the data_collator lays examples end to end, which leaves "
            "nothing of it to make a row of. Leave it out (dataset.filter(lambda row: len(row['input_ids']) > 0)), pad "
            "instead, or capture at the end alone (during=None)."
        )


def _check_equal(examples: Examples, positions: Sequence[int]) -> None:
    """Refuse examples of equal contents that differ in other inputs."""
    if len(positions) == 1:
        return
    first = _inputs(examples, positions[0])
    for position in positions[1:]:
        other = _inputs(examples, position)
        differ = [name for name in {**first, **other} if not _equal(first.get(name), other.get(name))]
        if differ:
            raise BadSetting(
                f"the examples {positions[0]} and {position} have the same tokens and labels and differ in "
                f"{differ[0]!r}. Rows find their way home by tokens and labels, so theirs would be mixed up. Keep a "
                "column of ids in the batch (id_column=…, remove_unused_columns=False), or capture at the end alone "
                "(during=None)."
            )


def _inputs(examples: Examples, position: int) -> dict[str, Any]:
    """What the model is given of an example beside what its hash is made of, without padding around it."""
    batch = examples.collated([position])
    main = main_input(batch)
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == 1 and mask.any():
        real = mask[0].nonzero()[:, 0]
        cut = by_token(batch, mask)  # what is masked between its tokens stays: it moves the positions behind it
        batch = {name: value[:, real[0] : real[-1] + 1] if name in cut else value for name, value in batch.items()}
    return {name: batch[name] for name in batch if name in examples.arguments and name not in (main, *LABELS)}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
    return bool(one == other)
