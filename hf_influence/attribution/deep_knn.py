"""Neighbours in the space in which the model decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from hf_influence.attribution.given import Labelled
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.statistic import statistic


@dataclass(kw_only=True)
class DeepKnn(Labelled, name="deep_knn"):
    """How many of the examples that look most alike to the model have the same label.

        score[i] = 1/k |{j ∈ N_i : y_j = y_i}|,   N_i the k others whose features are nearest to those of i

    Features are the input of the model's last layer; 0 for an example that has no others.

    Cost: O(n² h) for h features.
    Use when: as a baseline for classification; rows were collected with `features=True`.
    See also: ConfidentLearning (from the probabilities), Vote (neighbours among clean queries, by gradients).
    Source: Bahri et al., Deep k-NN for Noisy Labels, ICML 2020.
    """

    needs = ("features", "labels")

    k: int = field(default=10, metadata={"least": 1})
    """Neighbours looked at; all others if there are fewer."""

    def score(self, rows: Selection) -> Tensor:
        train = rows.train
        features, classes = statistic(train, "features", f"method '{self.name}'"), self.classes(train)
        k = self._neighbours(rows)
        if not k:
            return torch.zeros(len(train), 1, dtype=train.dtype)
        nearest = NearestNeighbors(n_neighbors=k).fit(features.numpy()).kneighbors(return_distance=False)  # [n, k]
        codes = {label: code for code, label in enumerate(dict.fromkeys(classes))}
        label = torch.tensor([codes[name] for name in classes])
        same = label[torch.from_numpy(nearest)] == label[:, None]
        return same.to(train.dtype).mean(1, keepdim=True)

    def record(self, rows: Selection) -> dict[str, Any]:
        return super().record(rows) | {"k": max(1, self._neighbours(rows))}

    def _neighbours(self, rows: Selection) -> int:
        return max(0, min(self.k, len(rows.train) - 1))
