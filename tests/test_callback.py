"""One callback: the rows of the final weights, and a training run that is bit for bit what it would have been."""

from __future__ import annotations

import random
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import watched
from datasets import Dataset
from models import all_rows, bert, labelled, llama, lora, padding, prompts, roberta, stored, tiny
from test_collect import layer_norm_too
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_influence.attribution import attribute
from hf_influence.callbacks import GradientCapture
from hf_influence.callbacks import capture as callback
from hf_influence.errors import BadExample, BadSetting, StoreError, StoreMismatch, UnsupportedModel
from hf_influence.gradients import collect, dropout
from hf_influence.store import GradientStore, writer

TRAIN, QUERY = prompts(8), prompts(3, seed=1)


class Steps(TrainerCallback):
    """Counts the steps that were begun."""

    def __init__(self) -> None:
        self.begun = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun += 1


def noisy(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that draws from all three sources of randomness."""
    batch = padding("left", extra=random.randrange(3))(features)
    drop = torch.rand(batch["labels"].shape) + np.random.rand() < 0.2
    return {**batch, "labels": batch["labels"].masked_fill(drop, -100)}


def trainer(
    model: nn.Module,
    folder: Path,
    *callbacks: TrainerCallback,
    collate: Any = None,
    train: Any = None,
    evaluate: Any = None,
    **options: Any,
) -> Trainer:
    settings = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no"}
    settings |= {"disable_tqdm": True, **options}
    args = TrainingArguments(str(folder), per_device_train_batch_size=2, use_cpu=True, report_to=[], **settings)
    train = Dataset.from_list(TRAIN) if train is None else train
    return Trainer(
        model,
        args,
        data_collator=collate or padding(),
        train_dataset=train,
        eval_dataset=evaluate,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("compress", [None, dropout(5)])
def test_a_trainer_with_the_callback_leaves_the_rows_of_the_final_weights(tmp_path: Path, compress: Any) -> None:
    model = tiny()
    start = models.state_of(model)["weights"]
    capture = GradientCapture(tmp_path / "rows", Dataset.from_list(QUERY), compress=compress)
    trainer(model, tmp_path, capture).train()
    assert any(not torch.equal(start[name], weight) for name, weight in model.named_parameters())
    store = GradientStore.open(capture.path)
    for split, examples in (("train", TRAIN), ("query", QUERY)):
        by_hand = stored(model, examples, tmp_path / "by hand", split, compress=compress)
        torch.testing.assert_close(all_rows(store.rows(split)), all_rows(by_hand))
    assert attribute(capture.path, "datainf").values.shape == (8, 3)


@pytest.mark.parametrize("collate", [None, noisy])
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path: Path, collate: Any) -> None:
    runs = []
    for callbacks in ([], [GradientCapture(tmp_path / "rows", QUERY)]):
        model = tiny(torch.float32)
        run = trainer(model, tmp_path / "out", *callbacks, collate=collate, max_grad_norm=0.1)
        run.train()
        runs.append(
            (models.state_of(model)["weights"], [log["loss"] for log in run.state.log_history if "loss" in log])
        )
    assert len(runs[0][1]) == 4
    assert runs[0][1] == runs[1][1]
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=0, atol=0)


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_bars_are_the_trainers_to_choose(tmp_path: Path, quiet: bool, capsys: pytest.CaptureFixture) -> None:
    train, query = ([one for one in rows if one["labels"][:2] == [-100, -100]] for rows in (TRAIN, prompts(8, seed=1)))
    capture = GradientCapture(tmp_path / "rows", query, during="epochs", other_prompts=1)
    trainer(tiny(), tmp_path, capture, train=Dataset.from_list(train), disable_tqdm=quiet).train()
    told = capsys.readouterr().err
    bars = ("gradients of train", "gradients of query", "losses of train after other prompts")
    assert [bar in told for bar in bars] == [not quiet] * 3


@pytest.mark.parametrize("kind", [Dataset.from_list, list])
def test_queries_of_more_than_two_classes_are_collected_under_wrong_labels_as_well(tmp_path: Path, kind: Any) -> None:
    train, query = (labelled(lambda i: i % 3, n, seed) for n, seed in ((8, 0), (30, 1)))
    torch.manual_seed(0)
    model = lora(roberta(), ["query", "value"])
    capture = GradientCapture(tmp_path / "rows", kind(query), during="epochs")
    trainer(model, tmp_path, capture, train=Dataset.from_list(train)).train()
    store = GradientStore.open(capture.path)
    assert "query-mislabelled" in store.splits(0)
    assert "query-mislabelled" not in store.splits(1)
    wrong = store.rows("query-mislabelled")
    labels = wrong.stats["label"].tolist()
    assert all(label != row["labels"] for label, row in zip(labels, query, strict=True))
    assert set(labels) == {0, 1, 2}
    by_hand = stored(
        model, [{**row, "labels": label} for row, label in zip(query, labels, strict=True)], tmp_path / "b"
    )
    torch.testing.assert_close(all_rows(wrong), all_rows(by_hand))


def test_queries_under_wrong_labels_take_room_at_the_end_alone(tmp_path: Path) -> None:
    rows = labelled(lambda i: i % 3, 8)
    torch.manual_seed(0)
    model = lora(roberta(), ["query", "value"])
    size = 8 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)  # float64
    splits = 3 + 2 * 3  # at the end, and after three epochs
    for short in (0, 1):
        budget = (splits * len(rows) * size - short) / 2**30
        options: dict[str, Any] = {"during": "epochs", "budget": budget, "overwrite": True}
        capture = GradientCapture(tmp_path / "rows", Dataset.from_list(rows), **options)
        trainer(model, tmp_path, capture, train=Dataset.from_list(rows), max_steps=12).train()
        assert GradientStore.open(capture.path).points() == ([0, 1, 3] if short else [0, 1, 2, 3])


@pytest.mark.parametrize("label", [lambda i: i % 2, lambda i: float(i)], ids=["two classes", "regression"])
def test_other_queries_are_collected_once(tmp_path: Path, label: Any) -> None:
    torch.manual_seed(0)
    model = lora(bert(num_labels=2 if label(1) == 1 and isinstance(label(1), int) else 1), ["query", "value"])
    capture = GradientCapture(tmp_path / "rows", Dataset.from_list(labelled(label, 5)))
    trainer(model, tmp_path, capture, train=Dataset.from_list(labelled(label, 8))).train()
    assert GradientStore.open(capture.path).splits(0) == ["query", "train"]


def taken(path: Path) -> None:
    collect(tiny(), QUERY, path, split="query")


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 100))


def doubling(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that makes two rows of every example."""
    return padding()([row for row in features for _ in range(2)])


UNLABELLED = Dataset.from_list([{"input_ids": row["input_ids"]} for row in TRAIN])
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "parameter": (layer_norm_too, {}, {}, UnsupportedModel, "no exact per-example rule.*norm.weight"),
    "two rows": (tiny, {}, {"collate": doubling}, BadSetting, "made 2 rows of one example"),
    "labels": (tiny, {}, {"train": UNLABELLED}, BadExample, "has no labels"),
    "query labels": (tiny, {"query_dataset": UNLABELLED}, {}, BadExample, "has no labels"),
    "empty queries": (tiny, {"query_dataset": []}, {}, BadExample, "the dataset is empty"),
    "folder": (tiny, {}, {}, StoreMismatch, r"rows of an earlier run \(splits: query\).*overwrite=True"),
    "disk": (tiny, {}, {}, StoreError, "MiB free.*compress=dropout"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_fail_at_the_end_fails_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    make, settings, options, error, message = REFUSED[case]
    if case == "folder":
        taken(tmp_path / "rows")
    if case == "disk":
        full(monkeypatch)
    model, steps = make(), Steps()
    before = models.state_of(model)
    run = trainer(model, tmp_path, GradientCapture(tmp_path / "rows", **settings), steps, **options)
    with pytest.raises(error, match=f"(?s){message}"):
        run.train()
    assert steps.begun == 0
    after = models.state_of(model)
    models.assert_same_state({**before, "modes": None}, {**after, "modes": None})  # the Trainer has set it to training
    if case != "folder":
        assert not list(tmp_path.rglob("*.json"))


def test_overwrite_replaces_the_rows_of_an_earlier_run(tmp_path: Path) -> None:
    taken(tmp_path / "rows")
    model = tiny()
    trainer(model, tmp_path, GradientCapture(tmp_path / "rows", overwrite=True)).train()
    assert GradientStore.open(tmp_path / "rows").splits() == ["train"]


def test_overwrite_leaves_no_epoch_of_an_earlier_run(tmp_path: Path) -> None:
    trainer(tiny(), tmp_path, GradientCapture(tmp_path / "rows", during="epochs")).train()
    assert GradientStore.open(tmp_path / "rows").points() == [0, 1]
    trainer(tiny(), tmp_path, GradientCapture(tmp_path / "rows", overwrite=True)).train()
    assert GradientStore.open(tmp_path / "rows").points() == [0]


def test_a_resumed_run_collects_at_its_own_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = trainer(tiny(), tmp_path, GradientCapture(tmp_path / "rows"), save_strategy="steps", save_steps=2)
    first.train()
    expected = all_rows(GradientStore.open(tmp_path / "rows").rows())

    model = tiny()  # the rows are there already, and the resumed run arrives at the same weights
    again = trainer(model, tmp_path, GradientCapture(tmp_path / "rows"), save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(all_rows(GradientStore.open(tmp_path / "rows").rows()), expected)
    torch.testing.assert_close(all_rows(stored(model, TRAIN, tmp_path / "by hand")), expected)


def test_rows_are_taken_at_the_best_weights(tmp_path: Path) -> None:
    model = tiny()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1}
    capture, queries = GradientCapture(tmp_path / "rows"), Dataset.from_list(QUERY)
    run = trainer(model, tmp_path, capture, evaluate=queries, save_steps=1, learning_rate=1.0, **best)
    run.train()
    assert run.state.best_global_step < 4
    by_hand = stored(model, TRAIN, tmp_path / "by hand")
    torch.testing.assert_close(all_rows(GradientStore.open(tmp_path / "rows").rows()), all_rows(by_hand))


def test_an_id_column_survives_the_removal_of_unused_columns(tmp_path: Path) -> None:
    named = Dataset.from_list([{**row, "name": f"row {i}"} for i, row in enumerate(TRAIN)])
    capture = GradientCapture(tmp_path / "rows", QUERY, train_dataset=named, id_column="name")
    trainer(tiny(), tmp_path, capture, train=named).train()
    store = GradientStore.open(tmp_path / "rows")
    assert store.rows("train").ids[:2] == ["row 0", "row 1"]
    assert store.rows("query").ids == [0, 1, 2]


def test_no_hook_remains_when_collecting_fails_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    hooks = models.state_of(model)["hooks"]
    run = trainer(model, tmp_path, GradientCapture(tmp_path / "rows"), learning_rate=1e300)
    with pytest.raises(BadExample, match="not finite"):
        run.train()
    assert models.state_of(model)["hooks"] == hooks


@pytest.mark.parametrize("during", ["epochs", None])
def test_a_path_that_is_no_folder_is_refused_before_the_first_step(tmp_path: Path, during: Any) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "rows"):
        seen: list[None] = []
        kind = type("Counting", (watched.Recording,), {"training_step": lambda *_, **__: seen.append(None)})  # noqa: B023
        with pytest.raises(StoreError, match=r"to be a folder for gradients.*Choose another path"):
            watched.train(tiny(torch.float32), tmp_path, GradientCapture(path, during=during), kind=kind)
        assert not seen
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_after_training_keeps_the_model_and_says_whose_examples_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Breaking(TorchDataset[Any], TrainerCallback):
        """Cannot be read once training has begun."""

        begun = False

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = True

        def __len__(self) -> int:
            return len(TRAIN)

        def __getitem__(self, at: int) -> Any:
            if self.begun:
                raise KeyError("lost")
            return TRAIN[at]

    model, queries = tiny(torch.float32), Breaking()
    with pytest.raises(BadExample, match=r"query_dataset: its examples do not go through.*KeyError: 'lost'"):
        watched.train(model, tmp_path / "out", GradientCapture(tmp_path / "rows", queries), queries)
    (folder,) = (tmp_path / "out").glob("trained-*")
    assert f"the trained model is in {folder}" in caplog.text
    saved = type(model).from_pretrained(llama().float(), folder)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert torch.equal(saved.get_parameter(name), weight.detach())


@pytest.mark.parametrize("during", ["epochs", "steps"])
@pytest.mark.parametrize(("step", "failing"), [(8, "rows"), (8, "queries"), (4, "rows"), (4, "queries")])
def test_an_error_of_the_capture_keeps_the_model_of_that_moment(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    during: Any,
    step: int,
    failing: str,
) -> None:
    """Of four steps an epoch."""
    bad = step // 4 if during == "epochs" else step
    write, collect = writer.save_tensors, callback.collect_planned

    def full(file: Path, *args: Any, **kwargs: Any) -> None:
        if f"points/{bad:04d}/train" in str(file):
            raise StoreError("the disk is full")
        write(file, *args, **kwargs)

    def unread(*args: Any, point: int = 0, **kwargs: Any) -> Any:
        if point == bad:
            raise StoreError("the disk is full")
        return collect(*args, point=point, **kwargs)

    monkeypatch.setattr(writer, "save_tensors", full if failing == "rows" else write)
    monkeypatch.setattr(callback, "collect_planned", unread if failing == "queries" else collect)
    model = tiny(torch.float32)
    capture = GradientCapture(tmp_path / "rows", watched.QUERIES, during=during)
    with pytest.raises(StoreError, match="the disk is full"):
        watched.train(model, tmp_path / "out", capture, kind=Trainer)
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == [f"trained-{step}"]
    assert f"rows failed after step {step} of 8; the trained model is in" in caplog.text
    saved = type(model).from_pretrained(llama().float(), tmp_path / f"out/trained-{step}")
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert torch.equal(saved.get_parameter(name), weight.detach())


@pytest.mark.parametrize("step", [1, 6])
def test_an_error_in_a_step_keeps_the_model_if_it_is_trained_at_all(tmp_path: Path, step: int) -> None:
    class Unknown(Trainer):
        """Trains on something else in one step."""

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().training_step(model, inputs, *args, **kwargs)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, items = super().get_batch_samples(*args, **kwargs)
            if self.state.global_step + 1 == step:
                batches[0]["input_ids"][:] = 5
            return batches, items

    with pytest.raises(BadExample, match="is not in the dataset"):
        watched.train(
            tiny(torch.float32), tmp_path / "out", GradientCapture(tmp_path / "rows", during="epochs"), kind=Unknown
        )
    assert [folder.name for folder in (tmp_path / "out").glob("*")] == ([f"trained-{step - 1}"] if step > 1 else [])
