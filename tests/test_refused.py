"""What would make rows wrong is refused, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from datasets import ClassLabel, Dataset
from models import bert, labelled, lora, padding, tiny
from torch import Tensor, nn
from transformers import (
    Trainer,
)
from watched import (
    EXAMPLES,
    Recording,
    adapted,
    assert_exact,
    train,
)

from hf_influence.callbacks import GradientCapture
from hf_influence.callbacks.checks import check_kind
from hf_influence.errors import BadExample, BadSetting, UnsupportedModel
from hf_influence.store import GradientStore


class OwnLoss(Trainer):
    """A loss that is not the examples' cross-entropy."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        logits = model(**inputs).logits
        return logits.square().mean()


class TokenWeights(Trainer):
    """Cross-entropy that weighs later tokens more."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return (loss * torch.arange(loss.shape[1])).mean()


class Weighted(Trainer):
    """Cross-entropy that weighs whole examples."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
        return (loss * torch.tensor([0.5, 3.0, 7.0])[: len(loss)]).sum()


def test_weights_of_whole_examples_are_divided_out(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    kind = type("WeightedRecording", (Recording, Weighted), {})
    run = train(tiny(torch.float32), tmp_path, capture, kind=kind)
    assert_exact(run, GradientStore.open(capture.path).rows("train", 2), EXAMPLES, 2)


def shuffling(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator that changes the examples at random."""
    batch = padding()(features)
    return {**batch, "input_ids": torch.where(torch.rand(batch["input_ids"].shape) < 0.5, 7, batch["input_ids"])}


def padded_labels(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = padding()(features)
    return {**batch, "labels": batch["input_ids"].clone()}


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "label smoothing": ({"label_smoothing_factor": 0.1}, BadSetting, "label smoothing makes the loss another one"),
    "own loss": ({"kind": OwnLoss}, UnsupportedModel, "not the mean or sum of the examples' own losses"),
    "token weights": ({"kind": TokenWeights}, UnsupportedModel, "not the mean or sum of the examples' own losses"),
    "dora": ({"model": adapted(["q_proj"], use_dora=True)}, UnsupportedModel, "lora_magnitude_vector"),
    "compile": ({"torch_compile": True}, BadSetting, "torch_compile=True.*hides the passes"),
    "random collator": ({"collate": shuffling}, BadExample, "not in the dataset of 10"),
    "labels on padding": ({"collate": padded_labels}, BadExample, "labels other than -100 stand on padding"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # from the set-up for torch_compile
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_make_rows_wrong_is_refused_with_a_reason(tmp_path: Path, case: str) -> None:
    options, error, message = REFUSED[case]
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    options = {"kind": Trainer, **options}
    model = options.pop("model", lambda: tiny(torch.float32))()
    hooks = models.state_of(model)["hooks"]
    with pytest.raises(error, match=f"(?s){message}"):
        train(model, tmp_path, capture, **options)
    assert models.state_of(model)["hooks"] == hooks


@pytest.mark.parametrize(
    "settings",
    [
        {"during": "batches"},
        {"during": None, "at_end": False},
        {"during": "epochs", "every": 0},
        {"every": 2},
        {"during": "steps", "epochs": [1]},
        {"during": "epochs", "epochs": []},
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        GradientCapture(tmp_path, **settings)


class Twice(Trainer):
    """As R-Drop does: the mean of two passes with other dropout."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return (model(**inputs).loss + model(**inputs).loss) / 2


class Focal(Trainer):
    """Its gradient at the logits points where that of cross-entropy does."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        each = nn.functional.cross_entropy(model(**inputs).logits, labels, reduction="none")
        return ((1 - torch.exp(-each)) ** 2 * each).mean()


def test_two_passes_in_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="forward and backward more than once"):
        train(tiny(torch.float32), tmp_path, GradientCapture(tmp_path / "rows", during="epochs"), kind=Twice)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_a_loss_of_ones_own_must_be_named_for_a_classifier(tmp_path: Path, classes: int) -> None:
    data = labelled((lambda i: i % 2) if classes > 1 else (lambda i: i / 2), 8)
    model = lora(bert(num_labels=classes), ["query"], dtype=torch.float32, modules_to_save=["classifier"])
    with pytest.raises(BadSetting, match=r"Focal has a compute_loss of its own.*task=own_loss"):
        train(model, tmp_path, GradientCapture(tmp_path / "rows", during="epochs"), data=data, kind=Focal)


def by_length(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    return padding()(sorted(features, key=lambda row: len(row["input_ids"])))


@pytest.mark.parametrize("during", ["epochs", None])
def test_a_collator_that_sorts_its_batch_is_refused(tmp_path: Path, during: Any) -> None:
    with pytest.raises(BadSetting, match="changes the order of the examples of a batch"):
        train(tiny(torch.float32), tmp_path, GradientCapture(tmp_path / "rows", during=during), collate=by_length)


def test_trainers_of_preferences_are_refused_by_what_they_inherit(tmp_path: Path) -> None:
    dpo = pytest.importorskip("trl").DPOTrainer
    train(tiny(torch.float32), tmp_path, GradientCapture(tmp_path / "rows"), kind=type("RewardAware", (Recording,), {}))
    made = object.__new__(type("Mine", (dpo,), {}))
    with pytest.raises(BadSetting, match="DPOTrainer does not train on the examples' own cross-entropy"):
        check_kind(made)


def test_other_steps_an_epoch_are_refused_when_a_run_goes_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4}
    taken: dict[str, Any] = {"during": "epochs", "at_end": False}
    capture = GradientCapture(tmp_path / "rows", **taken)
    train(tiny(torch.float32), tmp_path, capture, per_device_train_batch_size=5, **options)
    again = GradientCapture(tmp_path / "rows", **taken)
    options |= {"per_device_train_batch_size": 2, "resume": str(tmp_path / "checkpoint-4")}
    with pytest.raises(BadSetting, match=r"has 2 epochs in 4 steps, and with these settings .* 0 epochs"):
        train(tiny(torch.float32), tmp_path, again, **options)


def test_queries_whose_numbers_stand_for_other_classes_are_refused(tmp_path: Path) -> None:
    sets = []
    for names in (["a", "b", "c"], ["b", "c"]):
        rows = Dataset.from_list(labelled(lambda i: i % 2, 6))
        sets.append(rows.cast_column("labels", ClassLabel(names=names)))
    model = lora(bert(num_labels=3), ["query"], dtype=torch.float32, modules_to_save=["classifier"])
    with pytest.raises(BadSetting, match=r"classes of the column 'labels' are \['a', 'b', 'c'\].*one number means two"):
        train(model, tmp_path, GradientCapture(tmp_path / "rows", sets[1]), data=sets[0])
