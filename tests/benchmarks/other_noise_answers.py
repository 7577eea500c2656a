"""What do the defaults do with answers where it is not a fifth that is wrong, or there are few queries, or few answers?

    python tests/benchmarks/other_noise_answers.py --data FOLDER --results runs/other_answers --markdown other.md

FOLDER is that of `mislabel.py`; of it `sst2` is used, for the kinds whose answers are the names of two classes. The
other prompts are made: sentence transformations, of which some get another answer of their task. SmolLM2-135M-Instruct
with LoRA on q_proj and v_proj learns them while `GradientCapture` takes its rows, and then the defaults are asked,
knowing nothing of the kind or the tasks.

The table is that of `other_noise.py`. Without queries there are no probabilities, so `DatasetFilter()` refuses.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import prompts
from datasets import Dataset
from glue import load
from other_noise import aucs, made_of, options, tabulate
from series import add_model, named

from hf_influence.attribution import attribute
from hf_influence.evaluation import corrupt_answers
from hf_influence.evaluation.benchmarks import sentence_transformations

METHODS = ("auto", "prompt_gain", "loss_mean", "loss", "vote_mean", "vote", "kernel_ridge", "datainf", "self_ip")
WITHOUT_QUERIES = ("auto", "prompt_gain", "loss_mean", "loss", "self_ip")
NAMES = (" negative", " positive")


class Kind(NamedTuple):
    """Of answers and of noise."""

    share: float = 0.2
    """Of the answers that are wrong."""
    rows: int = 200
    queries: int = 50
    labels: bool = False
    """The answers are the names of two classes."""


KINDS = {
    "5 %": Kind(share=0.05),
    "20 %": Kind(),
    "40 %": Kind(share=0.4),
    "20 %, 10 queries": Kind(queries=10),
    "20 %, no queries": Kind(queries=0),
    "names of classes, none wrong": Kind(share=0.0, rows=400, labels=True),
    "names of classes, 20 %": Kind(rows=400, labels=True),
}


def right_rows(kind: Kind, data: Path | None, seed: int) -> tuple[Dataset, Dataset]:
    """Training rows and queries: prompt, answer, task, text."""
    if not kind.labels:
        made = sentence_transformations(train=kind.rows, test=max(kind.queries, 10), seed=seed)
        return made["train"], made["test"].select(range(kind.queries))
    rows = load("sst2", ["train"], data).shuffle(seed=seed).select(range(kind.rows + kind.queries))
    rows = rows.map(_named, remove_columns=rows.column_names)
    return rows.select(range(kind.rows)), rows.select(range(kind.rows, len(rows)))


def _named(row: dict[str, Any]) -> dict[str, str]:
    prompt, answer = f"Sentence: {row['text'].strip()}\nSentiment:", NAMES[row["label"]]
    return {"prompt": prompt, "answer": answer, "task": "sentiment", "text": prompt + answer}


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Method -> AUC, and what the defaults make of it."""
    kind = KINDS[name]
    rows, query = right_rows(kind, args.data, seed)
    train = corrupt_answers(rows, ["swapped_within"], kind.share, seed=seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        prompts.learn(train, query if kind.queries else None, args, seed, Path(folder))
        chosen = METHODS if kind.queries else WITHOUT_QUERIES
        scores = {method: attribute(folder, method) for method in chosen}
    found = {"made of it": made_of(scores["auto"], train)} | aucs(scores, train)
    print(f"{name}, seed {seed}: {found}", flush=True)
    return found


def main() -> None:
    made = options(__doc__, list(KINDS), epochs=3, batch_size=8, learning_rate=2e-3)
    add_model(made, prompts.MODEL)
    args = made.parse_args()
    model = named(args.model, prompts.MODEL)
    title = f"{model} + LoRA r=8, 200 rows and 50 clean queries, 400 rows where answers name classes"
    tabulate(partial(run, args=args), METHODS, title, args)


if __name__ == "__main__":
    main()
