"""Numbers at the edges: very large and very small gradients, equal ones, and statistics that are missing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import Blocks, make_store, make_trained_store, random_blocks
from torch import Tensor

from hf_influence.attribution import attribute
from hf_influence.attribution.kernel_ridge import KernelRidge
from hf_influence.errors import BadExample
from hf_influence.store import GradientStore

CLASSES = {"name": "classification", "problem_type": None, "num_labels": 2}


def blocks(n: int, seed: int, width: int = 33) -> Blocks:
    return random_blocks(n, seed, {"a": width, "b": width}, torch.float32)


def times(rows: Blocks, factor: Any) -> Blocks:
    return {name: g * factor for name, g in rows.items()}


@pytest.mark.parametrize("method", ["cosine", "vote", "kernel_ridge"])
def test_directions_do_not_depend_on_lengths(tmp_path: Path, method: str) -> None:
    """Squares of some of these lengths have no room in float32."""
    train, query = blocks(6, 1), blocks(4, 2)
    far = torch.tensor([1e20, 1e-26, 1.0, 1e15, 1e-22, 1.0])[:, None]
    expected = attribute(make_store(tmp_path / "plain", train, query), method).values
    found = attribute(make_store(tmp_path / "far", times(train, far), times(query, 1e-24)), method).values
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["datainf", "fisher", "self_datainf", "self_fisher"])
@pytest.mark.parametrize("factor", [1e20, 1e-20])
def test_gradients_without_room_for_their_squares_are_refused(tmp_path: Path, method: str, factor: float) -> None:
    store = make_store(tmp_path, times(blocks(6, 1), factor), times(blocks(4, 2), factor))
    with pytest.raises(BadExample, match=r"block a in .* mean squared entry of .*float64"):
        attribute(store, method)


def test_outliers_are_found_among_small_gradients(tmp_path: Path) -> None:
    train = blocks(60, 1)
    train["a"][7] *= 50
    plain = attribute(make_store(tmp_path / "plain", train), "outlier_iforest")
    small = attribute(make_store(tmp_path / "small", times(train, 2.0**-30)), "outlier_iforest")
    assert plain.lowest(1) == [7]
    assert torch.equal(small.values, plain.values)


@pytest.mark.parametrize("damping", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("method", ["fisher", "self_fisher"])
def test_the_fisher_matrix_is_exact_whatever_the_damping(tmp_path: Path, method: str, damping: float) -> None:
    """Rows near a few directions, so that the largest eigenvalue is many times the damping."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(4, 3000, generator=generator)

    def rows(n: int) -> Blocks:
        return {"a": torch.randn(n, 4, generator=generator) @ few + 0.1 * torch.randn(n, 3000, generator=generator)}

    sides = rows(50), rows(5)
    single = attribute(make_store(tmp_path / "single", *sides), method, damping=damping).values
    exact = attribute(
        make_store(tmp_path / "double", *({"a": side["a"].double()} for side in sides)), method, damping=damping
    ).values
    assert ((single - exact).norm() / exact.norm()).item() < 1e-2


def by_hand(query: Tensor, wrong: Tensor, same: list[int]) -> tuple[Tensor, Tensor]:
    """What ridge regression on the queries that are not the same one makes of each, with both of its rows."""
    right, turned = [], []
    for q, copy in enumerate(same):
        others = query[[i for i, other in enumerate(same) if other != copy]]
        kernel = others @ others.T + torch.eye(len(others), dtype=torch.float64)
        w = others.T @ torch.linalg.solve(kernel, torch.ones(len(others), dtype=torch.float64))
        right.append(query[q] @ w)
        turned.append(wrong[q] @ w)
    return torch.stack(right), torch.stack(turned)


def test_copies_of_a_query_do_not_bear_witness_to_each_other(tmp_path: Path) -> None:
    same = [0, 1, 0, 2, 3, 4, 1, 0]
    generator = torch.Generator().manual_seed(3)
    query, wrong = (torch.randn(5, 20, generator=generator, dtype=torch.float64)[same] for _ in range(2))
    store = make_store(tmp_path, {"a": query}, {"a": query}, mislabelled={"a": wrong})
    fitted = KernelRidge().fit(store.rows("query"))
    directions = [torch.nn.functional.normalize(rows, dim=1) for rows in (query, wrong)]
    left_out, turned = by_hand(*directions, same)
    torch.testing.assert_close(fitted.left_out, left_out)
    torch.testing.assert_close(fitted.turned(store.rows("query-mislabelled")), turned)


def test_queries_of_one_direction_are_no_copies_if_their_losses_differ(tmp_path: Path) -> None:
    query = blocks(1, 4)
    twice = {name: torch.cat((g, 3 * g)) for name, g in query.items()}
    for name, loss in (("same", [0.5, 0.5]), ("other", [0.5, 0.7])):
        store = make_store(tmp_path / name, twice, twice, query_stats={"loss": torch.tensor(loss)})
        assert len(KernelRidge().fit(store.rows("query")).copies) == (name == "same")


def test_queries_given_twice_tell_no_more_than_once(tmp_path: Path) -> None:
    query, train = blocks(50, 0, 150), blocks(400, 1, 150)
    stats = {"loss": torch.rand(400, generator=torch.Generator().manual_seed(2))}
    told = []
    for times_given in (1, 2):
        twice = {name: g.repeat(times_given, 1) for name, g in query.items()}
        report = attribute(make_store(tmp_path / str(times_given), train, twice, stats=stats, task=CLASSES)).report
        told.append(report.get("log_odds", {"auc": 0.5})["auc"])
    assert told[1] == pytest.approx(told[0], abs=0.05)


def test_equal_examples_have_equal_scores_in_whatever_files_they_lie(tmp_path: Path) -> None:
    """Each file is a matrix product of its own, and those of one row round otherwise than those of many."""
    train = {"a": torch.cat((blocks(1, 1, 333)["a"].repeat(101, 1), blocks(100, 2, 333)["a"]))}
    stats = {"loss": torch.cat((torch.full((101,), 0.3), torch.rand(100)))}
    for shards in (1, 3, 40):
        path = tmp_path / str(shards)
        store = make_store(path, train, {"a": blocks(30, 3, 333)["a"]}, stats=stats, shards=shards, task=CLASSES)
        assert len(attribute(store).values[:101].unique()) == 1


NOT_FINITE = {
    "confidence_entropy": "probabilities",
    "self_confidence": "loss",
    "loss": "loss",
    "margin": "margin",
    "prompt_gain": "other_prompt_loss",
    "auto": "loss",
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", NOT_FINITE)
def test_statistics_that_are_not_finite_are_refused_by_name(tmp_path: Path, method: str, value: float) -> None:
    stats = {name: torch.rand(6) for name in ("loss", "margin")}
    stats |= {name: torch.rand(6, 2) for name in ("probabilities", "other_prompt_loss")}
    stats[NOT_FINITE[method]][4] = value
    store = make_store(tmp_path, blocks(6, 1), stats=stats, task=CLASSES)
    with pytest.raises(BadExample, match=f"statistic '{NOT_FINITE[method]}' of example 4 .* not finite"):
        attribute(store, method)


def test_a_margin_of_a_query_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    stats = {"loss": torch.rand(6), "margin": torch.rand(6)}
    margins = torch.tensor([1.0, math.nan, 2.0, 1.0])
    store = make_store(tmp_path, blocks(6, 1), blocks(4, 2), stats=stats, query_stats={"margin": margins}, task=CLASSES)
    with pytest.raises(BadExample, match=r"statistic 'margin' of example 1 in .*query"):
        attribute(store)


def test_examples_of_no_group_are_of_one_group(tmp_path: Path) -> None:
    store = make_trained_store(tmp_path, blocks(8, 1), blocks(4, 2), task=CLASSES)
    assert GradientStore.open(tmp_path).points()
    groups: list[Any] = [math.nan, float("nan"), None, math.nan, "x", "x", "x", "x"]
    expected = attribute(store, groups=["y"] * 4 + ["x"] * 4)
    assert torch.equal(attribute(store, groups=groups).values, expected.values)
    listed = attribute(store, groups=[["y"]] * 4 + [["x"]] * 4)
    assert torch.equal(listed.values, expected.values)
