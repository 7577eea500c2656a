"""Where in the dataset an example stands that turned up in a batch, told by its contents."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from hf_influence.errors import BadExample, BadSetting
from hf_influence.gradients.batches import Examples
from hf_influence.gradients.training import Batch

AT_ONCE = 32


class Positions:
    """Content hash -> positions in the dataset; samplers, workers, shards and packing do not matter.

    Examples of equal content share a hash and a gradient; they are given out in dataset order.

    Args:
        examples: The dataset, behind the collator that training uses.
        per_token: Whether labels go by token.

    Raises:
        BadSetting: The collator makes more or fewer examples than it gets.
    """

    def __init__(self, examples: Examples, per_token: bool):
        self._n = len(examples)
        self._table: dict[int, list[int]] = {}
        for start in range(0, len(examples), AT_ONCE):
            at = range(start, min(start + AT_ONCE, len(examples)))
            codes = Batch.of(examples.collated(at), per_token).code.tolist()
            if len(codes) != len(at):
                raise BadSetting(
                    f"the data_collator made {len(codes)} examples of {len(at)}, so the rows of a batch cannot be told "
                    "apart. A collator that packs must give position_ids that start at 0 with each example, as "
                    "DataCollatorWithFlattening does."
                )
            for position, code in zip(at, codes, strict=True):
                self._table.setdefault(code, []).append(position)

    @property
    def duplicates(self) -> int:
        """Number of examples that are equal to an earlier one."""
        return sum(len(positions) - 1 for positions in self._table.values())

    def find(self, codes: Sequence[int], taken: AbstractSet[int]) -> list[int | None]:
        """The position of each example of a batch; `None` for one whose every copy is among those `taken`.

        Raises:
            BadExample: The dataset has no such example.
        """
        here: set[int] = set()
        found: list[int | None] = []
        for place, code in enumerate(codes):
            if code not in self._table:
                raise BadExample(
                    f"example {place} of a training batch is not in the dataset of {self._n}. Rows find their way "
                    "home by their tokens and labels: a collator or transform that changes an "
                    "example at random (masking, augmentation) or cuts it anew hides it, and so does packing that "
                    "was done before the Trainer saw the data. Pass train_dataset=… with the examples as the model "
                    "sees them, unpacked, or capture at the end alone (during=None)."
                )
            free = next(
                (position for position in self._table[code] if position not in taken and position not in here), None
            )
            if free is not None:
                here.add(free)
            found.append(free)
        return found
