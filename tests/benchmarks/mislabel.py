"""Which flipped labels does each method find? AUC, average precision and time of every preset on labelled texts.

    python tests/benchmarks/mislabel.py --data FOLDER --results runs/mislabel --markdown mislabel.md
    python tests/benchmarks/mislabel.py --data FOLDER --results runs/some --methods auto kernel_ridge loss

FOLDER holds `sst2/train.parquet`, `sst2/validation.parquet` and so on, as the hub has them; without `--data` the sets
are loaded from there (nyu-mll/glue). `--sets` takes others as well, of your own too: any with one text or two, in order
the columns of strings, the number of a class as `label`, and a split "test", "validation" or "dev" with clean labels.
Each run is kept in `--results` as soon as it is finished: the same command goes on after an interruption, more seeds or
ranks add to the table, and several processes may share the folder. With `--stores` the gradients of each run are kept
as well, some gigabytes: from a store that was filled to its end the methods are scored again without training.

MiniLM with LoRA on query and value learns a random part of the training set, of which a fifth has its label flipped,
with the ordinary Trainer. `GradientCapture` takes the rows of the training steps, epoch by epoch, and whole rows at the
end; the queries are clean rows of the validation or test set. What methods need beyond that is collected after
training: members of three ensembles, Kronecker factors, eigenpairs of the Hessian, in sizes (`EXTRAS`) that together
take about as long as the training. With `--methods` nothing is, and those methods alone are asked. Every method of the
table then ranks the training examples, with its defaults; those that are linear in the queries are asked for the mean
query, which gives the same figures. length_rho and duplicates_rho are the rank correlations of the scores with the
number of tokens and of copies.

All times are seconds of CPU time, so that other work on the machine does not count: in the table those of `attribute`
alone, from rows on the disk; in the result of a run also those of training and of each thing that was collected.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from glue import MODEL, Parts, add_sets, fine_tune, tokens
from series import (
    SLOW,
    add_model,
    add_stores,
    add_without,
    best,
    each,
    every_method,
    filled,
    finish,
    named,
    parser,
    runs_of,
    with_baselines,
)
from transformers import DataCollatorWithPadding, TrainerCallback

from hf_influence import collect_at, collect_ekfac, collect_hessian
from hf_influence.callbacks import GradientCapture
from hf_influence.evaluation import Run, Runs, Table, mislabel_detection
from hf_influence.evaluation.table import BASELINES
from hf_influence.gradients import adam_state
from hf_influence.points import continued_sgd, laplace, parameter_dropout
from hf_influence.pretrained import load_classifier

DROPPED, CONTINUED, STEPS, DRAWN = 3, 4, 25, 3
"""Members with weights set to zero; of continued training, and steps of each; from the Laplace posterior."""
EIGENPAIRS, ITERATIONS, EXAMPLES = 10, 20, 48
"""Of the Hessian."""
EXTRAS = (
    f"Collected beside the rows: {DROPPED} members with dropped weights, {CONTINUED} of {STEPS} more steps, {DRAWN} "
    f"from the Laplace posterior, {EIGENPAIRS} eigenpairs of the Hessian by {ITERATIONS} iterations on {EXAMPLES} "
    "examples."
)


@dataclass
class AdamState(TrainerCallback):
    """Keeps the state of the optimiser in the store that `GradientCapture` has filled, for `less`."""

    store: Path

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any) -> None:
        adam_state(model, self.store, optimizer)


def fill(store: Path, name: str, parts: Parts, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Fine-tune and collect what the methods need; what -> seconds."""
    _, tokenizer = load_classifier(args.model)
    train, query = tokens(parts.train, tokenizer), tokens(parts.query, tokenizer)
    capture = GradientCapture(store, query, during="epochs", features=True)
    model, training = timed(lambda: fine_tune(train, args, seed, capture, AdamState(store)))
    if args.methods:
        return {"training": training}
    how = {"data_collator": DataCollatorWithPadding(tokenizer)}
    at = partial(collect_at, model, {"train": train, "query": query}, store, **how)
    extras: dict[str, Callable[[], Any]] = {
        "parameter_dropout": lambda: at(parameter_dropout(DROPPED, seed=seed)),
        "continued_sgd": lambda: at(
            continued_sgd(model, train, CONTINUED, STEPS, seed=seed, folder=store / "members", **how), rows=False
        ),
        "laplace": lambda: at(laplace(model, train, DRAWN, seed=seed, **how), rows=False),
        "ekfac": lambda: collect_ekfac(model, train, store, **how),
        "hessian": lambda: collect_hessian(
            model, train, store, top=EIGENPAIRS, iterations=ITERATIONS, examples=EXAMPLES, seed=seed, **how
        ),
    }
    return {"training": training, **{extra: timed(collect)[1] for extra, collect in extras.items()}}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the seconds of CPU time that it took."""
    started = time.process_time()
    return work(), time.process_time() - started


def run(rank: int, seed: int, name: str, args: argparse.Namespace, runs: Runs) -> dict[str, Any]:
    """Fine-tune, collect and rank, or rank alone: what each method finds, and how long the rest took."""
    args = argparse.Namespace(**vars(args), rank=rank, held_out=0)
    parts = Parts.of(name, args, seed)
    given = replace(parts.given(seed), queries="mean")
    work = partial(fill, name=name, parts=parts, seed=seed, args=args)
    with filled(runs, args.stores, work, set=name, rank=rank, seed=seed) as (store, seconds):
        wrong = parts.train["is_wrong"]
        found = every_method(
            store, given, lambda _, scores: mislabel_detection(scores, wrong), args.without, args.methods
        )
    print(f"{name} r={rank} seed {seed}: {whole_seconds(seconds)}; {best(found, 'auc')}", flush=True)
    return {"methods": found, "seconds": seconds}


def whole_seconds(seconds: dict[str, float]) -> str:
    """In a line."""
    return ", ".join(f"{what} {took:.0f} s" for what, took in seconds.items())


def columns(run: Run) -> Iterator[tuple[str, Any]]:
    yield f"{run.key['set']} r={run.key['rank']}", run.result["methods"]


def main() -> None:
    options = parser(__doc__)
    add_without(options)
    options.set_defaults(without=[method for method in SLOW if method != "cg"])  # one query is no trouble for it
    options.add_argument("--methods", nargs="+", help="these alone, from the rows of training (all)")
    add_stores(options)
    add_sets(options)
    add_model(options, MODEL)
    options.add_argument("--ranks", nargs="+", type=int, default=[2, 8])
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--rows", type=int, default=1500)
    options.add_argument("--queries", type=int, default=400)
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--learning-rate", type=float, default=5e-4)
    options.add_argument("--share", type=float, default=0.2, help="of the labels that are flipped")
    args = options.parse_args()
    if args.methods:
        args.methods = with_baselines(args.methods, BASELINES)
    runs = runs_of(args, "sets", "ranks", "seeds")
    each(runs, partial(run, args=args, runs=runs), rank=args.ranks, seed=args.seeds, set=args.sets)
    title = (
        f"{named(args.model, MODEL)} + LoRA, {args.rows} training rows, {args.share:.0%} labels flipped, "
        f"{args.queries} clean queries, {args.epochs} epochs, batch {args.batch_size}, "
        f"learning rate {args.learning_rate}."
    )
    title += "" if args.methods else f" {EXTRAS}"
    beside = ("length_rho", "duplicates_rho", "seconds")
    finish(Table(title=title, metrics=("auc", "average_precision"), beside=beside), columns, runs, args)


if __name__ == "__main__":
    main()
