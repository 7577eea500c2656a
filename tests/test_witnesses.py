"""Queries that cannot bear witness are refused, and those that do so poorly are told of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import bert, labelled, lora
from stores import make_store, random_blocks
from torch import Tensor

from hf_influence import attribute, collect
from hf_influence.attribution.auto.share_wrong import Epoch
from hf_influence.attribution.auto.witnesses import OfDirections, Witness
from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter import DatasetFilter
from hf_influence.store import GradientStore

N = 40
CLASSES = {"name": "classification", "problem_type": "single_label_classification", "num_labels": 4}


rows = partial(random_blocks, widths={"a": 3})


def store_of(path: Path, labels: list[int], query: list[int], hashes: list[int] | None = None) -> GradientStore:
    """A store of a classifier with examples and queries of these classes."""
    m = len(query)
    stats = {"loss": torch.arange(N) * 1.0, "label": torch.tensor(labels), "hash": torch.arange(N)}
    query_stats = {"label": torch.tensor(query), "hash": torch.tensor(hashes or range(1000, 1000 + m))}
    return make_store(path, rows(N, 0), rows(m, 1), stats=stats, query_stats=query_stats, task=CLASSES)


EVEN = [i % 4 for i in range(N)]
ONE = [2] * 20
MOSTLY = [0] * 36 + [1, 2, 3, 3]


@pytest.mark.parametrize("labels", [EVEN, [i % 2 for i in range(N)]])
def test_queries_of_one_class_are_refused(tmp_path: Path, labels: list[int]) -> None:
    store = store_of(tmp_path, labels, ONE)
    with pytest.raises(
        BadSetting, match=r"all 20 queries are of the class 2, and the examples of [24].*drawn at random"
    ):
        attribute(store)
    assert len(attribute(store, "kernel_ridge")) == N  # what was asked for by name
    assert len(attribute(store, parts=["kernel_ridge", "loss"])) == N


@pytest.mark.parametrize("labels", [EVEN, [2] * N])
def test_a_point_without_rows_hides_nothing(tmp_path: Path, labels: list[int]) -> None:
    """As after a step in half precision whose gradients overflowed: the queries are there, and no row."""
    draw = torch.Generator().manual_seed(0)
    for point, present in enumerate((None, None, [])):
        notes = {"loss": torch.rand(N, generator=draw), "label": torch.tensor(labels)}
        if point:
            notes |= {"step": torch.full((N,), point), "margin": torch.randn(N, generator=draw)}
            notes |= {"learning_rate": torch.full((N,), 0.1)}
        query = {"label": torch.tensor(ONE), "margin": torch.randn(20, generator=draw)}
        more = {"point": point, "present": present, "task": CLASSES}
        store = make_store(tmp_path, rows(N, 0), rows(20, 1), stats=notes, query_stats=query, **more)
    if labels is EVEN:
        with pytest.raises(BadSetting, match="all 20 queries are of the class 2"):
            attribute(store)
    else:
        assert attribute(store).values.isfinite().all()


@pytest.mark.parametrize("bad", [("query", 1), ("query", 0), ("train", 1)])
def test_margins_that_are_not_finite_are_named(tmp_path: Path, bad: tuple[str, int]) -> None:
    for point in (0, 1):
        stats = {"loss": torch.rand(N), "label": torch.tensor(EVEN), "margin": torch.randn(N)}
        query = {"label": torch.tensor(EVEN), "margin": torch.randn(N)}
        if point:
            stats |= {"step": torch.arange(N), "learning_rate": torch.full((N,), 0.1)}
        if bad[1] == point:
            (stats if bad[0] == "train" else query)["margin"][3] = torch.nan
        store = make_store(tmp_path, rows(N, 0), rows(N, 1), stats=stats, query_stats=query, point=point, task=CLASSES)
    with pytest.raises(BadExample, match=f"'margin' of example 3 in .*000{bad[1]}/{bad[0]} is not finite"):
        attribute(store)


@pytest.mark.parametrize(
    ("labels", "query", "told"),
    [
        (EVEN, MOSTLY, True),
        (EVEN, EVEN, False),
        (EVEN, [i % 3 for i in range(N)], False),  # one class of four is missing
        (EVEN, [0, 1, 2, 2, 3], False),  # few, by chance
        (MOSTLY, MOSTLY, False),
        ([0] * N, [0] * 20, False),
    ],
)
def test_classes_in_other_proportions_are_told(tmp_path: Path, labels: list[int], query: list[int], told: bool) -> None:
    store = store_of(tmp_path, labels, query)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        attribute(store)
    assert any("in other proportions" in str(one.message) for one in seen) == told


def test_queries_that_are_training_examples_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="3 of the 20 queries are training examples as well"):
        attribute(store_of(tmp_path / "3", EVEN, EVEN[:20], [5, 6, 7, *range(100, 117)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(store_of(tmp_path / "2", EVEN, EVEN[:20], [5, 6, *range(100, 118)]))


def test_a_split_of_queries_by_another_name_is_told(tmp_path: Path) -> None:
    model = lora(bert(), ["query", "value"], dtype=torch.float32)
    collect(model, labelled(lambda i: i % 2, 8), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(tmp_path)
    collect(model, labelled(lambda i: i % 2, 6, seed=1), tmp_path, "validation")
    with pytest.warns(UserWarning, match=r"no split 'query'.*attribute\(…, query_split='validation'\)"):
        scores = attribute(tmp_path)
    assert scores.report["parts"] == {"loss": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(tmp_path, query_split="validation")


def test_directions_tell_from_where_the_model_has_settled() -> None:
    """Their share is the one that shows first then; margins tell what would have shown before training."""
    generator = torch.Generator().manual_seed(4)
    queries, fast = (mean + torch.randn(200, generator=generator, dtype=torch.float64) for mean in (1.5, 0.0))
    epochs = []
    for visits, wrong in enumerate((300, 300, 200, 160, 120)):
        examples = 1.5 + torch.randn(1000, generator=generator, dtype=torch.float64)
        examples[torch.randperm(1000, generator=generator)[:wrong]] *= -1
        epochs.append(Epoch(examples, queries, fast if visits == 1 else queries, visits))
    end = epochs[-1].examples
    directions, margins = (kind(queries, -queries, end, epochs, 5) for kind in (OfDirections, Witness))
    assert len(directions.over_training()) == 3
    assert len(margins.over_training()) == 5
    settled, all_ = directions.share(), margins.share()
    assert settled is not None is not all_
    assert settled.sharp
    assert all_.sharp
    assert settled.share == pytest.approx(0.19, abs=0.03)
    assert all_.share == pytest.approx(0.29, abs=0.05)
    none = OfDirections(queries, -queries, end, epochs[:2], None)
    assert none.share() is None, "it never settled"
    alone = OfDirections(queries, -queries, end, epochs[:2], 2.0).share()
    assert alone is not None
    assert alone.share == pytest.approx(0.12, abs=0.03), "but at the end it has"


def one_class_unheard(path: Path, *, of_it: bool = True, missing: Sequence[int] = (4,), training: bool = False) -> Any:
    """A store of a softmax regression that has learnt five classes, a fifth of the labels wrong, and of its queries.

    Args:
        of_it: With the examples of the class 4; otherwise with those of the others alone.
        missing: Classes without queries.
        training: With two earlier points, from training steps.

    Returns:
        The store, and the labels as they are and as they should be.
    """
    draw, c, n, q = torch.Generator().manual_seed(0), 5, 400, 100
    centres = 1.5 * torch.randn(c, 8, generator=draw, dtype=torch.float64)

    def drawn(n: int) -> tuple[Tensor, Tensor]:
        right = torch.randint(c, (n,), generator=draw)
        return centres[right] + torch.randn(n, 8, generator=draw, dtype=torch.float64), right

    def turned(labels: Tensor) -> Tensor:
        return (labels + torch.randint(1, c, labels.shape, generator=draw)) % c

    (x, right), (v, heard) = drawn(n), drawn(4 * q)
    labels = torch.where(torch.rand(n, generator=draw) < 0.2, turned(right), right)
    kept = ~torch.isin(heard, torch.tensor(missing))
    v, heard = v[kept][:q], heard[kept][:q]
    wrong = turned(heard)
    weights = torch.zeros(c, 8, dtype=torch.float64, requires_grad=True)
    among = torch.ones(n, dtype=torch.bool) if of_it else labels != 4

    def kept_at(point: int, mislabelled: bool) -> GradientStore:
        def rows(x: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            logits = (x @ weights.detach().T).log_softmax(1)
            residual = logits.exp() - torch.nn.functional.one_hot(labels, c)
            steps = {"step": torch.arange(len(x))} if point else {}
            stats = {"loss": -logits.gather(1, labels[:, None])[:, 0], "label": labels, **steps}
            return {"w": (residual[:, :, None] * x[:, None]).flatten(1)}, stats

        (train, stats), (query, query_stats), (other, other_stats) = (
            rows(x[among], labels[among]),
            rows(v, heard),
            rows(v, wrong),
        )
        more = {"mislabelled": other, "mislabelled_stats": other_stats} if mislabelled else {}
        task = {**CLASSES, "num_labels": c}
        return make_store(path, train, query, stats=stats, query_stats=query_stats, point=point, task=task, **more)

    optimizer = torch.optim.SGD([weights], lr=0.05)
    for step in range(1, 201):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x @ weights.T, labels).backward()
        optimizer.step()
        if training and step in (50, 100):
            kept_at(step // 50, mislabelled=False)
    return kept_at(0, mislabelled=True), labels[among], right[among]


@pytest.mark.parametrize("training", [False, True])
def test_right_labels_of_a_class_without_queries_are_kept(tmp_path: Path, training: bool) -> None:
    def of_class_4(store: GradientStore, labels: Tensor, right: Tensor) -> tuple[float, float]:
        """The shares of right and of wrong labels of that class that are dropped."""
        report = DatasetFilter().decide(Dataset.from_dict({"x": [0] * len(labels)}), attribute(store))
        gone = torch.tensor([action == "drop" for action in report.actions])
        of_it = labels == 4
        kinds = (of_it & (labels == right), of_it & (labels != right))
        return float(gone[kinds[0]].double().mean()), float(gone[kinds[1]].double().mean())

    with pytest.warns(UserWarning, match=r"none or hardly any of the 100 queries are of the classes \[4\]"):
        dropped = of_class_4(*one_class_unheard(tmp_path / "unheard", training=training))
    assert dropped[0] < 0.05, "by agreement with queries of other classes most of them would go"
    assert dropped[1] > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of_class_4(*one_class_unheard(tmp_path / "heard", missing=(), training=training))[0] < 0.05


@pytest.mark.parametrize("training", [False, True])
def test_a_class_without_queries_does_not_count_in_the_share_that_they_find(tmp_path: Path, training: bool) -> None:
    with pytest.warns(UserWarning, match="none or hardly any"):
        whole = attribute(one_class_unheard(tmp_path / "whole", training=training)[0])
    rest = attribute(one_class_unheard(tmp_path / "rest", of_it=False, training=training)[0])
    assert "kernel_ridge_mean" in whole.report["parts"] or not training
    assert whole.report["estimated_share_wrong"] == rest.report["estimated_share_wrong"] > 0
    assert whole.report["log_odds"] == rest.report["log_odds"]
