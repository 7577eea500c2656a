"""The fairness of a classifier as a target: how far its predictions differ between two groups of people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import BadExample, UnsupportedModel
from hf_influence.gradients.batches import inputs_of
from hf_influence.task import Classification, task_of


@dataclass(frozen=True)
class Fairness:
    """Demographic parity: the gap between the mean predictions of two groups.

        f = |E[ŷ | a = a₁] − E[ŷ | a = a₀]|,   ŷ the predicted probability of class `positive`

    That is by softmax where an example has one label, and by the sigmoid of its own logit where it may have several.

    Source: Revisiting Inner Product (IP Ensemble), eq. 3.
    """

    sensitive: str
    """The column that says which group a query belongs to."""
    groups: tuple[Any, Any] = (0, 1)
    """Its two values."""
    positive: int = 1
    """The class whose probability is compared."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What each batch is to carry."""
        return (self.sensitive,)

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Sum of ŷ and number of queries, of the one group and of the other, `[4]`."""
        batch = dict(batch)
        belongs = batch[self.sensitive]
        members = belongs.tolist() if isinstance(belongs, Tensor) else belongs
        if strange := [value for value in members if value not in self.groups]:
            raise BadExample(
                f"a query has {self.sensitive}={strange[0]!r}, and fairness compares the groups {self.groups[0]!r} and "
                f"{self.groups[1]!r}. Leave other queries out, or name the values: fairness({self.sensitive!r}, "
                "groups=(…, …))."
            )
        y = self._probability(model, batch)
        mine = [torch.tensor([value == group for value in members], device=y.device) for group in self.groups]
        return torch.stack([number for member in mine for number in (y[member].sum(), member.sum().to(y))])

    def _probability(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """That of the class, `[b]`, in float64."""
        task = task_of(model)
        inputs, labels, _ = inputs_of(model, batch, task)
        z = model(**inputs).logits
        problem = task.settled(labels).problem if isinstance(task, Classification) else None
        if problem in (None, "regression") or z.ndim != 2 or not self.positive < z.shape[1]:
            found = "predicts numbers" if problem == "regression" else f"gives logits of shape {list(z.shape)}"
            raise UnsupportedModel(
                f"fairness compares the probability of class {self.positive}, and {type(model).__name__} {found}. Use "
                "a classifier with that class, or a target of your own."
            )
        several = problem == "multi_label_classification"
        return (z.double().sigmoid() if several else z.double().softmax(1))[:, self.positive]

    def combine(self, sums: Tensor) -> Tensor:
        """The gap, from the sums over all queries."""
        for group, size in zip(self.groups, sums[1::2].tolist(), strict=True):
            if size == 0:
                raise BadExample(
                    f"no query has {self.sensitive}={group!r}, so the two groups cannot be compared. Add queries of "
                    f"that group, or name the values: fairness({self.sensitive!r}, groups=(…, …))."
                )
        mean = sums[0::2] / sums[1::2]  # [2]
        return (mean[1] - mean[0]).abs()


def fairness(sensitive: str, *, groups: tuple[Any, Any] = (0, 1), positive: int = 1) -> Fairness:
    """The gap between the mean predictions of two groups of queries, as a target for `collect_target`.

    Higher scores are worth keeping for fairness: without such an example the gap is predicted to widen.

    Args:
        sensitive: Column of the query set that tells the groups apart.
        groups: Its two values.
        positive: The class whose probability is compared, 1 for a binary classifier.
    """
    return Fairness(sensitive, groups, positive)
