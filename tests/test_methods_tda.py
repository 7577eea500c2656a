"""Approximate unrolling: against dense matrix exponentials, against the steps it stands for, and against training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stores import Blocks, make_store, random_blocks
from torch import Tensor

from hf_influence.attribution import attribute, lacking
from hf_influence.attribution.segments import segments
from hf_influence.attribution.selection import Selection
from hf_influence.curvature import by_dense_side, by_gram_side
from hf_influence.errors import BadSetting, MissingRows, StoreMismatch
from hf_influence.store import GradientStore, PointAbout, number_of

assert_exact = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)

N, M = 8, 3
WIDTHS = {"narrow": 4, "wide": 30}
PRESENT = {1: [0, 1, 2, 3, 4, 6, 7], 2: [0, 2, 3, 5, 6, 7], 4: [0, 1, 2, 3, 4, 7], 5: [1, 2, 5, 6], 6: list(range(N))}
"""What each point holds: 5 is missing in the first segment but for one point, 0 in half of the second."""
CUT = [[1, 2], [4, 5], [6]]
RATE = 0.1

blocks = partial(random_blocks, widths=WIDTHS)


def noted(point: int, n: int = N, rate: float = RATE) -> dict[str, Tensor]:
    """Point p holds the steps 2 p − 1 and 2 p, with the rate falling from point to point."""
    step = 2 * point - 1 + torch.arange(n) % 2
    return {"step": step, "learning_rate": torch.full((n,), rate / point, dtype=torch.float64)}


TRAIN, QUERY = {point: blocks(N, point) for point in PRESENT}, blocks(M, 100)
MASS = [2 * RATE * (1 + 1 / 2), 2 * RATE * (2 / 4 + 1 / 5), 2 * RATE / 6]
"""Twice a point, and the steps of point 3, which is not stored, with the rate of point 4."""


def store_of(path: Path, *, queries: int | None = 0, notes: bool = True) -> GradientStore:
    """The points of PRESENT, and the query rows at one point."""
    store = make_store(path, blocks(N, 7), QUERY if queries == 0 else None)
    for point, present in PRESENT.items():
        asked = QUERY if point == queries else None
        make_store(path, TRAIN[point], asked, stats=noted(point) if notes else None, point=point, present=present)
    return store


def moved(h: Tensor, mass: float) -> Tensor:
    """∫₀ᵀ exp(−s H) ds, a corner of the exponential of a matrix twice the size."""
    d = len(h)
    double = torch.zeros(2 * d, 2 * d, dtype=torch.float64)
    double[:d, :d], double[:d, d:] = -h, torch.eye(d)
    return torch.linalg.matrix_exp(mass * double)[:d, d:]


def second_moment(rows: list[Tensor]) -> Tensor:
    return sum(torch.outer(g, g) for g in rows) / torch.tensor(len(rows))


def every_row(block: str, cut: list[int]) -> list[Tensor]:
    return [TRAIN[point][block][i] for point in cut for i in PRESENT[point]]


def dense(query: Blocks, mass: list[float], rows: Any = every_row) -> Tensor:
    """The formula, `[n, q]`."""
    out = torch.zeros(N, len(next(iter(query.values()))), dtype=torch.float64)
    for block, v in query.items():
        h = [second_moment(rows(block, cut)) for cut in CUT]
        for i in range(N):
            for k, cut in enumerate(CUT):
                own = [TRAIN[point][block][i] for point in cut if i in PRESENT[point]]
                if not own:
                    continue
                state = moved(h[k], mass[k]) @ torch.stack(own).mean(0)
                for later in range(k + 1, len(CUT)):
                    state = torch.linalg.matrix_exp(-mass[later] * h[later]) @ state
                out[i] += v @ state / N
    return out


@pytest.mark.parametrize("factor", [1, 40], ids=["cut short", "long"])
def test_scores_are_those_of_dense_matrix_exponentials(tmp_path: Path, factor: float) -> None:
    mass = [factor * one for one in MASS]
    scores = attribute(store_of(tmp_path), "tda", thin=False, **({"step_mass": mass} if factor > 1 else {}))
    assert_exact(scores.values, dense(QUERY, mass))
    assert scores.query_ids == list(range(M))
    assert scores.settings["segments"] == 3
    assert scores.settings["step_mass"] == pytest.approx(mass)
    mean = attribute(tmp_path, "tda", thin=False, step_mass=mass, queries="mean").values
    assert_exact(mean, scores.values.mean(1, keepdim=True))


def test_wide_blocks_take_one_row_of_each_example(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    cut = segments(Selection(store).over(None, queries=False), 3, None, "tda")
    picks = {tuple(points): one._drawn for points, one in zip(CUT, cut, strict=True)}

    def some_rows(block: str, points: list[int]) -> list[Tensor]:
        if block == "narrow":
            return every_row(block, points)
        drawn = picks[tuple(points)]
        kept = [
            (point, i)
            for point, pick in zip(points, drawn, strict=True)
            for i, taken in zip(PRESENT[point], pick.tolist(), strict=True)
            if taken
        ]
        assert sorted(i for _, i in kept) == sorted({i for point in points for i in PRESENT[point]})
        return [TRAIN[point][block][i] for point, i in kept]

    assert any(0 < pick.sum() < len(pick) for pick in picks[(1, 2)])
    assert_exact(attribute(store, "tda").values, dense(QUERY, MASS, some_rows))
    assert not torch.allclose(attribute(store, "tda", thin=False).values, attribute(store, "tda").values)


@pytest.mark.parametrize("thin", [True, False])
def test_self_influence_is_that_of_the_last_row_of_each_example(tmp_path: Path, thin: bool) -> None:
    last = {
        block: torch.stack([TRAIN[max(p for p in PRESENT if i in PRESENT[p])][block][i] for i in range(N)])
        for block in WIDTHS
    }
    store = store_of(tmp_path / "a")
    make_store(tmp_path / "a", blocks(N, 7), last, point=9)
    with_queries = attribute(store, "tda", points=list(PRESENT), query_point=9, thin=thin).values
    if not thin:
        assert_exact(with_queries, dense(last, MASS))
    scores = attribute(store, "self_tda", points=list(PRESENT), thin=thin)
    assert_exact(scores.values, -with_queries.diagonal()[:, None])
    assert scores.query_ids is None


FUNCTIONS = {
    "kept": lambda s: torch.exp(-3 * s),
    "damped inverse": lambda s: 1 / (0.1 + s),
    "square": lambda s: s.square(),
}


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(("n", "d"), [(20, 7), (7, 20), (9, 9), (1, 3), (0, 3), (600, 5)])
def test_both_sides_give_the_same_function_of_the_fisher_matrix(n: int, d: int, f: Any) -> None:
    draw = torch.Generator().manual_seed(n)
    g, v = (torch.randn(count, d, generator=draw, dtype=torch.float64) for count in (n, 4))
    if n > 5:
        g[3] = g[4]  # fewer directions than rows
    gram, dense = by_gram_side(g)(f, v), by_dense_side(g.split(3), d, n)(f, v)
    assert_exact(gram, dense)
    if f is FUNCTIONS["damped inverse"]:
        inverse = torch.linalg.inv(0.1 * torch.eye(d, dtype=torch.float64) + g.T @ g / max(1, n))
        assert_exact(dense, v @ inverse)
    single = by_gram_side(g.float())(f, v.float())
    torch.testing.assert_close(single.double(), dense, rtol=1e-4, atol=1e-4)


def test_scores_are_the_limit_of_small_steps_on_the_linearised_course(tmp_path: Path) -> None:
    """δ ← (I − ηH)δ − (η/n) ḡ_i, unrolled; the query's loss falls by −⟨v, δ⟩ up to an error in proportion to η."""
    mass = [0.5, 1.0, 0.25]
    scores = attribute(store_of(tmp_path), "tda", thin=False, step_mass=mass).values
    errors = []
    for eta in (1 / 64, 1 / 128, 1 / 256):
        unrolled = torch.zeros(N, M, dtype=torch.float64)
        for block, v in QUERY.items():
            state = torch.zeros(N, WIDTHS[block], dtype=torch.float64)
            for cut, length in zip(CUT, mass, strict=True):
                h = second_moment(every_row(block, cut))
                pull = torch.zeros_like(state)
                for i in range(N):
                    own = [TRAIN[point][block][i] for point in cut if i in PRESENT[point]]
                    pull[i] = torch.stack(own).mean(0) if own else 0
                for _ in range(round(length / eta)):
                    state = state - eta * state @ h - eta / N * pull
            unrolled -= state @ v.T
        errors.append(float((unrolled - scores).norm() / scores.norm()))
    assert errors[-1] < 5e-3
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([2, 2], rel=0.1)


def logistic_run(path: Path, steps: int) -> Tensor:
    """Full-batch descent on 200 examples, every step stored as a point, and the truth by autograd through the run.

    Returns:
        `−dℓ_q/dw_i` for the weight w_i of example i in the loss 1/n Σ w_i ℓ_i, `[n, q]`.
    """
    n, rate, draw = 200, 0.5, torch.Generator().manual_seed(0)
    scale = torch.logspace(0.5, -1, 6, dtype=torch.float64)
    x, z = (torch.randn(count, 6, generator=draw, dtype=torch.float64) for count in (n, 8))
    slope = 1.5 * torch.randn(6, generator=draw, dtype=torch.float64)
    x, z = x * scale, z * scale
    y, t = ((torch.rand(len(a), generator=draw, dtype=torch.float64) < (a @ slope).sigmoid()).double() for a in (x, z))

    def rows(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (((x @ weight).sigmoid() - y)[:, None] * x).detach()

    counts = torch.ones(n, dtype=torch.float64, requires_grad=True)
    weight = torch.zeros(6, dtype=torch.float64)
    for step in range(1, steps + 1):
        notes = {"step": torch.full((n,), step), "learning_rate": torch.full((n,), rate, dtype=torch.float64)}
        make_store(path, {"weight": rows(weight, x, y)}, stats=notes, point=step)
        weight = weight - rate / n * ((counts * ((x @ weight).sigmoid() - y)) @ x)
    make_store(path, {"weight": rows(weight, x, y)}, {"weight": rows(weight, z, t)})
    losses = F.binary_cross_entropy_with_logits(z @ weight, t, reduction="none")
    return torch.stack([-torch.autograd.grad(loss, counts, retain_graph=True)[0] for loss in losses], 1)


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def test_training_cut_short_is_predicted_better_than_by_influence_at_its_end(tmp_path: Path) -> None:
    truth = logistic_run(tmp_path, steps=10)
    scores = {method: attribute(tmp_path, method).values for method in ("tda", "fisher", "ip")}
    near = {method: correlation(values, truth) for method, values in scores.items()}
    assert near["tda"] > 0.98
    assert near["tda"] > near["fisher"] + 0.04
    assert near["tda"] > near["ip"] + 0.04
    slope = float((scores["tda"] * truth).sum() / scores["tda"].square().sum())
    assert 0.85 < slope < 1.15  # not only in proportion: in units of the query's loss


def test_points_far_apart_stand_for_the_steps_between_them(tmp_path: Path) -> None:
    """Every fifth point predicts nearly what all of them do, with the same sum of learning rates."""
    logistic_run(tmp_path, steps=20)
    every, fifth = (attribute(tmp_path, "tda", points=points) for points in (range(1, 21), (1, 5, 10, 15, 20)))
    assert sum(every.settings["step_mass"]) == pytest.approx(10)
    assert sum(fifth.settings["step_mass"]) == pytest.approx(10)
    assert correlation(every.values, fifth.values) > 0.995


def test_checkpoints_bring_step_and_rate_themselves(tmp_path: Path) -> None:
    """And their order: it is that of the steps, not of the numbers."""
    for step in (30, 10, 60):
        about = PointAbout("checkpoint", {"step": step, "learning_rate": 1 / step})
        make_store(tmp_path, blocks(N, step), blocks(M, 1), about=about, point=number_of(tmp_path, about))
    scores = attribute(tmp_path, "tda")
    assert scores.settings["step_mass"] == pytest.approx([10 / 10, 20 / 30, 30 / 60])
    assert scores.settings["query_point"] == GradientStore.open(tmp_path).points("checkpoint")[-1]
    for point, step in enumerate((10, 30, 60), 1):
        notes = {"step": torch.full((N,), step), "learning_rate": torch.full((N,), 1 / step, dtype=torch.float64)}
        make_store(tmp_path / "in order", blocks(N, step), blocks(M, 1), stats=notes, point=point)
    assert_exact(scores.values, attribute(tmp_path / "in order", "tda").values)


@pytest.mark.parametrize("queries", [0, 6])
def test_queries_are_those_after_training_or_of_the_last_point(tmp_path: Path, queries: int) -> None:
    scores = attribute(store_of(tmp_path, queries=queries), "tda", thin=False)
    assert scores.settings["query_point"] == queries
    assert_exact(scores.values, dense(QUERY, MASS))
    assert lacking(tmp_path)["tda"] == ()


def test_queries_without_rows_after_training_do_not_count(tmp_path: Path) -> None:
    """Losses at point 0 may have been collected for another method."""
    store = store_of(tmp_path, queries=6)
    make_store(tmp_path, blocks(N, 7), QUERY, query_stats={"loss": torch.zeros(M)}, rows=False, point=0)
    assert attribute(store, "tda").settings["query_point"] == 6


def test_queries_in_the_middle_are_asked_for_by_number(tmp_path: Path) -> None:
    store = store_of(tmp_path, queries=4)
    assert lacking(store)["tda"] == ("queries",)
    with pytest.raises(MissingRows, match=r"'query' at point 6 .*Points with rows of it: 4"):
        attribute(store, "tda")
    assert_exact(attribute(store, "tda", query_point=4, thin=False).values, dense(QUERY, MASS))


def test_more_segments_than_points_are_one_for_each(tmp_path: Path) -> None:
    scores = attribute(store_of(tmp_path), "tda", segments=9)
    assert scores.settings["segments"] == 5
    assert len(scores.settings["step_mass"]) == 5


@pytest.mark.parametrize("method", ["tda", "self_tda"])
def test_unknown_rates_are_refused_and_masses_can_be_passed(tmp_path: Path, method: str) -> None:
    store = store_of(tmp_path, notes=False)
    points = list(PRESENT)
    with pytest.raises(MissingRows, match=r"0001.train holds rows without a step or a learning rate.*step_mass=\["):
        attribute(store, method, points=points)
    attribute(store, method, points=points, step_mass=MASS)
    with pytest.raises(BadSetting, match=r"has 2 numbers for 3 segments of 5 points"):
        attribute(store, method, points=points, step_mass=[1, 2])


@pytest.mark.parametrize("masses", [1.0, "1", [-1.0], [float("nan")], ["1"]])
def test_masses_that_are_none_are_refused(tmp_path: Path, masses: Any) -> None:
    with pytest.raises(BadSetting, match=r"method 'tda': step_mass="):
        attribute(store_of(tmp_path), "tda", step_mass=masses)


def test_points_of_two_runs_are_refused(tmp_path: Path) -> None:
    for point in (1, 2):
        make_store(tmp_path, blocks(N, point), QUERY, stats=noted(1), point=point)
    with pytest.raises(StoreMismatch, match=r"step 1, and the point before it goes up to step 2.*points=\["):
        attribute(tmp_path, "tda")
