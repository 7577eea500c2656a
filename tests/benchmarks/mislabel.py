"""Which flipped labels does each method find? AUC, average precision and time of every preset on GLUE sets.

    python tests/benchmarks/mislabel.py --data FOLDER --json mislabel.json --markdown mislabel.md

FOLDER holds `sst2/train.parquet` and so on, as the hub has them (columns sentence | sentence1, sentence2 | question,
sentence; label); without `--data` the sets are loaded from the hub (nyu-mll/glue).

MiniLM with LoRA on query and value learns a random part of the training set, of which a fifth has its label flipped,
with the ordinary Trainer. `GradientCapture` takes the rows of the training steps, epoch by epoch, and whole rows at the
end; the queries are clean rows of the validation or test set. Every method of the table then ranks the training
examples, with its defaults. Time is that of `attribute` alone, from rows on the disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import statistics
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from hf_influence import attribute
from hf_influence.attribution import lacking, methods
from hf_influence.callbacks import GradientCapture
from hf_influence.errors import InfluenceError
from hf_influence.evaluation import mislabel_detection
from hf_influence.pretrained import load_classifier

TEXTS = {"sst2": ("sentence",), "mrpc": ("sentence1", "sentence2"), "qnli": ("question", "sentence")}
HELD_OUT = {"sst2": "validation", "mrpc": "test", "qnli": "validation"}
MAX_TOKENS = 128


def load(name: str, split: str, folder: Path | None) -> Dataset:
    if folder is not None:
        return Dataset.from_parquet(str(folder / name / f"{split}.parquet"))
    return load_dataset("nyu-mll/glue", name, split=split)


def tokens(rows: Dataset, name: str, tokenizer: Any) -> Dataset:
    texts = [list(rows[column]) for column in TEXTS[name]]
    encoded = tokenizer(*texts, truncation=True, max_length=MAX_TOKENS)
    return Dataset.from_dict({**encoded, "labels": list(rows["label"])})


def flipped(rows: Dataset, share: float, seed: int) -> tuple[Dataset, list[bool]]:
    wrong = set(random.Random(seed).sample(range(len(rows)), round(share * len(rows))))
    labels = [1 - label if i in wrong else label for i, label in enumerate(rows["labels"])]
    return rows.remove_columns("labels").add_column("labels", labels), [i in wrong for i in range(len(rows))]


def train(name: str, rank: int, seed: int, args: argparse.Namespace, store: Path) -> dict[str, Any]:
    """Fine-tune and capture; the tokenised rows, which of them are wrong, the model and what it took."""
    model, tokenizer = load_classifier(seed=seed)
    whole = load(name, "train", args.data).shuffle(seed=seed)
    rows, wrong = flipped(tokens(whole.select(range(args.rows)), name, tokenizer), args.share, seed)
    held_out = load(name, HELD_OUT[name], args.data).shuffle(seed=seed)
    query = tokens(held_out.select(range(args.queries)), name, tokenizer)
    set_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"], task_type="SEQ_CLS")
    arguments = TrainingArguments(
        str(store / "trainer"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        get_peft_model(model, lora),
        arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[GradientCapture(store, query, during="epochs")],
    )
    started = time.perf_counter()
    trainer.train()
    return {
        "wrong": wrong,
        "model": trainer.model,
        "train": rows,
        "query": query,
        "seconds": time.perf_counter() - started,
    }


def measure(store: Path, wrong: list[bool], labels: list[int]) -> dict[str, dict[str, Any]]:
    """Every method of the table that the store has the rows for; what stopped the others."""
    found: dict[str, dict[str, Any]] = {}
    for method, lacks in lacking(store).items():
        if lacks:
            found[method] = {"left out": f"the store has no {', '.join(lacks)}"}
            continue
        settings = {"labels": labels} if "labels" in methods()[method].needs else {}
        started = time.perf_counter()
        try:
            scores = attribute(store, method, **settings)
        except InfluenceError as error:
            found[method] = {"left out": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            continue
        found[method] = {"seconds": time.perf_counter() - started, **mislabel_detection(scores, wrong)}
    return found


def table(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Markdown: a row a method, a column a set and rank, mean ± standard deviation over seeds; best mean first."""
    runs = sorted({(run["set"], run["rank"]) for run in results})
    cells: dict[str, dict[tuple[str, int], list[dict[str, Any]]]] = {}
    for run in results:
        for method, row in run["methods"].items():
            if "auc" in row:
                cells.setdefault(method, {}).setdefault((run["set"], run["rank"]), []).append(row)

    def mean(method: str) -> float:
        return statistics.mean(row["auc"] for rows in cells[method].values() for row in rows)

    lines = [
        f"MiniLM + LoRA, {args.rows} training rows, {args.share:.0%} labels flipped, {args.queries} clean queries, "
        f"{args.epochs} epochs, batch {args.batch_size}, learning rate {args.learning_rate}, seeds "
        f"{', '.join(map(str, args.seeds))}; {date.today()}, {platform.machine()}, torch {version('torch')}, "
        f"transformers {version('transformers')}, peft {version('peft')}.",
        "",
        "AUC / average precision, mean over seeds ± standard deviation of the AUC; seconds of `attribute`, median.",
        "",
        "| method | " + " | ".join(f"{name} r={rank}" for name, rank in runs) + " | seconds |",
        "|---|" + "---|" * (len(runs) + 1),
    ]
    for method in sorted(cells, key=lambda name: -mean(name)):
        shown = []
        for run_ in runs:
            rows = cells[method].get(run_, [])
            auc = [row["auc"] for row in rows]
            precision = statistics.mean(row["average_precision"] for row in rows) if rows else 0
            shown.append(f"{statistics.mean(auc):.3f} ± {statistics.pstdev(auc):.3f} / {precision:.3f}" if rows else "")
        seconds = statistics.median(row["seconds"] for rows in cells[method].values() for row in rows)
        lines.append(f"| `{method}` | " + " | ".join(shown) + f" | {seconds:.2f} |")
    left_out = {m: row["left out"] for run in results for m, row in run["methods"].items() if "left out" in row}
    lines += ["", *(f"Left out: `{method}` ({why})." for method, why in left_out.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of parquet files; the hub without")
    parser.add_argument("--sets", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--share", type=float, default=0.2, help="of the labels that are flipped")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name in args.sets:
        for rank in args.ranks:
            for seed in args.seeds:
                folder = Path(tempfile.mkdtemp(prefix="mislabel-"))
                try:
                    run = train(name, rank, seed, args, folder)
                    found = measure(folder, run["wrong"], run["train"]["labels"])
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                results.append({"set": name, "rank": rank, "seed": seed, "seconds": run["seconds"], "methods": found})
                best = sorted((-row["auc"], m) for m, row in found.items() if "auc" in row)[:5]
                shown = ", ".join(f"{m} {-auc:.3f}" for auc, m in best)
                print(f"{name} r={rank} seed {seed}: training {run['seconds']:.0f} s; {shown}", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1))
    text = table(results, args)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
