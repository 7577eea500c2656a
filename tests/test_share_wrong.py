"""How many labels are wrong, by scores of examples and of clean queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, multivariate_normal, norm
from sightings import estimated_share, flags
from torch import Tensor

from hf_influence.attribution.auto.share_wrong import (
    Epoch,
    Sighting,
    Suspicion,
    estimate,
    sighting,
    sighting_in,
    sighting_in_first,
)


def seen_by(train: Tensor, queries: Tensor, **about: Any) -> Sighting | None:
    """What mirrored queries tell of the examples."""
    suspicion = Suspicion.of(queries, -queries)
    return sighting(suspicion(train), suspicion(queries), suspicion(-queries), **about)


def test_suspicion_is_the_probability_of_a_wrong_label_for_two_bell_curves() -> None:
    right, wrong = (torch.from_numpy(norm(mean, 2).ppf((np.arange(20_000) + 0.5) / 20_000)) for mean in (3, -1))
    at = torch.linspace(-5, 6, 12, dtype=torch.float64)
    densities = [share * norm(mean, 2).pdf(at.numpy()) for share, mean in ((0.9, 3), (0.1, -1))]
    expected = torch.from_numpy(densities[1] / (densities[0] + densities[1]))
    torch.testing.assert_close(Suspicion.of(right, wrong)(at), expected, atol=1e-3, rtol=1e-2)


def test_scores_that_are_all_the_same_leave_no_doubt() -> None:
    same = torch.ones(5)
    assert torch.equal(Suspicion.of(same, -same)(torch.tensor([-1.0, 1.0])), torch.tensor([1.0, 0.0]).double())
    assert Suspicion.of(same, same)(torch.tensor([-7.0, 7.0])).tolist() == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_the_share_of_wrong_labels_is_found_where_the_scores_of_queries_and_examples_are_alike(share: float) -> None:
    """Whatever their distribution is, and as far off as it says; signs alone would be off by more."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> Tensor:
        """Two kinds of examples, easy and hard ones."""
        easy = torch.rand(n, generator=generator) < 0.6
        return torch.where(easy, 2.0, 0.3) + torch.randn(n, generator=generator)

    found, told, by_signs = [], [], []
    for _ in range(300):
        queries, train = draw(400), draw(1500)
        train[: round(1500 * share)] *= -1
        seen, signs = seen_by(train, queries), sighting(train < 0, queries < 0, queries > 0)
        assert seen is not None is not signs
        found.append(seen.share)
        told.append(math.hypot(seen.own, seen.common))
        by_signs.append(signs.share)
    assert np.mean(found) == pytest.approx(share, abs=3 * np.std(found) / math.sqrt(300))
    assert np.std(found) < 1.1 * np.mean(told)
    assert np.std(found) > 0.6 * np.mean(told)
    assert np.std(found) < 0.85 * np.std(by_signs)


def test_nothing_is_seen_where_the_scores_tell_nothing() -> None:
    queries = torch.tensor([1.0, 2.0, 1.5])
    assert seen_by(queries, -queries) is None
    assert seen_by(queries, torch.zeros(3)) is None
    assert seen_by(queries, 1e-3 * torch.tensor([20.0, -19.0, 0.0])) is None, "hardly anything"
    assert seen_by(queries[:0], queries) is None is sighting(queries > 0, torch.zeros(0), torch.zeros(0))


def test_wrong_labels_count_where_no_right_one_is_below_zero() -> None:
    """Half of the wrong ones are above it all the same."""
    seen = sighting(flags(100, 1000) < 0, flags(0, 1000) < 0, flags(500, 1000) < 0)
    assert seen is not None
    assert seen.share == pytest.approx(0.2)


def quadrature(sightings: Sequence[Sighting], visits: bool = True) -> float:
    """The posterior mean of the share, by the trapezoidal rule over both unknowns."""
    shares, falls = np.linspace(1e-9, 0.5, 1500), np.linspace(0, 0.3, 300)
    own, common = (np.array([getattr(one, name) for one in sightings]) for name in ("own", "common"))
    errors = multivariate_normal(np.zeros(len(own)), np.diag(own**2) + np.outer(common, common))
    left = [
        one.share - shares[:, None] + (one.visits * falls[None] if visits else 0 * falls[None]) for one in sightings
    ]
    density = np.exp(errors.logpdf(np.stack(left, -1)) - errors.logpdf(np.zeros(len(own)))) * np.exp(-falls / 0.03)
    density = np.trapezoid(density, falls, axis=1)
    cumulative = beta.cdf(shares, 0.3, 2.7)
    middle = (shares[1:] + shares[:-1]) / 2
    weight = np.diff(cumulative) * (density[1:] + density[:-1]) / 2
    return float((middle * weight).sum() / weight.sum())


@pytest.mark.parametrize(
    "sightings",
    [
        [Sighting(0.2, 0.02, 0.03)],
        [Sighting(0.05, 0.02, 0.03, 1)],
        [Sighting(0.25, 0.08, 0.02, 1), Sighting(0.13, 0.03, 0.02, 2), Sighting(0.1, 0.03, 0.03, 3)],
        [Sighting(0.0, 0.02, 0.02, 1), Sighting(-0.06, 0.02, 0.02, 2)],
        [Sighting(-0.1, 0.02, 0.03, 2.0)],
    ],
)
def test_the_estimate_is_the_posterior_mean(sightings: list[Sighting]) -> None:
    assert estimated_share(sightings) == pytest.approx(quadrature(sightings), abs=2e-3)


def test_an_estimate_that_says_hardly_more_than_was_expected_is_not_sharp() -> None:
    blurred, clear = (estimate([Sighting(0.0, error, error)]) for error in (1.0, 0.03))
    assert blurred is not None is not clear
    assert blurred.share == pytest.approx(float(beta.expect(args=(0.3, 2.7), ub=0.5, conditional=True)), abs=0.01)
    assert (blurred.sharp, clear.sharp) == (False, True)


def test_few_examples_or_queries_hardly_count() -> None:
    assert estimated_share([]) is None
    few = seen_by(torch.cat((-torch.ones(10), torch.ones(10))), torch.tensor([2.0, 1.0, 1.0, 3.0, -0.5, 0.1]))
    assert few is not None
    assert few.share == pytest.approx(0.5, abs=0.3)
    share = estimated_share([few])
    assert share is not None
    assert 0.07 < share < 0.3
    assert estimated_share([Sighting(-3.0, 0.01, 0.01)]) == pytest.approx(0, abs=1e-3), "far below 0"
    assert estimated_share([Sighting(2.0, 0.01, 0.01)]) == pytest.approx(0.5, abs=1e-3), "far above"


def test_what_is_learnt_by_heart_is_made_up_for() -> None:
    """Each time that training sees the examples four in a hundred fewer look wrong, down to none."""
    falling = [Sighting(0.2 - 0.04 * visits, 0.02, 0.02, visits) for visits in range(1, 6)]
    assert estimated_share(falling) == pytest.approx(0.2, abs=0.015)
    unaware = estimated_share([one._replace(visits=0.0) for one in falling])
    assert unaware is not None
    assert unaware < 0.1
    clean = [Sighting(-0.04 * visits, 0.02, 0.02, visits) for visits in range(1, 6)]
    share = estimated_share(clean)
    assert share is not None
    assert share < 0.015


def test_an_epoch_tells_by_its_second_half() -> None:
    examples = torch.cat((-torch.ones(100), flags(25, 100)))
    queries = torch.tensor([-1.0] * 10 + [1.0] * 90)
    still = Epoch(examples, queries, before=queries, visits=2)
    assert sighting_in(still) == pytest.approx(seen_by(examples[100:], queries, visits=2))
    assert still.moved == 0
    assert sighting_in(still._replace(before=None)) is None, "nobody knows where the queries were"
    together = sighting_in(still._replace(before=None, together=True))
    assert together == pytest.approx(seen_by(examples, queries, visits=2))
    assert sighting_in(still._replace(queries=queries[:0], before=queries[:0])) is None
    assert sighting_in(still._replace(examples=examples[:0])) is None


def test_a_model_has_settled_where_the_queries_look_as_before() -> None:
    queries = flags(10, 100)
    epoch = Epoch(queries, queries, before=flags(14, 100))
    assert epoch.settled
    assert not epoch._replace(before=flags(30, 100)).settled
    assert not epoch._replace(before=None).settled
    assert epoch._replace(before=None, together=True).settled


def test_where_the_model_was_learning_the_queries_are_taken_to_have_been_half_way() -> None:
    """Of a hundred queries ten have negative scores at the end, and thirty before."""
    queries = torch.tensor([-1.0] * 10 + [1.0] * 90)
    epoch = Epoch(torch.cat((flags(50, 100), flags(30, 100))), queries, torch.tensor([-1.0] * 30 + [1.0] * 70))
    suspicion = epoch.suspicion
    low, high = suspicion(torch.tensor([1.0, -1.0])).tolist()
    seen, still = sighting_in(epoch), sighting_in(epoch._replace(before=queries))
    assert seen is not None is not still
    e, w = 0.15, 0.85  # of suspicious ones, three quarters of the way
    assert seen.share == pytest.approx((0.3 - e) / (w - e))
    assert epoch.moved == pytest.approx(0.2 * (high - low))
    moved = 0.25 * 0.2 / (w - e)
    assert seen.own**2 - moved**2 == pytest.approx((still.own * 0.8 / (w - e)) ** 2)


def test_the_first_epoch_tells_by_its_last_examples_that_were_never_seen() -> None:
    examples = torch.cat((-torch.ones(200), flags(32, 100), flags(30, 100)))
    queries = flags(10, 100)
    seen, plain = sighting_in_first(Epoch(examples, queries), None), seen_by(examples[300:], queries)
    assert seen is not None is not plain
    assert (seen.share, seen.common, seen.visits) == (plain.share, plain.common, 0)
    assert seen.share == pytest.approx(0.2 / 0.8)
    low, high = Epoch(examples, queries).suspicion(torch.tensor([1.0, -1.0])).tolist()
    apart = 0.8 * (high - low)
    assert seen.own**2 - plain.own**2 == pytest.approx((0.02 * (high - low) / apart) ** 2), "it was learning still"
    after = Epoch(examples, queries, before=flags(20, 100))
    moving = sighting_in_first(Epoch(examples, queries), after)
    assert moving is not None
    assert moving.own**2 - plain.own**2 == pytest.approx((0.1 * (high - low) / apart) ** 2), "and went on to"
    together = sighting_in_first(Epoch(examples, queries, together=True), None)
    assert together == pytest.approx(seen_by(examples, queries))
    assert sighting_in_first(Epoch(examples, queries), after._replace(before=None)) is None
    assert sighting_in_first(Epoch(examples, queries[:0]), None) is None
    assert sighting_in_first(Epoch(examples[:0], queries), None) is None


@pytest.mark.parametrize("beyond", [0.4, -0.4])
def test_what_wrong_labels_look_like_is_a_guess_where_they_do_not_turn_the_sign(beyond: float) -> None:
    """Of more than two classes: between what they would if they did, and always or never suspicious."""
    generator = torch.Generator().manual_seed(8)
    queries, examples = (1 + torch.randn(n, generator=generator, dtype=torch.float64) for n in (300, 600))
    epoch = Epoch(examples, queries, visits=2.0, together=True)
    of = epoch.suspicion
    turned = of(-queries)
    wrong = turned + 0.4 * (1 - turned) if beyond > 0 else 0.6 * turned
    seen, plain, sure = sighting_in(epoch, beyond), sighting_in(epoch), sighting(of(examples), of(queries), wrong, 2.0)
    assert seen is not None
    assert plain is not None
    assert sure is not None
    assert (seen.share, seen.own) == (sure.share, sure.own)
    apart = float(wrong.mean() - of(queries).mean())
    guessed = float((wrong - turned).mean()) * 0.1 / apart
    assert seen.common == pytest.approx(math.hypot(sure.common, guessed), rel=1e-9)
    assert plain == sighting(of(examples), of(queries), turned, 2.0), "of two classes nothing is guessed"
    first, same = sighting_in_first(epoch, None, beyond), sighting(of(examples), of(queries), wrong)
    assert first is not None
    assert same is not None
    assert first.common == pytest.approx(math.hypot(same.common, guessed), rel=1e-9)
