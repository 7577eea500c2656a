"""Confident learning: which labels the model contradicts with the confidence that it has in each class."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_influence.attribution.extras import package
from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.statistic import statistic
from hf_influence.errors import BadExample


@dataclass(kw_only=True)
class ConfidentLearning(Method, name="confident_learning"):
    """How far the label is ahead of the best other class; the examples that confident learning calls wrong come last.

        score[i] = (1 + p_i[y_i] − max_{c ≠ y_i} p_i[c]) / 2 − [i is a label issue]

    Below 0 stand the label issues, found by noise rate: the joint distribution of given and true labels is estimated by
    counting the examples whose probability of a class is above the mean that the examples of that class have, and from
    each pair of classes as many are taken as that says, the most contradicted first. The only example of a class is
    none.

    The probabilities are meant to be those of a model that has not been trained on the example. After training on it a
    wrong label may be memorised, and few issues are found: store rows of held-out folds, or of an early epoch.

    Cost: O(n c) for c classes; the probabilities are stored with the rows. Needs the package cleanlab.
    Use when: as a baseline for classification, or when a number of wrong labels is wanted along with a ranking.
    See also: Margin (the ranking alone, of logits), SelfConfidence, ConfidenceEntropy.
    Source: Northcutt et al., Confident Learning: Estimating Uncertainty in Dataset Labels, JAIR 2021.
    """

    needs = ("probabilities", "label")

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, 1]` in [−1, 1].

        Raises:
            MissingPackage: cleanlab is not installed.
            BadExample: A label is none of the classes.
        """
        find_label_issues = package("cleanlab.filter", self.name).find_label_issues
        p = statistic(rows.train, "probabilities", f"method '{self.name}'").double()  # [n, c]
        y = statistic(rows.train, "label", f"method '{self.name}'").long()[:, None]
        if not len(y):
            return torch.zeros(0, 1, dtype=rows.train.dtype)
        if int(y.min()) < 0 or int(y.max()) >= p.shape[1]:
            raise BadExample(
                f"method '{self.name}' compares classes, and the labels in {rows.train.folder} go from {int(y.min())} "
                f"to {int(y.max())} for {p.shape[1]} probabilities: it takes labels from 0 to {p.shape[1] - 1}."
            )
        margin = p.gather(1, y) - p.scatter(1, y, -torch.inf).amax(1, keepdim=True)  # [n, 1]
        if y.min() == y.max():  # nothing to confuse it with, which cleanlab refuses
            return ((1 + margin) / 2).to(rows.train.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "May not flag all label issues", UserWarning)  # said in the docstring
            issue = find_label_issues(y[:, 0].numpy(), p.numpy(), filter_by="prune_by_noise_rate", n_jobs=1)
        return ((1 + margin) / 2 - torch.from_numpy(issue)[:, None].to(margin)).to(rows.train.dtype)
