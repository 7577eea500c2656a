"""WeightedTrainer: weights of one change nothing, others count as they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from models import VOCABULARY, bert, labelled, lora, padding, prompts, tiny
from torch import Tensor, nn
from transformers import (
    DataCollatorWithFlattening,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_influence.callbacks import GradientCapture, WeightedTrainer, soft_cross_entropy
from hf_influence.errors import BadExample, BadSetting
from hf_influence.gradients import own_loss
from hf_influence.store import GradientStore

TEXTS, CLASSES = prompts(8), labelled(lambda i: i % 2, 8)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return lora(bert(), ["query", "value"], lora_dropout=0.0, dtype=torch.float32, modules_to_save=["classifier"])


def causal() -> nn.Module:
    return tiny(torch.float32, lora_dropout=0.0)


def with_weights(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = padding()(features)
    if "weight" in features[0]:
        batch["weight"] = torch.tensor([row["weight"] for row in features])
    return batch


def trained(
    kind: type[Trainer],
    model: nn.Module,
    rows: Dataset,
    folder: Path,
    accumulate: int = 2,
    collate: Any = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The trainable values after three steps of plain SGD."""
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        max_steps=3,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **{name: options.pop(name) for name in ("train_sampling_strategy",) if name in options},
    )
    kind(model, args, data_collator=collate or with_weights, train_dataset=rows, **options).train()
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


# transformers 5.23 forgets to divide the loss of a classifier under PEFT by the steps it accumulates
@pytest.mark.parametrize(
    ("model", "examples", "accumulate"), [(classifier, CLASSES, 1), (causal, TEXTS, 2)], ids=["classes", "tokens"]
)
def test_weights_of_one_train_as_the_plain_trainer_does(
    tmp_path: Path, model: Any, examples: Any, accumulate: int
) -> None:
    rows = Dataset.from_list(examples)
    plain = trained(Trainer, model(), rows, tmp_path, accumulate)
    weighted = trained(WeightedTrainer, model(), rows.add_column("weight", [1.0] * 8), tmp_path, accumulate)
    torch.testing.assert_close(weighted, plain, rtol=1e-4, atol=1e-5)
    other = trained(WeightedTrainer, model(), rows.add_column("weight", [2.0, 0.0] * 4), tmp_path, accumulate)
    assert any((other[name] - plain[name]).abs().max() > 1e-3 for name in plain)


@pytest.mark.parametrize(("model", "examples"), [(classifier, CLASSES), (causal, TEXTS)], ids=["classes", "tokens"])
def test_rows_of_weight_zero_do_not_matter(tmp_path: Path, model: Any, examples: Any) -> None:
    weight = [1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 0.0, 1.0]
    spoiled = [
        {**row, "input_ids": [5] * len(row["input_ids"])} if not weight[i] else row for i, row in enumerate(examples)
    ]
    one, other = (
        trained(WeightedTrainer, model(), Dataset.from_list(rows).add_column("weight", weight), tmp_path)
        for rows in (examples, spoiled)
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_labels_may_be_vectors_of_probabilities(tmp_path: Path) -> None:
    rows = Dataset.from_list(CLASSES)
    hard = trained(WeightedTrainer, classifier(), rows.add_column("weight", [1.0] * 8), tmp_path)
    vectors = [[1.0 - row["labels"], float(row["labels"])] for row in CLASSES]
    soft_rows = rows.remove_columns("labels").add_column("labels", vectors).add_column("weight", [1.0] * 8)
    soft = trained(WeightedTrainer, classifier(), soft_rows, tmp_path)
    torch.testing.assert_close(soft, hard, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [WeightedTrainer, Trainer])
def test_numbers_of_classes_may_stand_in_lists(tmp_path: Path, kind: type[Trainer]) -> None:
    own: dict[str, Any] = {"compute_loss_func": soft_cross_entropy} if kind is Trainer else {}
    listed = [{**row, "labels": [row["labels"]]} for row in CLASSES]
    one, other = (
        trained(kind, classifier(), Dataset.from_list(rows).add_column("weight", [1.0] * 8), tmp_path, **own)
        for rows in (CLASSES, listed)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("by", ["loss", "sampling"])
def test_examples_of_several_classes_need_a_model_that_knows(tmp_path: Path, by: Any) -> None:
    several = [[[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]][i % 3] for i in range(8)]
    rows = Dataset.from_list(CLASSES).remove_columns("labels").add_column("labels", several)
    weighted = rows.add_column("weight", [1.0] * 8)
    with pytest.raises(BadExample, match="multi_label_classification"):
        trained(WeightedTrainer, classifier(), weighted, tmp_path, 1, by=by)

    def knowing() -> nn.Module:
        model = classifier()
        model.get_base_model().config.problem_type = "multi_label_classification"
        return model

    plain = trained(Trainer, knowing(), rows, tmp_path, 1)
    torch.testing.assert_close(trained(WeightedTrainer, knowing(), weighted, tmp_path, 1), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_plain_trainer_learns_vectors_by_their_cross_entropy(tmp_path: Path, accumulate: int) -> None:
    rows = Dataset.from_list(CLASSES)
    hard = trained(Trainer, classifier(), rows, tmp_path, accumulate, compute_loss_func=soft_cross_entropy)
    if accumulate == 1:  # with more, transformers does not divide the loss that a BERT makes of class numbers
        torch.testing.assert_close(hard, trained(Trainer, classifier(), rows, tmp_path, 1), rtol=1e-4, atol=1e-5)

    def learnt(right: float) -> dict[str, Tensor]:
        vectors = [[1 - right, right] if row["labels"] else [right, 1 - right] for row in CLASSES]
        soft = rows.remove_columns("labels").add_column("labels", vectors)
        return trained(Trainer, classifier(), soft, tmp_path, accumulate, compute_loss_func=soft_cross_entropy)

    torch.testing.assert_close(learnt(1.0), hard, rtol=1e-4, atol=1e-5)
    assert any((learnt(0.7)[name] - hard[name]).abs().max() > 1e-4 for name in hard)


def test_the_loss_of_vectors_is_that_of_their_formula() -> None:
    z, y = torch.randn(4, 3), torch.rand(4, 3).softmax(1)
    each = -(y * z.log_softmax(1)).sum(1)
    torch.testing.assert_close(soft_cross_entropy({"logits": z}, y), each.mean())
    torch.testing.assert_close(soft_cross_entropy((z,), y, num_items_in_batch=3 * 10), each.sum() / 10)


def test_sampling_draws_in_proportion(tmp_path: Path) -> None:
    rows = Dataset.from_list(CLASSES).add_column("weight", [0.0, 1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to=[], seed=3)
    trainer = WeightedTrainer(classifier(), args, data_collator=with_weights, train_dataset=rows, by="sampling")
    sampler = trainer._get_train_sampler()
    assert sampler is not None
    drawn = [index for _ in range(200) for index in sampler]
    assert set(drawn) == {1, 3}
    assert 0.7 < drawn.count(3) / len(drawn) < 0.8
    assert "weight" not in next(iter(trainer.get_train_dataloader()))
    trainer.args.max_steps = 2
    trainer.train()


def test_sampling_draws_anew_in_each_epoch_also_of_a_resumed_run(tmp_path: Path) -> None:
    rows = Dataset.from_list(CLASSES).add_column("weight", [1.0] * 8)
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to=[], seed=3)

    def epoch(loader: Any, number: int) -> list[Any]:
        loader.set_epoch(number)
        return [batch["input_ids"].tolist() for batch in loader]

    def loader() -> Any:
        made = WeightedTrainer(classifier(), args, data_collator=with_weights, train_dataset=rows, by="sampling")
        return made.get_train_dataloader()

    one = loader()
    first, second = epoch(one, 0), epoch(one, 1)
    assert first != second
    assert epoch(loader(), 1) == second


@pytest.mark.parametrize("training", [True, False])
def test_weights_count_once_and_in_training_alone(tmp_path: Path, training: bool) -> None:
    """Where columns are not removed, batches have them also when rows are drawn in proportion, or for evaluation."""
    rows = Dataset.from_list(CLASSES).add_column("weight", [0.5] * 8)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], remove_unused_columns=False)
    how = {"by": "sampling"} if training else {}
    run = WeightedTrainer(classifier(), args, data_collator=with_weights, train_dataset=rows, **how)
    model, batch = run.model.train(training), with_weights([dict(row) for row in rows])
    assert "weight" in batch
    torch.manual_seed(1)  # dropout
    loss = run.compute_loss(model, batch)
    torch.manual_seed(1)
    expected = model(**with_weights(CLASSES)).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("during", [None, "epochs"])
def test_rows_of_vectors_need_to_be_told_their_loss(tmp_path: Path, during: Any) -> None:
    """They look like several labels an example, and have another loss."""
    soft = Dataset.from_list([{**row, "labels": [0.3, 0.7]} for row in CLASSES])

    def run(folder: str, **settings: Any) -> nn.Module:
        capture = GradientCapture(tmp_path / folder, during=during, **settings)
        model = classifier()
        trained(Trainer, model, soft, tmp_path, 1, compute_loss_func=soft_cross_entropy, callbacks=[capture])
        return model.eval()

    with pytest.raises(BadSetting, match=r"vectors of class probabilities.*task=own_loss"):
        run("untold")
    model = run("told", task=own_loss(F.cross_entropy, reduction="none"))
    found = GradientStore.open(tmp_path / "told").rows().stats["loss"]
    for loss, row in zip(found, soft, strict=True):
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        assert loss.item() == pytest.approx(F.cross_entropy(logits, torch.tensor([row["labels"]])).item(), rel=1e-4)


def test_a_stream_brings_its_weights_along_and_has_no_rows_to_draw(tmp_path: Path) -> None:
    rows = Dataset.from_list(CLASSES).add_column("weight", [2.0, 0.0] * 4)
    listed = trained(WeightedTrainer, classifier(), rows, tmp_path, train_sampling_strategy="sequential")
    stream = trained(WeightedTrainer, classifier(), rows.to_iterable_dataset(), tmp_path)
    torch.testing.assert_close(stream, listed)
    with pytest.raises(BadSetting, match=r"IterableDataset is no datasets\.Dataset"):
        trained(WeightedTrainer, classifier(), rows.to_iterable_dataset(), tmp_path, by="sampling")


def test_evaluation_needs_no_weights(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    rows = Dataset.from_list(CLASSES)
    losses = [
        kind(classifier(), args, data_collator=with_weights, eval_dataset=rows).evaluate()["eval_loss"]
        for kind in (Trainer, WeightedTrainer)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    rows = Dataset.from_list(CLASSES)
    with pytest.raises(BadExample, match="no column 'weight'"):
        trained(WeightedTrainer, classifier(), rows, tmp_path)
    with pytest.raises(BadExample, match="at least 0"):
        trained(WeightedTrainer, classifier(), rows.add_column("weight", [-1.0] * 8), tmp_path)
    with pytest.raises(BadExample, match=r"at least 0.* nan"):
        trained(WeightedTrainer, classifier(), rows.add_column("weight", [None, *[1.0] * 7]), tmp_path)
    with pytest.raises(BadSetting, match="compute_loss_func"):
        trained(WeightedTrainer, classifier(), rows, tmp_path, compute_loss_func=print)
    smooth = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    with pytest.raises(BadSetting, match=r"label_smoothing_factor=0\.1"):
        WeightedTrainer(classifier(), smooth)
    with pytest.raises(BadSetting, match="'loss' or 'sampling'"):
        trained(WeightedTrainer, classifier(), rows, tmp_path, by="luck")


def flat(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator that packs a batch into one row, and drops the weights."""
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in features]
    return dict(DataCollatorWithFlattening()(rows))


def test_weights_go_past_a_collator_that_drops_them(tmp_path: Path) -> None:
    rows = Dataset.from_list(TEXTS).add_column("weight", [2.0, 0.0, 1.0, 0.5] * 2)
    kept, dropped = (
        trained(WeightedTrainer, causal(), rows, tmp_path, collate=collate) for collate in (with_weights, padding())
    )
    torch.testing.assert_close(dropped, kept, rtol=0, atol=0)
    with pytest.raises(BadExample, match=r"packs several examples into a row.*by='sampling'"):
        trained(WeightedTrainer, causal(), rows, tmp_path, collate=flat)
    trained(WeightedTrainer, causal(), rows, tmp_path, collate=flat, by="sampling")


def test_an_encoder_decoder_gets_its_decoder_inputs(tmp_path: Path) -> None:
    """The collator makes none: a plain Trainer leaves that to the model, which sees the labels."""
    rows = [{"input_ids": ids["input_ids"], "labels": ids["input_ids"], "weight": 1.0} for ids in TEXTS]
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    config.decoder_start_token_id = 0

    def model() -> nn.Module:
        torch.manual_seed(0)
        return lora(T5ForConditionalGeneration(config), ["q", "v"], lora_dropout=0.0, dtype=torch.float32)

    plain = Dataset.from_list(rows).remove_columns("weight")
    weighted = trained(WeightedTrainer, model(), Dataset.from_list(rows), tmp_path, accumulate=1)
    expected = trained(Trainer, model(), plain, tmp_path, accumulate=1)
    torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=1e-7)
