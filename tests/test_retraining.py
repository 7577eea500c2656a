"""Scores against retraining: exact where it has a closed form, and on a small network from its rows to the figure."""

import re
from itertools import combinations

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from worlds import examples, fitted, half_moons, network, tensors

from hf_influence import attribute, collect
from hf_influence.errors import BadSetting, StoreMismatch
from hf_influence.evaluation import draw_subsets, lds, removal_curve, retrain_on_subsets, retraining_gain
from hf_influence.scores import Scores

N, M, D = 300, 12, 4
RIDGE = 1.0


def per_query(values, ids=None):
    return Scores(values, ids or list(range(len(values))), "exact", query_ids=list(range(values.shape[1])))


class Ridge:
    """Linear regression with a ridge: leaving examples out is a linear system, and so is their exact influence."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        truth = torch.randn(D, generator=draw, dtype=torch.float64)
        self.x, self.xq = (torch.randn(k, D, generator=draw, dtype=torch.float64) for k in (N, M))
        self.y = self.x @ truth + torch.randn(N, generator=draw, dtype=torch.float64)
        self.yq = self.xq @ truth + torch.randn(M, generator=draw, dtype=torch.float64)
        self.rows = Dataset.from_dict({"row": list(range(N))})

    def weights(self, rows):
        x, y = self.x[rows], self.y[rows]
        return torch.linalg.solve(x.T @ x + RIDGE * torch.eye(D, dtype=torch.float64), x.T @ y)

    def losses(self, dataset):
        """Those of the queries after training on the rows of a dataset."""
        return self.after(list(dataset["row"]))

    def after(self, rows):
        """Half the squared error of each query."""
        return 0.5 * (self.xq @ self.weights(list(rows)) - self.yq).square()

    def leave_one_out(self):
        """By how much each query's loss rises without each row, `[n, m]`."""
        return torch.stack([self.after([k for k in range(N) if k != i]) - self.after(range(N)) for i in range(N)])


@pytest.fixture(scope="module")
def ridge():
    return Ridge()


@pytest.fixture(scope="module")
def measured(ridge):
    subsets = draw_subsets(N, 100, seed=1)
    return subsets, retrain_on_subsets(ridge.rows, ridge.losses, subsets)


def test_exact_leave_one_out_foretells_retraining_and_random_scores_do_not(ridge, measured):
    subsets, losses = measured
    exact = lds(per_query(ridge.leave_one_out()), losses, subsets)
    assert exact.lds > 0.85
    assert exact.low > 0.75
    assert len(exact.per_query) == M
    chance = lds(per_query(torch.randn(N, M, dtype=torch.float64)), losses, subsets)
    assert abs(chance.lds) < 0.15
    assert chance.low < 0 < chance.high
    assert lds(per_query(-ridge.leave_one_out()), losses, subsets).lds == pytest.approx(-exact.lds)


def test_the_score_is_its_definition(measured):
    subsets, losses = measured
    values = torch.randn(N, M, dtype=torch.float64)
    found = lds(per_query(values), losses, subsets)
    for q in range(M):
        sums = [sum(float(values[i, q]) for i in range(N) if subset[i]) for subset in subsets]
        assert found.per_query[q] == pytest.approx(spearmanr(sums, -losses[:, q]).statistic)
    assert found.lds == pytest.approx(np.mean(found.per_query))


def test_losses_that_are_minus_the_sums_are_foretold_perfectly():
    values = torch.randn(40, 3, dtype=torch.float64)
    subsets = draw_subsets(40, 32)
    found = lds(per_query(values), -subsets.double() @ values, subsets)
    assert (found.lds, found.spread, found.low, found.high) == pytest.approx((1, 0, 1, 1))


def test_scores_are_matched_by_their_ids():
    values, order = torch.randn(40, 3, dtype=torch.float64), torch.randperm(40).tolist()
    subsets = draw_subsets(40, 32)
    losses = -subsets.double() @ values
    assert lds(per_query(values[order], order), losses, subsets).lds == pytest.approx(1)


def test_a_score_without_queries_is_held_against_each():
    values = torch.randn(40, 1, dtype=torch.float64)
    subsets = draw_subsets(40, 32)
    losses = torch.cat([-subsets.double() @ values, subsets.double() @ values], 1)
    assert lds(Scores(values, list(range(40)), "self_ip"), losses, subsets).per_query == pytest.approx([1, -1])


def test_queries_that_never_change_are_skipped_and_scores_without_order_count_nothing():
    values = torch.randn(40, 3, dtype=torch.float64)
    subsets = draw_subsets(40, 32)
    losses = -subsets.double() @ values
    losses[:, 0] = 1
    values[:, 1] = 0
    found = lds(per_query(values), losses, subsets)
    assert (found.per_query, found.skipped) == ([0, pytest.approx(1)], 1)
    with pytest.raises(BadSetting, match="all 3 queries is the same after every training"):
        lds(per_query(values), torch.ones(32, 3), subsets)


@pytest.mark.parametrize("one", [0.1, 1 / 3, 1.0, 7e-310, 1e9 / 7])
def test_scores_that_are_all_equal_foretell_nothing(one):
    values = torch.full((101, 1), one, dtype=torch.float64)
    losses = torch.randn(64, 5, dtype=torch.float64)
    found = lds(Scores(values, list(range(101)), "constant"), losses, draw_subsets(101, 64))
    assert (found.per_query, found.spread) == ([0] * 5, 0)


def test_small_differences_of_large_scores_count():
    values = 1 + 1e-7 * torch.randn(40, 2, dtype=torch.float64)
    subsets = draw_subsets(40, 32)
    assert lds(per_query(values), -subsets.double() @ (values - 1), subsets).lds == pytest.approx(1)


def test_losses_and_subsets_may_be_arrays(measured):
    subsets, losses = measured
    scores = per_query(torch.randn(N, M))
    assert lds(scores, losses.numpy(), subsets.numpy()) == lds(scores, losses, subsets)


def test_the_spread_is_that_over_other_subsets_and_queries():
    """The standard deviation of the score when the whole experiment is done again, against the bootstrap of one."""
    again, claimed = [], []
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        ability = 0.6 * torch.randn(1, 10, generator=draw, dtype=torch.float64)
        sums = torch.randn(40, 10, generator=draw, dtype=torch.float64)
        losses = -(ability * sums + torch.randn(40, 10, generator=draw, dtype=torch.float64))
        found = lds(per_query(torch.linalg.pinv(SUBSETS.double()) @ sums), losses, SUBSETS, draws=100)
        again.append(found.lds)
        claimed.append(found.spread)
    assert 0.8 < np.mean(claimed) / np.std(again, ddof=1) < 1.6


SUBSETS = draw_subsets(60, 40)


def test_subsets_are_random_halves_that_the_seed_decides():
    subsets = draw_subsets(101, 40, seed=3)
    assert subsets.shape == (40, 101)
    assert (subsets.sum(1) == 50).all()
    assert torch.equal(draw_subsets(101, 64, seed=3)[:40], subsets)
    assert not torch.equal(draw_subsets(101, 40, seed=4), subsets)
    assert all(not torch.equal(a, b) for a, b in combinations(subsets, 2))
    assert (draw_subsets(100, 40, share=0.29).sum(1) == 29).all()
    assert 10 < subsets.sum(0).double().mean() < 30
    with pytest.raises(BadSetting, match=r"31 subsets .* ±0\.18 by chance alone\. Draw at least 32"):
        draw_subsets(101, 31)
    with pytest.raises(BadSetting, match="share=1 of 5 rows are 5"):
        draw_subsets(5, share=1)


def test_interrupted_retraining_goes_on_and_gives_the_same(ridge, measured, tmp_path):
    subsets, losses = measured
    subsets, calls = subsets[:40], []

    def retrain(dataset):
        if len(calls) == 17:
            calls.append("interrupted")
            raise KeyboardInterrupt
        calls.append(len(dataset))
        return ridge.losses(dataset).tolist()

    with pytest.raises(KeyboardInterrupt):
        retrain_on_subsets(ridge.rows, retrain, subsets, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 17
    assert torch.equal(retrain_on_subsets(ridge.rows, retrain, subsets, tmp_path), losses[:40])
    assert len(calls) == 41
    assert torch.equal(retrain_on_subsets(ridge.rows, retrain, subsets[5:10], tmp_path), losses[5:10])
    assert len(calls) == 41, "subsets are known by their rows, not by their number"
    with pytest.raises(StoreMismatch, match="made with dataset="):
        retrain_on_subsets(ridge.rows.select(range(N)[::-1]), retrain, subsets, tmp_path)


@pytest.mark.parametrize(
    ("retrain", "subsets", "message"),
    [
        (lambda rows: [1.0], torch.ones(3, 4, dtype=torch.bool), r"subsets is torch.bool \[3, 4\] for 3 rows"),
        (lambda rows: [1.0], torch.ones(3, 3), "give a bool tensor"),
        (lambda rows: 1.0, torch.eye(3).bool(), r"retrain gave \[\] numbers"),
        (lambda rows: [1.0, float("nan")], torch.eye(3).bool(), "1 of them not finite"),
        (lambda rows: [1.0] * (1 + rows["row"][0]), torch.eye(3).bool(), "2 losses for subset 1 and 1 for the first"),
    ],
)
def test_retraining_that_cannot_be_used_is_named(retrain, subsets, message):
    with pytest.raises(BadSetting, match=message):
        retrain_on_subsets(Dataset.from_dict({"row": [0, 1, 2]}), retrain, subsets)


@pytest.mark.parametrize(
    ("losses", "subsets"),
    [((32, 2), (32, 40)), ((31, 3), (32, 40)), ((32, 3), (32, 41)), ((2, 3), (2, 40)), ((32,), (32, 40))],
)
def test_shapes_that_do_not_belong_together_are_named(losses, subsets):
    with pytest.raises(BadSetting, match=r"do not belong together.*\[n, m\]"):
        lds(per_query(torch.zeros(40, 3)), torch.zeros(losses), torch.zeros(subsets, dtype=torch.bool))
    with pytest.raises(BadSetting, match="not finite"):
        lds(per_query(torch.zeros(40, 3)), torch.full((32, 3), torch.inf), draw_subsets(40, 32))


def moons(seed=0, n=120):
    train, test, _ = half_moons(seed)
    return train[:n], test[:200]


def dataset_of(points):
    return Dataset.from_dict({"x": [row["x"].tolist() for row in points], "labels": [row["labels"] for row in points]})


def points_of(dataset):
    return examples(np.array(dataset["x"][:]), np.array(dataset["labels"][:]))


def test_on_a_network_influence_from_its_rows_foretells_retraining(tmp_path):
    """Logistic regression with its stored rows; the bar is that of the methods, chance that of random scores."""
    train, test = moons()
    query = test[:20]
    model = fitted(network(), train, epochs=400, learning_rate=0.05)
    for split, side in (("train", train), ("query", query)):
        collect(model, side, tmp_path / "store", split, modules="trainable")
    x, y = tensors(query)

    def retrain(dataset):
        again = fitted(network(), points_of(dataset), epochs=150, learning_rate=0.05)
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(again(x).logits, y, reduction="none")

    subsets = draw_subsets(len(train), 32)
    losses = retrain_on_subsets(dataset_of(train), retrain, subsets, tmp_path / "subsets")
    found = {name: lds(attribute(tmp_path / "store", name), losses, subsets) for name in ("fisher", "random")}
    assert found["fisher"].lds > 0.5 > 0.3 > abs(found["random"].lds)
    assert found["fisher"].low > found["random"].high


def test_removal_curves_drop_what_they_say_and_compare_with_as_many_at_random(tmp_path):
    rows = Dataset.from_dict({"value": [float(i) for i in range(10)]})
    scores = Scores(torch.arange(10.0)[:, None], list(range(10)), "mine")
    seen = []

    def total(dataset):
        seen.append(list(dataset["value"]))
        return sum(dataset["value"])

    curve = removal_curve(scores, rows, total, (0.29, 0.5), seeds=(0, 1, 2, 3), folder=tmp_path)
    assert curve.whole == 45
    first, second = curve.curve
    assert (first["fraction"], first["removed"], first["lowest"], first["highest"]) == (0.29, 2, 44, 28)
    assert (second["removed"], second["lowest"], second["highest"]) == (5, 35, 10)
    assert first["random_mean"] == pytest.approx(np.mean(first["random"]))
    assert first["random_spread"] == pytest.approx(np.std(first["random"], ddof=1))
    assert len(set(first["random"])) > 1
    small, large = ({*range(10)} - {*map(int, kept)} for kept in (seen[3], seen[9]))
    assert len(small) == 2 < len(large) == 5
    assert small < large, "a larger random drop contains the smaller"

    trained = len(seen)
    assert removal_curve(scores, rows, total, (0.29, 0.5), seeds=(0, 1, 2, 3), folder=tmp_path) == curve
    assert len(seen) == trained
    other = Scores(-scores.values, scores.ids, "mine")
    turned = removal_curve(other, rows, total, (0.5,), seeds=(0, 1, 2, 3), folder=tmp_path).curve[0]
    assert (turned["lowest"], turned["highest"]) == (10, 35)
    assert turned["random"] == second["random"]
    assert len(seen) == trained + 2, "other scores share the random drops"


@pytest.mark.parametrize(
    ("fractions", "seeds"),
    [
        (np.array([0.1, 0.7]), np.arange(2)),
        (np.array([0.1, 0.7], np.float32), [np.int64(0), np.int64(1)]),
        ([torch.tensor(0.1), torch.tensor(0.7)], torch.arange(2)),
    ],
)
def test_fractions_and_seeds_may_be_arrays_and_tensors(fractions, seeds, tmp_path):
    rows = Dataset.from_dict({"value": [float(i) for i in range(10)]})
    scores = Scores(torch.arange(10.0)[:, None], list(range(10)), "mine")

    def total(kept):
        return sum(kept["value"])

    expected = removal_curve(scores, rows, total, (0.1, 0.7), seeds=(0, 1))
    assert removal_curve(scores, rows, total, fractions, seeds=seeds, folder=tmp_path) == expected


def test_removal_follows_the_ids_of_the_scores():
    rows = Dataset.from_dict({"name": ["a", "b", "c", "d"], "value": [1.0, 2.0, 3.0, 4.0]})
    named = Scores(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), ["d", "c", "b", "a"], "mine", id_column="name")
    curve = removal_curve(named, rows, lambda kept: sum(kept["value"]), (0.25,), ("lowest",), seeds=(0,))
    assert curve.curve[0]["lowest"] == 6
    assert "highest" not in curve.curve[0]
    assert curve.curve[0]["random_spread"] is None
    left = removal_curve(
        named, rows.select([1, 2, 3]), lambda kept: sum(kept["value"]), (0.4,), ("lowest",), seeds=(0,)
    )
    assert left.curve[0]["lowest"] == 5  # without d, the lowest of those that are left
    with pytest.raises(BadSetting, match=r"1 of the 4 rows of the dataset have no score: 'e' in column 'name'"):
        removal_curve(named, Dataset.from_dict({"name": list("abce")}), lambda kept: 0.0, (0.5,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fractions": (0.1,)}, "leaves out 0 of 4 rows"),
        ({"fractions": (1.0,)}, "leaves out 4 of 4 rows"),
        ({"fractions": (2,)}, "share=2"),
        ({"ends": ("middle",), "fractions": (0.5,)}, "ends has 'middle'"),
        ({"seeds": (), "fractions": (0.5,)}, "seeds is empty"),
        ({"fractions": (0.5,)}, "retrain gave nan"),
    ],
)
def test_removal_that_cannot_work_is_named(settings, message):
    rows = Dataset.from_dict({"value": [1.0, 2.0, 3.0, 4.0]})
    scores = Scores(torch.arange(4.0)[:, None], [0, 1, 2, 3], "mine")
    with pytest.raises(BadSetting, match=message):
        removal_curve(scores, rows, lambda kept: float("nan"), **settings)


def test_on_a_network_dropping_the_flipped_rows_helps_more_than_chance_and_dropping_others_hurts():
    train, test = moons()
    noisy = [{**row, "labels": 1 - row["labels"]} if i % 6 == 0 else row for i, row in enumerate(train)]
    scores = Scores(torch.tensor([[-float(i % 6 == 0)] for i in range(len(train))]), list(range(len(train))), "oracle")

    def held_out_loss(dataset):
        model = fitted(network(), points_of(dataset), epochs=100, learning_rate=0.05)
        x, y = tensors(test)
        with torch.no_grad():
            return float(model(x, y).loss)

    (point,) = removal_curve(scores, dataset_of(noisy), held_out_loss, (0.16,)).curve
    assert point["lowest"] < min(point["random"])
    assert point["highest"] > point["random_mean"]


def test_gain_is_the_share_of_the_gap_with_its_spread():
    metrics = {"noisy": [0.6, 0.64, 0.62], "clean": [0.8, 0.82, 0.83], "mine": [0.7, 0.74, 0.75], "random": [0.6] * 3}
    found = retraining_gain(metrics)
    gaps, won = np.array([0.2, 0.18, 0.21]), np.array([0.1, 0.1, 0.13])
    assert found.gap == pytest.approx(gaps.mean())
    assert found.gap_interval == pytest.approx(4.302653 * gaps.std(ddof=1) / 3**0.5, rel=1e-6)
    assert found.shares["mine"]["share"] == pytest.approx(won.mean() / gaps.mean())
    left_out = np.array([np.delete(won, i).mean() / np.delete(gaps, i).mean() for i in range(3)])
    assert found.shares["mine"]["spread"] == pytest.approx((2 * left_out.var()) ** 0.5)
    assert found.shares["random"]["share"] < 0
    assert found.text.startswith("mine recovers 56% ± ")
    losses = {name: [1 - value for value in values] for name, values in metrics.items()}
    turned = retraining_gain(losses, higher_is_better=False)
    assert turned.shares["mine"]["share"] == pytest.approx(found.shares["mine"]["share"])


@pytest.mark.parametrize(
    ("noisy", "clean", "message"),
    [
        (
            [0.70, 0.75, 0.72],
            [0.72, 0.71, 0.76],
            r"the gap of 0.007 ± 0.1\d\d between noisy and clean \(3 seeds\) is within",
        ),
        ([0.80, 0.81, 0.80], [0.70, 0.71, 0.71], r"clean is worse than noisy: the gap .* is -0.097 ± "),
        ([0.70, 0.70], [0.70, 0.70], r"the gap of 0.000 ± 0.000 .* is within the noise"),
        ([0.70], [0.90], r"with one seed it is not known whether the gap of 0.200 .*\(1 seed\) is more than noise"),
    ],
)
def test_a_gap_within_the_noise_has_no_shares(noisy, clean, message):
    found = retraining_gain({"noisy": noisy, "clean": clean, "mine": [0.75] * len(noisy)})
    assert found.shares["mine"] == {"share": None, "spread": None}
    assert pytest.approx(np.mean(clean) - np.mean(noisy)) == found.gap
    assert "recovers" not in found.text
    assert re.search(message, found.text), found.text


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"noisy": [1], "mine": [1], "other": [1]}, r"no \['clean'\].*top="),
        ({"noisy": [1], "clean": [1]}, "no curated set"),
        ({"noisy": [1, 2], "clean": [1, 2], "mine": [1]}, "'mine': 1"),
        ({"noisy": [1], "clean": [float("nan")], "mine": [1]}, r"metrics\['clean'\]"),
    ],
)
def test_metrics_that_cannot_be_compared_are_named(metrics, message):
    with pytest.raises(BadSetting, match=message):
        retraining_gain(metrics)


def test_a_random_drop_may_be_the_bottom():
    metrics = {"random drop": [0.5, 0.51], "oracle": [0.9, 0.91], "mine": [0.7, 0.71]}
    assert retraining_gain(metrics, bottom="random drop", top="oracle").shares["mine"]["share"] == pytest.approx(0.5)
