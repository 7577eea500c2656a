"""`damping="auto"`: what is chosen, by which numbers, and how near to the best it comes where the truth is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from sklearn.metrics import roc_auc_score
from stores import make_store
from torch import Tensor

from hf_influence.attribution import attribute
from hf_influence.curvature.choice import GRID
from hf_influence.errors import BadExample, BadSetting, MissingRows, NotConverged

assert_exact = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)
World = tuple[Tensor, Tensor, Tensor]
"""Rows `[n, d]`, queries `[m, d]`, and which examples are good for which query, `[n, m]`."""


def classes(seed: int, n: int = 200, m: int = 40, d: int = 300, k: int = 5) -> World:
    """Each class has a direction, all share three strong ones, and norms are heavy-tailed.

    Returns:
        Rows `[n, d]`, queries `[m, d]`, and whether they are of one class, `[n, m]`.
    """
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)
    centre, shared = normal(k, d) / d**0.5, 2 * normal(3, d) / d**0.5

    def some(count: int) -> tuple[Tensor, Tensor]:
        label = torch.arange(count) % k
        rows = centre[label] + normal(count, 3) @ shared + normal(count, d) / d**0.5
        return rows * normal(count, 1).exp(), label

    (train, label), (query, wanted) = some(n), some(m)
    return train, query, label[:, None] == wanted


def flips(seed: int, n: int = 200, m: int = 40, d: int = 300) -> World:
    """A fifth of the rows point away from the direction of the clean queries; norms are heavy-tailed, noise is alike
    in all directions, so that the inner product is as good as any.
    """
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)
    centre, clean = 0.5 * normal(d) / d**0.5, torch.arange(n) % 5 > 0
    train = torch.where(clean, 1.0, -1.0)[:, None] * centre + normal(n, d) / d**0.5
    query = centre + normal(m, d) / d**0.5
    return train * normal(n, 1).exp(), query * normal(m, 1).exp(), clean[:, None].expand(-1, m)


def quality(scores: Tensor, good: Tensor) -> float:
    """AUC of finding what is good for a query, mean over the queries."""
    columns = zip(good.T.numpy(), scores.T.numpy(), strict=True)
    return sum(roc_auc_score(truth, score) for truth, score in columns) / scores.shape[1]


@pytest.mark.parametrize("world", [classes, flips])
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_near_the_best_where_the_truth_is_known(
    tmp_path: Path, world: Callable[[int], World], seed: int
) -> None:
    train, query, good = world(seed)
    store = make_store(tmp_path, {"w": train}, {"w": query})
    found = {damping: quality(attribute(store, "fisher", damping=damping).values, good) for damping in GRID}
    chosen = attribute(store, "fisher", damping="auto")
    best = max(found.values())
    assert quality(chosen.values, good) > best - 0.03
    assert best - found[0.01] > 0.05  # it does matter
    if world is flips:
        assert chosen.settings["damping"] >= 10


INVERSES = {"fisher": oracle.fisher, "datainf": oracle.mean_of_inverses, "cg": oracle.fisher}


def two_blocks(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    train, query, _ = classes(seed, n=20, m=6, d=40, k=2)
    return {"a": train[:, :9], "b": train[:, 9:]}, {"a": query[:, :9], "b": query[:, 9:]}


@pytest.mark.parametrize("method", INVERSES)
def test_the_curve_is_that_of_dense_inverses_and_the_scores_those_of_the_number_chosen(
    tmp_path: Path, method: str
) -> None:
    train, query = two_blocks()
    store = make_store(tmp_path, train, query)
    more: dict[str, Any] = {"tolerance": 1e-11} if method == "cg" else {}
    scores = attribute(store, method, damping="auto", **more)
    curve = []
    for damping in GRID:
        products = torch.zeros(6, 6, dtype=torch.float64)
        for name, g in train.items():
            products += query[name] @ INVERSES[method](g, damping) @ query[name].T
        cosines = torch.stack(
            [products[a, b] / (products[a, a] * products[b, b]).sqrt() for a in range(6) for b in range(a + 1, 6)]
        )
        curve.append(float(cosines.mean() / cosines.std()))
    report = scores.report["damping"]
    assert report["tried"] == list(GRID)
    torch.testing.assert_close(report["agreement"], curve, rtol=1e-6, atol=1e-8)
    assert report["chosen"] == GRID[curve.index(max(curve))] == scores.settings["damping"]
    assert_exact(scores.values, attribute(store, method, damping=report["chosen"], **more).values)
    assert_exact(attribute(store, method, **scores.settings).values, scores.values)


@pytest.mark.parametrize("method", ["dropout", "gaussian", "logra", "lissa"])
def test_other_damped_methods_choose_as_well(tmp_path: Path, method: str) -> None:
    store = make_store(tmp_path, *two_blocks())
    scores = attribute(store, method, damping="auto", queries="mean")
    assert scores.settings["damping"] in GRID
    assert_exact(attribute(store, method, **scores.settings).values, scores.values)


def test_a_solver_that_needs_more_damping_chooses_among_what_it_can_solve(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)
    spectrum, basis = torch.arange(1, 301, dtype=torch.float64) ** -0.7, torch.linalg.qr(normal(300, 300)).Q
    train, query = (
        {"a": (normal(k, 300) * spectrum) @ basis + shift * basis[30]} for k, shift in ((300, 0.1), (20, 0.6))
    )
    store = make_store(tmp_path, train, query)
    with pytest.raises(NotConverged, match="More damping"):
        attribute(store, "cg", damping=1e-4, iterations=100)
    scores, exact = attribute(store, "cg", damping="auto", iterations=100), attribute(store, "fisher", damping="auto")
    assert scores.settings["damping"] == exact.settings["damping"]
    tried, reference = scores.report["damping"]["agreement"], exact.report["damping"]["agreement"]
    assert tried[0] is None
    assert None not in tried[4:]
    torch.testing.assert_close(tried[4:], reference[4:], rtol=1e-4, atol=1e-4)
    with pytest.raises(NotConverged):
        attribute(store, "cg", damping="auto", iterations=1, tolerance=1e-12)


def test_the_choice_does_not_depend_on_the_length_of_a_query(tmp_path: Path) -> None:
    train, query = two_blocks()
    long = {
        name: v * torch.tensor([1.0, 100, 1, 1, 1, 1e-3], dtype=torch.float64)[:, None] for name, v in query.items()
    }
    one, other = (
        attribute(make_store(tmp_path / name, train, side), "fisher", damping="auto").report["damping"]["agreement"]
        for name, side in (("plain", query), ("long", long))
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", ["self_fisher", "self_datainf", "self_cg", "self_lissa"])
def test_without_queries_it_is_refused_with_the_reason(tmp_path: Path, method: str) -> None:
    train, query = two_blocks()
    with pytest.raises(BadSetting, match=r"how well the queries agree .* none to ask. Pass a number"):
        attribute(make_store(tmp_path, train, query), method, damping="auto")


def test_too_few_queries_are_refused(tmp_path: Path) -> None:
    train, query = two_blocks()
    store = make_store(tmp_path, train, {name: v[:2] for name, v in query.items()})
    with pytest.raises(MissingRows, match=r"has 2 with a gradient .* three are the least"):
        attribute(store, "fisher", damping="auto")


def test_queries_that_disagree_at_every_damping_are_refused(tmp_path: Path) -> None:
    train, query = two_blocks()
    opposed = {name: torch.cat([v[:3], -v[:3]]) for name, v in query.items()}
    with pytest.raises(MissingRows, match="agree with each other, and there is none"):
        attribute(make_store(tmp_path, train, opposed), "fisher", damping="auto")


def test_rows_that_are_not_finite_are_named_as_ever(tmp_path: Path) -> None:
    train, query = two_blocks()
    train["b"][4, 2] = torch.nan
    with pytest.raises(BadExample, match=r"example 4 .*block b"):
        attribute(make_store(tmp_path, train, query), "fisher", damping="auto")


def test_other_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"damping='best' must be a number above 0, or 'auto'"):
        attribute(make_store(tmp_path, *two_blocks()), "fisher", damping="best")
