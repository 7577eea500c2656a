"""Methods over checkpoints and over the members of an ensemble: against their formulas, and what they refuse."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from stores import make_store, random_blocks
from torch import Tensor

from hf_influence.attribution import attribute
from hf_influence.errors import BadSetting, MissingRows, StoreMismatch
from hf_influence.gradients import dropout
from hf_influence.store import GradientStore, PointAbout, number_of

assert_exact = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)

N, M, WIDTHS = 9, 4, {"layer0": 5, "layer1": 12}
MEMBERS = {"parameter_dropout": [1_000_000, 1_000_001, 1_000_002], "continued_sgd": [2_000_000, 2_000_001, 2_000_002]}
ENSEMBLES = {
    **dict.fromkeys(("ip_ensemble", "self_ip_ensemble"), "parameter_dropout"),
    **dict.fromkeys(("gex", "self_gex", "gex_lin", "self_gex_lin"), "continued_sgd"),
}
every_ensemble = pytest.mark.parametrize("method", ENSEMBLES)

blocks = partial(random_blocks, widths=WIDTHS)
TRAIN, QUERY = blocks(N, 1), blocks(M, 2)
LOSS = {point: torch.rand(N + M, generator=torch.Generator().manual_seed(point)).double() for point in range(4)}
NEAR = [(blocks(N, 3 + 100 * member), blocks(M, 4 + 100 * member)) for member in range(3)]
STEPS = [blocks(1, 5 + 100 * member) for member in range(3)]


def store_of(path: Path, kinds: Any = MEMBERS, **options: Any) -> GradientStore:
    """Point 0, and members of both ensembles."""
    losses = [{"stats": {"loss": loss[:N]}, "query_stats": {"loss": loss[N:]}} for loss in LOSS.values()]
    store = make_store(path, TRAIN, QUERY, **losses[0], **options)
    for kind in kinds:
        for member, (train, query) in enumerate(NEAR):
            about = PointAbout(kind, {"member": member}, "")
            point = number_of(path, about)
            of_rows = kind == "parameter_dropout"
            noted = {} if of_rows else losses[member + 1]
            make_store(path, train, query, about=about, point=point, rows=of_rows, **noted, **options)
            store.displacement(point).save({name: step[0] for name, step in STEPS[member].items()})
    return store


def deviations(linear: bool, members: list[int]) -> list[list[float]]:
    """For each example and then each query, how its loss differs from point 0 at each member."""
    rows = {name: torch.cat([TRAIN[name], QUERY[name]]) for name in WIDTHS}
    if linear:
        return [[sum(float(rows[k][z] @ STEPS[m][k][0]) for k in WIDTHS) for m in members] for z in range(N + M)]
    return [[float(LOSS[m + 1][z] - LOSS[0][z]) for m in members] for z in range(N + M)]


@pytest.mark.parametrize("members", [None, [0, 2]])
def test_ip_ensemble_is_the_mean_over_the_members(tmp_path: Path, members: list[int] | None) -> None:
    store, numbers = store_of(tmp_path), MEMBERS["parameter_dropout"]
    chosen = {} if members is None else {"points": [numbers[m] for m in members]}
    parts = [oracle.influence(*NEAR[m], oracle.identity) for m in members or range(3)]
    own = [oracle.self_influence(NEAR[m][0], oracle.identity) for m in members or range(3)]
    expected = torch.stack(parts).mean(0)
    scores = attribute(store, "ip_ensemble", **chosen)
    assert scores.settings["points"] == chosen.get("points", numbers)
    assert_exact(scores.values, expected)
    assert_exact(attribute(store, "ip_ensemble", queries="mean", **chosen).values, expected.mean(1, keepdim=True))
    assert_exact(attribute(store, "self_ip_ensemble", **chosen).values, torch.stack(own).mean(0))


@pytest.mark.parametrize("method", ["gex", "gex_lin"])
@pytest.mark.parametrize("members", [None, [0, 2]])
def test_gex_is_the_mean_product_of_deviations(tmp_path: Path, method: str, members: list[int] | None) -> None:
    store, numbers = store_of(tmp_path), MEMBERS["continued_sgd"]
    chosen = {} if members is None else {"points": [numbers[m] for m in members]}
    moved = deviations(method == "gex_lin", members or [0, 1, 2])
    expected = torch.zeros(N, M, dtype=torch.float64)
    own = torch.zeros(N, 1, dtype=torch.float64)
    for i in range(N):
        own[i] = -sum(a * a for a in moved[i]) / len(moved[i])
        for q in range(M):
            expected[i, q] = sum(a * b for a, b in zip(moved[i], moved[N + q], strict=True)) / len(moved[i])
    scores = attribute(store, method, **chosen)
    assert scores.settings["points"] == chosen.get("points", numbers)
    assert_exact(scores.values, expected)
    assert_exact(attribute(store, method, queries="mean", **chosen).values, expected.mean(1, keepdim=True))
    assert_exact(attribute(store, f"self_{method}", **chosen).values, own)


def trained(path: Path, kind: str, rate: Tensor | None) -> GradientStore:
    """Three points with rows, of training steps or of checkpoints."""
    store = make_store(path, TRAIN, QUERY)
    for point, (train, query) in enumerate(NEAR, 1):
        if kind == "training":
            stats = {"step": torch.full((N,), point), "learning_rate": torch.full((N,), 0.1 * point).double()}
            make_store(path, train, query, point=point, stats=stats)
        else:
            about = PointAbout(kind, {"step": point, "learning_rate": None if rate is None else float(rate[point - 1])})
            make_store(path, train, query, point=number_of(path, about), about=about)
    return store


@pytest.mark.parametrize("kind", ["training", "checkpoint"])
@pytest.mark.parametrize("weighted", [True, False])
def test_tracin_weighs_points_of_training_and_checkpoints(tmp_path: Path, kind: str, weighted: bool) -> None:
    store = trained(tmp_path, kind, torch.tensor([0.1, 0.2, 0.3]))
    weights = [0.1, 0.2, 0.3] if weighted else [1 / 3] * 3
    expected = sum(w * oracle.influence(*side, oracle.identity) for w, side in zip(weights, NEAR, strict=True))
    own = sum(w * oracle.self_influence(side[0], oracle.identity) for w, side in zip(weights, NEAR, strict=True))
    tolerance = {"rtol": 1e-6, "atol": 1e-6}  # of the rates above, which were float32
    torch.testing.assert_close(attribute(store, "tracin", weighted=weighted).values, expected, **tolerance)
    torch.testing.assert_close(attribute(store, "self_tracin", weighted=weighted).values, own, **tolerance)


def test_points_of_training_come_before_checkpoints(tmp_path: Path) -> None:
    trained(tmp_path, "checkpoint", torch.tensor([0.1, 0.2, 0.3]))
    assert attribute(tmp_path, "tracin").settings["points"] == [1_000_000, 1_000_001, 1_000_002]
    store = trained(tmp_path, "training", None)
    assert attribute(store, "tracin").settings["points"] == [1, 2, 3]


def test_checkpoints_without_a_learning_rate_are_not_weighed(tmp_path: Path) -> None:
    store = trained(tmp_path, "checkpoint", None)
    with pytest.raises(MissingRows, match=r"without a learning rate.*weighted=False"):
        attribute(store, "self_tracin")
    assert attribute(store, "self_tracin", weighted=False).values.isfinite().all()


def test_members_are_no_points_of_training(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    with pytest.raises(MissingRows, match="from training steps"):
        attribute(store, "loss_mean")
    make_store(tmp_path, TRAIN, point=1, stats={"step": torch.ones(N), "loss": LOSS[0][:N]})
    assert attribute(store, "loss_mean").settings["points"] == [1]


@pytest.mark.parametrize("method", ["ip", "fisher", "cosine", "self_ip", "outlier_l2"])
def test_statistics_alone_are_no_rows(tmp_path: Path, method: str) -> None:
    store, point = store_of(tmp_path), MEMBERS["continued_sgd"][1]
    with pytest.raises(MissingRows, match=r"2000001.* statistics of its examples alone.*rows=True and overwrite=True"):
        attribute(store, method, point=point)


def test_statistics_alone_serve_methods_of_statistics(tmp_path: Path) -> None:
    store, point = store_of(tmp_path), MEMBERS["continued_sgd"][1]
    assert_exact(attribute(store, "loss", point=point).values[:, 0], -LOSS[2][:N])


@every_ensemble
def test_without_members_it_says_how_to_make_them(tmp_path: Path, method: str) -> None:
    kind = ENSEMBLES[method]
    with pytest.raises(MissingRows, match=rf"no points of the kind '{kind}'.*it has: weights.*collect_at\(.*{kind}\("):
        attribute(store_of(tmp_path, kinds=()), method)


@every_ensemble
def test_the_weights_themselves_are_no_member(tmp_path: Path, method: str) -> None:
    points = [0, *MEMBERS[ENSEMBLES[method]]]
    with pytest.raises(BadSetting, match=r"points=\[0, .*Leave it out"):
        attribute(store_of(tmp_path), method, points=points)
    with pytest.raises(BadSetting, match=rf"method '{method}' goes over several points"):
        attribute(store_of(tmp_path), method, point=points[1])


@every_ensemble
def test_members_made_from_other_weights_are_refused(tmp_path: Path, method: str) -> None:
    store = store_of(tmp_path)
    about = PointAbout(ENSEMBLES[method], {"member": 3}, "other weights")
    make_store(tmp_path, *NEAR[0], about=about, point=number_of(tmp_path, about))
    with pytest.raises(StoreMismatch, match=r"not all made from the weights of point 0 .*other weights.*points=\["):
        attribute(store, method)
    assert attribute(store, method, points=MEMBERS[ENSEMBLES[method]]).values.isfinite().all()


@pytest.mark.parametrize("method", ["gex_lin", "self_gex_lin"])
def test_compressed_rows_do_not_give_the_way_of_a_member(tmp_path: Path, method: str) -> None:
    store = store_of(tmp_path, compress=dropout(3))
    with pytest.raises(StoreMismatch, match=rf"dropout.*whole rows for method '{method}'.*'{method[:-4]}'"):
        attribute(store, method)
    assert attribute(store, method[:-4]).values.isfinite().all()


@pytest.mark.parametrize("method", ["gex_lin", "self_gex_lin"])
def test_a_parameter_that_moved_without_rows_is_named(tmp_path: Path, method: str) -> None:
    store, point = store_of(tmp_path), MEMBERS["continued_sgd"][0]
    store.displacement(point).save({"head": torch.ones(2), "layer0": STEPS[0]["layer0"][0]})
    with pytest.raises(StoreMismatch, match="moved in head and 0 other"):
        attribute(store, method)


@pytest.mark.parametrize("method", ["gex_lin", "self_gex_lin"])
def test_points_that_do_not_know_their_way_are_refused(tmp_path: Path, method: str) -> None:
    store, point = store_of(tmp_path), MEMBERS["continued_sgd"][0]
    store.displacement(point).file.unlink()
    with pytest.raises(MissingRows, match=r"2000000 does not say how far.*collect_at"):
        attribute(store, method)


def test_a_parameter_that_did_not_move_counts_nothing(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    for point in MEMBERS["continued_sgd"]:
        store.displacement(point).save({"layer0": torch.zeros(5), "layer1": STEPS[0]["layer1"][0]})
    assert store.displacement(point).moved() == ["layer1"]
    product = TRAIN["layer1"] @ STEPS[0]["layer1"][0]
    assert_exact(attribute(store, "self_gex_lin").values[:, 0], -product.square())


def test_losses_are_compared_example_by_example(tmp_path: Path) -> None:
    store = store_of(tmp_path, kinds=())
    about = PointAbout("continued_sgd", {"member": 0}, "")
    stats = {"loss": LOSS[1][:N]}
    make_store(tmp_path, *NEAR[0], about=about, point=1_000_000, rows=False, present=[0, 3], stats=stats)
    with pytest.raises(MissingRows, match=r"do not hold the same examples \(9 and 2\)"):
        attribute(store, "self_gex")
