"""Baselines from the probabilities that a model predicts, without gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.statistic import statistic


@dataclass(kw_only=True)
class SelfConfidence(Method, name="self_confidence"):
    """The probability that the model gives the example's own label.

        score[i] = exp(−ℓ(x_i, y_i)) = p_i[y_i]

    For a language model the geometric mean of the probabilities of the labelled tokens (one over the perplexity), or
    their product where losses were summed.

    Cost: none; the loss is stored with the rows.
    Use when: a score between 0 and 1 is wanted; the order is that of `loss`.
    See also: Loss, ConfidenceEntropy (how sure the model is of all classes), ConfidentLearning.
    Source: Müller & Markert, Identifying Mislabeled Instances in Classification Datasets, IJCNN 2019.
    """

    needs = ("loss",)

    def score(self, rows: Selection) -> Tensor:
        return (-statistic(rows.train, "loss", f"method '{self.name}'")).exp().to(rows.train.dtype)[:, None]


@dataclass(kw_only=True)
class ConfidenceEntropy(Method, name="confidence_entropy"):
    """The probability of the example's own label, weighed with how unsure the model is of all classes.

        score[i] = ln(1 + a_i) / a_i,   a_i = H(p_i) / (p_i[y_i] ln c),   c classes, 1 where a_i = 0

    An example is suspect if the model is sure, and sure of another label.

    Cost: none; the probabilities are stored with the rows.
    Use when: as a baseline for classification with more than two classes; with two the order is close to `loss`.
    See also: SelfConfidence, ConfidentLearning (with a threshold for each class).
    Source: Kuan & Mueller, Model-agnostic Label Quality Scoring to Detect Real-world Label Errors, DataPerf 2022.
    """

    needs = ("probabilities", "loss")

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, 1]` in (0, 1]."""
        p = statistic(rows.train, "probabilities", f"method '{self.name}'").double()  # [n, c]
        loss = statistic(rows.train, "loss", f"method '{self.name}'").double()  # −ln p_y
        if not len(loss):
            return torch.zeros(0, 1, dtype=rows.train.dtype)
        entropy = -torch.special.xlogy(p, p).sum(1)
        # H(p) is at least p_y (−ln p_y), which rounding hides where the model is sure
        ratio = torch.maximum(entropy * loss.exp().clamp(max=torch.finfo(p.dtype).max), loss) / math.log(p.shape[1])
        score = torch.where(ratio > 0, ratio.log1p() / ratio.clamp(min=torch.finfo(p.dtype).tiny), 1.0)
        return score.to(rows.train.dtype)[:, None]
