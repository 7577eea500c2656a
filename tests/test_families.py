"""Rows of every family of models are those of plain autograd, at fixed weights and while training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import (
    ENCODER,
    ENDS,
    PAD,
    VOCABULARY,
    WIDTH,
    Example,
    autograd_row,
    labelled,
    lora,
    padding,
    prompts,
    stored,
    worst_error,
)
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadExample, StoreMismatch, UnsupportedModel
from hf_influence.gradients import collect, verify
from hf_influence.gradients.batches import padding_with
from hf_influence.store import GradientStore

N, BATCH = 6, 3
TOLERANCE = 1e-5
SIZE = {**ENCODER, **ENDS}
GROUPED = {**SIZE, "num_key_value_heads": 1, "head_dim": 8}
Collate = Callable[[list[Example]], dict[str, Tensor]]


def sequences() -> list[Example]:
    return labelled(lambda i: i % 2, N)


def texts(answer: Callable[[list[int]], list[int]]) -> list[Example]:
    return [{"input_ids": row["input_ids"], "labels": answer(row["input_ids"])} for row in prompts(N)]


def images(seed: int = 0) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=draw).tolist(), "labels": i % 2} for i in range(N)]


def encoder_padding(side: str = "right") -> Collate:
    """Pads the input on one side and the labels on the right, as a decoder needs them."""

    def collate(features: list[Example]) -> dict[str, Tensor]:
        inputs = [{"input_ids": row["input_ids"]} for row in features]
        return {**padding(side)(inputs), **padding_with(PAD)([{"labels": row["labels"]} for row in features])}

    return collate


@dataclass(frozen=True)
class Family:
    """A tiny random model with an adapter, and examples for it."""

    kind: str
    config: dict[str, Any]
    targets: list[str] | str
    head: Any = AutoModelForCausalLM
    data: Callable[[], list[Example]] = lambda: prompts(N)
    collate: Callable[[str], Collate] = padding
    sides: tuple[str, ...] = ("right", "left")
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Any:
        """In float32, without any dropout."""
        config = AutoConfig.for_model(self.kind, **self.config)
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        return lora(
            self.head.from_config(config),
            self.targets,
            dtype=torch.float32,
            std=0.05,
            **{"lora_dropout": 0.0, **self.options},
        )


def classifier(kind: str, config: dict[str, Any], targets: list[str]) -> Family:
    options = {"modules_to_save": ["classifier"]}
    head = AutoModelForSequenceClassification
    return Family(kind, config, targets, head, sequences, sides=("right",), options=options)


def translator(kind: str, config: dict[str, Any], targets: list[str], answer: Callable[[list[int]], Any]) -> Family:
    return Family(kind, config, targets, AutoModelForSeq2SeqLM, lambda: texts(answer), encoder_padding)


DEBERTA = {
    **SIZE,
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
GEMMA = {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 8}
MIXTRAL = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {
    **{name: SIZE[name] for name in SIZE if name != "intermediate_size"},
    "ffn_dim": 24,
    "word_embed_proj_dim": 8,
}
BART = {
    **{name: SIZE[name] for name in ("vocab_size", "max_position_embeddings", "pad_token_id", "eos_token_id")},
    "d_model": WIDTH,
    **{f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 24))},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 3,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": PAD,
    "decoder_start_token_id": PAD,
}

FAMILIES = {
    "Llama": Family("llama", GROUPED, "all-linear"),
    "Qwen3": Family("qwen3", GROUPED, "all-linear"),
    "Mistral": Family("mistral", {**GROUPED, "sliding_window": 4}, "all-linear"),
    "Gemma 2": Family("gemma2", {**GEMMA, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}, "all-linear"),
    "Gemma 3": Family("gemma3_text", GEMMA, "all-linear"),
    "Cohere": Family("cohere", {**SIZE, "num_key_value_heads": 1, "logit_scale": 0.3}, "all-linear"),
    "Granite": Family(
        "granite",
        {**SIZE, "num_key_value_heads": 1, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
        "all-linear",
    ),
    "OLMo": Family("olmo", {**SIZE, "clip_qkv": 0.5}, "all-linear"),  # clips projections in place
    "Phi-3": Family("phi3", {**SIZE, "num_key_value_heads": 1}, ["qkv_proj", "gate_up_proj"]),
    "GPT-2": Family(
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "bos_token_id": 2, "eos_token_id": 3},
        ["c_attn", "c_fc"],
        options={"fan_in_fan_out": True},
    ),
    "OPT": Family("opt", OPT, ["q_proj", "v_proj", "out_proj"]),
    "Mixtral": Family("mixtral", MIXTRAL, ["q_proj", "v_proj"]),
    "Qwen3-MoE": Family(
        "qwen3_moe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}, ["k_proj"]
    ),
    "BERT": classifier("bert", SIZE, ["query", "dense"]),
    "RoBERTa": classifier("roberta", SIZE, ["query", "dense"]),
    "DeBERTa-v3": classifier("deberta-v2", DEBERTA, ["value_proj", "dense"]),
    "ModernBERT": classifier(
        "modernbert",
        {**SIZE, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
        ["Wqkv", "Wo", "Wi"],
    ),
    "DistilBERT": classifier(
        "distilbert",
        {"vocab_size": VOCABULARY, "dim": WIDTH, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "pad_token_id": PAD},
        ["q_lin", "lin1"],
    ),
    "T5": translator("t5", T5, ["q", "v", "wo"], lambda ids: [*ids[2:], 3]),
    "BART": translator("bart", BART, ["q_proj", "fc1"], lambda ids: ids[::-1]),  # labels of the shape of the input
    "ViT": Family(
        "vit",
        {**{name: SIZE[name] for name in ("hidden_size", "intermediate_size")}, "image_size": 8, "patch_size": 4}
        | {"num_hidden_layers": 2, "num_attention_heads": 2},
        ["q_proj", "v_proj"],
        AutoModelForImageClassification,
        images,
        lambda side: padding_with(PAD),
        ("right",),
        {"modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_equal_plain_autograd(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    model, data = family.model(), family.data()
    reference = [autograd_row(model, example) for example in data]
    for side in family.sides:
        rows = stored(model, data, tmp_path / side, batch_size=BATCH, data_collator=family.collate(side))
        assert list(rows.blocks) == list(reference[0])
        assert worst_error(rows, reference) <= TOLERANCE


class Recording:
    """Notes the weights that each step starts from, and takes the examples in their order."""

    weights: list[dict[str, Tensor]]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        self.weights.append({name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad})
        return super().training_step(model, *args, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class RecordingTrainer(Recording, Trainer):
    pass


class RecordingSeq2SeqTrainer(Recording, Seq2SeqTrainer):
    pass


def trained(family: Family, model: Any, folder: Path, batch_size: int = BATCH) -> tuple[Any, list[dict[str, Tensor]]]:
    """Rows of one epoch, and the gradient of each example by plain autograd at the weights of its step."""
    decoder = family.head is AutoModelForSeq2SeqLM
    kind, arguments = (
        (RecordingSeq2SeqTrainer, Seq2SeqTrainingArguments) if decoder else (RecordingTrainer, TrainingArguments)
    )
    args = arguments(
        str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    data = family.data()
    capture = GradientCapture(folder / "rows", during="epochs", at_end=False)
    trainer = kind(
        model,
        args,
        data_collator=family.collate("right"),
        train_dataset=Dataset.from_list(data),
        callbacks=[capture],
    )
    trainer.weights = []
    trainer.train()
    reference = []
    for i, example in enumerate(data):
        model.load_state_dict(trainer.weights[i // batch_size], strict=False)
        reference.append(autograd_row(model, example))
    return GradientStore.open(capture.path).rows("train", 1), reference


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_training_equal_plain_autograd(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    rows, reference = trained(family, family.model(), tmp_path)
    assert list(rows.blocks) == list(reference[0])
    assert worst_error(rows, reference) <= TOLERANCE


SHARED = {
    "DeBERTa's relative positions": classifier("deberta-v2", DEBERTA, ["query_proj", "key_proj", "value_proj"]),
    "OPT's feed-forward layers": Family("opt", OPT, ["fc1", "fc2"]),
}


@pytest.mark.parametrize("name", SHARED)
def test_layers_that_mix_examples_are_exact_one_example_at_a_time(tmp_path: Path, name: str) -> None:
    family = SHARED[name]
    model, data = family.model(), family.data()
    with pytest.raises(UnsupportedModel, match=r"(key_proj|fc2).* rows in a batch of 2 .*batch_size=1"):
        stored(model, data, tmp_path / "three", batch_size=3)
    rows = stored(model, data, tmp_path / "one", batch_size=1)
    assert worst_error(rows, [autograd_row(model, example) for example in data]) <= TOLERANCE
    rows, reference = trained(family, model, tmp_path / "training", batch_size=1)
    assert worst_error(rows, reference) <= TOLERANCE


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"target_modules": ["q_proj", "gate"]}, r"mlp\.gate\.lora_A.*LoRA on the parameter weight"),
        ({"target_parameters": ["experts.gate_up_proj"]}, r"experts\.lora_A.*LoRA on the parameter gate_up_proj"),
        ({"modules_to_save": ["gate"]}, r"mlp\.gate\..*weight \(MixtralTopKRouter\)"),
        ({"modules_to_save": ["experts"]}, r"experts\..*gate_up_proj \(MixtralExperts\)"),
    ],
)
def test_experts_and_routers_are_refused_by_name(tmp_path: Path, options: dict[str, Any], found: str) -> None:
    model = Family("mixtral", MIXTRAL, ["q_proj"], options=options).model()
    with pytest.raises(UnsupportedModel, match=f"no exact per-example rule: .*{found}"):
        collect(model, prompts(N), tmp_path)


def test_experts_can_be_left_out_on_purpose(tmp_path: Path) -> None:
    model = Family("mixtral", MIXTRAL, ["q_proj"], options={"target_parameters": ["experts.down_proj"]}).model()
    rows = stored(model, prompts(N), tmp_path, skip=["*experts*"])
    assert worst_error(rows, [autograd_row(model, example) for example in prompts(N)]) <= TOLERANCE


def test_the_loss_that_balances_experts_belongs_to_no_example(tmp_path: Path) -> None:
    balanced = {**MIXTRAL, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    model = Family("mixtral", balanced, ["q_proj"]).model()
    assert verify(model, prompts(N), collect(model, prompts(N), tmp_path), k=N) <= TOLERANCE


def with_decoder_inputs(model: Any, collate: Collate) -> Collate:
    """As `DataCollatorForSeq2Seq(tokenizer, model)` does."""

    def made(features: list[Example]) -> dict[str, Tensor]:
        batch = collate(features)
        return {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}

    return made


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["T5", "BART"])
def test_decoder_inputs_stay_with_their_labels(tmp_path: Path, name: str, reduction: Any) -> None:
    family = FAMILIES[name]
    model, data = family.model(), family.data()
    collate = with_decoder_inputs(model, family.collate("left"))
    store = collect(model, data, tmp_path, loss_reduction=reduction, data_collator=collate)
    assert verify(model, data, store, k=N, data_collator=collate) <= TOLERANCE
    plain = stored(model, data, tmp_path / "plain", batch_size=1)
    assert torch.equal(plain.stats["hash"], store.rows("train").stats["hash"])
    assert plain.stats["n_tokens"].tolist() == [len(example["labels"]) for example in data]


def test_decoder_labels_padded_on_the_left_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["BART"]
    with pytest.raises(BadExample, match=r"labels begin with -100.*padding_side = 'right'"):
        collect(family.model(), family.data(), tmp_path, data_collator=padding("left"))


def test_images_of_equal_labels_are_other_examples(tmp_path: Path) -> None:
    model = FAMILIES["ViT"].model()
    rows = stored(model, images(), tmp_path)
    assert len(rows.stats["hash"].unique()) == N
    with pytest.raises(StoreMismatch):
        collect(model, images(seed=1), tmp_path)
