"""What does a language model gain when it is trained again without the answers that look wrong?

    python tests/benchmarks/retraining_answers.py --data FOLDER --results runs/again --markdown again.md

FOLDER is that of `wrong_answers.py`, which says how well each method finds the answers; sets that can be made are made
without it. A fifth of the training answers is wrong, as many of each of `--kinds`. SmolLM2-135M-Instruct with LoRA on
q_proj and v_proj learns the answers while `GradientCapture` takes their gradients, epoch by epoch and at the end. Then
it is trained again, from the same adapter and for as many steps, on

    clean      the rows whose answer is right: perfect cleaning
    drop M     without the lowest scores by method M, as many as are wrong; by `auto` in ranks within task or source
    doubtful   without what is less than twice as likely right as wrong by `auto` (`DatasetFilter(drop="doubtful")`)

and judged on other rows of the training part, clean and none of them a query: by the mean loss of the answers, by the
share of tokens that are the likeliest, and by the share of answers that are so in all their tokens, which greedy
decoding would then write. `all` is the first training. `share` is the part of the gap between a random drop and clean
that a way recovers, by the loss and by whole answers, mean over the seeds; there is none with one seed or where the gap
is within the noise.

`doubtful` goes by what is found alone. Otherwise the share to drop is known here; with data of your own it is not.

Every training is kept in `--results` as soon as it is finished.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import prompts
from datasets import Dataset
from series import Given, by_seed, each, finish_each, runs_of, scored, train_again, whole_run, with_baselines
from torch import nn

from hf_influence.evaluation import Run, Runs, Table, corrupt_answers, retraining_gain
from hf_influence.evaluation.benchmarks import tokenize
from hf_influence.evaluation.corruption_kinds import KINDS
from hf_influence.evaluation.table import BASELINES
from hf_influence.filter import DatasetFilter
from hf_influence.gradients import losses
from hf_influence.pretrained import load_language_model
from hf_influence.scores import LOG_ODDS

BOTTOM, TOP = "drop random", "clean"
JUDGED = {"loss": False, "whole answers": True}
"""By which shares of the gap are told, and whether higher is better."""


def curated(train: Dataset, store: Path, given: Given, args: argparse.Namespace) -> Iterator[tuple[str, Dataset]]:
    """The name of each way of curating, and the training rows that it leaves."""
    yield TOP, train.select([i for i, wrong in enumerate(train["is_wrong"]) if not wrong])
    for method in args.methods:
        scores = scored(store, method, given)
        yield f"drop {method}", DatasetFilter(drop=sum(train["is_wrong"])).apply(train, scores)
        if LOG_ODDS in scores.report:
            yield "doubtful", DatasetFilter(drop="doubtful").apply(train, scores)


def run(name: str, seed: int, args: argparse.Namespace, runs: Runs) -> dict[str, dict[str, float]]:
    """Way of curating -> what the model has learnt, and the wrong answers left."""
    _, tokenizer = load_language_model(args.model)
    more = argparse.Namespace(**{**vars(args), "rows": args.rows + args.held_out})
    data = prompts.load(name, more, tokenizer, seed)
    train = corrupt_answers(data["train"].select(range(args.rows)), args.kinds, args.share, seed=seed)
    held_out = tokenize(data["train"].select(range(args.rows, more.rows)), tokenizer, gradient="answer")

    def judged(way: str, model: nn.Module, rows: Dataset) -> dict[str, float]:
        told = losses(model, held_out)
        found = {
            "loss": float(told["loss"].mean()),
            "right tokens": float(told["correct"].mean()),
            "whole answers": float((told["correct"] == 1).double().mean()),
            "wrong left": sum(rows["is_wrong"]) / len(rows),
        }
        figures = ", ".join(f"{figure} {value:.3f}" for figure, value in found.items())
        print(f"{name} seed {seed}, {way}: {figures}", flush=True)
        return found

    def first(store: Path) -> tuple[str, dict[str, float], Iterator[tuple[str, Dataset]]]:
        model = prompts.learn(train, data["test"], args, seed, store)
        given = prompts.given(train, data["test"], seed)
        return "all", judged("all", model, train), curated(train, store, given, args)

    def again(way: str, rows: Dataset) -> dict[str, float]:
        tokens = tokenize(rows, tokenizer, gradient="answer")
        return judged(way, prompts.fine_tune(tokens, args, seed, steps=whole_run(args)), rows)

    return train_again(runs, first, again, set=name, seed=seed)


def columns(gains: dict[str, dict[str, Any]], run: Run) -> Iterator[tuple[str, str, Any]]:
    name = run.key["set"]
    rows = {}
    for way, found in run.result.items():
        shares = {f"share, {figure}": gains[name][figure].shares.get(way, {}).get("share") for figure in JUDGED}
        rows[way] = found | shares
    yield name, "held-out prompts", rows


def main() -> None:
    made = prompts.options(__doc__)
    made.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    made.add_argument("--share", type=float, default=0.2, help="of the answers that are wrong")
    made.add_argument("--held-out", type=int, default=150, help="clean prompts to judge retrained models by")
    made.add_argument("--methods", nargs="+", default=["auto"])
    args = prompts.parsed(made)
    args.methods = with_baselines(args.methods, BASELINES)
    runs = runs_of(args, "sets", "seeds")
    each(runs, partial(run, args=args, runs=runs), set=args.sets, seed=args.seeds)
    gains: dict[str, dict[str, Any]] = {}
    for figure, higher in JUDGED.items():
        for name, ways in by_seed(runs, figure).items():
            gain = retraining_gain(ways, bottom=BOTTOM, top=TOP, higher_is_better=higher)
            gains.setdefault(name, {})[figure] = gain
    about = f"{prompts.trained_how(args)} {args.share:.0%} of the answers wrong ({', '.join(args.kinds)})."
    tables = {
        name: Table(
            title=" ".join([about, *(f"{figure}: gap {gain.gap:.3f}." for figure, gain in own.items())]),
            metrics=("loss", "right tokens", "whole answers"),
            beside=(*(f"share, {figure}" for figure in JUDGED), "wrong left"),
            baselines=["all", TOP, *(f"drop {method}" for method in BASELINES)],
            higher_is_better=False,
        )
        for name, own in gains.items()
    }
    finish_each(tables, partial(columns, gains), runs, args)


if __name__ == "__main__":
    main()
