"""The default method: which parts speak for what a store holds, and that it is the mean of their ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import watched
from datasets import Dataset, IterableDataset
from models import tiny
from scipy.optimize import brentq
from scipy.stats import norm, rankdata, spearmanr
from sightings import estimated_share
from sklearn.metrics import roc_auc_score, roc_curve
from stores import Blocks, make_store, make_trained_store, random_blocks
from torch import Tensor

from hf_influence import Scores, attribute
from hf_influence.attribution import lacking
from hf_influence.attribution.auto.share_wrong import Sighting, sighting
from hf_influence.attribution.auto.trust import divide
from hf_influence.attribution.auto.witnesses import ANSWERS
from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadExample, BadSetting, MissingRows
from hf_influence.evaluation import mislabel_detection
from hf_influence.store import GradientStore

N, M = 12, 6
CLASSES = {"name": "classification", "problem_type": None, "num_labels": 2}
TEXTS = {"name": "causal_lm", "loss_reduction": "mean"}


blocks = partial(random_blocks, widths={"a": 6, "b": 6})


def losses(seed: int) -> dict[str, Tensor]:
    return {"loss": torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def store(
    path: Path,
    task: dict[str, Any],
    *,
    training: bool,
    queries: bool = True,
    final: bool = True,
    prompts: bool = False,
) -> Path:
    query = blocks(M, 50) if queries else None
    if final:
        others = {"other_prompt_loss": 2 * losses(9)["loss"][:, None]} if prompts else {}
        make_store(path, blocks(N, 0), query, stats=losses(0) | others, task=task)
    for point in (1, 2) if training else ():
        stats = losses(point) | {"step": torch.arange(N)}
        query = blocks(M, 50 + point) if queries else None
        make_store(path, blocks(N, point), query, stats=stats, point=point, task=task)
    return path


def ranked(scores: Scores) -> Tensor:
    """Of the mean over the queries, (rank − ½) / n."""
    return torch.from_numpy((rankdata(scores.mean().numpy()) - 0.5) / len(scores))


def scaled(ranking: Tensor) -> Tensor:
    """Normal scores of the ranks, none of them below zero."""
    n = len(ranking)
    place = (rankdata(ranking.numpy().round(12)) - 0.5) / n
    return torch.from_numpy(norm.ppf(place) - norm.ppf(0.25 / n))


def left_out(query: Blocks) -> Tensor:
    """What ridge regression by the other queries makes of each, `[m]`."""
    directions = torch.nn.functional.normalize(torch.cat(list(query.values()), 1))
    scores = []
    for q in range(len(directions)):
        others = [i for i in range(len(directions)) if i != q]
        kernel = directions[others] @ directions[others].T + torch.eye(len(others), dtype=torch.float64)
        scores.append(
            directions[q] @ directions[others].T @ torch.linalg.solve(kernel, torch.ones(len(others)).double())
        )
    return torch.stack(scores)


def under_wrong_labels(query: Blocks, wrong: Blocks) -> Tensor:
    """What ridge regression by the other queries makes of each with the gradient of a wrong label, `[m]`."""
    directions, turned = (torch.nn.functional.normalize(torch.cat(list(g.values()), 1)) for g in (query, wrong))
    scores = []
    for q in range(len(directions)):
        others = [i for i in range(len(directions)) if i != q]
        kernel = directions[others] @ directions[others].T + torch.eye(len(others), dtype=torch.float64)
        alpha = torch.linalg.solve(kernel, torch.ones(len(others), dtype=torch.float64))
        scores.append(turned[q] @ directions[others].T @ alpha)
    return torch.stack(scores)


def told_apart(right: Tensor, wrong: Tensor) -> float:
    """The AUC, and one query more of which nothing is known."""
    q = len(right)
    return (roc_auc_score([1] * q + [0] * len(wrong), torch.cat((right, wrong))) * q + 0.5) / (q + 1)


def believed(ranking: Tensor, auc: float, share: float) -> Tensor:
    """Log-odds at the places of two bell curves, each found by itself."""
    d, odds = math.sqrt(2) * norm.ppf(auc), math.log((1 - share) / share)
    places = (rankdata(ranking.numpy().round(12)) - 0.5) / len(ranking)

    def at(place: float) -> float:
        return brentq(lambda x: (1 - share) * norm.cdf(x, d / 2) + share * norm.cdf(x, -d / 2) - place, -20, 20)

    return torch.tensor([d * at(place) + odds for place in places], dtype=torch.float64)


def agree(scores: Scores, ranking: Tensor, path: Path, point: int = 0) -> None:
    """The scores are log-odds where the queries tell, else normal scores of the ranks."""
    estimate, auc = scores.report["estimated_share_wrong"], 0.0
    if estimate is not None:
        rows = GradientStore.open(path).rows("query", point=point)
        kinds = [left_out({name: rows.block(name) for name in rows.blocks})]
        if "margin" in GradientStore.open(path).rows("train", point=point).stats:
            kinds.append(rows.stats["margin"])
        auc = max(told_apart(right, -right) for right in kinds)
    if auc <= 0.5:
        assert "log_odds" not in scores.report
        torch.testing.assert_close(scores.values[:, 0], scaled(ranking))
        return
    assert estimate is not None
    torch.testing.assert_close(scores.values[:, 0], believed(ranking, auc, estimate), atol=5e-3, rtol=5e-3)


ALL = {"points": [1, 2, 0]}
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
    assert scores.settings["points"] == ([1, 2, 0] if training else [0])
    ranking = torch.stack([ranked(attribute(path, name, **settings)) for name, settings in parts]).mean(0)
    assert scores.report["estimated_share_wrong"] is None or (task is CLASSES and queries)
    agree(scores, ranking, path)
    assert scores.report["parts"] == {name: pytest.approx(1 / len(parts), abs=1e-4) for name, _ in parts}
    assert lacking(path)["auto"] == ()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("queries", [True, False])
def test_where_answers_were_read_after_other_prompts_that_counts_as_well(
    tmp_path: Path, training: bool, queries: bool
) -> None:
    plain = attribute(store(tmp_path / "plain", TEXTS, training=training, queries=queries))
    path = store(tmp_path / "prompts", TEXTS, training=training, queries=queries, prompts=True)
    scores, parts = attribute(path), [*plain.report["parts"], "prompt_gain"]
    assert list(scores.report["parts"]) == parts
    rankings = [ranked(attribute(path, name, **(ALL if "_mean" in name else {}))) for name in parts]
    agree(scores, (torch.stack(rankings[:-1]).mean(0) + rankings[-1]) / 2, path)
    classes = attribute(store(tmp_path / "classes", CLASSES, training=training, queries=queries, prompts=True))
    assert "prompt_gain" not in classes.report["parts"]


def test_queries_after_other_prompts_make_the_scores_of_answers_log_odds(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(4)

    def read(n: int, wrong: int) -> dict[str, Tensor]:
        """Losses after the own prompt and after two others; the first answers are no likelier after their own."""
        others = 2 + 0.4 * torch.rand(n, 2, generator=draw, dtype=torch.float64)
        own = torch.where(torch.arange(n) < wrong, 2.0, 1.5) + 0.4 * torch.rand(n, generator=draw, dtype=torch.float64)
        return {"loss": own, "other_prompt_loss": others}

    train, query = read(N, 4), read(M, 0)
    make_store(tmp_path, blocks(N, 0), blocks(M, 50), stats=train, query_stats=query, task=TEXTS)
    scores = attribute(tmp_path)
    gains = 1 - train["loss"] / train["other_prompt_loss"].mean(1)
    right = 1 - query["loss"] / query["other_prompt_loss"].mean(1)
    wrong = torch.cat([1 - query["other_prompt_loss"][:, a] / query["other_prompt_loss"][:, 1 - a] for a in (0, 1)])
    false_alarms, found, cuts = roc_curve([0] * M + [1] * (2 * M), -torch.cat([right, wrong]), drop_intermediate=False)
    place = int((found - false_alarms).argmax())
    assert divide(right, wrong) == pytest.approx(-cuts[place], abs=0.1)
    cut = divide(right, wrong)
    assert float((wrong < cut).double().mean()) == pytest.approx(found[place])
    assert float((right < cut).double().mean()) == pytest.approx(false_alarms[place])
    seen = sighting(gains < cut, right < cut, wrong < cut)
    assert seen is not None
    share = estimated_share([seen])
    assert share is not None
    assert scores.report["estimated_share_wrong"] == pytest.approx(share, abs=1e-4)
    parts = [ranked(attribute(tmp_path, name)) for name in ("loss", "vote", "prompt_gain", "prompt_gain")]
    want = believed(torch.stack(parts).mean(0), told_apart(right, wrong), share)
    torch.testing.assert_close(scores.values[:, 0], want, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(scores.probability_wrong(), torch.sigmoid(-scores.values[:, 0]))

    trained = store(tmp_path / "trained", TEXTS, training=True, final=False)  # which has seen each example twice
    make_store(trained, blocks(N, 0), blocks(M, 50), stats=train, query_stats=query, task=TEXTS)
    learnt = estimated_share([seen._replace(visits=2 * ANSWERS)])
    assert learnt is not None
    assert learnt > share
    assert attribute(trained).report["estimated_share_wrong"] == pytest.approx(learnt, abs=1e-4)

    one = {**query, "other_prompt_loss": query["other_prompt_loss"][:, :1]}
    make_store(tmp_path / "one", blocks(N, 0), blocks(M, 50), stats=train, query_stats=one, task=TEXTS)
    with pytest.raises(BadSetting, match=r"not read after two other prompts"):
        attribute(tmp_path / "one").probability_wrong()


@pytest.mark.parametrize("leans", [False, True])
def test_for_classes_the_parts_weigh_what_the_queries_say(tmp_path: Path, leans: bool) -> None:
    """Of their margins for the losses, and of what the others say of each for kernel ridge regression.

    Where the model leans to a class, what counts is how wrong labels of that class are told.
    """
    generator = torch.Generator().manual_seed(3)
    mean = {name: g[:1] for name, g in blocks(1, 9).items()}
    query = {name: mean[name] + 0.8 * g for name, g in blocks(M, 50).items()}
    margin = torch.randn(M, generator=generator, dtype=torch.float64) + 0.5
    label = torch.arange(M) % 2
    margin += torch.tensor([4.0, -1.0])[label] if leans else 0.0
    about = {"margin": margin, "label": label}
    make_store(tmp_path, blocks(N, 0), query, stats=losses(0), query_stats=about, task=CLASSES)
    seen = left_out(query)

    def told(right: Tensor) -> float:
        overall = roc_auc_score([1] * M + [0] * M, torch.cat([right, -right]))
        of = [-right[label != given] for given in (0, 1)]
        each = [roc_auc_score([1] * M + [0] * len(one), torch.cat([right, one])) for one in of]
        by = [auc + (12 * len(one)) ** -0.5 for auc, one in zip(each, of, strict=True)]
        assert right is not margin or leans == (min(by) < overall)
        return min([overall, *by])

    by_queries, by_loss = told(seen), told(margin)
    weight = torch.tensor([max(0.01, by_loss - 0.5) ** 4, max(0.01, by_queries - 0.5 - (12 * M) ** -0.5) ** 4])
    weight = weight.double() / weight.sum()
    assert 0.02 < weight[0] < 0.98
    scores = attribute(tmp_path)
    assert list(scores.report["parts"].values()) == pytest.approx(weight.tolist(), abs=1e-4)
    parts = torch.stack([ranked(attribute(tmp_path, name)) for name in ("loss", "kernel_ridge")])
    ridge = attribute(tmp_path, "kernel_ridge").values
    of = suspicious(seen)
    sighted = sighting(of(ridge[:, 0]), of(seen), of(-seen))
    assert sighted is not None
    assert scores.report["estimated_share_wrong"] == pytest.approx(estimated_share([sighted]), abs=1e-4)
    agree(scores, weight @ parts, tmp_path)
    assert 0 < (scores.probability_wrong() > 0.5).sum() == (scores.values < 0).sum()


REASONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no queries": ({"queries": False}, {}, r"no clean queries .*query_dataset=clean"),
    "training goes on": ({"final": False}, {}, r"no rows at the final weights: .*at_end=False"),
    "prompts are learnt": ({}, {}, r"not read after two other prompts.*prompt and completion.*assistant_only_loss"),
    "parts": ({}, {"parts": ["loss"]}, r"chosen by hand"),
}


@pytest.mark.parametrize("case", REASONS)
def test_scores_that_are_ranks_say_why_they_are_no_probabilities(tmp_path: Path, case: str) -> None:
    held, settings, why = REASONS[case]
    path = store(tmp_path / "store", TEXTS, training=True, **held)
    if case == "training goes on":  # and the queries come last
        make_store(path, blocks(N, 3), stats=losses(3) | {"step": torch.arange(N)}, point=3, task=TEXTS)
    scores = attribute(path, **settings)
    with pytest.raises(BadSetting, match=rf"by 'auto' rank the examples and are no probabilities: .*{why}"):
        scores.probability_wrong()
    scores.save(tmp_path / "scores")
    assert Scores.load(tmp_path / "scores").report["ranks_only"] == scores.report["ranks_only"]


def test_of_regression_nothing_is_known(tmp_path: Path) -> None:
    path = store(tmp_path, CLASSES | {"problem_type": "regression"}, training=True)
    with pytest.raises(BadSetting, match=r"the queries do not tell right from wrong.*of regression"):
        attribute(path).probability_wrong()


def test_a_known_share_of_wrong_labels_takes_the_place_of_the_estimate(tmp_path: Path) -> None:
    mean = {name: g[:1] for name, g in blocks(1, 9).items()}
    query = {name: mean[name] + 0.8 * g for name, g in blocks(M, 50).items()}
    make_store(tmp_path / "told", blocks(N, 0), query, stats=losses(0), task=CLASSES)
    found, told = attribute(tmp_path / "told"), attribute(tmp_path / "told", share_wrong=0.4)
    assert told.probability_wrong().mean() == pytest.approx(0.4, abs=2e-3)
    assert found.probability_wrong().mean() == pytest.approx(found.report["estimated_share_wrong"], abs=2e-3)
    assert told.report == found.report
    assert told.settings["share_wrong"] == 0.4
    assert torch.equal(told.values.argsort(0), found.values.argsort(0))

    path = store(tmp_path / "untold", CLASSES, training=True, queries=False)
    with pytest.raises(BadSetting, match=r"share_wrong=0\.4 is for .* log-odds.*no clean queries.*query_dataset"):
        attribute(path, share_wrong=0.4)
    with pytest.raises(BadSetting, match=r"parts of your own, \['loss'\], are not"):
        attribute(tmp_path / "told", share_wrong=0.4, parts=["loss"])
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(BadSetting, match=f"share_wrong={share}"):
            attribute(path, share_wrong=share)


@pytest.mark.parametrize("final", [True, False])
def test_rows_at_the_end_count_more_as_they_carry_no_dropout(tmp_path: Path, final: bool) -> None:
    margin = torch.linspace(-1, 2, M, dtype=torch.float64)
    for point in (0, 1, 2) if final else (1, 2):
        stats = losses(point) | ({"step": torch.arange(N)} if point else {})
        queries: dict[str, Any] = {"query": blocks(M, 50), "query_stats": {"margin": margin}}
        make_store(tmp_path, blocks(N, point), stats=stats, point=point, task=CLASSES, **queries)
    parts = attribute(tmp_path).report["parts"]
    assert list(parts) == ["loss_mean", "kernel_ridge_mean", "kernel_ridge"]
    assert parts["kernel_ridge"] == pytest.approx((8 if final else 1) * parts["kernel_ridge_mean"], abs=2e-4)
    assert parts["loss_mean"] > 0.05


def test_losses_over_training_are_trusted_as_those_of_the_queries_over_training_tell(tmp_path: Path) -> None:
    """Not as they do at the end, when the model may have got worse, or better."""
    generator = torch.Generator().manual_seed(1)
    mean = {name: g[:1] for name, g in blocks(1, 9).items()}
    query = {name: mean[name] + 0.8 * g for name, g in blocks(M, 50).items()}
    margins = torch.randn(3, M, generator=generator, dtype=torch.float64) + torch.tensor([[1.0], [0.2], [0.5]])
    for point in (0, 1, 2):
        stats = losses(point) | ({"step": torch.arange(N)} if point else {})
        queries: dict[str, Any] = {"query": query, "query_stats": {"margin": margins[point]}}
        make_store(tmp_path, blocks(N, point), stats=stats, point=point, task=CLASSES, **queries)
    right, wrong = (-torch.log1p(torch.exp(-sign * margins)).mean(0) for sign in (1, -1))
    auc = roc_auc_score([1] * M + [0] * M, torch.cat([right, wrong]))
    assert abs(auc - roc_auc_score([1] * M + [0] * M, torch.cat([margins[0], -margins[0]]))) > 0.02
    by_queries = roc_auc_score([1] * M + [0] * M, torch.cat([left_out(query), -left_out(query)]))
    ratio = (auc - 0.5) ** 4 / max(0.01, by_queries - 0.5 - (12 * M) ** -0.5) ** 4
    parts = attribute(tmp_path).report["parts"]
    assert parts["loss_mean"] / parts["kernel_ridge_mean"] == pytest.approx(ratio, rel=2e-2)


def test_what_the_model_has_learnt_by_heart_counts_less_at_the_end(tmp_path: Path) -> None:
    """A query is on the other side, a quarter of the examples too, or none of them."""
    mean = {name: g[:1] for name, g in blocks(1, 9).items()}
    side = torch.tensor([-1, 1, 1, 1, 1, 1])[:, None]
    query = {name: side * (mean[name] + 0.3 * g) for name, g in blocks(M, 50).items()}
    margin = torch.tensor([2.0, 3.0, -0.1, 1.5, -0.2, 1.0], dtype=torch.float64)
    weights = []
    for learnt in (0.0, 9.0):
        path = tmp_path / str(learnt)
        for point in (0, 1, 2):
            sign = torch.where((torch.arange(N) % 4 == 0) & (learnt == 0), -1, 1)[:, None]
            rows = {name: sign * (mean[name] + 0.3 * g) for name, g in blocks(N, 6).items()}
            stats = losses(point) | {"margin": torch.linspace(-3, 6, N, dtype=torch.float64) + learnt}
            stats |= {"step": torch.arange(N)} if point else {}
            queries: dict[str, Any] = {"query": query, "query_stats": {"margin": margin}}
            make_store(path, rows, stats=stats, point=point, task=CLASSES, **queries)
        weights.append(attribute(path).report["parts"])
    fresh, stale = weights
    seen = left_out(query)
    ridge = attribute(tmp_path / "9.0", "kernel_ridge").values[:, 0]
    o, e = ((values < 0).double().mean().item() for values in (ridge, seen))
    assert o < e, "fewer negative scores than the queries have"
    factor = ((o + 0.5 / M) / (e + 0.5 / M)) ** 4
    assert fresh["kernel_ridge"] == pytest.approx(8 * fresh["kernel_ridge_mean"], abs=2e-4)
    assert stale["kernel_ridge"] == pytest.approx(8 * factor * stale["kernel_ridge_mean"], abs=2e-4)


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
    agree(scores, torch.stack([ranked(part) for part in parts]).mean(0), path, point=2)


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


def test_groups_of_a_stream_without_ids_are_refused(tmp_path: Path) -> None:
    def captured(name: str, **settings: Any) -> GradientStore:
        capture = GradientCapture(tmp_path / name, during="epochs", at_end=False, **settings)
        stream = IterableDataset.from_generator(lambda: iter(watched.EXAMPLES[::-1]))
        watched.train(tiny(torch.float32), tmp_path, capture, data=stream, max_steps=8)
        return GradientStore.open(tmp_path / name)

    groups = [i % 2 for i in range(10)]
    with pytest.raises(BadSetting, match=r"groups goes by the order of the dataset.*of a stream.*id_column=…"):
        attribute(captured("stream"), groups=groups)
    scores = attribute(tmp_path / "stream", "loss_mean")
    with pytest.raises(BadSetting, match=r"of a stream.*whose the is_mislabeled are"):
        mislabel_detection(scores, groups)
    at_hand = captured("at hand", train_dataset=Dataset.from_list(watched.EXAMPLES))
    assert len(attribute(at_hand, groups=groups)) == 10


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


def test_examples_and_parts_without_a_number_are_no_best_ones(tmp_path: Path) -> None:
    for point in (0, 1, 2):
        seen = {"present": range(N - 2)} if point else {}
        stats = losses(point) | ({"step": torch.arange(N)} if point else {})
        make_store(tmp_path / "short", blocks(N, point), blocks(M, 50), stats=stats, point=point, task=TEXTS, **seen)
    with pytest.raises(MissingRows, match=f"scores the example {N - 2}, which training did not see"):
        attribute(tmp_path / "short", parts=["loss_mean", "vote_mean"])
    assert attribute(tmp_path / "short").values.isfinite().all()

    path = store(tmp_path / "whole", CLASSES, training=False)
    with pytest.raises(BadSetting, match=r"part 'fisher' gives no number.*damping"):
        attribute(path, parts={"fisher": {"damping": 1e-45, "side": "gram"}})
    bad = losses(0)
    bad["loss"][3] = torch.nan
    make_store(tmp_path / "nan", blocks(N, 0), blocks(M, 50), stats=bad, task=TEXTS)
    with pytest.raises(BadExample, match="'loss' of example 3"):
        attribute(tmp_path / "nan")


def test_an_empty_point_of_training_does_not_silence_the_others(tmp_path: Path) -> None:
    """As where all examples of a step overflowed in half precision."""
    path = store(tmp_path, CLASSES, training=True)
    stats = losses(3) | {"step": torch.arange(N)}
    expected = set(attribute(path).report["parts"])
    make_store(path, blocks(N, 3), blocks(M, 53), stats=stats, point=3, task=CLASSES, present=[])
    assert set(attribute(path).report["parts"]) == expected


def test_points_that_were_asked_for_hold_for_parts_of_ones_own(tmp_path: Path) -> None:
    path = store(tmp_path, CLASSES, training=True)
    for points in ([0], [1], [1, 2]):
        scores = attribute(path, parts=["loss_mean"], points=points)
        torch.testing.assert_close(ranked(scores), ranked(attribute(path, "loss_mean", points=points)))


def test_groups_go_by_place_whatever_the_index_of_their_column(tmp_path: Path) -> None:
    path = store(tmp_path, CLASSES, training=False)
    groups = [at % 3 for at in range(N)]
    column = pd.Series(groups, index=list(range(N))[::-1])
    torch.testing.assert_close(attribute(path, groups=column).values, attribute(path, groups=groups).values)
    with pytest.raises(BadSetting, match="is not a sequence of"):
        attribute(path, groups=dict(enumerate(groups)))


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


def suspicious(queries: Tensor, wrong: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The probability of a wrong label among ten, by bell curves of one width fitted to the queries."""
    right, wrong = queries.numpy(), (-queries if wrong is None else wrong).numpy()
    width = math.sqrt((right.var() + wrong.var()) / 2)

    def of(scores: Tensor) -> Tensor:
        curves = [share * norm.pdf(scores.numpy(), one.mean(), width) for share, one in ((0.9, right), (0.1, wrong))]
        return torch.from_numpy(curves[1] / (curves[0] + curves[1]))

    return of


def test_epochs_tell_how_many_labels_are_wrong_before_they_are_learnt_by_heart(tmp_path: Path) -> None:
    """In the second epoch a third of the later examples have negative margins, in the third fewer, at the end none."""
    generator = torch.Generator().manual_seed(5)
    n, m = 300, 80
    queries = [1 + torch.randn(m, generator=generator, dtype=torch.float64) for _ in range(4)]
    examples = [1 + torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(4)]
    for margins, wrong in zip(examples, (90, 90, 45, 0), strict=True):
        margins[-wrong or n :] *= -1
    steps = torch.arange(n)
    for point in (1, 2, 3, 0):
        at = (point - 1) % 4
        shuffled = torch.randperm(n, generator=generator)
        stats = {"loss": -examples[at][shuffled], "margin": examples[at][shuffled]}
        about = {"query_stats": {"margin": queries[at]}, "point": point, "task": CLASSES}
        stats |= {"step": steps[shuffled]} if point else {}
        make_store(tmp_path, blocks(n, point), blocks(m, 50), stats=stats, **about)

    def seen(at: int) -> Sighting | None:
        of, now, before = suspicious(queries[at]), queries[at], queries[at - 1]
        right, wrong = (0.75 * of(sign * now) + 0.25 * of(sign * before) for sign in (1, -1))
        unsure = 0.25 * abs(float((of(now) - of(before)).mean()))
        return sighting(of(examples[at][n // 2 :]), right, wrong, at, unsure)

    of, after = suspicious(queries[0]), suspicious(queries[1])
    third, fourth = (of(part) for part in examples[0].tensor_split(4)[2:])
    unsure = max(abs(float(third.mean() - fourth.mean())), abs(float((after(queries[1]) - after(queries[0])).mean())))
    first = sighting(fourth, of(queries[0]), of(-queries[0]), 0, unsure)
    end = suspicious(queries[3])
    at_end = sighting(end(examples[3]), end(queries[3]), end(-queries[3]), 3)
    sightings = [one for one in (at_end, first, seen(1), seen(2)) if one is not None]
    assert len(sightings) == 4
    report = attribute(tmp_path).report
    assert report["estimated_share_wrong"] == pytest.approx(estimated_share(sightings), abs=1e-4)
    assert report["log_odds"]["auc"] == pytest.approx(told_apart(queries[3], -queries[3]), abs=1e-4)


def test_wrong_labels_among_more_than_two_classes_turn_the_margin_less(tmp_path: Path) -> None:
    """How far they look wrong at the end, beside what would if they turned the sign, is a guess for the epochs."""
    generator = torch.Generator().manual_seed(6)
    n, m = 60, 40
    margins = [1 + torch.randn(size, generator=generator, dtype=torch.float64) for size in (n, n, m, m)]
    train, query = margins[:2], margins[2:]
    wrong = {"margin": -2 * query[1] - 1, "loss": query[1]}
    for point in (1, 2):
        stats = {"loss": -train[point - 1], "margin": train[point - 1]}
        stats |= {"step": torch.arange(n)} if point == 1 else {}
        about = {"query_stats": {"margin": query[point - 1]}, "task": CLASSES | {"num_labels": 5}}
        if point == 2:
            about |= {"mislabelled": blocks(m, 51), "mislabelled_stats": wrong}
        make_store(tmp_path, blocks(n, point), blocks(m, 50), stats=stats, point=point % 2, **about)
    first, end = suspicious(query[0]), suspicious(query[1], wrong["margin"])
    so, mirrored = (float(suspicious(query[1])(one).mean()) for one in (wrong["margin"], -query[1]))
    beyond = (so - mirrored) / (1 - mirrored)
    assert beyond > 0.2
    third, fourth = (first(part) for part in train[0].tensor_split(4)[2:])
    turned = first(-query[0])
    below = turned + beyond * (1 - turned)
    by_chance, guessed = abs(float((third - fourth).mean())), float((below - turned).mean())
    sightings = [
        sighting(fourth, first(query[0]), below, 0, by_chance, guessed),
        sighting(end(train[1]), end(query[1]), end(wrong["margin"]), 1),
    ]
    expected = estimated_share([one for one in sightings if one is not None])
    assert attribute(tmp_path).report["estimated_share_wrong"] == pytest.approx(expected, abs=1e-4)


def test_more_than_two_classes_need_the_queries_under_wrong_labels(tmp_path: Path) -> None:
    """A third of the examples is wrong, and points as little towards the queries as they do under wrong labels."""
    many = CLASSES | {"num_labels": 5}
    mean, m = {name: g[:1] for name, g in blocks(1, 9).items()}, 12
    query = {name: mean[name] + 0.7 * g for name, g in blocks(m, 50).items()}
    wrong = {name: 0.3 * mean[name] + 0.7 * g for name, g in blocks(m, 51).items()}
    train = {name: torch.cat((query[name], wrong[name][:6])) + 0.1 * blocks(18, 52)[name] for name in query}
    stats = {"loss": torch.rand(18, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
    plain = attribute(make_store(tmp_path / "plain", train, query, stats=stats, task=many))
    assert plain.report["estimated_share_wrong"] is None
    assert "log_odds" not in plain.report
    path = make_store(tmp_path / "whole", train, query, stats=stats, mislabelled=wrong, task=many).path
    scores = attribute(path)
    assert torch.equal(scores.mean().argsort(), plain.mean().argsort())
    ridge = attribute(path, "kernel_ridge").values[:, 0]
    right, turned = left_out(query), under_wrong_labels(query, wrong)
    of = suspicious(right, turned)
    seen = sighting(of(ridge), of(right), of(turned))
    assert seen is not None
    assert scores.report["estimated_share_wrong"] == pytest.approx(estimated_share([seen]), abs=1e-4)
    expected = believed(ranked(plain), told_apart(right, turned), scores.report["estimated_share_wrong"])
    torch.testing.assert_close(scores.values[:, 0], expected, atol=5e-3, rtol=5e-3)
