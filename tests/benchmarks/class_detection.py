"""Do the training prompts that influence a query most share its task? AUC and recall of every method on three sets.

    python tests/benchmarks/class_detection.py --train 180 --test 30 --json classes.json --markdown classes.md

SmolLM2-135M-Instruct with LoRA on q_proj and v_proj learns the whole text of ten sentence transformations or ten kinds
of word problems (without and with reasoning), made by `hf_influence.evaluation.benchmarks`; then whole rows are
collected from the prompt, the answer and the text. The papers train on 900 prompts, 90 of each kind, with 100 queries.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from datasets import DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from hf_influence import attribute, collect
from hf_influence.attribution import methods
from hf_influence.errors import InfluenceError
from hf_influence.evaluation import class_detection
from hf_influence.evaluation.benchmarks import math_problems, sentence_transformations, tokenize
from hf_influence.evaluation.benchmarks.tokenization import Part
from hf_influence.pretrained import load_language_model

SETS: dict[str, Callable[..., DatasetDict]] = {
    "sentence_transformations": sentence_transformations,
    "math": math_problems,
    "math_with_reasoning": partial(math_problems, reasoning=True),
}


def measure(store: Path, train: list[str], query: list[str]) -> dict[str, dict[str, Any]]:
    """Every method with a score a query that the store has the rows for; what stopped the others."""
    found: dict[str, dict[str, Any]] = {}
    for method, about in methods().items():
        if "queries" not in about.needs:
            continue
        settings = {"labels": train} if "labels" in about.needs else {}
        started = time.perf_counter()
        try:
            scores = attribute(store, method, **settings)
        except InfluenceError as error:
            found[method] = {"left out": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            continue
        took = time.perf_counter() - started
        if scores.query_ids is None or len(scores.query_ids) != len(query):
            continue  # one column for all queries ranks no single one
        signed = "labels" in about.needs
        found[method] = {"seconds": took, **class_detection(scores, train, query, absolute=not signed)}
    return found


def run(name: str, args: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Part of the text -> method -> figures."""
    model, tokenizer = load_language_model()
    data = SETS[name](train=args.train, test=args.test, seed=args.seed)
    set_seed(args.seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            seed=args.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            get_peft_model(model, lora),
            arguments,
            train_dataset=tokenize(data["train"], tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        trainer.train()
        found = {}
        for part in get_args(Part):
            store = Path(folder) / part
            for split, rows in (("train", data["train"]), ("query", data["test"])):
                collect(trainer.model, tokenize(rows, tokenizer, gradient=part), store, split)
            found[part] = measure(store, list(data["train"]["task"]), list(data["test"]["task"]))
            best = sorted((-row["auc_mean"], m) for m, row in found[part].items() if "auc_mean" in row)[:6]
            print(name, part, ", ".join(f"{method} {-auc:.3f}" for auc, method in best), flush=True)
    return found


def table(results: dict[str, dict[str, dict[str, dict[str, Any]]]], args: argparse.Namespace) -> str:
    """Markdown: a row a method, a column a set and part; AUC / recall; best mean first."""
    columns = [(name, part) for name in results for part in results[name]]
    cells: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for name, part in columns:
        for method, row in results[name][part].items():
            if "auc_mean" in row:
                cells.setdefault(method, {})[name, part] = row
    order = sorted(cells, key=lambda m: -sum(row["auc_mean"] for row in cells[m].values()) / len(cells[m]))
    lines = [
        f"SmolLM2-135M-Instruct + LoRA r=8, {args.train} training and {args.test} test prompts, {args.epochs} epochs, "
        f"batch {args.batch_size}, learning rate {args.learning_rate}, seed {args.seed}; {date.today()}, "
        f"{platform.machine()}, torch {version('torch')}, transformers {version('transformers')}.",
        "",
        "AUC / recall, mean over the queries; absolute influence, but for class-wise outliers.",
        "",
        "| method | " + " | ".join(f"{name}, {part}" for name, part in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for method in order:
        shown = (cells[method].get(column) for column in columns)
        lines.append(
            f"| `{method}` | "
            + " | ".join(f"{row['auc_mean']:.3f} / {row['recall_mean']:.3f}" if row else "" for row in shown)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--train", type=int, default=900)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in args.sets:
        results[name] = run(name, args)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    text = table(results, args)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
