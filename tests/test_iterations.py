"""Inverses by iteration: what they converge to, what they say of it, and what they refuse to hand out."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import oracle
import pytest
import torch
from stores import Blocks, make_store, random_blocks
from torch import Tensor

import hf_influence.store.rows
from hf_influence import Scores
from hf_influence.attribution import attribute
from hf_influence.errors import NotConverged

assert_exact = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)


def blocks(n: int, seed: int, dtype: torch.dtype = torch.float64, widths: tuple[int, ...] = (7, 26)) -> Blocks:
    """Rows with one direction that dwarfs all others, so that the spectral norm is found to the last digit."""
    return {name: g + 10 for name, g in random_blocks(n, seed, widths, dtype).items()}


TRAIN, QUERY = blocks(20, 1), blocks(5, 2)


@pytest.mark.parametrize("damping", [0.001, 0.1, 3.0])
def test_conjugate_gradients_give_the_dense_inverse(tmp_path: Path, damping: float) -> None:
    store = make_store(tmp_path, TRAIN, QUERY)
    scores = attribute(store, "cg", damping=damping, tolerance=1e-13)
    assert_exact(scores.values, oracle.influence(TRAIN, QUERY, oracle.fisher, damping))
    assert scores.report["residual"] <= 1e-12
    assert 1 <= scores.report["iterations"] <= 40
    own = attribute(store, "self_cg", damping=damping, tolerance=1e-13)
    assert_exact(own.values, oracle.self_influence(TRAIN, oracle.fisher, damping))


def test_conjugate_gradients_stop_at_the_tolerance(tmp_path: Path) -> None:
    store = make_store(tmp_path, TRAIN, QUERY)
    exact = oracle.influence(TRAIN, QUERY, oracle.fisher)
    rough, fine = (attribute(store, "cg", tolerance=tolerance) for tolerance in (1e-1, 1e-6))
    assert 1e-6 < rough.report["residual"] <= 1e-1
    assert fine.report["residual"] <= 1e-6
    assert rough.report["iterations"] < fine.report["iterations"]
    assert (fine.values - exact).norm() < (rough.values - exact).norm()


def test_conjugate_gradients_converge_on_float32_rows(tmp_path: Path) -> None:
    train, query = (blocks(40, seed, torch.float32, (300,)) for seed in (1, 2))
    store = make_store(tmp_path, train, query)
    scores = attribute(store, "cg", damping=1e-2, tolerance=1e-10)
    assert scores.values.dtype == torch.float32
    assert scores.report["residual"] <= 1e-10
    exact = oracle.influence(
        *({k: g.double() for k, g in side.items()} for side in (train, query)), oracle.fisher, 1e-2
    )
    assert (scores.values - exact).norm() / exact.norm() < 1e-4


def series(g: Tensor, v: Tensor, iterations: int, damping: float, scale: float = 1) -> tuple[Tensor, float]:
    """The sum of the Neumann series by powers of a dense matrix, and the residual that it leaves."""
    n, d = g.shape
    matrix = oracle.strength(g, damping) * torch.eye(d, dtype=torch.float64) + g.T @ g / n
    s = scale * torch.linalg.eigvalsh(matrix)[-1]
    step = torch.eye(d, dtype=torch.float64) - matrix / s
    x = sum(torch.linalg.matrix_power(step, k) for k in range(iterations + 1)) @ v.T / s  # [d, q]
    return x, float(((v.T - matrix @ x).norm(dim=0) / v.norm(dim=1)).max())


@pytest.mark.parametrize(("iterations", "scale"), [(10, 1.0), (1, 1.0), (25, 0.6)])
def test_lissa_sums_the_series_and_reports_what_is_left(tmp_path: Path, iterations: int, scale: float) -> None:
    store = make_store(tmp_path, TRAIN, QUERY)
    scores = attribute(store, "lissa", iterations=iterations, scale=scale)
    parts = [series(TRAIN[name], QUERY[name], iterations, 0.1, scale) for name in TRAIN]
    assert_exact(scores.values, sum(TRAIN[name] @ x for name, (x, _) in zip(TRAIN, parts, strict=True)))
    assert scores.report["residual"] == pytest.approx(max(left for _, left in parts), rel=1e-6)
    assert scores.report["iterations"] == iterations
    own = attribute(store, "self_lissa", iterations=iterations, scale=scale)
    expected = [(g * series(g, g, iterations, 0.1, scale)[0].T).sum(1, keepdim=True) for g in TRAIN.values()]
    assert_exact(own.values, -sum(expected))


def test_lissa_converges_to_the_dense_inverse(tmp_path: Path) -> None:
    scores = attribute(make_store(tmp_path, TRAIN, QUERY), "lissa", damping=10.0, iterations=800)
    assert_exact(scores.values, oracle.influence(TRAIN, QUERY, oracle.fisher, 10.0))
    assert scores.report["residual"] < 1e-9


@pytest.mark.parametrize("method", ["lissa", "self_lissa"])
def test_a_series_that_grows_is_refused_with_the_numbers(tmp_path: Path, method: str) -> None:
    with pytest.raises(NotConverged, match=r"block layer0 .* 30 iterations .* went from \d.* to \d\S*e\+.*method='cg'"):
        attribute(make_store(tmp_path, TRAIN, QUERY), method, scale=0.2, iterations=30)


@pytest.mark.parametrize("method", ["cg", "self_cg"])
def test_conjugate_gradients_that_do_not_converge_are_refused_with_the_numbers(tmp_path: Path, method: str) -> None:
    with pytest.raises(NotConverged, match=r"residual .* is \d\S* after at most 2 iterations, and 1e-06 was asked for"):
        attribute(make_store(tmp_path, TRAIN, QUERY), method, iterations=2)


@pytest.mark.parametrize("method", ["lissa", "cg"])
def test_a_zero_query_has_zero_scores(tmp_path: Path, method: str) -> None:
    query = {name: v.clone() for name, v in QUERY.items()}
    for v in query.values():
        v[1] = 0
    scores = attribute(make_store(tmp_path, TRAIN, query), method)
    assert (scores.values[:, 1] == 0).all()
    assert_exact(scores.values[:, 2], attribute(make_store(tmp_path / "other", TRAIN, QUERY), method).values[:, 2])


@pytest.mark.parametrize("method", ["lissa", "cg"])
def test_chunks_do_not_matter(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, TRAIN, QUERY)
    expected = attribute(store, method)
    monkeypatch.setattr(hf_influence.store.rows, "CHUNK_BYTES", 300)
    assert_exact(attribute(store, method).values, expected.values)


def test_the_report_is_saved_with_the_scores_and_is_no_setting(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", TRAIN, QUERY)
    scores = attribute(store, "cg")
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert loaded.report == scores.report
    assert set(loaded.report) == {"iterations", "residual"}
    assert_exact(attribute(store, loaded.method, **loaded.settings).values, scores.values)
