"""Thresholds: where they cut, and that they leave clean data alone where they promise to."""

import pytest
import torch

from hf_influence.errors import BadSetting
from hf_influence.filter.thresholds import discovery, mixture, negative, otsu


def two_groups(n, bad, gap, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    values[:bad] -= gap
    return values


def otsu_by_trying_every_cut(values):
    mean, best = values.mean(1), (-1.0, None)
    for cut in mean.tolist():
        low, high = mean[mean <= cut], mean[mean > cut]
        if len(high):
            between = len(low) * len(high) * float(low.mean() - high.mean()) ** 2
            best = max(best, (between, cut))
    return mean <= best[1]


@pytest.mark.parametrize("seed", range(5))
def test_otsu_is_the_best_of_all_cuts(seed):
    values = two_groups(50, 10, 4.0, seed)
    assert torch.equal(otsu(values), otsu_by_trying_every_cut(values))
    doubled = torch.cat([values, values])
    assert torch.equal(otsu(doubled), otsu(values).repeat(2))


@pytest.mark.parametrize("threshold", [otsu, mixture, negative])
def test_only_the_lowest_go(threshold):
    values = two_groups(300, 60, 6.0, 0)
    gone = threshold(values)
    assert 0 < gone.sum() < 300
    assert values[gone].max() < values[~gone].min()


@pytest.mark.parametrize("seed", range(5))
def test_mixture_finds_the_lower_group_and_leaves_a_single_one_alone(seed):
    gone = mixture(two_groups(500, 100, 6.0, seed))
    assert gone[:100].sum() >= 98
    assert gone[100:].sum() <= 4
    assert not mixture(two_groups(500, 0, 0.0, seed)).any()


@pytest.mark.parametrize("threshold", [otsu, mixture])
def test_equal_scores_all_stay(threshold):
    assert not threshold(torch.ones(6, 2)).any()
    assert not threshold(torch.tensor([0.3, 0.1 + 0.2] * 20, dtype=torch.float64)[:, None]).any(), "but for rounding"


def test_discoveries_are_right_and_mistakes_as_rare_as_asked():
    mistakes, found = [], []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        common = torch.randn(1, 40, generator=generator, dtype=torch.float64)
        values = torch.randn(200, 40, generator=generator, dtype=torch.float64) + common  # the rows hang together
        values[:30] -= 1.0
        gone = discovery(0.1, permutations=500)(values - common)
        mistakes.append(float(gone[30:].sum() / gone.sum().clamp(min=1)))
        found.append(float(gone[:30].float().mean()))
    assert sum(mistakes) / 10 <= 0.13  # 0.1 and what ten draws leave open
    assert sum(found) / 10 > 0.9


def test_pure_chance_is_hardly_ever_discovered():
    false_alarms = 0
    for seed in range(20):
        values = torch.randn(100, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        false_alarms += bool(discovery(0.1, permutations=500)(values).any())
    assert false_alarms <= 5


def test_signs_that_change_nothing_count_whatever_the_rounding():
    values = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    below = values.abs().neg()  # each as low as can be, and so by 1 of 256 patterns
    assert not discovery(0.002, permutations=20_000)(below).any()
    assert discovery(0.006, permutations=20_000)(below).all()


def test_discovery_needs_queries_and_a_rate():
    with pytest.raises(BadSetting, match="at least 8"):
        discovery(0.1)(torch.zeros(4, 3))
    with pytest.raises(BadSetting, match="between 0 and 1"):
        discovery(1.0)
