"""Reweight: every row stays and counts as much as it is worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset, IterableDataset, Value
from torch import Tensor

from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter.actions import Written
from hf_influence.filter.decision import Decision
from hf_influence.filter.rankings import Given, estimates_of, rankings_of, wrong_of
from hf_influence.filter.rule import Rule
from hf_influence.filter.streams import By
from hf_influence.filter.thresholds import all_equal
from hf_influence.scores import mean_ranks

HOW = ("softmax", "clipped", "ranks", "posterior")


@dataclass(kw_only=True)
class Reweight(Rule):
    """A column of weights with mean 1, the larger the more a row is worth keeping.

    With z the mean scores, standardised to mean 0 and deviation 1 over the dataset, and w scaled to mean 1:

        "softmax"   w = exp(z / temperature)
        "clipped"   w = clip(1 + z / (3 · temperature), 0, 2)
        "ranks"     w = rank / n, from 1/n (worst) to 1 (best), to the power 1 / temperature
        "posterior" w = max(0, 1 − 2 p)^(1 / temperature), p = `scores.probability_wrong()`, by how much a label is
                    rather right than wrong; for one set of scores by "auto" of classes with queries

    Train on them with `hf_influence.callbacks.WeightedTrainer`, which weighs the loss of each example or draws examples
    in proportion. The other splits of a `DatasetDict` get no column, and the hub takes splits with the same columns:
    push that split alone, `new["train"].push_to_hub(…)`.

    >>> train = Dataset.from_dict({"text": ["good", "bad"]})
    >>> from hf_influence.scores import Scores
    >>> scores = Scores(torch.tensor([[1.0], [-1.0]]), ids=[0, 1], method="ip")
    >>> [round(weight, 2) for weight in Reweight(how="clipped").apply(train, scores)["weight"][:]]
    [1.33, 0.67]

    Source: Inner product and its ensemble, section on reweighting (softmax of the scores).

    Raises:
        BadSetting: An unknown `how`, or a temperature that is not above 0; when it is applied with "posterior", scores
            that are no log-odds, or by which every label is rather wrong than right.
    """

    how: str = "softmax"
    temperature: float = 1.0
    """Small: few rows count for much. Large: all count alike."""
    column: str = "weight"

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise BadSetting(f"how={self.how!r} is no way to weigh. Choose one of {', '.join(map(repr, HOW))}.")
        if not self.temperature > 0:
            raise BadSetting(f"temperature={self.temperature!r} must be above 0.")

    def decide(self, dataset: Dataset | IterableDataset, scores: Given, by: By = None) -> Decision:
        """What `apply` would do with each row; arguments and errors as there."""
        rankings = rankings_of(scores)
        decision = Decision.keeping_all(dataset, rankings, by)
        if self.column in (dataset.column_names or ()):
            raise BadExample(f"the dataset has a column {self.column!r} already. Name another: Reweight(column='…').")
        if self.how == "posterior":
            right = (1 - 2 * wrong_of(rankings, decision.ids)).clamp(min=0) ** (1 / self.temperature)
            if len(right) and not right.any():
                raise BadSetting(
                    "every label is rather wrong than right, so how='posterior' leaves no weight. Look at the share "
                    "of wrong labels that the scores were told or have found (share_wrong, report)."
                )
            weights = (right / right.mean()).tolist()
        else:
            weights = self._weights(torch.tensor(decision.scores, dtype=torch.float64)).tolist()
        rule = f"reweight how={self.how!r}, temperature={self.temperature!r}"
        return decision.but(
            rule=rule,
            actions=["weight"] * len(weights),
            reasons=(f"the rule {rule} gives weights with mean 1",),
            reason=[0] * len(weights),
            estimates=estimates_of(rankings) if self.how == "posterior" else (),
            writes=(Written(name=self.column, new=weights, feature=Value("float64")),),
        )

    def _weights(self, mean: Tensor) -> Tensor:
        z = torch.zeros_like(mean) if all_equal(mean) else (mean - mean.mean()) / mean.std(correction=0)
        if self.how == "softmax":
            weight = torch.softmax(z / self.temperature, 0)
        elif self.how == "clipped":
            weight = (1 + z / (3 * self.temperature)).clamp(0, 2)
        else:
            weight = (mean_ranks(z) / len(z)) ** (1 / self.temperature)
        return weight / weight.mean()
