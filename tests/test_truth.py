"""Influence against the truth: every example left out and the model trained again, to the minimum, without it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_influence.attribution import attribute
from hf_influence.gradients import collect, solve_queries
from hf_influence.store import GradientStore

N, D, PENALTY = 300, 4, 0.02


class Logistic(nn.Module):
    """A linear classifier with the face of those of transformers."""

    loss_type = "ForImageClassification"

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(problem_type="single_label_classification", num_labels=2)
        self.linear = nn.Linear(D, 2, bias=False, dtype=torch.float64)
        self.linear.weight.data.copy_(weight)

    def forward(self, pixel_values: Tensor, labels: Any = None) -> Any:
        return SimpleNamespace(logits=self.linear(pixel_values))


def minimum(x: Tensor, y: Tensor, count: int) -> Tensor:
    """Of `1/count Σ ℓ + c/2 ‖θ‖²` by Newton's method, `[2, D]`."""
    weight, onehot = torch.zeros(2, D, dtype=torch.float64), F.one_hot(y, 2).double()
    for _ in range(12):
        p = (x @ weight.T).softmax(1)
        slope = (p - onehot).T @ x / count + PENALTY * weight
        spread = torch.diag_embed(p) - p[:, :, None] * p[:, None]  # [n, 2, 2]
        curve = torch.einsum("nab,ni,nj->aibj", spread, x, x).reshape(2 * D, 2 * D) / count
        step = torch.linalg.solve(curve + PENALTY * torch.eye(2 * D, dtype=torch.float64), slope.flatten())
        weight = weight - step.view_as(weight)
    assert step.norm() < 1e-10
    return weight


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Labels drawn from such a model, the rows at the minimum, and the truth `[n, q]`: what each query loses."""
    draw = torch.Generator().manual_seed(0)
    x, queries = (torch.randn(n, D, generator=draw, dtype=torch.float64) for n in (N, 8))
    slope = torch.tensor([1.5, -1.0, 0.5, 0.0], dtype=torch.float64)
    y, wanted = (
        (torch.rand(len(z), generator=draw, dtype=torch.float64) < (z @ slope).sigmoid()).long() for z in (x, queries)
    )
    best = minimum(x, y, N)

    def losses(weight: Tensor) -> Tensor:
        return F.cross_entropy(queries @ weight.T, wanted, reduction="none")

    rest = torch.ones(N, dtype=torch.bool)
    truth = []
    for i in range(N):
        rest[i] = False
        truth.append(losses(minimum(x[rest], y[rest], N)) - losses(best))
        rest[i] = True
    path, model = tmp_path_factory.mktemp("truth"), Logistic(best)
    train, query = (
        [{"pixel_values": a, "labels": int(b)} for a, b in zip(*side, strict=True)]
        for side in ((x, y), (queries, wanted))
    )
    collect(model, train, path, modules="trainable")
    collect(model, query, path, "query", modules="trainable")
    return {"path": path, "model": model, "train": train, "truth": torch.stack(truth)}


def correlations(scores: Tensor, truth: Tensor) -> Tensor:
    """Pearson's, of each query, and of all queries' sums at the end."""
    pairs = zip([*scores.T, scores.sum(1)], [*truth.T, truth.sum(1)], strict=True)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])


@pytest.mark.parametrize("solver", ["cg", "lissa"])
def test_the_true_hessian_predicts_retraining(world: dict[str, Any], solver: Any) -> None:
    """The penalty of training is the damping; with it the scores are n times the truth, to first order."""
    solve_queries(
        world["model"],
        world["train"],
        world["path"],
        damping=PENALTY,
        solver=solver,
        iterations=500,
        tolerance=1e-9,
    )
    scores = attribute(world["path"], "ip", query_split=f"query-{solver}").values / N
    assert correlations(scores, world["truth"]).min() > 0.99
    slope = (scores * world["truth"]).sum() / scores.square().sum()
    assert 0.95 < slope < 1.1


def test_the_empirical_fisher_matrix_predicts_retraining_where_the_model_is_right(world: dict[str, Any]) -> None:
    """A linear model's Gauss-Newton matrix is its Hessian, Σ p(1−p) xxᵀ; the empirical Fisher matrix has (p−y)² there.

    Both have the same mean only where labels are drawn with the probabilities of the model, as they are here.
    """
    g = GradientStore.open(world["path"]).rows().block("linear.weight")
    relative = PENALTY / float(g.square().mean())  # `damping` is relative to the mean squared entry
    scores = attribute(world["path"], "fisher", damping=relative).values / N
    assert correlations(scores, world["truth"]).min() > 0.98
    assert correlations(scores, world["truth"])[-1] > 0.99


def test_without_curvature_the_prediction_is_worse(world: dict[str, Any]) -> None:
    plain = correlations(attribute(world["path"], "ip").values, world["truth"])
    assert plain.min() < 0.97
