"""Find wrong labels among images with a vision transformer and LoRA.

    python examples/mislabelled_digits.py

The handwritten digits of scikit-learn, 8 × 8 pixels, a fifth of the training labels wrong, and a small ViT that was
never trained before. Ten seconds on a CPU.
"""

import tempfile

import numpy as np
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_influence import attribute
from hf_influence.callbacks import GradientCapture
from hf_influence.evaluation import flipped_labels, mislabel_detection

set_seed(0)
images, labels = load_digits(return_X_y=True)
order = np.random.permutation(len(labels))[:500]
pixels = (images[order].reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
data = Dataset.from_dict({"pixel_values": pixels, "labels": labels[order]}).with_format("torch")
train, query = flipped_labels(data.select(range(400)), share=0.2, label="labels"), data.select(range(400, 500))

config = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    num_labels=10,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    initializer_range=0.2,  # random features; leave it out with pretrained weights
)
adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "fc1", "fc2"], modules_to_save=["classifier"])
model = get_peft_model(ViTForImageClassification(config), adapter)

with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        output_dir=folder,
        num_train_epochs=15,
        per_device_train_batch_size=20,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )
    capture = GradientCapture(f"{folder}/rows", query)
    Trainer(model, args, train_dataset=train, callbacks=[capture]).train()
    for method in ("outlier_l1", "outlier_iforest", "self_ip", "cosine", "datainf", "loss", "random"):
        found = mislabel_detection(attribute(capture.path, method), train["is_wrong"])
        print(f"{method:15} AUC {found.auc:.3f}  average precision {found.average_precision:.3f}")
