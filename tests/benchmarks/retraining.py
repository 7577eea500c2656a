"""What does a model gain when it is trained again on curated data? Held-out accuracy for each way of curating.

    python tests/benchmarks/retraining.py --data FOLDER --results runs/retraining --markdown retraining.md

FOLDER is that of `mislabel.py`. A fifth of the labels is flipped. MiniLM with LoRA on query and value learns the rows
while `GradientCapture` takes their gradients, epoch by epoch and at the end. Then it is trained again, from the same
head and adapter and for as many steps, on

    clean        the rows whose label was not flipped: perfect cleaning
    doubtful     without what is less than twice as likely right as wrong by `auto` (`DatasetFilter(drop="doubtful")`)
    posterior    with each label as far as it is believed: class probabilities by `auto` (`Relabel(how="posterior")`)
    drop M       without the lowest scores by method M, as many as were flipped; `drop random` is a random drop
    relabel M    with the likeliest other label for these rows, by the first of `--methods`
    reweight M   with all rows, weighed by their scores (`WeightedTrainer`), by the first of `--methods`; by `auto` as
                 far as a label is rather right than wrong (`Reweight(how="posterior")`)

and judged by its accuracy on clean held-out rows of the evaluation and the training set, none of them a query or
trained on; `noisy` is the first training. `share` is the part of the gap between noisy and clean that a way recovers,
mean over the seeds, with its jackknife standard error; there is none with one seed or where the gap is within the
noise. `wrong left` are wrong labels in the rows trained on, of class probabilities what they leave to the wrong class.

`posterior`, `doubtful` and `reweight auto` go by what is found alone; where the queries tell nothing, there is no
`posterior`. Otherwise the share to drop is known here; with data of your own it is not.

Every training is kept in `--results` as soon as it is finished. `--ways` leaves ways out that take too long, but for
`clean`, with which they are compared; a run that is finished is not taken up again for others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from glue import WEIGHT, Parts, fine_tune, options, tokens, trained_how
from series import Given, by_seed, each, finish_each, runs_of, scored, train_again, whole_run, with_baselines
from torch import nn

from hf_influence.callbacks import GradientCapture
from hf_influence.evaluation import Run, Runs, Table, retraining_gain
from hf_influence.evaluation.table import BASELINES
from hf_influence.filter import DatasetFilter, Relabel, Reweight
from hf_influence.gradients import losses
from hf_influence.pretrained import load_classifier
from hf_influence.scores import LOG_ODDS

BOTTOM, TOP = "noisy", "clean"


def curated(train: Dataset, store: Path, given: Given, args: argparse.Namespace) -> Iterator[tuple[str, Dataset]]:
    """The name of each way of curating, and what it makes of the training rows."""
    scores = {method: scored(store, method, given) for method in args.methods}
    first, trim = args.methods[0], DatasetFilter(drop=args.share)
    yield TOP, train.select([i for i, wrong in enumerate(train["is_wrong"]) if not wrong])
    for own in scores.values():
        if LOG_ODDS in own.report:
            yield "doubtful", DatasetFilter(drop="doubtful").apply(train, own)
            yield "posterior", Relabel(how="posterior", probabilities=store).apply(train, own)
    predicted = Relabel(suspects=trim, how="predicted", probabilities=store)
    yield f"relabel {first}", predicted.apply(train, scores[first])
    how = "posterior" if LOG_ODDS in scores[first].report else "softmax"
    yield f"reweight {first}", Reweight(column=WEIGHT, how=how).apply(train, scores[first])
    for method, own in scores.items():
        yield f"drop {method}", trim.apply(train, own)


def ways_of(methods: Sequence[str]) -> list[str]:
    """The names of all ways but clean, of which some may not be there."""
    first = methods[0]
    return ["doubtful", "posterior", f"relabel {first}", f"reweight {first}", *(f"drop {each}" for each in methods)]


def wrong_left(rows: Dataset) -> float:
    """The share of wrong labels; of labels that are class probabilities, what they leave to the wrong class."""
    believed = [
        label[right] if isinstance(label, list) else label == right
        for label, right in zip(rows["label"], rows["right_label"], strict=True)
    ]
    return 1 - sum(believed) / len(rows)


def run(name: str, seed: int, args: argparse.Namespace, runs: Runs) -> dict[str, dict[str, float]]:
    """Way of curating -> accuracy and wrong labels left."""
    parts = Parts.of(name, args, seed)
    _, tokenizer = load_classifier(args.model)
    held_out = tokens(parts.held_out, tokenizer)

    def judged(way: str, model: nn.Module, rows: Dataset) -> dict[str, float]:
        accuracy, left = float(losses(model, held_out)["correct"].mean()), wrong_left(rows)
        print(f"{name} seed {seed}, {way}: accuracy {accuracy:.3f}, {left:.3f} of {len(rows)} wrong", flush=True)
        return {"accuracy": accuracy, "wrong left": left}

    def first(store: Path) -> tuple[str, dict[str, float], Iterator[tuple[str, Dataset]]]:
        capture = GradientCapture(store, tokens(parts.query, tokenizer), during="epochs")
        model = fine_tune(tokens(parts.train, tokenizer), args, seed, capture)
        ways = curated(parts.train, store, parts.given(seed), args)
        asked = ((way, rows) for way, rows in ways if args.ways is None or way in (TOP, *args.ways))
        return BOTTOM, judged(BOTTOM, model, parts.train), asked

    def again(way: str, rows: Dataset) -> dict[str, float]:
        return judged(way, fine_tune(tokens(rows, tokenizer), args, seed, steps=whole_run(args)), rows)

    return train_again(runs, first, again, set=name, seed=seed)


def columns(gains: dict[str, Any], run: Run) -> Iterator[tuple[str, str, Any]]:
    name = run.key["set"]
    shares = gains[name].shares
    rows = {way: found | _share(shares.get(way, {})) for way, found in run.result.items()}
    yield name, "held-out accuracy", rows


def _share(found: dict[str, float | None]) -> dict[str, float | None]:
    return {"share": found.get("share"), "share ±": found.get("spread")}


def gap(gain: Mapping[str, Any]) -> str:
    """How much there is to gain, and whether shares of it mean anything."""
    reach = "" if gain["gap_interval"] is None else f" ± {gain['gap_interval']:.3f} (95 %)"
    told = any(found["share"] is not None for found in gain["shares"].values())
    why = "" if told else ", which is one seed's or within the noise, so there are no shares of it"
    return f"Gap between {BOTTOM} and {TOP}: {gain['gap']:.3f}{reach}{why}."


def main() -> None:
    made = options(__doc__, queries=400, held_out=3000, epochs=12)  # enough to memorise wrong labels
    made.add_argument("--methods", nargs="+", default=["auto", "loss", "ip", "datainf", "kernel_ridge"])
    made.add_argument("--ways", nargs="+", help="of curating, by the names above, to train on; all without")
    args = made.parse_args()
    args.methods = with_baselines(args.methods, BASELINES)
    known = ways_of(args.methods)
    if args.ways is not None and (not set(args.ways) & set(known) or set(args.ways) - {TOP, *known}):
        made.error(f"--ways {' '.join(map(repr, args.ways))}: name ways beside {TOP}, of {', '.join(map(repr, known))}")
    runs = runs_of(args, "sets", "seeds")
    each(runs, partial(run, args=args, runs=runs), set=args.sets, seed=args.seeds)
    gains = {
        name: retraining_gain(accuracies, bottom=BOTTOM, top=TOP)
        for name, accuracies in by_seed(runs, "accuracy").items()
    }
    baselines = [BOTTOM, TOP, *(f"drop {method}" for method in BASELINES)]
    beside = ("share", "share ±", "wrong left")
    tables = {
        name: Table(
            title=f"{trained_how(args)} At most {args.held_out} held-out rows. {gap(gain)}",
            metrics=("accuracy",),
            beside=beside,
            baselines=baselines,
        )
        for name, gain in gains.items()
    }
    finish_each(tables, partial(columns, gains), runs, args)


if __name__ == "__main__":
    main()
