"""Baselines from the probabilities that a model predicts, without gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.statistic import statistic
from hf_influence.errors import BadSetting


@dataclass(kw_only=True)
class SelfConfidence(Method, name="self_confidence"):
    """The probability that the model gives the example's own label.

        score[i] = exp(−ℓ(x_i, y_i)) = p_i[y_i]

    For a language model the geometric mean of the probabilities of the labelled tokens (one over the perplexity), or
    their product where losses were summed. Of another loss, label smoothing for instance, the stored probabilities of
    the classes are taken.

    Cost: none; the loss is stored with the rows.
    Use when: a score between 0 and 1 is wanted; the order is that of `loss`.
    See also: Loss, ConfidenceEntropy (how sure the model is of all classes), ConfidentLearning.
    Source: Müller & Markert, Identifying Mislabeled Instances in Classification Datasets, IJCNN 2019.
    """

    needs = ("loss",)

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, 1]` in (0, 1].

        Raises:
            BadSetting: Probabilities that are 0 in the precision of the rows, as those of whole texts are.
        """
        loss = _own_loss(rows, self.name)
        p = torch.exp(-loss).to(rows.train.dtype)
        if (gone := (p == 0).nonzero()).numel():
            at = int(gone[0])
            raise BadSetting(
                f"method '{self.name}': the loss of example {rows.train.ids[at]!r} is {float(loss[at]):.4g}, and its "
                f"probability is 0 in {p.dtype}, so that examples cannot be told from each other. Use method='loss': "
                "its order is the same."
            )
        return p[:, None]


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
        loss = _own_loss(rows, self.name)
        if not len(loss):
            return torch.zeros(0, 1, dtype=rows.train.dtype)
        entropy = -torch.special.xlogy(p, p).sum(1)
        # H(p) is at least p_y (−ln p_y), which rounding hides where the model is sure
        ratio = torch.maximum(entropy * loss.exp().clamp(max=torch.finfo(p.dtype).max), loss) / math.log(p.shape[1])
        score = torch.where(ratio > 0, ratio.log1p() / ratio.clamp(min=torch.finfo(p.dtype).tiny), 1.0)
        return score.to(rows.train.dtype)[:, None]


def _own_loss(rows: Selection, method: str) -> Tensor:
    """−ln p_y of each training example, `[n]` in float64: its loss, unless that is another one than cross-entropy.

    Raises:
        MissingRows: It is another one, and neither probabilities nor labels are stored.
    """
    needed_by = f"method '{method}'"
    if "loss" not in rows.store.header.task:
        return statistic(rows.train, "loss", needed_by).double()
    p, label = (statistic(rows.train, name, needed_by) for name in ("probabilities", "label"))
    return -p.double().gather(1, label.long()[:, None])[:, 0].log() if len(p) else torch.zeros(0, dtype=torch.float64)
