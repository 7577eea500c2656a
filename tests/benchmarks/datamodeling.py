"""Do sums of scores predict what training on half of the data gives? Linear datamodeling score of every method.

    python tests/benchmarks/datamodeling.py --data FOLDER --results runs/datamodeling --markdown datamodeling.md

FOLDER is that of `mislabel.py`. Nothing is planted (`--share` flips labels). MiniLM with LoRA on query and value learns
a part of the training set while `GradientCapture` takes the rows, epoch by epoch and at the end; then it learns random
halves of that part, from the same head and adapter and for as many epochs, each half `--trainings` times in another
order and with other dropout. What is foretold is the mean loss of each clean query over these trainings.

Rank correlations, 1 is best and 0 chance. The row `training again` is no method: it predicts the losses of the first
half of the trainings from those of the other half, and shows how much the order and the dropout alone decide. Methods
are held against the mean of all trainings, so a good one may come out above it. `bootstrap` is the standard deviation
of the score when subsets and queries are drawn anew.

Every training is kept in `--results` as soon as it is finished.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from glue import Parts, fine_tune, options, tokens, trained_how
from series import best, each, every_method, finish, on_the_way, runs_of
from torch import Tensor

from hf_influence.attribution import methods
from hf_influence.callbacks import GradientCapture
from hf_influence.evaluation import Run, Runs, Table, draw_subsets, lds, retrain_on_subsets
from hf_influence.evaluation.table import BASELINES
from hf_influence.gradients import losses
from hf_influence.pretrained import load_classifier
from hf_influence.scores import Scores

AGAIN = "training again"


def figures(measured: Tensor, subsets: Tensor, method: str, scores: Scores) -> dict[str, Any]:
    """The score of a method; one column that stands for all queries is held against their mean loss."""
    if scores.query_ids is not None and len(scores.query_ids) != measured.shape[1]:
        measured = measured.mean(1, keepdim=True)
    found = lds(scores, measured, subsets)
    return {"lds": found.lds, "bootstrap": found.spread, "low": found.low, "high": found.high}


def training_again(all_losses: Tensor) -> dict[str, dict[str, Any]]:
    """How well half of the trainings predict the others, from the losses `[t, k, m]` of all."""
    if len(all_losses) < 2:
        return {AGAIN: {"left out": "it takes --trainings 2 or more"}}
    half = len(all_losses) // 2
    subsets, queries = list(range(all_losses.shape[1])), list(range(all_losses.shape[2]))
    scores = Scores(-all_losses[half:].mean(0), subsets, AGAIN, query_ids=queries)  # [k, m]: one row is all of a subset
    return {AGAIN: figures(all_losses[:half].mean(0), torch.eye(len(subsets), dtype=torch.bool), AGAIN, scores)}


def run(name: str, seed: int, args: argparse.Namespace, runs: Runs) -> dict[str, dict[str, Any]]:
    """Method -> figures."""
    parts = Parts.of(name, args, seed)
    _, tokenizer = load_classifier(args.model)
    train, query = tokens(parts.train, tokenizer), tokens(parts.query, tokenizer)
    subsets = draw_subsets(len(train), args.subsets, seed=seed)

    def retrain(order: int, rows: Dataset) -> Tensor:
        return losses(fine_tune(rows, args, seed, order=order), query)["loss"]

    all_losses = torch.stack(
        [
            retrain_on_subsets(train, partial(retrain, order), subsets, on_the_way(runs, set=name, seed=seed, no=order))
            for order in range(1, args.trainings + 1)
        ]
    )  # [t, k, m]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store = Path(folder)
        fine_tune(train, args, seed, GradientCapture(store, query, during="epochs"))
        found = every_method(store, parts.given(seed), partial(figures, all_losses.mean(0), subsets))
    about = methods()
    found = {method: row for method, row in found.items() if "queries" in about[method].needs or method in BASELINES}
    found |= training_again(all_losses)
    print(f"{name} seed {seed}: {best(found, 'lds')}", flush=True)
    return found


def columns(run: Run) -> Iterator[tuple[str, Any]]:
    yield run.key["set"], run.result


def main() -> None:
    made = options(__doc__, rows=300, queries=100, held_out=0, epochs=5, learning_rate=1e-3, share=0.0)
    made.add_argument("--subsets", type=int, default=32, help="random halves of the training rows, at least 32")
    made.add_argument("--trainings", type=int, default=2, help="of each half")
    args = made.parse_args()
    runs = runs_of(args, "sets", "seeds")
    each(runs, partial(run, args=args, runs=runs), set=args.sets, seed=args.seeds)
    title = f"Linear datamodeling score, {args.subsets} halves trained on {args.trainings} times. {trained_how(args)}"
    beside = ("bootstrap", "length_rho", "duplicates_rho", "seconds")
    finish(Table(title=title, metrics=("lds",), beside=beside), columns, runs, args)


if __name__ == "__main__":
    main()
