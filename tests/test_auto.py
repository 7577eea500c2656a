"""The default method: which parts speak for what a store holds, and that it is the mean of their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import norm, rankdata, spearmanr
from sklearn.metrics import roc_auc_score
from stores import Blocks, make_store, make_trained_store
from torch import Tensor

from hf_influence import Scores, attribute
from hf_influence.attribution import lacking
from hf_influence.attribution.kernel_ridge import negative
from hf_influence.attribution.trust import estimated_share, mirrored_auc
from hf_influence.errors import BadSetting, MissingRows
from hf_influence.store import GradientStore

N, M = 12, 6
CLASSES = {"name": "classification", "problem_type": None, "num_labels": 2}
TEXTS = {"name": "causal_lm", "loss_reduction": "mean"}


def blocks(n: int, seed: int) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, 6, generator=generator, dtype=torch.float64) for name in ("a", "b")}


def losses(seed: int) -> dict[str, Tensor]:
    return {"loss": torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def store(path: Path, task: dict[str, Any], *, training: bool, queries: bool = True, final: bool = True) -> Path:
    query = blocks(M, 50) if queries else None
    if final:
        make_store(path, blocks(N, 0), query, stats=losses(0), task=task)
    for point in (1, 2) if training else ():
        stats = losses(point) | {"step": torch.arange(N)}
        query = blocks(M, 50 + point) if queries else None
        make_store(path, blocks(N, point), query, stats=stats, point=point, task=task)
    return path


def ranked(scores: Scores) -> Tensor:
    """Of the mean over the queries, (rank − ½) / n."""
    return torch.from_numpy((rankdata(scores.mean().numpy()) - 0.5) / len(scores))


def scaled(ranking: Tensor, negative: int = 0) -> Tensor:
    """Normal scores of the ranks, so many of them below zero."""
    n = len(ranking)
    place = (rankdata(ranking.numpy().round(12)) - 0.5) / n
    return torch.from_numpy(norm.ppf(place) - norm.ppf(max(negative, 0.25) / n))


ALL = {"points": [0, 1, 2]}
BOTH = [("loss_mean", ALL), ("kernel_ridge_mean", ALL), ("kernel_ridge", {})]


@pytest.mark.parametrize(
    ("task", "training", "queries", "parts"),
    [
        (CLASSES, True, True, BOTH),
        (CLASSES, False, True, [("loss", {}), ("kernel_ridge", {})]),
        (CLASSES, True, False, [("loss_mean", ALL)]),
        (CLASSES, False, False, [("loss", {})]),
        (TEXTS, True, True, [("loss_mean", ALL), ("vote_mean", ALL)]),
        (TEXTS, False, True, [("loss", {}), ("vote", {})]),
        (TEXTS, True, False, [("loss_mean", ALL)]),
        (TEXTS, False, False, [("loss", {})]),
    ],
)
def test_it_is_the_mean_rank_over_what_the_store_allows(
    tmp_path: Path, task: dict[str, Any], training: bool, queries: bool, parts: list[tuple[str, dict[str, Any]]]
) -> None:
    path = store(tmp_path / "store", task, training=training, queries=queries)
    scores = attribute(path)
    assert scores.method == "auto"
    assert scores.settings["points"] == ([0, 1, 2] if training else [0])
    ranking = torch.stack([ranked(attribute(path, name, **settings)) for name, settings in parts]).mean(0)
    estimate = scores.report["estimated_share_wrong"]
    assert (estimate is None) == (task is TEXTS or not queries)
    torch.testing.assert_close(scores.values[:, 0], scaled(ranking, int((estimate or 0) * N)))
    assert scores.report["parts"] == {name: pytest.approx(1 / len(parts), abs=1e-4) for name, _ in parts}
    assert lacking(path)["auto"] == ()


def test_for_classes_the_parts_weigh_what_the_queries_say(tmp_path: Path) -> None:
    """Of their margins for the losses, and of what the others say of each for kernel ridge regression."""
    generator = torch.Generator().manual_seed(3)
    mean = {name: g[:1] for name, g in blocks(1, 9).items()}
    query = {name: mean[name] + 0.8 * g for name, g in blocks(M, 50).items()}
    margin = torch.randn(M, generator=generator, dtype=torch.float64) + 0.5
    make_store(tmp_path, blocks(N, 0), query, stats=losses(0), query_stats={"margin": margin}, task=CLASSES)
    directions = torch.nn.functional.normalize(torch.cat(list(query.values()), 1))
    left_out = []
    for q in range(M):  # ridge regression by the other queries
        others = [i for i in range(M) if i != q]
        kernel = directions[others] @ directions[others].T + torch.eye(M - 1, dtype=torch.float64)
        left_out.append(directions[q] @ directions[others].T @ torch.linalg.solve(kernel, torch.ones(M - 1).double()))
    side = [1] * M + [0] * M
    by_queries = roc_auc_score(side, torch.cat([torch.stack(left_out), -torch.stack(left_out)]))
    by_loss = roc_auc_score(side, torch.cat([margin, -margin]))
    weight = torch.tensor([max(0.01, by_loss - 0.5) ** 4, max(0.01, by_queries - 0.5 - (12 * M) ** -0.5) ** 4])
    weight = weight.double() / weight.sum()
    assert 0.02 < weight[0] < 0.98
    scores = attribute(tmp_path)
    assert list(scores.report["parts"].values()) == pytest.approx(weight.tolist(), abs=1e-4)
    parts = torch.stack([ranked(attribute(tmp_path, name)) for name in ("loss", "kernel_ridge")])
    ridge = attribute(tmp_path, "kernel_ridge").values
    seen, error = (ridge < 0).double().mean(), (torch.stack(left_out) < 0).double().mean()
    share = max(0, ((seen - error) / (1 - 2 * error)).item())
    assert scores.report["estimated_share_wrong"] == pytest.approx(share, abs=1e-4)
    assert share * N > 1
    torch.testing.assert_close(scores.values[:, 0], scaled(weight @ parts, int(share * N)))
    assert (scores.values < 0).sum() == int(share * N)


@pytest.mark.parametrize("final", [True, False])
def test_rows_at_the_end_count_more_as_they_carry_no_dropout(tmp_path: Path, final: bool) -> None:
    margin = torch.linspace(-1, 2, M, dtype=torch.float64)
    for point in (0, 1, 2) if final else (1, 2):
        stats = losses(point) | ({"step": torch.arange(N)} if point else {})
        queries: dict[str, Any] = {"query": blocks(M, 50), "query_stats": {"margin": margin}}
        make_store(tmp_path, blocks(N, point), stats=stats, point=point, task=CLASSES, **queries)
    parts = attribute(tmp_path).report["parts"]
    assert list(parts) == ["loss_mean", "kernel_ridge_mean", "kernel_ridge"]
    assert parts["kernel_ridge"] == pytest.approx((4 if final else 1) * parts["kernel_ridge_mean"], abs=2e-4)
    assert parts["loss_mean"] > 0.05


def test_the_report_says_how_far_the_parts_agree(tmp_path: Path) -> None:
    path = store(tmp_path, CLASSES, training=True)
    a, b, c = (ranked(attribute(path, name, **settings)) for name, settings in BOTH)
    expected = torch.corrcoef(torch.stack((a, (b + c) / 2)))[0, 1].item()
    assert attribute(path).report["agreement"]["loss_mean"] == pytest.approx(expected, abs=1e-4)
    two = attribute(path, parts=["loss", "cosine"]).report["agreement"]
    rho = spearmanr(attribute(path, "loss").values[:, 0], attribute(path, "cosine").mean()).statistic
    assert two == {"loss": pytest.approx(rho, abs=1e-4), "cosine": pytest.approx(rho, abs=1e-4)}


def test_queries_at_the_end_alone_still_count(tmp_path: Path) -> None:
    make_store(tmp_path, blocks(N, 0), blocks(M, 50), stats=losses(0), task=CLASSES)
    make_store(tmp_path, blocks(N, 1), stats=losses(1) | {"step": torch.arange(N)}, point=1, task=CLASSES)
    assert list(attribute(tmp_path).report["parts"]) == ["loss_mean", "kernel_ridge"]


def test_without_final_rows_the_last_point_stands_for_them(tmp_path: Path) -> None:
    path = store(tmp_path, CLASSES, training=True, final=False)
    scores = attribute(path)
    assert scores.settings["points"] == [1, 2]
    parts = [
        attribute(path, "loss_mean"),
        attribute(path, "kernel_ridge_mean"),
        attribute(path, "kernel_ridge", point=2),
    ]
    estimate = scores.report["estimated_share_wrong"]
    ranking = torch.stack([ranked(part) for part in parts]).mean(0)
    torch.testing.assert_close(scores.values[:, 0], scaled(ranking, int(estimate * N)))


def test_an_example_is_ranked_by_the_parts_that_score_it(tmp_path: Path) -> None:
    make_store(tmp_path, blocks(N, 0), blocks(M, 50), stats=losses(0))
    present = [i for i in range(N) if i != 7]
    stats = losses(1) | {"step": torch.arange(N)}
    make_store(tmp_path, blocks(N, 1), blocks(M, 51), stats=stats, point=1, present=present)
    scores = attribute(tmp_path, parts={"loss_mean": {"points": [1]}, "cosine": {}})
    cosine, loss = ranked(attribute(tmp_path, "cosine")), ranked(attribute(tmp_path, "loss", point=1))
    ranking = cosine.clone()
    ranking[present] = (cosine[present] + loss) / 2
    torch.testing.assert_close(scores.values[:, 0], scaled(ranking))


@pytest.mark.parametrize("whole", [True, False])
def test_ranks_are_within_groups(tmp_path: Path, whole: bool) -> None:
    """Given for the whole dataset or for the examples that have rows."""
    present = list(range(2, N))
    make_store(tmp_path, blocks(N, 0), stats=losses(0), present=present)
    groups = ["even" if i % 2 == 0 else "odd" for i in range(N)]
    scores = attribute(tmp_path, groups=groups if whole else groups[2:])
    value, ranking = -losses(0)["loss"][2:], torch.zeros(N - 2, dtype=torch.float64)
    for start in (0, 1):
        ranking[start::2] = torch.from_numpy((rankdata(value[start::2].numpy()) - 0.5) / 5)
    torch.testing.assert_close(scores.values[:, 0], scaled(ranking))
    assert scores.settings["groups"].startswith("2 groups, sha256")
    with pytest.raises(BadSetting, match="pass the groups themselves"):
        attribute(tmp_path, **scores.settings)
    with pytest.raises(BadSetting, match=r"groups=.* is not a sequence of 10 groups"):
        attribute(tmp_path, groups=groups[:5])


def test_what_was_recorded_gives_the_same_scores(tmp_path: Path) -> None:
    path = store(tmp_path / "store", TEXTS, training=True)
    scores = attribute(path, parts={"vote": {"k": 2}, "loss_mean": {}})
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert loaded.report == scores.report
    torch.testing.assert_close(attribute(path, loaded.method, **loaded.settings).values, scores.values)


def test_parts_asked_for_by_name_are_what_attribute_gives(tmp_path: Path) -> None:
    path = store(tmp_path, CLASSES, training=True)
    parts = [ranked(attribute(path, name)) for name in ("loss_mean", "ip")]
    scores = attribute(path, parts=["loss_mean", "ip"])
    torch.testing.assert_close(scores.values[:, 0], scaled(torch.stack(parts).mean(0)))


@pytest.mark.parametrize("parts", [[], "loss", ["auto"], {"auto": {}}])
def test_parts_that_are_none_are_refused(tmp_path: Path, parts: Sequence[str]) -> None:
    with pytest.raises(BadSetting, match="method 'auto': parts="):
        attribute(store(tmp_path, TEXTS, training=False), parts=parts)


def test_what_a_part_refuses_is_said_in_its_name(tmp_path: Path) -> None:
    path = store(tmp_path, TEXTS, training=False, queries=False)
    with pytest.raises(BadSetting, match="method 'vote': k=0"):
        attribute(path, parts={"vote": {"k": 0}})
    with pytest.raises(MissingRows, match="'query'"):
        attribute(path, parts=["loss", "cosine"])
    with pytest.raises(MissingRows, match="during="):
        attribute(path, parts=["loss_mean"])
    with pytest.raises(BadSetting, match="method 'auto' goes over several points"):
        attribute(path, point=1)


def test_a_store_without_any_rows_says_so(tmp_path: Path) -> None:
    make_store(tmp_path, blocks(0, 0))
    opened = GradientStore.open(tmp_path)
    with pytest.raises(MissingRows):
        attribute(opened, train_split="validation")


def test_a_wrong_label_comes_last(tmp_path: Path) -> None:
    """Its gradient is against all queries, and its loss was high until the end."""
    query = blocks(M, 5)
    for name in query:
        query[name] = query[name][:1] + 0.1 * query[name]
    train = {name: v[:1] + 0.5 * blocks(N, 6)[name] for name, v in query.items()}
    for name in train:
        train[name][3] = -train[name][3]
    stats = {"loss": torch.tensor([2.0 if i == 3 else 0.1 + i / 100 for i in range(N)])}
    make_trained_store(tmp_path, train, query, stats=stats, task=CLASSES)
    assert attribute(tmp_path).lowest(1) == [3]


def test_the_share_of_wrong_labels_is_found_where_the_scores_of_queries_and_examples_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, train = (0.8 + torch.randn(n, generator=generator) for n in (20000, 40000))
    train[:8000] *= -1

    def share(train: torch.Tensor, queries: torch.Tensor, before: float | None = None) -> float:
        return estimated_share(negative(train), len(train), negative(queries), len(queries), before)

    assert share(train, queries) == pytest.approx(0.2, abs=0.02)
    assert share(train[8000:], queries) == pytest.approx(0, abs=0.02)
    assert share(train + 1, queries) == 0
    assert share(train, -queries) == 0
    assert share(train[:0], queries) == 0
    error = negative(queries)
    assert 0.18 < share(train, queries, before=error) < share(train, queries)  # less a standard error
    assert share(train[8000:], queries, before=error) == 0
    assert share(train, queries, before=error + 0.1) == 0  # learning too fast


def test_epochs_before_the_labels_are_learnt_by_heart_tell_how_many_are_wrong(tmp_path: Path) -> None:
    """At the end each example agrees with its label; in the second epoch a quarter points the other way."""
    mean = {name: g[:1] for name, g in blocks(1, 9).items()}
    query = {name: mean[name] + 0.3 * g for name, g in blocks(M, 50).items()}
    learnt = {name: mean[name] + 0.3 * g for name, g in blocks(N, 6).items()}
    wrong = torch.arange(N) % 4 == 0
    seen = {name: torch.where(wrong[:, None], -g, g) for name, g in learnt.items()}
    make_store(tmp_path, learnt, query, stats=losses(0), task=CLASSES)
    for point in (1, 2):
        stats = losses(point) | {"step": torch.arange(N) + N * (point - 1)}
        make_store(tmp_path, seen, query, stats=stats, point=point, task=CLASSES)
    estimate = attribute(tmp_path).report["estimated_share_wrong"]
    assert estimate == pytest.approx(0.25 - (0.25 * 0.75 / N) ** 0.5, abs=1e-4)


def test_an_auc_against_the_negatives_is_that_of_scikit_learn() -> None:
    values = torch.tensor([1.0, -0.5, 0.5, 0.0, 2.0, 1.0])
    expected = roc_auc_score([1] * 6 + [0] * 6, torch.cat([values, -values]))
    assert mirrored_auc(values) == pytest.approx(expected, abs=1e-12)
