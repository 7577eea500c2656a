"""Baselines that need no gradient, from what was noted about an example each time that training saw it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_influence.attribution.baselines import El2n, Loss, Margin
from hf_influence.attribution.over_points import MeanOverTraining, OverTraining
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.statistic import statistic


@dataclass(kw_only=True)
class LossMean(MeanOverTraining, Loss, name="loss_mean"):
    """Minus the mean of the example's loss over training: what is learnt late or never comes lowest.

        score[i] = −1/|C_i| Σ_{c ∈ C_i} ℓ_c(x_i, y_i),   C_i the points that hold i

    Cost: none; the loss is stored with the rows of each point.
    Use when: rows were captured during training; a wrong label that is memorised at the end still shows.
    See also: Loss (at one point), Aum.
    Source: the small-loss rule over training; Swayamdipta et al., Dataset Cartography, EMNLP 2020 (mean confidence).
    """


@dataclass(kw_only=True)
class Aum(MeanOverTraining, Margin, name="aum"):
    """Area under the margin: by how much the logit of the label exceeds the best other logit, on average in training.

        score[i] = 1/|C_i| Σ_{c ∈ C_i} (z_i[y_i] − max_{k ≠ y_i} z_i[k])(θ_c),   C_i the points that hold i

    Cost: none; the margin is stored with the rows of each point.
    Use when: rows were captured during training and labels may be wrong; best over the epochs before memorisation.
    See also: Margin (at one point), LossMean, Forgetting.
    Source: Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking, NeurIPS 2020.
    """


@dataclass(kw_only=True)
class El2nMean(MeanOverTraining, El2n, name="el2n_mean"):
    """Minus the length of the error vector of the predicted probabilities, on average in training.

        score[i] = −1/|C_i| Σ_{c ∈ C_i} ‖softmax(z_i(θ_c)) − onehot(y_i)‖₂,   C_i the points that hold i

    Cost: none; the statistic is stored with the rows of each point.
    Use when: as a baseline for classification where rows were captured during training; one point is noisy.
    See also: El2n (at one point), LossMean.
    Source: Paul et al., Deep Learning on a Data Diet, NeurIPS 2021 (there the mean is over several early runs).
    """


@dataclass(kw_only=True)
class Forgetting(OverTraining, name="forgetting"):
    """Minus how often training forgets the example: right the last time it was seen, wrong now. Never learnt is worst.

        score[i] = −Σ_t max(0, a_i[t−1] − a_i[t]) − T (1 − max_t a_i[t]),   a the share of labels predicted right

    t counts the points that hold i, T is the largest number of them for any example. With one label, a is 0 or 1: the
    score is minus the number of forgetting events, or −T for an example that was never right. For a language model a
    is the share of labelled tokens, and the score the same count on average over the tokens, as far as the share
    shows it (it hides tokens that are forgotten while as many others are learnt).

    Cost: none; the share is stored with the rows of each point.
    Use when: rows were captured over many epochs; with few, most examples tie.
    See also: Aum and LossMean (finer with few epochs).
    Source: Toneva et al., An Empirical Study of Example Forgetting during Deep Neural Network Learning, ICLR 2019.
    """

    needs = ("points", "correct")

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, 1]`; StoreMismatch where the points are not consecutive parts of one run."""
        forgotten, last, best, times = torch.zeros(4, len(rows.ids), dtype=torch.float64)  # each [n]
        before = -1
        for part in rows.parts:
            before = part.last_step_after(before) if part.points[0] else before
            at = rows.places(part)
            share = statistic(part.train, "correct", f"method '{self.name}'").to(last)
            forgotten[at] += (last[at] - share).clamp(min=0)
            best[at] = torch.maximum(best[at], share)
            last[at] = share
            times[at] += 1
        most = times.max() if len(times) else 0
        return (-forgotten - most * (1 - best)).to(rows.train.dtype)[:, None]
