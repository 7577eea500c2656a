"""What the benchmarks of language models share: sets of prompts and answers, and how the language model learns them."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from series import Given, add_model, add_sampling, arguments, named, parser
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, set_seed

from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadExample, BadSetting
from hf_influence.evaluation.benchmarks import math_problems, sentence_transformations, tokenize
from hf_influence.pretrained import load_language_model

MADE: dict[str, Callable[..., DatasetDict]] = {
    "sentence_transformations": sentence_transformations,
    "math_with_reasoning": partial(math_problems, reasoning=True),
}
"""Sets that can be made where there is no folder."""
SETS = (*MADE, "instructions")
MODEL = "SmolLM2-135M-Instruct"
ASKED = ("instruction", "input")
ANSWERS = ("answer", "completion", "response", "output")
KEPT = ("test", "validation", "dev")
"""Splits that a set may keep for evaluation."""


def load(name: str, args: argparse.Namespace, tokenizer: Any, seed: int) -> DatasetDict:
    """`train` and `test`, `args.rows` and `args.queries` rows, with prompt, answer, task and text (prompt + answer).

    From a folder they are drawn at random among the rows of at most `args.max_tokens` tokens: cutting the others would
    make answers wrong that nobody has planted.
    """
    if args.data is None:
        if name not in MADE:
            raise BadSetting(f"{name} cannot be made, {' and '.join(MADE)} can. Give its folder: --data FOLDER.")
        return MADE[name](train=args.rows, test=args.queries, seed=seed)
    kept = next((split for split in KEPT if (args.data / name / f"{split}.parquet").exists()), KEPT[0])
    splits = {"train": ("train", args.rows), "test": (kept, args.queries)}
    return DatasetDict({ours: _drawn(name, *theirs, args, tokenizer, seed) for ours, theirs in splits.items()})


def _drawn(name: str, split: str, size: int, args: argparse.Namespace, tokenizer: Any, seed: int) -> Dataset:
    rows = Dataset.from_parquet(str(args.data / name / f"{split}.parquet"))
    if not {"prompt", "instruction"} & set(rows.column_names) or not {*ANSWERS, "text"} & set(rows.column_names):
        raise BadExample(
            f"{name}/{split} has the columns {rows.column_names}. A set has `prompt`, or `instruction` and `input`; "
            f"one of {', '.join(ANSWERS)}, or `text` that begins with the prompt; `task` or `source`, if it has any."
        )
    rows = rows.map(_example, remove_columns=rows.column_names)
    lengths = [len(ids) for ids in tokenizer(list(rows["text"]))["input_ids"]]
    rows = rows.select([i for i, length in enumerate(lengths) if length <= args.max_tokens])
    if size > len(rows):
        raise BadExample(
            f"{name}/{split} has {len(rows)} rows of at most {args.max_tokens} tokens, and {size} are asked for. Lower "
            "--rows or --queries, or raise --max-tokens."
        )
    return rows.shuffle(seed=seed).select(range(size))


def _example(row: dict[str, str]) -> dict[str, str]:
    """Prompt, answer, task and text of a row that has them, or an instruction, under one of the names."""
    task = next((row[name] for name in ("task", "source") if name in row), "")
    prompt = row["prompt"] if "prompt" in row else "".join(f"{row[name]}\n" for name in ASKED if row.get(name))
    answer = next((row[name] for name in ANSWERS if name in row), None)
    if answer is None:
        text = row.get("text") or ""
        if not text.startswith(prompt):
            raise BadExample(
                f"a row has no answer, and its text {text[:40]!r} does not begin with its prompt {prompt[:40]!r}, so "
                f"none can be read off it. Give one of {', '.join(ANSWERS)}, or `text` that begins with the prompt."
            )
        answer = text.removeprefix(prompt)
    return {"prompt": prompt, "answer": answer, "task": task, "text": prompt + answer}


def given(train: Dataset, query: Dataset, seed: int) -> Given:
    """What the methods are passed; those that can rank within tasks."""
    tasks = list(train["task"])
    return Given(tasks, list(train["text"]), list(query["text"]), seed, groups=tasks)


def fine_tune(
    rows: Dataset, args: argparse.Namespace, seed: int, *callbacks: TrainerCallback, steps: int = -1
) -> nn.Module:
    """The language model with LoRA on queries and values, trained on tokens.

    The adapter that it begins with depends on `seed` alone.
    """
    model, tokenizer = load_language_model(args.model)
    set_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        trainer = Trainer(
            get_peft_model(model, lora),
            arguments(folder, args, seed, steps),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=list(callbacks),
        )
        trainer.train()
    return trainer.model


def learn(train: Dataset, query: Dataset | None, args: argparse.Namespace, seed: int, store: Path) -> nn.Module:
    """The model that has learnt the answers; `store` gets their gradients, epoch by epoch and at the end."""
    _, tokenizer = load_language_model(args.model)
    rows, clean = (None if part is None else tokenize(part, tokenizer, gradient="answer") for part in (train, query))
    return fine_tune(rows, args, seed, GradientCapture(store, clean, during="epochs"))


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of a series on these sets; `parsed` reads them."""
    made = parser(description)
    made.add_argument("--data", type=Path, help="folder of sets; without, those that can be made are")
    made.add_argument("--sets", nargs="+", help="folders there, or sets that can be made; all known ones by default")
    add_model(made, MODEL)
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--rows", type=int, default=200, help="to train on")
    made.add_argument("--queries", type=int, default=50, help="clean rows to compare with")
    made.add_argument("--max-tokens", type=int, default=256, help="longer rows of the folder are not drawn")
    made.add_argument("--epochs", type=int, default=3)
    add_sampling(made)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--learning-rate", type=float, default=2e-3)
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given; `made`, whether the sets are, is one of them, so that the two are not mixed in one table."""
    args = made.parse_args()
    args.made = args.data is None
    args.sets = args.sets or list(MADE if args.made else SETS)
    return args


def trained_how(args: argparse.Namespace) -> str:
    """For the title of a table."""
    return (
        f"{named(args.model, MODEL)} + LoRA r=8, {args.rows} training rows, {args.queries} clean queries, "
        f"{'generated' if args.made else 'given'} data, {args.epochs} epochs, batch {args.batch_size} "
        f"({args.sampling}), learning rate {args.learning_rate}."
    )
