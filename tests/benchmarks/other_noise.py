"""What do the defaults do where the data is not balanced, or not a fifth of its labels flipped evenly?

    python tests/benchmarks/other_noise.py --data FOLDER --results runs/other_noise --markdown other_noise.md

FOLDER is that of `mislabel.py`; of it `sst2` is used. The data of ten classes are made: the answers of the sentence
transformations, their task being the class. Some labels are turned as each of `KINDS` says, MiniLM with LoRA on query
and value learns them while `GradientCapture` takes its rows, and then the defaults are asked, knowing nothing of the
kind.

The first columns are the AUC at which methods tell the wrong labels. Beside them is what there is to know, and what
`auto` and `DatasetFilter()` make of it: `share wrong` of the labels, the share `found` by `auto`, `dropped` by the
filter, `right dropped` of the right labels, and `wrong left` of the labels that it keeps.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Value
from glue import MODEL, fine_tune, load, tokens
from series import add_model, add_sampling, each, finish, named, parser, runs_of

from hf_influence.attribution import attribute
from hf_influence.callbacks import GradientCapture
from hf_influence.evaluation import Run, Table, mislabel_detection
from hf_influence.evaluation.benchmarks import sentence_transformations
from hf_influence.filter import DatasetFilter
from hf_influence.pretrained import load_classifier
from hf_influence.scores import LOG_ODDS, Scores

METHODS = ("auto", "kernel_ridge", "kernel_ridge_mean", "loss_mean", "loss", "datainf", "self_ip")
BESIDE = ("share wrong", "found", "dropped", "right dropped", "wrong left")


class Kind(NamedTuple):
    """Of data and of noise."""

    share: float = 0.2
    """Of the labels that are wrong."""
    rows: int = 1000
    queries: int = 300
    classes: int = 2
    """2 are those of `sst2`, 10 the tasks of the sentence transformations."""
    positive: float | None = None
    """Share of rows of class 1; that of the set without."""
    of: int | None = None
    """The class whose labels are wrong; all without."""
    neighbours: bool = False
    """A wrong label is that of the next class; otherwise it is drawn from all others."""


KINDS = {
    "no label wrong": Kind(share=0.0),
    "5 %": Kind(share=0.05),
    "20 %": Kind(),
    "40 %": Kind(share=0.4),
    "20 %, all of one class": Kind(of=1),
    "10 %, a class of 15 %": Kind(share=0.1, positive=0.15),
    "20 %, 40 queries": Kind(queries=40),
    "20 % of 400 rows, 60 queries": Kind(rows=400, queries=60),
    "20 % of 200 rows": Kind(rows=200, queries=100),
    "ten classes, none wrong": Kind(share=0.0, rows=700, queries=200, classes=10),
    "ten classes, 20 %": Kind(rows=700, queries=200, classes=10),
    "ten classes, 20 % of the next": Kind(rows=700, queries=200, classes=10, neighbours=True),
}


def right_rows(kind: Kind, data: Path | None, seed: int) -> Dataset:
    """Training rows and queries in random order: text, label."""
    wanted = kind.rows + kind.queries
    if kind.classes == 2:
        rows = load("sst2", ["train"], data).shuffle(seed=seed)
        if kind.positive is None:
            return rows.select(range(wanted))
        positive = round(kind.positive * wanted)
        places = {label: [i for i, own in enumerate(rows["label"]) if own == label] for label in (0, 1)}
        chosen = places[1][:positive] + places[0][: wanted - positive]
        return rows.select(Random(seed).sample(chosen, wanted))
    made = sentence_transformations(train=wanted, test=kind.classes, seed=seed)["train"]
    tasks = sorted(set(made["task"]))
    return Dataset.from_dict({"text": made["answer"], "label": [tasks.index(task) for task in made["task"]]})


def turned(rows: Dataset, kind: Kind, seed: int) -> Dataset:
    """With wrong labels, and a column `is_wrong`."""
    rng, labels = Random(seed), list(rows["label"])
    may = [i for i, label in enumerate(labels) if kind.of in (None, label)]
    wrong = set(rng.sample(may, round(kind.share * len(labels))))
    for i in sorted(wrong):
        labels[i] = (labels[i] + (1 if kind.neighbours else rng.randrange(1, kind.classes))) % kind.classes
    rows = rows.remove_columns("label").add_column("label", labels)
    return rows.add_column("is_wrong", [i in wrong for i in range(len(rows))], feature=Value("bool"))


def made_of(scores: Scores, train: Dataset) -> dict[str, float]:
    """What `auto` and the filter make of it; nothing where its scores are no log-odds, which the filter refuses."""
    if LOG_ODDS not in scores.report:
        return {}
    wrong = torch.tensor(train["is_wrong"])
    gone = torch.tensor([action == "drop" for action in DatasetFilter().decide(train, scores).actions])
    values: Sequence[Any] = (
        wrong.double().mean(),
        scores.report["estimated_share_wrong"],
        gone.double().mean(),
        gone[~wrong].double().mean(),
        wrong[~gone].double().mean(),
    )
    return dict(zip(BESIDE, map(float, values), strict=True))


def aucs(scores: Mapping[str, Scores], train: Dataset) -> dict[str, dict[str, float]]:
    """Method -> AUC; nothing where none is wrong."""
    wrong = train["is_wrong"][:]
    return {method: {"auc": mislabel_detection(own, wrong)["auc"]} for method, own in scores.items() if any(wrong)}


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Method -> AUC, and what the defaults make of it."""
    kind = KINDS[name]
    rows = right_rows(kind, args.data, seed)
    train = turned(rows.select(range(kind.rows)), kind, seed)
    _, tokenizer = load_classifier(args.model)
    encoded = tokens(train, tokenizer)
    query = tokens(rows.select(range(kind.rows, len(rows))), tokenizer)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        capture = GradientCapture(Path(folder), query, during="epochs")
        fine_tune(encoded, args, seed, capture)
        scores = {method: attribute(folder, method) for method in METHODS}
    found = {"made of it": made_of(scores["auto"], train)} | aucs(scores, train)
    print(f"{name}, seed {seed}: {found}", flush=True)
    return found


def options(description: str | None, kinds: Sequence[str], **defaults: Any) -> argparse.ArgumentParser:
    """The options of a series on these kinds, with defaults for epochs, batch size and learning rate."""
    made = parser(description)
    made.add_argument("--data", type=Path, help="folder of parquet files; the hub without")
    made.add_argument("--kinds", nargs="+", default=kinds, choices=kinds, metavar="KIND")
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--epochs", type=int)
    add_sampling(made)
    made.add_argument("--batch-size", type=int)
    made.add_argument("--learning-rate", type=float)
    made.set_defaults(**defaults)
    return made


def columns(methods: Sequence[str], run: Run) -> Iterator[tuple[str, Any]]:
    kind, (made, found) = run.key["kind"], (run.result["made of it"], run.result)
    for method in methods:
        yield method, {kind: found.get(method, {}) | (made if method == methods[0] else {})}


def tabulate(work: Callable[..., Any], methods: Sequence[str], title: str, args: argparse.Namespace) -> None:
    """The table of all runs; `work` takes a kind and a seed."""
    runs = runs_of(args, "kinds", "seeds")
    each(runs, work, kind=args.kinds, seed=args.seeds)
    how = f"{args.epochs} epochs, batch {args.batch_size} ({args.sampling}), learning rate {args.learning_rate}."
    table = Table(title=f"{title}, {how}", metrics=("auc",), beside=BESIDE, baselines=())
    finish(table, partial(columns, methods), runs, args)


def main() -> None:
    made = options(__doc__, list(KINDS), epochs=6, batch_size=16, learning_rate=5e-4)
    made.add_argument("--rank", type=int, default=8)
    add_model(made, MODEL)
    args = made.parse_args()
    size = "1000 rows and 300 clean queries of two classes or 700 and 200 of ten"
    title = f"{named(args.model, MODEL)} + LoRA r={args.rank}, {size}"
    tabulate(partial(run, args=args), METHODS, title, args)


if __name__ == "__main__":
    main()
