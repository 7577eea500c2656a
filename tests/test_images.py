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
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_influence import GradientStore, attribute
from hf_influence.callbacks import GradientCapture
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
