"""Models that are not what their kind is like: rows are right all the same, or refused before the first of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from models import Example, labelled, lora, padding, prompts
from torch import nn

from hf_influence.errors import BadExample, BadSetting, UnsupportedModel
from hf_influence.gradients import collect, per_sample_gradients
from hf_influence.gradients.plan import Plan
from hf_influence.gradients.trial import Trial, try_out

SIZES = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"pad_token_id": 1, "max_position_embeddings": 64}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
XLNET = {"vocab_size": 48, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "pad_token_id": 1, "num_labels": 3}
BART = {"vocab_size": 48, "d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 24, "decoder_attention_heads": 2}
BART |= {"encoder_layers": 1, "encoder_ffn_dim": 24, "encoder_attention_heads": 2, "pad_token_id": 1, "bos_token_id": 2}
BART |= {"eos_token_id": 3, "max_position_embeddings": 64, "dropout": 0.0}
TRANSLATORS = {**BART, "decoder_start_token_id": 3}


def made(config: str, kind: str, targets: Any, *saved: str, options: dict[str, Any], **lora_options: Any) -> Any:
    torch.manual_seed(0)
    base = getattr(transformers, kind)(getattr(transformers, config)(**options))
    model = lora(base, targets, dtype=torch.float32, modules_to_save=list(saved) or None, **lora_options)
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    return model.eval()


def classes() -> list[Example]:
    return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in labelled(lambda i: i % 3, 5)]


def texts() -> list[Example]:
    return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in prompts(5)]


def pairs() -> list[Example]:
    return [{**row, "labels": [*row["input_ids"][1:], 3]} for row in texts()]


def several() -> list[Example]:
    return [{**row, "labels": [float(i % 2), 1.0, float(i > 2)]} for i, row in enumerate(texts())]


@dataclass
class Odd:
    """A model, its data, and what is said of it."""

    model: Callable[[], Any]
    data: Callable[[], list[Example]]
    message: str
    settings: dict[str, Any] = field(default_factory=dict)


def deberta() -> Any:
    options = {**SIZES, **STILL, "num_labels": 3, "relative_attention": True, "position_buckets": 4}
    options |= {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_biased_input": False}
    return made("DebertaV2Config", "DebertaV2ForSequenceClassification", ["value_proj"], "classifier", options=options)


def bart_decoder() -> Any:
    targets = r".*self_attn\.(q_proj|v_proj)"
    return made("BartConfig", "BartForCausalLM", targets, options={**BART, "is_encoder_decoder": False})


def xlnet() -> Any:
    targets = ["sequence_summary.summary"]
    return made("XLNetConfig", "XLNetForSequenceClassification", targets, "logits_proj", options=XLNET)


def fnet() -> Any:
    options = {**SIZES, "num_labels": 3, "hidden_dropout_prob": 0.0}
    return made("FNetConfig", "FNetForSequenceClassification", ["dense"], options=options)


def fresh_fnet() -> Any:
    """Whose head says nothing yet: all losses are alike."""
    model = fnet()
    nn.init.normal_(model.get_base_model().classifier.weight, std=0.01)
    return model


REFUSED = {
    "soft cross-entropy": Odd(deberta, several, r"by the model itself .* by its logits and labels .*another loss"),
    "labels that are not shifted": Odd(bart_decoder, texts, r"by the model itself .*task=own_loss"),
    "the last position is read": Odd(xlnet, classes, "reads padding", {"data_collator": padding("left", 3)}),
    "no attention mask": Odd(fnet, classes, r"in a padded batch .*batch_size=1"),
    "a fresh head": Odd(
        fresh_fnet, classes, r"gradient of example \d .* in a padded batch by .* of its length.*padding"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_with_another_loss_or_that_read_padding_are_refused(tmp_path: Path, name: str) -> None:
    odd = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=odd.message):
        models.stored(odd.model(), odd.data(), tmp_path, **odd.settings)


def mine() -> Any:
    class Mine(transformers.LlamaForCausalLM):
        pass

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1)
    return lora(Mine(config), ["q_proj", "v_proj"], dtype=torch.float32)


def gemma() -> Any:
    text = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"text_config": text, "vision_config": {**vision, "image_size": 16, "patch_size": 8}}
    options |= {"mm_tokens_per_image": 4}
    targets = r".*language_model.*(q_proj|v_proj)"
    return made("Gemma3Config", "Gemma3ForConditionalGeneration", targets, options=options)


def bigbird() -> Any:
    options = {**SIZES, **STILL, "max_position_embeddings": 256, "num_labels": 3, "attention_type": "block_sparse"}
    options |= {"block_size": 8, "num_random_blocks": 2}
    return made("BigBirdConfig", "BigBirdForSequenceClassification", ["query"], "classifier", options=options)


def long() -> list[Example]:
    rows = [{**row, "labels": i % 3} for i, row in enumerate(prompts(3, shortest=97, longest=109))]
    return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]


RIGHT: dict[str, tuple[Callable[[], Any], Callable[[], list[Example]], dict[str, Any]]] = {
    "a subclass": (mine, texts, {}),
    "Gemma 3 of its class for images": (gemma, texts, {}),
    "M2M100": (
        lambda: made("M2M100Config", "M2M100ForConditionalGeneration", ["q_proj", "fc1"], options=TRANSLATORS),
        pairs,
        {},
    ),
    "Blenderbot": (
        lambda: made("BlenderbotConfig", "BlenderbotForConditionalGeneration", ["q_proj", "fc1"], options=TRANSLATORS),
        pairs,
        {},
    ),
    "XLNet without padding": (xlnet, classes, {"batch_size": 1}),
    "FNet without padding": (fnet, classes, {"batch_size": 1}),
    "BigBird, which pads to its blocks": (bigbird, long, {"batch_size": 1}),
}


def autograd(model: Any, example: Example) -> dict[str, Any]:
    names = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss = model(**{name: torch.tensor([value]) for name, value in example.items()}).loss
    return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))


@pytest.mark.parametrize("name", RIGHT)
def test_rows_of_unusual_models_equal_autograd(tmp_path: Path, name: str) -> None:
    make, data, settings = RIGHT[name]
    model, examples = make().eval(), data()
    want = [autograd(model, example) for example in examples]
    assert models.worst_error(models.stored(model, examples, tmp_path, **settings), want) <= 1e-5


def test_layers_that_do_not_keep_examples_apart_are_refused_in_passes_of_ones_own() -> None:
    model = made("OPTConfig", "OPTForCausalLM", ["fc1"], options={**SIZES, "word_embed_proj_dim": 16, "ffn_dim": 24})
    batch = padding()(prompts(4, shortest=6, longest=6))
    with per_sample_gradients(model) as rows:
        model(**batch).loss.backward()
        with pytest.raises(UnsupportedModel, match=r"saw 24 rows in a batch of 4 examples"):
            rows.take()


BAD = {"a token below 0": -1, "a token beyond the vocabulary": 48}


@pytest.mark.parametrize("name", BAD)
def test_labels_that_are_no_tokens_are_refused(tmp_path: Path, name: str) -> None:
    data = texts()
    data[2]["labels"] = [*data[2]["labels"][:-1], BAD[name]]
    with pytest.raises(BadExample, match=rf"example 2 has the label {BAD[name]}, .* from 0 to 47, and -100"):
        models.stored(mine(), data, tmp_path)


@pytest.mark.parametrize("label", [-1, 3, True])
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, label: Any) -> None:
    data = [{**row, "labels": label} for row in classes()]
    model = lora(models.bert(num_labels=3), ["query"], dtype=torch.float32)
    with pytest.raises(BadExample, match=r"from 0 to 2|type torch.bool"):
        models.stored(model, data, tmp_path)


def test_what_may_go_by_token_is_refused_with_padding_on_the_left(tmp_path: Path) -> None:
    def boxed(features: list[Example]) -> dict[str, Any]:
        batch = padding("left")([{name: row[name] for name in row if name != "bbox"} for row in features])
        return {**batch, "bbox": torch.zeros(*batch["input_ids"].shape, 4, dtype=torch.long)}

    options = {**SIZES, **STILL, "num_labels": 3, "max_2d_position_embeddings": 64}
    model = made("LayoutLMConfig", "LayoutLMForSequenceClassification", ["query"], "classifier", options=options)
    data = [{**row, "bbox": [[0, 0, 1, 1]] * len(row["input_ids"])} for row in classes()]
    with pytest.raises(BadSetting, match=r"padded on the left and has 'bbox'.*padding_side"):
        models.stored(model, data, tmp_path, data_collator=boxed)


def unmasked(rows: list[Example]) -> dict[str, torch.Tensor]:
    batch = padding()(rows)
    del batch["attention_mask"]
    return batch


def test_padding_that_no_mask_tells_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="pads and gives no attention_mask"):
        models.stored(models.tiny(), models.prompts(), tmp_path / "a", data_collator=unmasked)
    model, alike = models.tiny(), [{**row, "input_ids": row["input_ids"][:3]} for row in models.prompts()]
    alike = [{**row, "labels": row["input_ids"]} for row in alike]
    assert len(models.stored(model, alike, tmp_path / "b", data_collator=unmasked)) == len(alike)


class Drawn:
    """Examples that are other ones each time they are looked at, as images under random crops are."""

    def __init__(self) -> None:
        self.rows, self.generator = classes(), torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> Example:
        row = self.rows[at]
        drawn = torch.randint(4, 48, (len(row["input_ids"]),), generator=self.generator)
        return {**row, "input_ids": drawn.tolist()}


def test_examples_that_are_drawn_anew_each_time_are_no_other_loss(tmp_path: Path) -> None:
    model = lora(models.bert(num_labels=3), ["query"], dtype=torch.float32)
    assert len(models.stored(model, Drawn(), tmp_path)) == 5


def translated() -> Any:
    return made("BartConfig", "BartForConditionalGeneration", ["q_proj"], options=TRANSLATORS)


class Answers:
    """Pads the labels of a decoder with `fill`; with `drawn`, some of the first are others each time."""

    def __init__(self, fill: int, drawn: bool = False):
        self.fill, self.drawn = fill, drawn
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, features: list[Example]) -> dict[str, torch.Tensor]:
        batch = padding()([{name: row[name] for name in ("input_ids", "attention_mask")} for row in features])
        rows = [torch.tensor(row["labels"]) for row in features]
        labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.fill)
        if self.drawn:
            labels[:, 0] = torch.randint(4, 48, (len(rows),), generator=self.generator)
        return {**batch, "labels": labels}


def test_labels_padded_with_a_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"\d labelled tokens alone and \d+ beside another.*other than -100.*Seq2Seq"):
        models.stored(translated(), pairs(), tmp_path / "a", data_collator=Answers(1))
    for number, right in enumerate((Answers(-100), Answers(1, drawn=True))):
        rows = models.stored(translated(), pairs(), tmp_path / str(number), data_collator=right)
        assert len(rows) == 5


def test_examples_of_which_the_model_is_right_to_the_last_bit_are_not_refused(tmp_path: Path) -> None:
    options = {**SIZES, "num_key_value_heads": 1, "num_labels": 1}
    model = made("LlamaConfig", "LlamaForSequenceClassification", ["q_proj", "v_proj"], options=options)
    data = [{**row, "labels": 0.0} for row in texts()]
    for row in data:
        row["labels"] = model(**{name: torch.tensor([value]) for name, value in row.items()}).logits.item()
    alone, beside = (models.stored(model, data, tmp_path / str(b), batch_size=b) for b in (1, 5))
    a, b = (torch.cat([rows.block(name) for name in rows.blocks], 1) for rows in (alone, beside))
    assert ((a - b).norm(dim=1) > 0.1 * b.norm(dim=1)).any()  # rounding, of errors that are no more than that


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_trial_leaves_all_as_it_was(dtype: torch.dtype) -> None:
    model = models.tiny(dtype).train()
    model(**padding()(models.prompts())).loss.backward()
    before, drawn = models.state_of(model), torch.get_rng_state()
    plan = Plan.of(model, models.prompts(), None, "mean", None, "lora", (), None, True)
    try_out(model, plan.task, plan.examples, plan.taps)
    models.assert_same_state(before, models.state_of(model))
    assert torch.equal(torch.get_rng_state(), drawn)


def test_statistics_alone_need_no_layers_that_keep_examples_apart(tmp_path: Path) -> None:
    model = made("OPTConfig", "OPTForCausalLM", ["fc1"], options={**SIZES, "word_embed_proj_dim": 16, "ffn_dim": 24})
    assert len(collect(model, texts(), tmp_path, rows=False).rows("train")) == 5


def test_two_examples_that_do_not_fit_into_memory_are_tried_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    look = Trial.look

    def small(self: Trial, batch: dict[str, Any]) -> Any:
        if len(batch["input_ids"]) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return look(self, batch)

    monkeypatch.setattr(Trial, "look", small)
    assert len(models.stored(mine(), texts(), tmp_path)) == 5
    assert "out of memory with 2 examples" in caplog.text
