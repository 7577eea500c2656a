"""Ways to bring several queries together: groups, a vote of the nearest, ridge regression."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from models import bert, labelled, lora, stored
from sklearn.kernel_ridge import KernelRidge
from stores import make_store, make_trained_store, random_blocks
from torch import Tensor, nn

from hf_influence import Scores
from hf_influence.attribution import attribute
from hf_influence.errors import BadSetting, MissingRows
from hf_influence.store import GradientStore

assert_exact = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)


TRAIN, QUERY = random_blocks(20, 1), random_blocks(5, 2)
GROUPS = ["b", "a", "b", "c", "a"]
COSINES = oracle.cosine(TRAIN, QUERY)


@pytest.mark.parametrize("method", ["ip", "datainf", "fisher", "dropout", "cosine", "tracin"])
@pytest.mark.parametrize("groups", [GROUPS, np.array(GROUPS), torch.tensor([7, 3, 7, 5, 3])], ids=["list", "np", "pt"])
def test_a_group_has_the_mean_of_its_queries(tmp_path: Path, method: str, groups: Any) -> None:
    store = make_trained_store(tmp_path, TRAIN, QUERY)
    each, grouped = (attribute(store, method, queries=queries) for queries in ("each", groups))
    assert grouped.query_ids == list(dict.fromkeys(groups.tolist() if hasattr(groups, "tolist") else groups))
    for column, members in enumerate(([0, 2], [1, 4], [3])):
        assert_exact(grouped.values[:, column], each.values[:, members].mean(1))


def test_groups_are_recorded_and_give_the_same_scores(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", TRAIN, QUERY)
    scores = attribute(store, "fisher", queries=np.array(GROUPS))
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert loaded.settings["queries"] == GROUPS
    assert loaded.query_ids == ["b", "a", "c"]
    assert_exact(attribute(store, loaded.method, **loaded.settings).values, loaded.values)


def test_groups_of_queries_of_which_some_are_not_there_keep_their_names(tmp_path: Path) -> None:
    make_store(tmp_path, {"a": TRAIN["layer0"][:4]})
    make_store(tmp_path, {"a": TRAIN["layer0"][:4]}, point=1, present=[1, 2])
    groups = ["A", "B", "A", "C"]
    scores = attribute(tmp_path, "ip", query_split="train", point=1, queries=groups)
    assert scores.query_ids == ["B", "A"]
    own = TRAIN["layer0"][1:3]
    assert_exact(scores.values, own @ own.T)


@pytest.mark.parametrize("groups", [GROUPS[:-1], [], [1.5] * 5, [None] * 5, 3, "all"])
def test_groups_that_do_not_fit_the_queries_are_refused(tmp_path: Path, groups: Any) -> None:
    with pytest.raises(BadSetting, match="method 'ip': queries="):
        attribute(make_store(tmp_path, TRAIN, QUERY), "ip", queries=groups)


@pytest.mark.parametrize("k", [1, 3, 5, 20])
def test_vote_is_that_of_the_nearest_queries(tmp_path: Path, k: int) -> None:
    scores = attribute(make_store(tmp_path, TRAIN, QUERY), "vote", k=k)
    expected = [sum(sorted(row.tolist(), key=abs, reverse=True)[:k]) for row in COSINES]
    assert_exact(scores.values[:, 0], torch.tensor(expected, dtype=torch.float64))
    assert scores.settings["k"] == min(k, 5)


@pytest.mark.parametrize("ridge", [0.1, 1.0, 30.0])
def test_kernel_ridge_is_ridge_regression_on_directions(tmp_path: Path, ridge: float) -> None:
    u, v = (torch.cat([-g for g in side.values()], 1) for side in (TRAIN, QUERY))
    u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
    w = torch.linalg.inv(v.T @ v + ridge * torch.eye(v.shape[1])) @ v.sum(0)
    scores = attribute(make_store(tmp_path, TRAIN, QUERY), "kernel_ridge", ridge=ridge)
    assert_exact(scores.values[:, 0], u @ w)


def slopes(model: nn.Module, examples: Sequence[dict[str, Any]], names: Sequence[str]) -> Tensor:
    """The direction of `∂(z_1 − z_0)/∂θ` for each example, by autograd, `[n, d]`."""
    weights = [dict(model.named_parameters())[name] for name in names]
    out = []
    for example in examples:
        logits = model.eval()(input_ids=torch.tensor([example["input_ids"]])).logits[0]
        slope = torch.cat([part.flatten() for part in torch.autograd.grad(logits[1] - logits[0], weights)])
        out.append(slope / slope.norm())
    return torch.stack(out)


def test_with_two_classes_kernel_ridge_predicts_labels_from_the_slope_of_the_margin(tmp_path: Path) -> None:
    model = lora(bert(num_labels=2), ["query", "value"], task_type="SEQ_CLS")
    train, query = labelled(lambda i: i % 2, 9), labelled(lambda i: int(i % 3 > 0), 6, seed=1)
    rows = stored(model, train, tmp_path)
    stored(model, query, tmp_path, "query")
    d, dq = (slopes(model, side, list(rows.blocks)) for side in (train, query))
    side, side_q = (torch.tensor([2.0 * row["labels"] - 1 for row in examples]) for examples in (train, query))
    fit = KernelRidge(alpha=1.0, kernel="precomputed").fit(dq @ dq.T, side_q)
    agreement = side * torch.from_numpy(fit.predict(d @ dq.T))
    assert_exact(attribute(GradientStore.open(tmp_path), "kernel_ridge").values[:, 0], agreement)


@pytest.mark.parametrize("method", ["vote", "kernel_ridge"])
def test_lengths_do_not_matter_and_a_zero_gradient_is_neutral(tmp_path: Path, method: str) -> None:
    scale = torch.tensor([10.0 ** (i % 7 - 12) for i in range(20)])[:, None]
    plain = attribute(make_store(tmp_path / "plain", TRAIN, QUERY), method).values
    scaled = {name: g * scale for name, g in TRAIN.items()}
    assert_exact(attribute(make_store(tmp_path / "scaled", scaled, QUERY), method).values, plain)
    train, query = ({name: g.clone() for name, g in side.items()} for side in (TRAIN, QUERY))
    for name in train:
        train[name][3], query[name][2] = 0, 0
    without = {name: v[[0, 1, 3, 4]] for name, v in QUERY.items()}
    zero = attribute(make_store(tmp_path / "zero", train, query), method).values
    assert zero[3] == 0
    others = [i for i in range(20) if i != 3]
    fewer = attribute(make_store(tmp_path / "fewer", TRAIN, without), method).values
    assert_exact(zero[others], fewer[others])


@pytest.mark.parametrize("method", ["vote", "kernel_ridge"])
def test_one_column_has_the_name_of_the_method_and_needs_a_query(tmp_path: Path, method: str) -> None:
    assert attribute(make_store(tmp_path / "some", TRAIN, QUERY), method).query_ids == [method]
    with pytest.raises(MissingRows, match=r"holds no examples.*Collect some queries"):
        attribute(make_store(tmp_path / "none", TRAIN, random_blocks(0, 1)), method)


@pytest.mark.parametrize("settings", [{"k": 0}, {"k": 2.0}])
def test_a_vote_of_nobody_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting, match="method 'vote': k="):
        attribute(make_store(tmp_path, TRAIN, QUERY), "vote", **settings)


def test_a_ridge_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="method 'kernel_ridge': ridge=0"):
        attribute(make_store(tmp_path, TRAIN, QUERY), "kernel_ridge", ridge=0)
