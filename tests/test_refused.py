"""What would make rows wrong is refused, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from models import bert, labelled, lora, padding, tiny
from torch import Tensor, nn
from transformers import (
    DataCollatorWithFlattening,
    Trainer,
)
from watched import (
    EXAMPLES,
    Recording,
    adapted,
    assert_exact,
    packed_llama,
    train,
)

from hf_influence.callbacks import GradientCapture, soft_cross_entropy
from hf_influence.callbacks.checks import check_kind
from hf_influence.errors import BadExample, BadSetting, UnsupportedModel
from hf_influence.gradients import collect, own_loss
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


def bare() -> Any:
    model = tiny(torch.float32)
    model.get_base_model().config.return_dict = False
    return model


EMPTY = [*EXAMPLES, {"input_ids": [], "labels": []}]
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "tuples": ({"model": bare}, BadSetting, r"a bare tuple.*Set model.config.return_dict = True"),
    "nothing, end to end": (
        {"model": packed_llama, "data": EMPTY, "collate": DataCollatorWithFlattening()},
        BadExample,
        "training example 10 has no tokens.*end to end.*Leave it out",
    ),
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


def test_an_example_without_tokens_has_a_row_of_zeros_where_examples_are_laid_end_to_end(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="1 of 11 examples of 'train' have no labelled token"):
        rows = collect(packed_llama(), EMPTY, tmp_path / "a", data_collator=DataCollatorWithFlattening()).rows()
    want = collect(packed_llama(), EXAMPLES, tmp_path / "b", data_collator=padding()).rows()
    for block in rows.blocks:
        torch.testing.assert_close(rows.block(block)[:10], want.block(block), rtol=1e-4, atol=1e-6)
        assert not rows.block(block)[10].any()


def test_layers_whose_gradient_is_approximated_have_rows_at_the_end_alone(tmp_path: Path) -> None:
    config = pytest.importorskip("peft")
    if not hasattr(config, "VeloraConfig"):
        pytest.skip("this PEFT has no VeLoRA")
    make = adapted(["q_proj"], velora_config=config.VeloraConfig())
    with pytest.raises(BadSetting, match=r"q_proj\.lora_A\S* is trained by VeLoRA, .*compressed inputs.*during=None"):
        train(make(), tmp_path, GradientCapture(tmp_path / "rows", during="epochs"), kind=Trainer)
    train(make(), tmp_path, GradientCapture(tmp_path / "end"), kind=Trainer)
    assert len(GradientStore.open(tmp_path / "end").rows()) == len(EXAMPLES)


@pytest.mark.parametrize(
    "settings",
    [
        {"during": "batches"},
        {"during": None, "at_end": False},
        {"during": "epochs", "every": 0},
        {"every": 2},
        {"during": "steps", "epochs": [1]},
        {"during": "epochs", "epochs": []},
        {"during": "epochs", "epochs": [0, 1]},
        {"during": "epochs", "epochs": 2},
        {"during": "epochs", "epochs": "2"},
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        GradientCapture(tmp_path, **settings)


@pytest.mark.parametrize("options", [{}, {"max_steps": 5}])
def test_epochs_that_training_does_not_have_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs", epochs=[2, 9])
    with pytest.raises(BadSetting, match=r"epochs=\[2, 9\] and training has 2, so of epoch 9 there would be no rows"):
        train(tiny(torch.float32), tmp_path, capture, **options)
    assert not capture.path.exists()


def test_epochs_that_a_stream_does_not_come_to_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs", epochs=[2, 9], at_end=False)
    data = Dataset.from_list(EXAMPLES).to_iterable_dataset()
    train(tiny(torch.float32), tmp_path, capture, data=data, max_steps=8)
    assert GradientStore.open(capture.path).points() == [2]
    assert "has no rows of the epochs [9]" in caplog.text


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
    for name in ("TPO", "SDFT", "IWOPD", "A2PO", "GKD", "GOLD"):  # the last two are SFTTrainers
        of_trl = {"__module__": f"trl.experimental.{name.lower()}.{name.lower()}_trainer"}
        imitating = type(f"{name}Trainer", (pytest.importorskip("trl").SFTTrainer,), of_trl)
        with pytest.raises(BadSetting, match=rf"{name}Trainer does not train on the examples' own cross-entropy"):
            check_kind(object.__new__(type("Mine", (imitating,), {})))
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


def by_name(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator that takes tokens and labels alone, and wants them."""
    return padding()([{name: row[name] for name in ("input_ids", "labels")} for row in features])


def named(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list([{**row, "name": f"row {i}"} for i, row in enumerate(rows)])


def nameless(dataset: Dataset) -> Dataset:
    return dataset.with_transform(lambda rows: {name: rows[name] for name in ("input_ids", "labels")})


UNLABELLED = [{"input_ids": row["input_ids"]} for row in EXAMPLES]
UNTOLD: dict[str, tuple[Any, str]] = {
    "splits": (DatasetDict(validation=named(EXAMPLES)), r"query_dataset is a DatasetDict of \['validation'\]"),
    "path": ("runs/clean", "query_dataset is a str, of which examples cannot be had by position"),
    "stream": (named(EXAMPLES).to_iterable_dataset(), r"query_dataset is a IterableDataset.*take"),
    "text": (Dataset.from_list([{"text": "a b c"}]), r"query_dataset: .*KeyError: 'input_ids'.*tokenised"),
    "strings": (["a b c"], "query_dataset: an example is a str"),
    "vocabulary": ([{"input_ids": [4, 999], "labels": [4, 5]}], r"query_dataset: .*999.*tokenizer of the model"),
    "ids": (nameless(named(EXAMPLES)), "query_dataset: the dataset has no id column 'name'"),
    "empty": ([], "query_dataset: the dataset is empty"),
    "labels": (UNLABELLED, "query_dataset: .*KeyError: 'labels'"),
}


@pytest.mark.parametrize("case", UNTOLD)
def test_queries_that_cannot_be_read_are_refused_by_name(tmp_path: Path, case: str) -> None:
    queries, message = UNTOLD[case]
    with pytest.raises(BadExample, match=message):
        train(
            tiny(torch.float32),
            tmp_path,
            GradientCapture(tmp_path / "rows", queries, id_column="name"),
            data=named(EXAMPLES),
            collate=by_name,
            remove_unused_columns=False,
        )
    assert not (tmp_path / "rows").exists()


def test_an_error_about_the_training_set_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadExample, match=r"the training set: the collated batch has no labels"):
        train(tiny(torch.float32), tmp_path, GradientCapture(tmp_path / "rows", EXAMPLES), data=UNLABELLED)


class Believing(Recording):
    """Learns from class probabilities as well as from class numbers."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, compute_loss_func=soft_cross_entropy, **kwargs)


@pytest.mark.parametrize("during", ["epochs", None])
@pytest.mark.parametrize("vectors", ["train", "query"])
def test_queries_with_labels_of_another_kind_are_refused(tmp_path: Path, vectors: str, during: Any) -> None:
    numbers = labelled(lambda i: i % 3, 6)
    soft = [{**row, "labels": [0.2, 0.3, 0.5]} for row in numbers]
    data, queries = (soft, numbers) if vectors == "train" else (numbers, soft)
    task = own_loss(nn.functional.cross_entropy, reduction="none")
    capture = GradientCapture(tmp_path / "rows", queries, task=task, during=during)
    model = lora(bert(num_labels=3), ["query"], dtype=torch.float32, modules_to_save=["classifier"])
    with pytest.raises(BadSetting, match=r"labels of the query examples are of another kind \((multi|single)_label"):
        train(model, tmp_path, capture, data=data, kind=Believing)
    assert not capture.path.exists()


@pytest.mark.parametrize("one", [True, False])
def test_queries_of_one_class_are_told_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, one: bool
) -> None:
    queries = Dataset.from_list(labelled(lambda i: 1 if one else i % 2, 4, seed=1))
    rows = Dataset.from_list(labelled(lambda i: i % 2, 6))
    train(lora(bert(), ["query"], dtype=torch.float32), tmp_path, GradientCapture(tmp_path / "r", queries), data=rows)
    assert ("all queries have the label 1" in caplog.text) == one


class Spare(models.LlamaForCausalLM):
    """Has a layer that it does not use."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.spare = nn.Linear(4, 4)


def spare(*targets: str) -> Any:
    return lora(Spare(models.LlamaConfig(**models.ENCODER)), targets, dtype=torch.float32)


MIXED, UNREACHED = r"fc1\S* saw \d+ rows in a batch of 2 examples.*batch_size=1", "no gradient reached 2 .*spare.*skip="
WITHOUT_ROWS: dict[str, tuple[Any, Any, str]] = {
    "mixed": (adapted(["fc1"], models.opt), EXAMPLES, MIXED),
    "mixed, all as long": (adapted(["fc1"], models.opt), models.prompts(6, shortest=5, longest=5), MIXED),
    "unused": (lambda: spare("spare", "q_proj"), EXAMPLES, UNREACHED),
    "all unused": (lambda: spare("spare"), EXAMPLES, UNREACHED),
}


@pytest.mark.parametrize("during", ["epochs", None])
@pytest.mark.parametrize("case", WITHOUT_ROWS)
def test_layers_of_which_there_are_no_rows_are_refused_before_training(tmp_path: Path, case: str, during: Any) -> None:
    make, data, message = WITHOUT_ROWS[case]
    model = make()
    before, seen = models.state_of(model), []
    kind = type("Counting", (Recording,), {"training_step": lambda *_, **__: seen.append(None)})
    with pytest.raises(UnsupportedModel, match=message):
        train(model, tmp_path, GradientCapture(tmp_path / "rows", during=during), data=data, kind=kind)
    assert not seen
    models.assert_same_state({**before, "modes": None}, {**models.state_of(model), "modes": None})
    assert not (tmp_path / "rows").exists()
