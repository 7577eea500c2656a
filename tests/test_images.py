"""Wrong labels among images are found, by a vision transformer under LoRA and by a convolutional network."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import autograd_row, lora
from sklearn.datasets import load_digits
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipVisionConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_influence import GradientStore, attribute
from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadSetting
from hf_influence.evaluation import mislabel_detection

TRAIN, QUERY = 300, 100


def digits() -> tuple[Dataset, Dataset, list[bool]]:
    """Images of 8 × 8 pixels, a fifth of the training labels wrong; clean queries; which are wrong."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[: TRAIN + QUERY]
    pixels = (images[order].reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    used, draw = labels[order].tolist(), random.Random(0)
    wrong = set(draw.sample(range(TRAIN), TRAIN // 5))
    used = [(label + draw.randint(1, 9)) % 10 if i in wrong else label for i, label in enumerate(used)]
    data = Dataset.from_dict({"pixel_values": pixels, "labels": used}).with_format("torch")
    flags = [i in wrong for i in range(TRAIN)]
    return data.select(range(TRAIN)), data.select(range(TRAIN, TRAIN + QUERY)), flags


def vision_transformer() -> Any:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.2, **size)
    targets = ["q_proj", "v_proj", "fc1", "fc2"]
    options: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "modules_to_save": ["classifier"]}
    return lora(ViTForImageClassification(config), targets, dtype=torch.float32, **options)


def residual_network() -> Any:
    """Only its last layer is trained; the convolutions stay as they were drawn, and so does their normalisation."""
    size = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **size)).requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


METHODS = {"cosine": 0.6, "datainf": 0.55, "ip": 0.55, "self_ip": 0.75, "outlier_l2": 0.75, "loss": 0.75}
"""The least area under the curve that each must reach; chance is ½."""

NETWORKS: dict[str, Any] = {
    "ViT": (vision_transformer, "lora", 15, 1e-2),
    "ResNet": (residual_network, "trainable", 30, 1e-2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_wrong_labels_of_digits_are_found(tmp_path: Path, name: str) -> None:
    make, modules, epochs, rate = NETWORKS[name]
    train, query, wrong = digits()
    set_seed(0)
    args = TrainingArguments(
        str(tmp_path),
        num_train_epochs=epochs,
        per_device_train_batch_size=20,
        learning_rate=rate,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    capture = GradientCapture(tmp_path / "rows", query, modules=modules)
    model = make()
    Trainer(model, args, train_dataset=train, callbacks=[capture]).train()

    store = GradientStore.open(capture.path)
    rows = store.rows("train")
    assert (len(rows), len(store.rows("query"))) == (TRAIN, QUERY)
    few = [{column: values.tolist() for column, values in train[i].items()} for i in range(4)]
    reference = [autograd_row(model, example) for example in few]
    for block in rows.blocks:
        want = torch.stack([row[block].flatten() for row in reference])
        torch.testing.assert_close(rows.block(block)[:4], want, rtol=1e-3, atol=1e-5)
    found = {method: mislabel_detection(attribute(store, method), wrong).auc for method in METHODS}
    assert all(auc > least for auc, least in zip(found.values(), METHODS.values(), strict=True)), found


def image_and_text() -> Any:
    """A causal language model that sees an image as four tokens."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    text = Gemma3TextConfig(
        **small, vocab_size=60, num_hidden_layers=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8
    )
    vision = SiglipVisionConfig(**small, num_hidden_layers=1, image_size=16, patch_size=4)
    tokens = {"image_token_index": 59, "image_token_id": 59, "boi_token_index": 57, "eoi_token_index": 58}
    base = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    )
    torch.nn.init.normal_(base.model.multi_modal_projector.mm_input_projection_weight, std=0.5)
    return lora(base, r".*language_model.*(q_proj|v_proj)", dtype=torch.float32, lora_dropout=0.0)


def test_other_images_under_the_same_text_need_ids(tmp_path: Path) -> None:
    """Which row is whose is told by tokens and labels, and questions and answers repeat."""
    torch.manual_seed(0)
    model, ids = image_and_text(), [57, 59, 59, 59, 59, 58, 5, 6, 7, 8]
    rows = [
        {
            "input_ids": ids,
            "attention_mask": [1] * 10,
            "token_type_ids": [0] + [1] * 4 + [0] * 5,
            "labels": [-100] * 8 + ids[8:],
            "pixel_values": (torch.randn(3, 16, 16) * 3).tolist(),
            "number": i,
        }
        for i in range(4)
    ]

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in examples]) for name in examples[0]}

    def run(data: Any, name: str, **capture: Any) -> GradientStore:
        args = TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=2,
            learning_rate=0.0,
            remove_unused_columns=False,
            per_device_train_batch_size=2,
        )
        rows = GradientCapture(tmp_path / name, during="epochs", **capture)
        Trainer(model, args, data_collator=collate, train_dataset=data, callbacks=[rows]).train()
        return GradientStore.open(rows.path)

    data, plain = Dataset.from_list(rows), Dataset.from_list(rows).remove_columns("number")
    with pytest.raises(BadSetting, match=r"examples 0 and 1 have the same tokens and labels and differ in 'pixel_val"):
        run(plain, "mixed")
    stream = data.remove_columns("number").to_iterable_dataset()
    with pytest.raises(BadSetting, match=r"of a stream are told apart by their tokens.*'pixel_values'"):
        run(stream, "stream", at_end=False)
    same = Dataset.from_list([rows[0]] * 4).remove_columns("number")
    assert len(run(same, "same").rows("train", 1)) == 4
    store = run(data, "named", id_column="number")
    for block in store.blocks:
        during, at_end = (store.rows("train", point) for point in (1, 0))
        assert during.ids == at_end.ids
        assert torch.allclose(during.block(block), at_end.block(block), atol=1e-5), "each image has its own row"
