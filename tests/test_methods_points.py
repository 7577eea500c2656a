"""Methods that go over the points of training: against their formulas, and what they say when there are none."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from datasets import Dataset
from models import bert, labelled, lora, padding
from stores import Blocks, make_artifacts, make_store, make_trained_store, random_blocks
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_influence import Scores
from hf_influence.attribution import attribute, methods
from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadSetting, MissingRows, StoreMismatch
from hf_influence.gradients import adam_state
from hf_influence.store import GradientStore, PointAbout, number_of

assert_exact = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)

N, M = 8, 3
OVER_POINTS = [name for name, about in methods().items() if "points" in about.needs]
PRESENT = {1: [0, 1, 2, 3, 4, 6, 7], 2: [0, 2, 3, 5, 6, 7], 4: [0, 1, 2, 3, 4, 7]}
"""What each point of the store holds; the example 5 is in one of them only."""

blocks = partial(random_blocks, widths=(5, 12))
narrow = partial(random_blocks, widths=(5,))


def per_query(method: str) -> bool:
    """Whether a method has a column for each query."""
    return "queries" in methods()[method].needs and not method.startswith(("vote", "kernel_ridge"))


def course(seed: int) -> tuple[Blocks, Blocks, dict[str, Tensor]]:
    """Rows, queries and statistics at one point of training; every example has a step of its own."""
    generator = torch.Generator().manual_seed(seed)
    names = ("learning_rate", "loss", "margin", "el2n")
    stats = {name: torch.rand(N, generator=generator, dtype=torch.float64) for name in names}
    stats["correct"] = torch.randint(0, 2, (N,), generator=generator).double()
    return blocks(N, seed), blocks(M, 100 + seed), {**stats, "step": torch.arange(N) + 10 * seed}


COURSE = {point: course(point) for point in PRESENT}


def store_of(path: Path, points: Any = PRESENT, **options: Any) -> GradientStore:
    """The points of COURSE, and other rows at point 0."""
    store = make_store(path, blocks(N, 7), blocks(M, 8), stats={"loss": torch.zeros(N)}, **options)
    for point in points:
        train, query, stats = COURSE[point]
        make_store(path, train, query, stats=stats, point=point, **{"present": PRESENT[point], **options})
    make_artifacts(store)
    return store


def seen(statistic: str) -> list[list[float]]:
    """For each example its values where it was seen."""
    return [[float(COURSE[point][2][statistic][i]) for point in PRESENT if i in PRESENT[point]] for i in range(N)]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("points", [None, [1, 4], [2]])
def test_tracin_is_the_sum_over_the_points(tmp_path: Path, weighted: bool, points: list[int] | None) -> None:
    used = points or list(PRESENT)
    parts = [(*COURSE[point][:2], COURSE[point][2]["learning_rate"], PRESENT[point]) for point in used]
    expected = oracle.tracin(parts, N, weighted)
    held = sorted({i for point in used for i in PRESENT[point]})
    scores = attribute(store_of(tmp_path), "tracin", weighted=weighted, points=points)
    assert scores.ids == held
    assert scores.query_ids == list(range(M))
    assert_exact(scores.values, expected[held])
    mean = attribute(tmp_path, "tracin", weighted=weighted, points=points, queries="mean")
    assert_exact(mean.values, expected[held].mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("method", "statistic", "sign"), [("loss_mean", "loss", -1), ("aum", "margin", 1), ("el2n_mean", "el2n", -1)]
)
def test_means_are_over_the_points_that_hold_the_example(
    tmp_path: Path, method: str, statistic: str, sign: int
) -> None:
    scores = attribute(store_of(tmp_path), method)
    assert scores.query_ids is None
    assert_exact(scores.values, sign * oracle.mean_over_points(seen(statistic)))


@pytest.mark.parametrize(
    ("method", "settings"), [("vote", {}), ("kernel_ridge", {"weighted": False}), ("kernel_ridge", {})]
)
def test_a_method_on_average_over_the_points_that_hold_the_example(
    tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    store = store_of(tmp_path)
    total, times = torch.zeros(N, 1, dtype=torch.float64), torch.zeros(N, 1, dtype=torch.float64)
    weights = []
    for point, held in PRESENT.items():
        values = attribute(store, method, point=point).values
        weight = 1.0
        if method == "kernel_ridge" and not settings:
            weight = max(0, (values > 0).double().mean().item() - 0.5) ** 2 / values.std().item()
        weights.append(weight)
        total[held] += weight * values
        times[held] += weight
    assert max(weights) > 0
    scores = attribute(store, f"{method}_mean", **settings)
    assert_exact(scores.values, (total / times).nan_to_num())
    assert scores.query_ids == [f"{method}_mean"]
    assert scores.settings["points"] == list(PRESENT)


def test_means_over_training_take_checkpoints_where_there_is_no_more(tmp_path: Path) -> None:
    losses = torch.arange(2.0 * N, dtype=torch.float64).view(2, N)
    for k in range(2):
        about = PointAbout("checkpoint", {"step": k})
        make_store(tmp_path, narrow(N, k), narrow(M, 9), stats={"loss": losses[k]}, point=5 + k, about=about)
    scores = attribute(tmp_path, "loss_mean")
    assert scores.settings["points"] == [5, 6]
    assert_exact(scores.values[:, 0], -losses.mean(0))


def test_checkpoints_count_in_the_order_of_training_whatever_that_of_collecting(tmp_path: Path) -> None:
    right = {10: [1.0, 0, 1, 0], 20: [0.0, 0, 1, 1], 30: [1.0, 0, 1, 1]}
    found = []
    for order in ([10, 20, 30], [20, 30, 10]):
        for step in order:
            about = PointAbout("checkpoint", {"step": step})
            notes = {"correct": torch.tensor(right[step]), "loss": torch.arange(4.0) * (step == 30)}
            path = tmp_path / str(order)
            store = make_store(path, narrow(4, 0), stats=notes, about=about, point=number_of(path, about))
        at_end = attribute(store, parts=["loss"])
        found.append((attribute(store, "forgetting").values[:, 0].tolist(), at_end.values[:, 0].tolist()))
        assert [store.point_about(k).details["step"] for k in at_end.settings["points"]] == [10, 20, 30]
    assert found[0] == found[1]
    assert found[0][0] == [-1, -3, 0, 0]
    assert found[0][1] == sorted(found[0][1], reverse=True)


def test_forgetting_counts_the_events_of_the_paper(tmp_path: Path) -> None:
    assert_exact(attribute(store_of(tmp_path), "forgetting").values, oracle.forgetting_events(seen("correct")))


def by_point(path: Path, shares: list[list[float]]) -> GradientStore:
    """A store of training in which the example i had the share `shares[i][t]` right at the point t + 1."""
    for point, share in enumerate(zip(*shares, strict=True), 1):
        rows = {"layer": torch.zeros(len(shares), 1, dtype=torch.float64)}
        notes = {"correct": torch.tensor(share, dtype=torch.float64), "step": torch.full((len(shares),), point)}
        store = make_store(path, rows, stats=notes, point=point)
    return store


def test_never_learnt_is_worse_than_any_forgetting(tmp_path: Path) -> None:
    histories = {"01111": 0, "11111": 0, "10111": -1, "11110": -1, "10101": -2, "01010": -2, "00000": -5}
    scores = attribute(by_point(tmp_path, [[float(a) for a in history] for history in histories]), "forgetting")
    assert scores.values[:, 0].tolist() == list(histories.values())


@pytest.mark.parametrize("points", [[0, 1, 2], [2, 1, 0]])
def test_the_end_comes_after_all_points_of_training(tmp_path: Path, points: list[int]) -> None:
    store = by_point(tmp_path, [[1.0, 1], [0, 1]])
    make_store(tmp_path, {"layer": torch.zeros(2, 1, dtype=torch.float64)}, stats={"correct": torch.tensor([0.0, 1])})
    scores = attribute(store, "forgetting", points=points)
    assert scores.values[:, 0].tolist() == [-1, 0]
    assert scores.settings["points"] == [1, 2, 0]


def test_what_the_end_knows_of_the_dataset_counts_beside_what_other_points_do(tmp_path: Path) -> None:
    store = by_point(tmp_path, [[1.0, 1], [0, 1]])
    make_store(tmp_path, {"layer": torch.zeros(2, 1, dtype=torch.float64)}, stats={"correct": torch.tensor([0.0, 1])})
    for point, columns in ((0, {"text": [2, "a", "b"], "n": [1, "c", "d"]}), (1, {"n": [1, "e", "f"]}), (2, {})):
        file = store.rows("train", point).folder / "rows.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"contents": columns}))
    scores = attribute(store, "forgetting", points=[0, 1, 2])
    assert scores.contents == {"text": [2, "a", "b"], "n": [1, "c", "d"]}


def test_two_runs_do_not_forget_for_each_other(tmp_path: Path) -> None:
    for folder, right in (("a", 1.0), ("b", 0.0)):
        for step in (10, 20):
            about = PointAbout("checkpoint", {"step": step, "folder": folder})
            point = number_of(tmp_path, about)
            make_store(tmp_path, narrow(2, 0), stats={"correct": torch.full((2,), right)}, about=about, point=point)
    with pytest.raises(StoreMismatch, match=r"rows of step 10, .* goes up to step 10.*several runs"):
        attribute(tmp_path, "forgetting")


def test_forgetting_of_language_models_is_the_mean_over_the_tokens(tmp_path: Path) -> None:
    """As far as shares can tell: here no token is forgotten while another one is learnt."""
    times = [
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]],  # one of four forgotten once, one never learnt
        [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
    ]
    scores = attribute(by_point(tmp_path, [[sum(t) / len(t) for t in example] for example in times]), "forgetting")
    assert_exact(scores.values, oracle.forgotten_tokens(times))


@pytest.mark.parametrize("method", OVER_POINTS)
def test_copies_of_an_example_score_alike(tmp_path: Path, method: str) -> None:
    for point in (1, 2):
        train, query, stats = COURSE[point]
        copied = [0, 1, 2, 3, 4, 5, 2, 7]  # 6 is a copy of 2
        rows = {name: g[copied] for name, g in train.items()}
        make_store(tmp_path, rows, query, stats={name: value[copied] for name, value in stats.items()}, point=point)
    make_artifacts(GradientStore.open(tmp_path))
    values = attribute(tmp_path, method).values
    torch.testing.assert_close(values[6], values[2], rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", OVER_POINTS)
def test_the_points_are_recorded_and_stay_the_same(tmp_path: Path, method: str) -> None:
    store = store_of(tmp_path / "store", points=(1, 4))
    scores = attribute(store, method)
    assert scores.settings["points"] == [1, 4]
    assert "point" not in scores.settings
    scores.save(tmp_path / "scores.safetensors")
    train, query, stats = COURSE[2]
    make_store(store.path, train, query, stats=stats, point=2, present=PRESENT[2])  # training went on
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert_exact(attribute(store, method, **loaded.settings).values, scores.values)
    assert_exact(attribute(store, method, points=(4, 1)).values, scores.values)
    assert attribute(store, method).settings["points"] == [1, 2, 4]


@pytest.mark.parametrize("method", OVER_POINTS)
def test_examples_come_in_dataset_order_under_their_names(tmp_path: Path, method: str) -> None:
    names = [f"example {9 - i}" for i in range(N)]
    scores = attribute(store_of(tmp_path / "named", ids=names), method)
    assert scores.ids == names
    assert_exact(scores.values, attribute(store_of(tmp_path / "plain"), method).values)


@pytest.mark.parametrize("method", ["loss", "margin", "el2n", "ip"])
def test_other_methods_look_at_one_point(tmp_path: Path, method: str) -> None:
    scores = attribute(store_of(tmp_path), method, point=2)
    assert scores.ids == PRESENT[2]
    assert scores.settings["point"] == 2
    if method != "ip":
        sign = 1 if method == "margin" else -1
        assert_exact(scores.values[:, 0], sign * COURSE[2][2][method][PRESENT[2]])


def test_checkpoints_that_were_collected_are_named(tmp_path: Path) -> None:
    """TracIn as in its paper: rows at fixed weights, no learning rate known."""
    for point in (0, 1, 2):
        make_store(tmp_path, narrow(N, point), narrow(M, 10 + point), point=point)
    with pytest.raises(MissingRows, match=r"without a learning rate.*weighted=False"):
        attribute(tmp_path, "tracin", points=[0, 1, 2])
    parts = [(narrow(N, point), narrow(M, 10 + point), torch.ones(N), list(range(N))) for point in (0, 1, 2)]
    scores = attribute(tmp_path, "tracin", points=range(3), weighted=False)
    assert_exact(scores.values, oracle.tracin(parts, N, weighted=False))


@pytest.mark.parametrize("method", OVER_POINTS)
def test_without_points_of_training_it_says_how_to_capture_them(tmp_path: Path, method: str) -> None:
    store = store_of(tmp_path, points=())
    with pytest.raises(MissingRows, match=r'points with rows of it: 0\).*GradientCapture\(.*during="epochs"\)'):
        attribute(store, method)


def test_a_point_without_queries_is_named(tmp_path: Path) -> None:
    store = store_of(tmp_path, points=(1,))
    make_store(tmp_path, COURSE[2][0], stats=COURSE[2][2], point=2)
    with pytest.raises(
        MissingRows, match=r"'query' at point 2 \(it has: train\).*query_dataset.*split='query', point=2"
    ):
        attribute(store, "tracin")
    assert attribute(store, "tracin", points=[1]).settings["points"] == [1]
    assert attribute(store, "aum").settings["points"] == [1, 2]


def test_queries_that_only_some_points_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingRows, match=r"points 1 and 2 do not hold the same queries.*position 1 "):
        attribute(store_of(tmp_path), "tracin", query_split="train")


@pytest.mark.parametrize("method", OVER_POINTS)
def test_points_of_different_datasets_are_refused(tmp_path: Path, method: str) -> None:
    store = store_of(tmp_path, points=(1, 2))
    file = tmp_path / "points" / "0002" / "train" / "rows.json"
    file.write_text(file.read_text().replace('"dataset": ""', '"dataset": "other"'))
    with pytest.raises(StoreMismatch, match=r"different datasets.*points=\["):
        attribute(store, method)


def test_an_interrupted_point_is_named(tmp_path: Path) -> None:
    store = store_of(tmp_path, points=(1, 2))
    file = tmp_path / "points" / "0002" / "train" / "rows.json"
    file.write_text(file.read_text().replace('"closed": true', '"closed": false'))
    with pytest.raises(MissingRows, match=r"holds 6 of 8 rows.*points=\[1\]"):
        attribute(store, "loss_mean")


def test_the_end_is_no_point_of_training_and_may_be_cut_short(tmp_path: Path) -> None:
    store = store_of(tmp_path, points=(1,), present=[0, 1])
    file = tmp_path / "points" / "0000" / "train" / "rows.json"
    file.write_text(file.read_text().replace('"closed": true', '"closed": false'))
    assert attribute(store, "loss_mean").settings["points"] == [1]


def test_missing_statistic_names_the_point(tmp_path: Path) -> None:
    store = store_of(tmp_path, points=(1,))
    make_store(tmp_path, COURSE[2][0], stats={"step": torch.arange(N), "loss": torch.ones(N)}, point=2)
    with pytest.raises(MissingRows, match=r"0002.train does not hold the statistic 'correct' that method 'forgetting'"):
        attribute(store, "forgetting")


@pytest.mark.parametrize("method", OVER_POINTS)
def test_one_point_is_not_quietly_ignored(tmp_path: Path, method: str) -> None:
    with pytest.raises(BadSetting, match=rf"method '{method}' goes over several points.*points=\[2\]"):
        attribute(store_of(tmp_path), method, point=2)


@pytest.mark.parametrize("points", [[], 2, "12", ["1"], [-1], [1.0]])
def test_points_that_are_none_are_refused(tmp_path: Path, points: Any) -> None:
    with pytest.raises(BadSetting, match="method 'aum': points="):
        attribute(store_of(tmp_path), "aum", points=points)


def test_a_point_that_is_not_there_says_which_are(tmp_path: Path) -> None:
    with pytest.raises(MissingRows, match=r"at point 3 .*Points with rows of it: 0, 1, 2, 4"):
        attribute(store_of(tmp_path), "aum", points=[1, 3])


def test_every_method_over_points_runs_on_what_a_trainer_leaves(tmp_path: Path) -> None:
    data, queries = (Dataset.from_list(labelled(lambda i: i % 3, n)) for n in (8, 2))
    model = lora(bert(num_labels=3), ["query", "value"], dtype=torch.float32, task_type="SEQ_CLS")
    capture = GradientCapture(tmp_path / "rows", queries, during="epochs", at_end=False)
    args = TrainingArguments(
        str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=3,
        dataloader_drop_last=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model, args, data_collator=padding(), train_dataset=data, callbacks=[capture])
    trainer.train()
    store = adam_state(model, capture.path, trainer.optimizer)
    held = sorted({i for point in (1, 2, 3) for i in store.rows("train", point).ids})
    for method in OVER_POINTS:
        scores = attribute(capture.path, method)
        assert scores.settings["points"] == [1, 2, 3]
        assert scores.ids == held
        assert scores.values.shape == (len(held), 2 if per_query(method) else 1)


def test_a_wrong_label_sinks_where_training_memorises_it(tmp_path: Path) -> None:
    """At the end all losses are alike; on the way they were not."""
    train, query = narrow(N, 1), narrow(M, 2)
    late = torch.tensor([2.0 if i == 5 else 0.1 for i in range(N)])
    make_trained_store(tmp_path, train, query, stats={"loss": late})
    make_store(tmp_path, train, query, stats={"loss": torch.full((N,), 0.1), "step": torch.arange(N)}, point=4)
    assert attribute(tmp_path, "loss_mean").lowest(1) == [5]
    assert attribute(tmp_path, "loss", point=4).values.unique().numel() == 1
