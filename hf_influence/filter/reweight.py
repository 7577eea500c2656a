"""Reweight: every row stays and counts as much as it is worth."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from torch import Tensor

from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter.matching import in_dataset_order
from hf_influence.scores import Scores, mean_ranks

HOW = ("softmax", "clipped", "ranks")


@dataclass(kw_only=True)
class Reweight:
    """A column of weights with mean 1, the larger the more a row is worth keeping.

    With z the mean scores, standardised to mean 0 and deviation 1 over the dataset, and w scaled to mean 1:

        "softmax"   w = exp(z / temperature)
        "clipped"   w = clip(1 + z / (3 · temperature), 0, 2)
        "ranks"     w = place in the ranking, from 0 (worst) to 1 (best), to the power 1 / temperature

    Train on them with `hf_influence.callbacks.WeightedTrainer`, which weighs the loss of each example or draws examples
    in proportion.

    >>> train = Dataset.from_dict({"text": ["good", "bad"]})
    >>> scores = Scores(torch.tensor([[1.0], [-1.0]]), ids=[0, 1], method="ip")
    >>> [round(weight, 2) for weight in Reweight(how="clipped").apply(train, scores)["weight"][:]]
    [1.33, 0.67]

    Source: Inner product and its ensemble, section on reweighting (softmax of the scores).

    Raises:
        BadSetting: An unknown `how`, or a temperature that is not above 0.
    """

    how: str = "softmax"
    temperature: float = field(default=1.0)
    """Small: few rows count for much. Large: all count alike."""
    column: str = "weight"

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise BadSetting(f"how={self.how!r} is no way to weigh. Choose one of {', '.join(map(repr, HOW))}.")
        if not self.temperature > 0:
            raise BadSetting(f"temperature={self.temperature!r} must be above 0.")

    def apply(self, dataset: Dataset, scores: Scores) -> Dataset:
        """The dataset with the column of weights.

        Raises:
            BadExample: The column is taken.
            BadSetting: Scores of another dataset.
        """
        if self.column in dataset.column_names:
            raise BadExample(f"the dataset has a column {self.column!r} already. Name another: Reweight(column='…').")
        mean = in_dataset_order(dataset, scores).mean(1)  # [n]
        return dataset.add_column(self.column, self._weights(mean).tolist())

    def _weights(self, mean: Tensor) -> Tensor:
        spread = mean.std(correction=0)
        z = (mean - mean.mean()) / spread if spread > 0 else torch.zeros_like(mean)
        if self.how == "softmax":
            weight = torch.softmax(z / self.temperature, 0)
        elif self.how == "clipped":
            weight = (1 + z / (3 * self.temperature)).clamp(0, 2)
        else:
            weight = (mean_ranks(mean) / len(mean)) ** (1 / self.temperature)
        return weight / weight.mean()
