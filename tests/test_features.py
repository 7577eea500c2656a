"""What the model predicts and sees of an example: probabilities and the input of its last layer, from a plain pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import (
    ENCODER,
    assert_same_state,
    bert,
    gpt2,
    labelled,
    lora,
    minilm,
    padding,
    prompts,
    roberta,
    state_of,
    stored,
    tiny,
)
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_influence import GradientStore, collect
from hf_influence.attribution import attribute
from hf_influence.callbacks import GradientCapture
from hf_influence.errors import StoreMismatch, UnsupportedModel
from hf_influence.gradients import losses


def llama_classifier(**config: Any) -> nn.Module:
    return LlamaForSequenceClassification(LlamaConfig(**ENCODER, num_key_value_heads=1, num_labels=3, **config))


CLASSIFIERS: dict[str, Any] = {
    "bert": lambda: lora(bert(num_labels=3), ["query", "value"], task_type="SEQ_CLS"),
    "roberta": lambda: lora(roberta(), ["query", "value"], task_type="SEQ_CLS"),
    "lora on the head": lambda: lora(roberta(), ["query", "out_proj"]),
    "a head that sees every token": lambda: lora(llama_classifier(), ["q_proj", "v_proj"], task_type="SEQ_CLS"),
}


def head_input(model: nn.Module, name: str, example: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The input of the module `name` and the logits, for one example alone."""
    seen: list[Tensor] = []
    head = dict(model.named_modules())[name]
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([example["input_ids"]])).logits
    handle.remove()
    return seen[-1][0], logits[0]


HEADS = {
    "bert": "base_model.model.classifier",
    "roberta": "base_model.model.classifier.modules_to_save.default.out_proj",
    "lora on the head": "base_model.model.classifier.out_proj",
    "a head that sees every token": "base_model.model.score",
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_probabilities_and_features_of_classifiers_are_those_of_a_plain_pass(tmp_path: Path, kind: str) -> None:
    model = CLASSIFIERS[kind]()
    examples = labelled(lambda i: i % 3, 9)
    before = state_of(model)
    stats = stored(model, examples, tmp_path, batch_size=4, features=True).stats
    assert_same_state(before, state_of(model))
    assert stats["probabilities"].shape == (9, 3)
    for i, example in enumerate(examples):
        seen, logits = head_input(model, HEADS[kind], example)
        torch.testing.assert_close(stats["features"][i], seen[-1] if seen.ndim == 2 else seen)
        torch.testing.assert_close(stats["probabilities"][i], logits.softmax(0))
        torch.testing.assert_close(stats["loss"][i].exp(), 1 / logits.softmax(0)[example["labels"]])
    torch.testing.assert_close(losses(model, examples)["probabilities"], stats["probabilities"])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_features_of_language_models_are_the_mean_over_the_positions_that_predict_labels(
    tmp_path: Path, kind: str
) -> None:
    model = tiny() if kind == "llama" else lora(gpt2(), ["c_attn"], fan_in_fan_out=True)
    examples = prompts(7)
    stats = stored(model, examples, tmp_path, batch_size=3, features=True).stats
    assert "probabilities" not in stats
    for i, example in enumerate(examples):
        hidden, _ = head_input(model, "base_model.model.lm_head", example)
        at = [t - 1 for t, label in enumerate(example["labels"]) if label != -100 and t > 0]
        torch.testing.assert_close(stats["features"][i], hidden[at].mean(0))


def test_features_of_encoder_decoders_are_those_of_the_decoder(tmp_path: Path) -> None:
    config = T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = lora(T5ForConditionalGeneration(config), ["q", "v"])
    examples = [{"input_ids": [5, 6, 7], "labels": [8, 9]}, {"input_ids": [4, 9], "labels": [7, 6, 5, 4]}]
    stats = stored(model, examples, tmp_path, features=True).stats
    for i, example in enumerate(examples):
        with torch.no_grad():
            batch = {name: torch.tensor([values]) for name, values in example.items()}
            seen: list[Tensor] = []
            head = model.get_base_model().lm_head
            handle = head.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            model.eval()(**batch)
            handle.remove()
        torch.testing.assert_close(stats["features"][i], seen[0][0].mean(0))


class TwoHeads(nn.Module):
    """The mean of two heads: no layer has the logits as its output."""

    def __init__(self, one: nn.Linear):
        super().__init__()
        self.one, self.other = one, nn.Linear(one.in_features, one.out_features)

    def forward(self, hidden: Tensor) -> Tensor:
        return (self.one(hidden) + self.other(hidden)) / 2


def test_logits_that_no_layer_gives_are_refused(tmp_path: Path) -> None:
    base: Any = bert(num_labels=3)
    base.classifier = TwoHeads(base.classifier)
    model = lora(base, ["query", "value"])
    with pytest.raises(UnsupportedModel, match=r"no linear layer whose output are its logits.*features=True"):
        stored(model, labelled(lambda i: i % 3), tmp_path, features=True)
    assert stored(model, labelled(lambda i: i % 3), tmp_path).stats["probabilities"].shape == (7, 3)


def test_rows_without_features_are_not_taken_for_rows_with_them(tmp_path: Path) -> None:
    model, examples = CLASSIFIERS["bert"](), labelled(lambda i: i % 3)
    collect(model, examples, tmp_path)
    with pytest.raises(StoreMismatch, match=r"without the statistic 'features'.*overwrite=True"):
        collect(model, examples, tmp_path, features=True)
    assert "features" in collect(model, examples, tmp_path, features=True, overwrite=True).rows().stats
    assert "features" in collect(model, examples, tmp_path).rows().stats  # complete, and more than was asked for


def test_a_run_is_continued_with_the_statistics_that_it_was_begun_with(tmp_path: Path) -> None:
    model, examples = CLASSIFIERS["bert"](), labelled(lambda i: i % 3, 8)
    store = collect(model, examples, tmp_path, features=True, batch_size=4)
    rows, stats = store.rows(), store.rows().stats
    writer = store.writer("half", adapter=store.adapter(), dataset=rows.dataset, n=8)
    first = [0, 1, 2, 3]
    half = {name: rows.block(name)[first] for name in rows.blocks}
    with writer:
        writer.append(first, half, {name: values[first] for name, values in stats.items()})
    with pytest.raises(
        StoreMismatch, match=r"other statistics than those to be added \(only one of both has: features"
    ):
        collect(model, examples, tmp_path, "half")
    again = collect(model, examples, tmp_path, "half", features=True).rows("half").stats
    torch.testing.assert_close(again["features"], stats["features"])


def test_a_trainer_leaves_probabilities_of_each_step_and_features_at_the_end(tmp_path: Path) -> None:
    data, queries = (Dataset.from_list(labelled(lambda i: i % 3, n)) for n in (8, 2))
    model = lora(bert(num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), ["query", "value"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    capture = GradientCapture(tmp_path / "rows", queries, during="epochs", features=True)
    args = TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=0.0,  # the weights stay, so a step sees what the end sees
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model, args, data_collator=padding(), train_dataset=data, callbacks=[capture]).train()
    store = GradientStore.open(capture.path)
    step, end = store.rows("train", 1).stats, store.rows("train").stats
    torch.testing.assert_close(step["probabilities"], end["probabilities"])
    torch.testing.assert_close(end["probabilities"].sum(1), torch.ones(8, dtype=torch.float64))
    assert "features" in end
    assert "features" in store.rows("query").stats
    assert attribute(store, "deep_knn", k=3).values.shape == (8, 1)


@pytest.mark.slow
def test_features_of_a_real_encoder_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    model, tokenizer = minilm()
    texts = ["a fine film", "dull", "one of the best of the year, and a joy to watch"]
    examples = [{**tokenizer(text), "labels": i % 2} for i, text in enumerate(texts)]
    one, three = (
        stored(model, examples, tmp_path / str(size), batch_size=size, features=True).stats["features"]
        for size in (1, 3)
    )
    assert one.shape == (3, 384)
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)
