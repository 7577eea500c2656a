"""Each method against its formula, written out with dense float64 matrices."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from sklearn.ensemble import IsolationForest
from sklearn.random_projection import johnson_lindenstrauss_min_dim
from stores import make_store, random_blocks
from torch import Tensor

from hf_influence.attribution import attribute
from hf_influence.attribution.method import class_of
from hf_influence.attribution.outlier_forest import _sketch
from hf_influence.gradients.compress import Compressor, dropout, gaussian

assert_exact = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)


TRAIN, QUERY = random_blocks(20, 1), random_blocks(5, 2)
INVERSES = {"ip": oracle.identity, "datainf": oracle.mean_of_inverses, "fisher": oracle.fisher}


@pytest.mark.parametrize("method", INVERSES)
@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_influence_is_that_of_the_dense_inverse(tmp_path: Path, method: str, damping: float) -> None:
    settings: dict[str, Any] = {} if method == "ip" else {"damping": damping}
    scores = attribute(make_store(tmp_path, TRAIN, QUERY), method, **settings)
    assert_exact(scores.values, oracle.influence(TRAIN, QUERY, INVERSES[method], damping))


@pytest.mark.parametrize("method", INVERSES)
def test_self_influence_is_that_of_the_dense_inverse(tmp_path: Path, method: str) -> None:
    scores = attribute(make_store(tmp_path, TRAIN), f"self_{method}")
    assert_exact(scores.values, oracle.self_influence(TRAIN, INVERSES[method]))


@pytest.mark.parametrize("name", ["self_datainf", "self_fisher", "self_lissa", "self_cg"])
def test_few_examples_at_a_time_are_compared_with_all(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However narrow the rows and large the files are, no n × n matrix is formed."""
    store, kind, pieces = make_store(tmp_path, TRAIN), class_of(name), []
    whole, fit = attribute(store, name).values, kind.fit

    def watched(self: Any, *args: Any) -> Any:
        solve = fit(self, *args)
        return lambda g: pieces.append(len(g)) or solve(g)

    monkeypatch.setattr(kind, "fit", watched)
    monkeypatch.setattr("hf_influence.store.rows.CHUNK_BYTES", 3 * 26 * 8)
    torch.testing.assert_close(attribute(store, name).values, whole, rtol=1e-6, atol=1e-6)  # where some iterate
    assert max(pieces) == 3
    assert sum(pieces) == 2 * 20


@pytest.mark.parametrize("method", ["fisher", "self_fisher"])
@pytest.mark.parametrize("tile", [3, 256])
def test_both_sides_of_the_fisher_matrix_agree(
    tmp_path: Path, method: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_influence.curvature.fisher.TILE", tile)
    store = make_store(tmp_path, TRAIN, QUERY)
    gram, dense, auto = (attribute(store, method, side=side).values for side in ("gram", "dense", "auto"))
    assert_exact(gram, dense)
    assert_exact(auto, dense)


def test_both_sides_of_the_fisher_matrix_agree_in_float32(tmp_path: Path) -> None:
    store = make_store(
        tmp_path, random_blocks(30, 1, (300, 20), torch.float32), random_blocks(5, 2, (300, 20), torch.float32)
    )
    gram, dense = (attribute(store, "fisher", side=side).values for side in ("gram", "dense"))
    assert (gram - dense).norm() / dense.norm() < 1e-5


def test_the_fisher_matrix_of_a_wide_block_keeps_the_order_of_float64(tmp_path: Path) -> None:
    """All rows share a direction, so the largest eigenvalue is some d times the damping."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(60_000, generator=generator)
    train, query = ({"block": common + torch.randn(n, 60_000, generator=generator)} for n in (40, 6))
    single = attribute(make_store(tmp_path / "single", train, query), "fisher").values
    double = [{name: g.double() for name, g in side.items()} for side in (train, query)]
    exact = attribute(make_store(tmp_path / "double", *double), "fisher").values
    assert ((single - exact).abs().max() / exact.abs().max()).item() < 0.05


@pytest.mark.parametrize("method", [*INVERSES, "cosine", "dropout"])
def test_the_mean_query_has_the_mean_score(tmp_path: Path, method: str) -> None:
    store = make_store(tmp_path, TRAIN, QUERY)
    mean = attribute(store, method, queries="mean")
    assert mean.query_ids == ["mean"]
    assert_exact(mean.values[:, 0], attribute(store, method).mean())


def test_cosine_is_that_of_whole_rows(tmp_path: Path) -> None:
    scores = attribute(make_store(tmp_path, TRAIN, QUERY), "cosine")
    assert_exact(scores.values, oracle.cosine(TRAIN, QUERY))


@pytest.mark.parametrize("compressor", [dropout(4, seed=3), gaussian(4, seed=3)], ids=lambda c: c.name)
def test_compressed_influence_is_fisher_on_compressed_rows(tmp_path: Path, compressor: Compressor) -> None:
    seen = [{name: compressor.fit(name, g.shape[1])(g) for name, g in side.items()} for side in (TRAIN, QUERY)]
    expected = oracle.influence(seen[0], seen[1], oracle.fisher)
    whole = attribute(make_store(tmp_path / "whole", TRAIN, QUERY), compressor.name, r=4, seed=3)
    small = make_store(tmp_path / "small", TRAIN, QUERY, compress=compressor)
    kept = attribute(small, compressor.name)
    assert_exact(whole.values, expected)
    assert_exact(kept.values, expected)
    assert_exact(attribute(small, "fisher").values, expected)
    assert whole.settings == kept.settings
    assert (kept.settings["r"], kept.settings["seed"]) == (4, 3)


@pytest.mark.parametrize("order", [1, 2])
def test_outlier_norms(tmp_path: Path, order: int) -> None:
    scores = attribute(make_store(tmp_path, TRAIN), f"outlier_l{order}")
    assert_exact(scores.values, oracle.norm(TRAIN, order))


def in_order_of_their_own(rows: Tensor) -> Tensor:
    """The order in which the forest takes the rows, if all of them are different."""
    return rows[(rows.numpy() @ np.random.default_rng(0).standard_normal(rows.shape[1])).argsort()]


def test_outlier_forest_is_that_of_scikit_learn(tmp_path: Path) -> None:
    rows = torch.cat(list(TRAIN.values()), 1)
    forest = IsolationForest(n_estimators=10, random_state=0).fit(in_order_of_their_own(rows).numpy())
    scores = attribute(make_store(tmp_path, TRAIN), "outlier_iforest", trees=10)
    assert_exact(scores.values[:, 0], torch.from_numpy(forest.score_samples(rows.numpy())))


@pytest.mark.parametrize("given", [True, False], ids=["labels passed", "labels stored"])
def test_classwise_forests_score_the_query_for_all_of_a_class(tmp_path: Path, given: bool) -> None:
    rows, queries = torch.cat(list(TRAIN.values()), 1), torch.cat(list(QUERY.values()), 1)
    label = torch.arange(20) % 3
    settings: dict[str, Any] = {"labels": [f"class {c}" for c in label.tolist()]} if given else {}
    store = make_store(tmp_path, TRAIN, QUERY, stats={} if given else {"label": label})
    scores = attribute(store, "outlier_classwise", trees=10, **settings)
    for c in range(3):
        forest = IsolationForest(n_estimators=10, random_state=0).fit(in_order_of_their_own(rows[label == c]).numpy())
        expected = torch.from_numpy(forest.score_samples(queries.numpy()))
        assert_exact(scores.values[label == c], expected.expand(int((label == c).sum()), -1))


def test_a_class_of_two_is_no_home_for_any_query(tmp_path: Path) -> None:
    store = make_store(tmp_path, TRAIN, QUERY)
    labels = ["two"] * 2 + ["many"] * 18
    with pytest.warns(UserWarning, match=r"fewer than 3 examples, and 1 of the 2 classes .*first: 'two'"):
        scores = attribute(store, "outlier_classwise", trees=10, labels=labels)
    assert (scores.values[:2] == -1).all()
    assert (scores.values[2:] > -1).all()


def test_labels_are_recorded_by_a_fingerprint(tmp_path: Path) -> None:
    store = make_store(tmp_path, TRAIN, QUERY)
    first, same, other = (
        attribute(store, "outlier_classwise", trees=2, labels=labels).settings["labels"]
        for labels in (["a", "b"] * 10, np.array(["a", "b"] * 10), ["b", "a"] * 10)
    )
    assert first.startswith("2 classes, sha256 ")
    assert first == same != other


def test_projected_rows_keep_their_distances(tmp_path: Path) -> None:
    train = random_blocks(12, 1, (900, 1500))
    rows = make_store(tmp_path, train).rows("train")
    projected = torch.from_numpy(_sketch(rows, eps=0.3, seed=0)(rows))
    assert projected.shape[1] == johnson_lindenstrauss_min_dim(12, eps=0.3) < 2400
    whole = torch.cat(list(train.values()), 1)
    ratio = torch.pdist(projected).square() / torch.pdist(whole).square()
    assert (ratio - 1).abs().max() < 0.3


@pytest.mark.parametrize(
    ("method", "statistic", "sign"),
    [("loss", "loss", -1), ("el2n", "el2n", -1), ("margin", "margin", 1), ("length", "length", -1)],
)
def test_baselines_are_signed_statistics(tmp_path: Path, method: str, statistic: str, sign: int) -> None:
    value = torch.arange(20).flip(0)
    scores = attribute(make_store(tmp_path, TRAIN, stats={statistic: value}), method)
    assert_exact(scores.values[:, 0], sign * value.double())


def test_random_numbers_follow_the_seed(tmp_path: Path) -> None:
    store = make_store(tmp_path, random_blocks(400, 1))
    first, other = attribute(store, "random").values, attribute(store, "random", seed=1).values
    assert_exact(attribute(store, "random").values, first)
    assert not torch.equal(first, other)
    assert 0.4 < first.mean() < 0.6
