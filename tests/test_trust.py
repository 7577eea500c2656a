"""What clean queries say of scores: how good they are, how many labels are wrong, and how probably each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from hf_influence.attribution.trust import (
    Epoch,
    Sighting,
    auc_of,
    cautious,
    divide,
    estimated_share,
    freshness,
    log_odds,
    negative,
    sighting,
    sighting_in,
    sighting_in_first,
)


def test_freshness_is_1_unless_the_examples_look_better_than_the_queries() -> None:
    assert freshness(0.3, 1500, 0.2, 200) == freshness(0.0, 1500, 0.0, 200) == 1
    assert freshness(0.1, 1500, 0.2, 200) == pytest.approx(0.1025 / 0.2025)
    assert freshness(0.0, 0, 0.2, 200) == 1


def test_the_share_of_wrong_labels_is_found_where_the_scores_of_queries_and_examples_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, train = (0.8 + torch.randn(n, generator=generator) for n in (20000, 40000))
    train[:8000] *= -1

    def seen(train: torch.Tensor, queries: torch.Tensor) -> Sighting | None:
        return sighting(negative(train), len(train), negative(queries), len(queries))

    def share(*given: Any) -> float | None:
        one = seen(*given)
        return estimated_share([] if one is None else [one])

    assert share(train, queries) == pytest.approx(0.2, abs=0.02)
    assert share(train[8000:], queries) == pytest.approx(0, abs=0.02)
    assert share(train[4000:], queries) == pytest.approx(4000 / 36000, abs=0.02)
    assert share(train + 1, queries) == pytest.approx(0, abs=1e-3)
    assert seen(train, -queries) is None  # no better than chance
    assert seen(train[:0], queries) is None
    few = share(train[7990:8010], queries[:10])
    assert few is not None
    assert 0.07 < few < 0.2  # half of them are wrong, but twenty hardly count
    assert estimated_share([]) is None
    assert estimated_share([], sighting(0.0, 20_000, 0.3, 5000)) == pytest.approx(0, abs=1e-3), "far below 0"
    assert estimated_share([], sighting(0.9, 20_000, 0.3, 5000)) == pytest.approx(0.5, abs=1e-3)


def test_scores_are_divided_where_right_and_wrong_ones_part_best() -> None:
    right, wrong = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([-1.0, 0.0, 0.5, 2.5])
    assert divide(right, wrong) == 0.75
    assert divide(right + 5, wrong + 5) == 5.75
    assert divide(right[2:], wrong[:2]) == 1.5
    assert divide(wrong, right) == -1, "no place is better than none"


def test_wrong_labels_count_where_no_right_one_is_below_zero() -> None:
    """Half of the wrong ones are above it all the same."""
    seen = sighting(0.1, 1000, 0.0, 1000, missed=0.5)
    assert seen is not None
    assert seen.share == pytest.approx(0.2)
    assert sighting(0.1, 1000, 0.0, 1000) == sighting(0.1, 1000, 0.0, 1000, missed=0.0)


def test_the_first_two_sharp_sightings_count() -> None:
    blurred, one, later = Sighting(0.45, 0.02, 0.03), Sighting(0.2, 0.01, 0.015), Sighting(0.3, 0.01, 0.01)
    assert estimated_share([one, later]) == pytest.approx(0.25, abs=0.01)
    assert estimated_share([blurred, one, later, Sighting(0.0, 0.01, 0.01)]) == estimated_share([one, later])
    assert estimated_share([blurred, one], later) == estimated_share([one]) == pytest.approx(0.2, abs=0.01)
    assert estimated_share([blurred], later) == estimated_share([later]) == estimated_share([], later), "blurred"
    assert estimated_share([blurred]) == pytest.approx(0.45, abs=0.03)
    few, many = sighting(0.3, 100, 0.1, 100), sighting(0.02, 400, 0.1, 10_000)
    assert few is not None is not many
    assert few.reach == pytest.approx(math.sqrt(2 * 0.25 / 100) / 0.8)
    assert few.error < few.reach
    assert many.reach == pytest.approx(few.reach * math.sqrt((1 / 400 + 1 / 10_000) / (2 / 100))), "by numbers alone"


def test_an_epoch_tells_by_its_second_half_unless_the_model_was_learning_too_fast() -> None:
    steps = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    scores = torch.where((steps % 4 == 0) | ((steps < 200) & (steps % 8 == 1)), -1.0, 1.0)
    queries = torch.tensor([-1.0] * 10 + [1.0] * 90)
    epoch = Epoch.of(scores, steps, queries)
    assert epoch.quarters == pytest.approx((0.375, 0.375, 0.25, 0.25), abs=0.006)
    assert (epoch.queries, epoch.n) == (pytest.approx(0.1), 100)
    assert Epoch.of(scores, None, queries) == ((0.3125,) * 4, epoch.queries, 100, None), "without steps all at its end"
    epoch = Epoch((0.4, 0.35, 0.27, 0.23), 0.1, 100, before=0.12)
    assert sighting_in(epoch, 100) is None, "ever fewer examples have negative scores"
    assert sighting_in(epoch._replace(n=25), 100) is not None, "of so few that means nothing"
    steady = epoch._replace(quarters=(0.24, 0.26, 0.27, 0.23))
    seen = sighting_in(steady, 100)
    assert seen == pytest.approx(sighting(0.25, 200, 0.1, 100))
    assert sighting_in(steady._replace(quarters=(0.1, 0.1, 0.27, 0.23)), 100) == pytest.approx(seen)
    assert sighting_in(steady._replace(before=0.3), 100) is None, "the queries have moved"
    assert sighting_in(steady._replace(before=None), 100) is None, "nobody knows where they were"
    assert sighting_in(steady._replace(n=0), 100) is None is sighting_in(steady, 0)


def test_the_first_epoch_tells_by_examples_that_were_never_seen() -> None:
    """Where the line through its last quarters arrives; one and a half times the last, less half of the one before."""
    epoch = Epoch((0.45, 0.4, 0.32, 0.3), 0.1, 100)
    still = Epoch((0.3,) * 4, 0.11, 100, before=0.1)
    seen = sighting_in_first(epoch, 400, still)
    assert seen is not None
    assert seen == pytest.approx(sighting(0.29, 100 / 2.5, 0.1, 400))
    assert seen.share == pytest.approx(0.19 / 0.8)
    flat = sighting_in_first(epoch._replace(queries=0.5), 400, None)
    assert flat is None, "the scores of the queries tell nothing"
    assert sighting_in_first(epoch, 400, None) == seen, "there is but one epoch"
    assert sighting_in_first(epoch, 400, still._replace(before=0.2)) is None, "the queries move afterwards"
    assert sighting_in_first(epoch._replace(n=10_000), 400, still) is None, "it was learning still"
    assert sighting_in_first(epoch._replace(quarters=(0.4, 0.4, 0.1, 0.0)), 400, None) is None
    assert sighting_in_first(epoch._replace(quarters=(0.4, 0.4, 0.03, 0.0), n=40), 400, None) is not None
    assert sighting_in_first(epoch._replace(n=0), 400, None) is None is sighting_in_first(epoch, 0, None)


def test_an_auc_is_that_of_scikit_learn() -> None:
    right, wrong = torch.tensor([1.0, -0.5, 0.5, 0.0, 2.0, 1.0]), torch.tensor([0.5, -1.0, 0.0])
    expected = roc_auc_score([1] * 6 + [0] * 3, torch.cat([right, wrong]))
    assert auc_of(right, wrong) == pytest.approx(expected, abs=1e-12)


def test_probabilities_are_right_as_often_as_they_say() -> None:
    """Scores of two bell curves that a wrong label mirrors: of the examples at p, a share of p is wrong."""
    generator = torch.Generator().manual_seed(1)
    queries, train = (0.5 + 0.6 * torch.randn(n, generator=generator, dtype=torch.float64) for n in (5000, 40000))
    wrong = torch.rand(len(train), generator=generator) < 0.2
    train[wrong] *= -1
    wrongly = torch.sigmoid(-log_odds(train, auc_of(queries, -queries), 0.2))
    assert wrongly.mean() == pytest.approx(0.2, abs=1e-3)
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 1)):
        at = (wrongly >= low) & (wrongly < high)
        assert wrong[at].double().mean() == pytest.approx(wrongly[at].mean().item(), abs=0.03)


def test_few_queries_make_nothing_certain() -> None:
    assert cautious(1.0, 2) == pytest.approx(5 / 6)
    assert cautious(0.5, 2) == 0.5
    assert cautious(0.9, 10_000) == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("auc", [0.5000001, 0.9, 0.99999])
def test_log_odds_keep_the_order_and_the_share(auc: float, share: float) -> None:
    ranking = torch.tensor([3.0, 1.0, 2.0, 2.0, *range(4, 400)])
    values = log_odds(ranking, auc, share)
    assert values.isfinite().all()
    assert (rankdata(values) == rankdata(ranking)).all()
    assert torch.sigmoid(-values).mean() == pytest.approx(min(max(share, 0.000625), 1 - 0.000625), abs=2e-3)
    if share != 0.2:
        assert bool(((values > 0) == (share == 0)).all())
    assert len(log_odds(torch.zeros(0), auc, share)) == 0
