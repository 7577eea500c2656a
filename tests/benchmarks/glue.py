"""What the benchmarks of classifiers share: sets of texts with flipped labels, and how the classifier learns them."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Value, concatenate_datasets, get_dataset_split_names, load_dataset
from peft import LoraConfig, get_peft_model
from series import Given, add_model, add_sampling, arguments, named, parser
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, set_seed

from hf_influence.callbacks import WeightedTrainer, soft_cross_entropy
from hf_influence.errors import BadExample, BadSetting
from hf_influence.evaluation import flipped_labels
from hf_influence.pretrained import load_classifier

SETS = ("sst2", "mrpc", "qnli")
TEXTS = ("text", "text_pair")
KEPT = ("test", "validation", "validation_matched", "dev")
"""Splits that a set may keep for evaluation; the first with labels is taken."""
MODEL = "MiniLM"
MAX_TOKENS = 128
WEIGHT = "weight"


def load(name: str, splits: Sequence[str], folder: Path | None) -> Dataset:
    """The first of `splits` that the set has, with labels: `text`, `text_pair` where there are two, and `label`.

    The texts are the columns of strings, in order.
    """
    path = (name,) if "/" in name else ("nyu-mll/glue", name)
    known = [file.stem for file in (folder / name).glob("*.parquet")] if folder else get_dataset_split_names(*path)
    for split in (split for split in splits if split in known):
        rows = (
            Dataset.from_parquet(str(folder / name / f"{split}.parquet"))
            if folder
            else load_dataset(*path, split=split)
        )
        kinds = rows.features
        found = [column for column in rows.column_names if kinds[column] in (Value("string"), Value("large_string"))]
        if not 0 < len(found) <= len(TEXTS) or "label" not in kinds or "label" in found:
            raise BadExample(
                f"{name}/{split} has the columns {rows.column_names}, of which {found} are text. A set has one text or "
                "two, and the number of the class as `label`."
            )
        if min(rows["label"]) >= 0:  # labels that the hub keeps back are -1
            return rows.select_columns([*found, "label"]).rename_columns(dict(zip(found, TEXTS, strict=False)))
    raise BadSetting(f"{name} has no labelled {' or '.join(splits)} in {folder or 'the hub'}, only {known}.")


def _columns(rows: Dataset) -> list[list[str]]:
    return [list(rows[column]) for column in TEXTS if column in rows.column_names]


def texts(rows: Dataset) -> list[str]:
    return [" ".join(parts) for parts in zip(*_columns(rows), strict=True)]


def tokens(rows: Dataset, tokenizer: Any) -> Dataset:
    """Tokens and labels, and the weights where the rows have them."""
    made = Dataset.from_dict(dict(tokenizer(*_columns(rows), truncation=True, max_length=MAX_TOKENS)))
    made = made.add_column("labels", list(rows["label"]), feature=rows.features["label"])
    return made.add_column(WEIGHT, list(rows[WEIGHT])) if WEIGHT in rows.column_names else made


def training_rows(name: str, args: argparse.Namespace, seed: int) -> Dataset:
    """The training set in random order; its first `args.rows` are trained on."""
    return load(name, ["train"], args.data).shuffle(seed=seed)


def clean_rows(name: str, args: argparse.Namespace, seed: int) -> Dataset:
    """Queries and then held-out rows, none of them trained on.

    They are random rows of the split that the set keeps for evaluation. Where that is too small for the held-out rows,
    there are also rows of the training set among these, as many as are asked for or as are left.
    """
    clean = load(name, KEPT, args.data).shuffle(seed=seed)
    if args.queries > len(clean):
        raise BadSetting(f"--queries {args.queries}, and {name} keeps {len(clean)} rows for evaluation. Lower them.")
    if (lacks := args.queries + args.held_out - len(clean)) > 0:
        rows = training_rows(name, args, seed)
        left = list(range(args.rows, min(args.rows + lacks, len(rows))))  # a range at the end must not be empty
        clean = concatenate_datasets([clean, rows.select(left)])
    if args.held_out and len(clean) == args.queries:
        raise BadSetting(
            f"--queries {args.queries} and --rows {args.rows} leave no held-out row of {name}, and a row must not be "
            "both. Lower them."
        )
    return clean.select(range(min(args.queries + args.held_out, len(clean))))


class Parts(NamedTuple):
    """Random parts of a set that share no row: training rows with flipped labels, clean queries, clean held-out rows.

    They are other ones for each seed. The type of their labels says how many classes there are, also where curated rows
    lack the last.
    """

    train: Dataset
    query: Dataset
    held_out: Dataset

    @classmethod
    def of(cls, name: str, args: argparse.Namespace, seed: int) -> Parts:
        rows = training_rows(name, args, seed).select(range(args.rows))
        clean = clean_rows(name, args, seed)
        kind = ClassLabel(1 + max(max(part["label"]) for part in (rows, clean)))
        rows, clean = rows.cast_column("label", kind), clean.cast_column("label", kind)
        held_out = clean.select(list(range(args.queries, len(clean))))  # as above
        query = clean.select(range(args.queries))
        return cls(flipped_labels(rows, args.share, seed=seed), query, held_out)

    def given(self, seed: int) -> Given:
        """What the methods are passed."""
        return Given(list(self.train["label"]), texts(self.train), texts(self.query), seed)


def fine_tune(
    rows: Dataset,
    args: argparse.Namespace,
    seed: int,
    *callbacks: TrainerCallback,
    steps: int = -1,
    order: int = 0,
) -> nn.Module:
    """The classifier with LoRA on queries and values, trained on tokens; weights count where the rows have them, and
    labels may be vectors of class probabilities.

    The head, of as many classes as there are, and the adapter that it begins with depend on `seed` alone; `order` stirs
    the order of the rows and the dropout as well.
    """
    vectors, feature = isinstance(rows[0]["labels"], list), rows.features["labels"]
    classes = len(rows[0]["labels"]) if vectors else getattr(feature, "num_classes", 1 + max(rows["labels"]))
    model, tokenizer = load_classifier(args.model, max(2, classes), seed)
    set_seed(seed)
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, task_type="SEQ_CLS")
    kind = WeightedTrainer if WEIGHT in rows.column_names else Trainer
    loss = {"compute_loss_func": soft_cross_entropy} if vectors else {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        trainer = kind(
            get_peft_model(model, lora),
            arguments(folder, args, seed + 1000 * order, steps),
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=list(callbacks),
            **loss,
        )
        trainer.train()
    return trainer.model


def add_sets(made: argparse.ArgumentParser) -> None:
    """Which sets, and where they lie."""
    made.add_argument("--data", type=Path, help="folder of folders of parquet files, one file a split; the hub without")
    made.add_argument("--sets", nargs="+", default=list(SETS), help="folders there; else of GLUE, or OWNER/NAME")


def options(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options of a series on these sets, with other defaults where given."""
    made = parser(description)
    add_sets(made)
    add_model(made, MODEL)
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--rows", type=int, default=1500, help="to train on")
    made.add_argument("--queries", type=int, default=200, help="clean rows to compare with")
    made.add_argument("--held-out", type=int, default=600, help="clean rows to judge retrained models by, at most")
    made.add_argument("--share", type=float, default=0.2, help="of the labels that are flipped")
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--epochs", type=int, default=8)
    add_sampling(made)
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--learning-rate", type=float, default=5e-4)
    made.set_defaults(**defaults)
    return made


def trained_how(args: argparse.Namespace) -> str:
    """For the title of a table."""
    return (
        f"{named(args.model, MODEL)} + LoRA r={args.rank}, {args.rows} training rows, {args.share:.0%} labels flipped, "
        f"{args.queries} clean queries, {args.epochs} epochs, batch {args.batch_size} ({args.sampling}), learning rate "
        f"{args.learning_rate}."
    )
