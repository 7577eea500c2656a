"""The toy worlds of the papers: points in the plane, some of them odd, and a small network that learns to tell them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.datasets import make_circles, make_moons
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

Example = dict[str, Any]


class PlaneConfig(PretrainedConfig):
    """`hidden` has the widths of the hidden layers; without any the model is logistic regression."""

    model_type = "plane"

    def __init__(self, hidden: Sequence[int] = (), inputs: int = 2, **kwargs: Any):
        super().__init__(**kwargs)
        self.hidden = list(hidden)
        self.inputs = inputs


class PlaneForSequenceClassification(PreTrainedModel):
    """A fully connected network with ReLUs over real numbers, `x` `[b, inputs]`."""

    config_class = PlaneConfig

    def __init__(self, config: PlaneConfig):
        super().__init__(config)
        widths = [config.inputs, *config.hidden, config.num_labels]
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As torch initialises them."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.layers(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def network(*hidden: int, seed: int = 0, inputs: int = 2) -> PlaneForSequenceClassification:
    """Two classes, in float64 so that figures do not depend on the machine."""
    torch.manual_seed(seed)
    return PlaneForSequenceClassification(PlaneConfig(hidden, inputs)).double()


def examples(x: np.ndarray, labels: np.ndarray) -> list[Example]:
    return [{"x": torch.from_numpy(point), "labels": int(label)} for point, label in zip(x, labels, strict=True)]


def tensors(data: Sequence[Example]) -> tuple[Tensor, Tensor]:
    return torch.stack([row["x"] for row in data]), torch.tensor([row["labels"] for row in data])


def fitted(
    model: PlaneForSequenceClassification,
    data: Sequence[Example],
    *,
    epochs: int,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.0,
) -> PlaneForSequenceClassification:
    """Trained on all of it at once with Adam."""
    x, y = tensors(data)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, weight_decay=weight_decay)
    for _ in range(epochs):
        optimizer.zero_grad()
        model(x, y).loss.backward()
        optimizer.step()
    return model


def accuracy(model: PlaneForSequenceClassification, data: Sequence[Example]) -> float:
    x, y = tensors(data)
    with torch.no_grad():
        return float((model(x).logits.argmax(1) == y).double().mean())


def half_moons(seed: int) -> tuple[list[Example], list[Example], list[bool]]:
    """250 training points, ten of each class with the label of the other, and 1,000 test points (100 in the paper).

    The wrong labels are the ten nearest to the middle of each moon. The paper has them flipped "manually"; in the
    authors' data they are ten of the 20 to 36 points around that middle, so less close together than here.

    Returns:
        Training set, test set, and which of the training labels are wrong.

    Source: Chhabra et al., Outlier Gradient Analysis, ICML 2025, sec. 4 and app. A.1.1; their data as published with
    github.com/yangziao56/Inner_Product_Ensemble. The noise is ours (theirs 0.125, and 0.1 for the test set), and that
    coordinates are standardised is only in their code.
    """
    draw = np.random.RandomState(seed)
    x, labels = make_moons(250, noise=0.08, random_state=draw)
    test_x, test_labels = make_moons(1000, noise=0.08, random_state=draw)
    wrong = np.zeros(250, dtype=bool)
    for label, middle in enumerate([(0, 1), (1, -0.5)]):
        far = np.where(labels == label, np.linalg.norm(x - middle, axis=1), np.inf)
        wrong[far.argsort()[:10]] = True
    labels[wrong] = 1 - labels[wrong]
    mean, spread = x.mean(0), x.std(0)
    train, test = examples((x - mean) / spread, labels), examples((test_x - mean) / spread, test_labels)
    return train, test, wrong.tolist()


def two_circles(seed: int) -> tuple[list[Example], list[bool]]:
    """Thirty points on each of two circles, the outer one class 0, the inner one class 1, and ten of class 0 inside.

    Returns:
        Training set, and which points are the ten that have no others of their class near them.

    Source: Kim et al., GEX, NeurIPS 2023, sec. 4.1 and app. E; the radius inside and how the ten scatter are ours.
    """
    x, labels = make_circles(60, factor=0.45, random_state=seed)
    odd = 0.02 * np.random.default_rng(seed).standard_normal((10, 2))
    flags = [False] * 60 + [True] * 10
    return examples(np.concatenate([x, odd]), np.concatenate([labels, np.zeros(10, dtype=int)])), flags
