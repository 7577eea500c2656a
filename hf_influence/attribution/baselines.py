"""Baselines that need no gradient: what was noted about an example on the way, and chance."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.statistic import statistic


@dataclass(kw_only=True)
class Statistic(Method):
    """`sign` times one of the statistics that are stored with the rows."""

    sign: ClassVar[int]

    def __init_subclass__(cls, *, statistic: str = "", sign: int = 0, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if statistic:
            cls.needs, cls.sign = (statistic,), sign

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, 1]`; MissingRows if the statistic was not collected."""
        return self.sign * statistic(rows.train, self.needs[0], f"method '{self.name}'").to(rows.train.dtype)[:, None]


@dataclass(kw_only=True)
class Loss(Statistic, name="loss", statistic="loss", sign=-1):
    """Minus the example's own loss: what the model has not learnt comes lowest.

        score[i] = −ℓ(x_i, y_i)

    Cost: none; the loss is stored with the rows.
    Use when: always, as the bar that any other method has to pass.
    See also: LossMean (over training), Margin, El2n.
    Source: the small-loss rule; Arpit et al., A Closer Look at Memorization, ICML 2017.
    """


@dataclass(kw_only=True)
class El2n(Statistic, name="el2n", statistic="el2n", sign=-1):
    """Minus the length of the error vector of the predicted probabilities.

        score[i] = −‖softmax(z_i) − onehot(y_i)‖₂

    Cost: none; the statistic is stored with the rows.
    Use when: as a baseline for classification, best early in training.
    See also: El2nMean (over training), Loss, Margin.
    Source: Paul et al., Deep Learning on a Data Diet, NeurIPS 2021.
    """


@dataclass(kw_only=True)
class Margin(Statistic, name="margin", statistic="margin", sign=1):
    """By how much the logit of the label exceeds the best other logit.

        score[i] = z_i[y_i] − max_{c ≠ y_i} z_i[c]

    Cost: none; the statistic is stored with the rows.
    Use when: as a baseline for mislabelled data; wrong labels tend to have negative margins.
    See also: Aum (over training), Loss, El2n.
    Source: Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking, NeurIPS 2020.
    """


@dataclass(kw_only=True)
class Length(Statistic, name="length", statistic="length", sign=-1):
    """Minus the number of tokens, padding not counted: the longest examples come lowest.

        score[i] = −(tokens of i)

    Cost: none; the number is stored with the rows.
    Use when: to see whether a method has found more than length.
    See also: Random.
    Source: a baseline of this library.
    """


@dataclass(kw_only=True)
class Random(Method, name="random"):
    """A uniform random number for each example, from the seed and the id of the example.

        score[i] ~ U(0, 1)

    Cost: none.
    Use when: to see what trimming as many examples at random would do.
    See also: Length.
    Source: a baseline of this library.
    """

    needs = ()

    seed: int = field(default=0, metadata={"least": 0})
    """Another seed gives other numbers; an example keeps its number wherever it stands in the dataset."""

    def score(self, rows: Selection) -> Tensor:
        draws = [random.Random(f"{self.seed}/{id}").random() for id in rows.train.ids]
        return torch.tensor(draws, dtype=rows.train.dtype)[:, None]
