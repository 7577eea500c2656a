"""Which flipped labels does each method find? AUC, average precision and time of every preset on GLUE sets.

    python tests/benchmarks/mislabel.py --data FOLDER --results runs/mislabel --markdown mislabel.md

FOLDER holds `sst2/train.parquet` and so on, as the hub has them (columns sentence | sentence1, sentence2 | question,
sentence; label); without `--data` the sets are loaded from the hub (nyu-mll/glue). Each run is kept in `--results` as
soon as it is finished: the same command goes on after an interruption, more seeds or ranks add to the table.

MiniLM with LoRA on query and value learns a random part of the training set, of which a fifth has its label flipped,
with the ordinary Trainer. `GradientCapture` takes the rows of the training steps, epoch by epoch, and whole rows at the
end; the queries are clean rows of the validation or test set. Every method of the table then ranks the training
examples, with its defaults. Time is that of `attribute` alone, from rows on the disk; length_rho and duplicates_rho are
the rank correlations of the scores with the number of tokens and of copies.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from glue import TEXTS, Parts, fine_tune, tokens
from series import add_without, best, each, every_method, finish, parser, runs_of

from hf_influence.callbacks import GradientCapture
from hf_influence.evaluation import Run, Table, mislabel_detection
from hf_influence.pretrained import load_classifier


def run(name: str, rank: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune, capture and rank: what each method finds, and how long the training took."""
    args = argparse.Namespace(**vars(args), rank=rank, held_out=0)
    parts = Parts.of(name, args, seed)
    _, tokenizer = load_classifier()
    rows, wrong = tokens(parts.train, name, tokenizer), parts.train["is_wrong"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store = Path(folder)
        started = time.perf_counter()
        fine_tune(rows, args, seed, GradientCapture(store, tokens(parts.query, name, tokenizer), during="epochs"))
        seconds = time.perf_counter() - started
        given = parts.given(name, seed)
        found = every_method(store, given, lambda _, scores: mislabel_detection(scores, wrong), args.without)
    print(f"{name} r={rank} seed {seed}: training {seconds:.0f} s; {best(found, 'auc')}", flush=True)
    return {"methods": found, "training_seconds": seconds}


def columns(run: Run) -> Iterator[tuple[str, Any]]:
    yield f"{run.key['set']} r={run.key['rank']}", run.result["methods"]


def main() -> None:
    options = parser(__doc__)
    add_without(options)
    options.add_argument("--data", type=Path, help="folder of parquet files; the hub without")
    options.add_argument("--sets", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    options.add_argument("--ranks", nargs="+", type=int, default=[2, 8])
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--rows", type=int, default=1500)
    options.add_argument("--queries", type=int, default=400)
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--learning-rate", type=float, default=5e-4)
    options.add_argument("--share", type=float, default=0.2, help="of the labels that are flipped")
    args = options.parse_args()
    runs = runs_of(args, "sets", "ranks", "seeds")
    each(runs, partial(run, args=args), set=args.sets, rank=args.ranks, seed=args.seeds)
    title = (
        f"MiniLM + LoRA, {args.rows} training rows, {args.share:.0%} labels flipped, {args.queries} clean queries, "
        f"{args.epochs} epochs, batch {args.batch_size}, learning rate {args.learning_rate}."
    )
    beside = ("length_rho", "duplicates_rho", "seconds")
    finish(Table(title=title, metrics=("auc", "average_precision"), beside=beside), columns, runs, args)


if __name__ == "__main__":
    main()
