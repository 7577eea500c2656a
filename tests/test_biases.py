"""Rank correlations are those of scipy, and a score that is hardly more than length or copies is called so."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from stores import make_store, stats_with_copies

from hf_influence import attribute
from hf_influence.errors import BadSetting, MissingRows, StoreMismatch
from hf_influence.evaluation import biases
from hf_influence.evaluation.spearman import spearman
from hf_influence.scores import Scores

N = 40
STATS = stats_with_copies(N)
LENGTH = STATS["length"]
COPIES = [3, 3, 3, 2, 2, *[1] * 35]


def column(values, ids=None):
    values = torch.as_tensor(values, dtype=torch.float64)[:, None]
    return Scores(values, ids or list(range(len(values))), "mine", {"train_split": "train", "point": 0})


def test_spearman_with_ties_is_that_of_scipy():
    draw = np.random.default_rng(0)
    one, other = draw.integers(0, 6, (30, 5)).astype(float), draw.integers(0, 6, (30, 5)).astype(float)
    expected = [spearmanr(a, b).statistic for a, b in zip(one.T, other.T, strict=True)]
    np.testing.assert_allclose(spearman(one, other), expected, atol=1e-12)
    assert np.isnan(spearman(one[:, :1], np.ones((30, 1))))[0]


@pytest.fixture
def store(tmp_path):
    g = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return make_store(tmp_path / "store", {"layer": g}, {"layer": g[:4]}, stats=STATS, shards=3)


def test_biases_are_rank_correlations_with_length_and_copies(store):
    scores = attribute(store, "loss")
    found = biases(scores, store)
    assert found.length == pytest.approx(spearmanr(-STATS["loss"], LENGTH).statistic)
    assert found.duplicates == pytest.approx(spearmanr(-STATS["loss"], COPIES).statistic)
    assert found.labelled is None, "all examples have as many labelled tokens"
    assert biases(scores, store.path) == found
    assert json.loads(json.dumps(found)) == found


def test_a_score_that_is_length_is_called_so_and_one_that_is_not_is_not(store):
    assert biases(attribute(store, "length"), store).length == pytest.approx(-1)
    mostly = column(LENGTH + 4.0 * torch.randn(N))
    rho = biases(mostly, store).length
    assert 0.7 < rho < 0.95
    (warning,) = biases(mostly, store).warnings
    assert warning.startswith(f"'mine' is mostly the number of tokens (Spearman {rho:.2f}, limit 0.7)")
    assert biases(mostly, store, threshold=0.95).warnings == []
    assert biases(attribute(store, "random"), store).warnings == []
    assert "how often an example occurs" in biases(column(COPIES), store).warnings[0]


def test_biases_follow_the_ids_of_the_scores(store):
    values, order = torch.randn(N), torch.randperm(N).tolist()
    assert biases(column(values[order], order), store) == biases(column(values), store)
    part = [4, 9, 11, 30, 2]
    found = biases(column(values[part], part), store)
    assert found.length == pytest.approx(spearmanr(values[part], LENGTH[part]).statistic)


def test_biases_of_scores_over_points_find_every_example(tmp_path):
    g = torch.randn(N, 3, dtype=torch.float64)
    for point, present in ((1, range(25)), (2, range(15, N))):
        steps = {"step": torch.full((N,), point), "learning_rate": torch.ones(N, dtype=torch.float64)}
        make_store(tmp_path, {"layer": g}, {"layer": g[:4]}, stats=STATS | steps, point=point, present=list(present))
    scores = attribute(tmp_path, "tracin", points=[1, 2])
    assert len(scores) == N
    assert biases(scores, tmp_path).length == pytest.approx(spearmanr(scores.mean(), LENGTH).statistic)


def test_what_biases_cannot_read_is_named(store, tmp_path):
    with pytest.raises(StoreMismatch, match=r"1 of the 2 examples .* \(first: 99\)"):
        biases(column([1.0, 2.0], [0, 99]), store)
    with pytest.raises(BadSetting, match="threshold=0"):
        biases(column(torch.zeros(N)), store, threshold=0)
    bare = make_store(tmp_path / "bare", {"layer": torch.zeros(2, 1)})
    with pytest.raises(MissingRows, match=r"'length' that biases\(\) needs"):
        biases(column([1.0, 2.0]), bare)
