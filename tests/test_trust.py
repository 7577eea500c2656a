"""What clean queries say of scores: how good they are, and how probably each label is wrong."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import rankdata
from sightings import flags
from sklearn.metrics import roc_auc_score

from hf_influence.attribution.auto.trust import auc_at_worst, auc_of, cautious, divide, freshness, log_odds, trust_of


def test_freshness_is_1_unless_the_examples_look_better_than_the_queries() -> None:
    queries, none = flags(40, 200), torch.zeros(0)
    assert freshness(flags(450, 1500), queries, -queries) == freshness(flags(0, 1500), flags(0, 200), -queries) == 1
    assert freshness(flags(150, 1500), queries, -queries) == pytest.approx(0.1025 / 0.2025)
    assert freshness(none, queries, -queries) == freshness(queries, none, none) == 1


def test_wrong_labels_among_the_examples_are_no_sign_of_freshness() -> None:
    """A fifth is wrong, so 0.8 · 0.2 + 0.2 · 0.8 should look so; a fifth does."""
    queries = flags(40, 200)
    assert freshness(flags(300, 1500), queries, -queries, 0.2) == pytest.approx(0.2025 / 0.3225)
    assert freshness(flags(480, 1500), queries, -queries, 0.2) == pytest.approx(1)


def test_scores_are_divided_where_right_and_wrong_ones_part_best() -> None:
    right, wrong = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([-1.0, 0.0, 0.5, 2.5])
    assert divide(right, wrong) == 0.75
    assert divide(right + 5, wrong + 5) == 5.75
    assert divide(right[2:], wrong[:2]) == 1.5
    assert divide(wrong, right) == -1, "no place is better than none"


def test_an_auc_is_that_of_scikit_learn() -> None:
    right, wrong = torch.tensor([1.0, -0.5, 0.5, 0.0, 2.0, 1.0]), torch.tensor([0.5, -1.0, 0.0])
    expected = roc_auc_score([1] * 6 + [0] * 3, torch.cat([right, wrong]))
    assert auc_of(right, wrong) == pytest.approx(expected, abs=1e-12)


def test_where_wrong_labels_of_one_class_are_told_worst_the_auc_is_theirs() -> None:
    """A model leans to class 0: of right labels 1 and of wrong labels 0 it cannot tell which is which."""
    generator = torch.Generator().manual_seed(2)
    label = torch.arange(400) % 2
    right = torch.randn(400, generator=generator, dtype=torch.float64) + torch.tensor([2.0, 0.2])[label]
    wrong, given = -right, 1 - label
    worst = roc_auc_score([1] * 400 + [0] * 200, torch.cat([right, wrong[given == 0]])) + (12 * 200) ** -0.5
    assert worst < auc_of(right, wrong) - 0.05
    assert auc_at_worst(right, wrong, given) == pytest.approx(worst, abs=1e-12)
    assert trust_of(right, wrong, given, errors=2.0) == pytest.approx((worst - 0.5 - 2 * (12 * 400) ** -0.5) ** 4)
    assert auc_at_worst(right, wrong, None) == auc_of(right, wrong)
    even = right - torch.tensor([1.8, 0.0])[label]
    assert auc_at_worst(even, -even, given) == auc_of(even, -even), "what chance does is not worse"


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
