"""How many rows does each rule drop where no label is wrong?

    python tests/benchmarks/false_alarms.py --data FOLDER --results runs/alarms --markdown alarms.md

FOLDER is that of `mislabel.py`. MiniLM with LoRA on query and value learns rows of which no label was flipped, while
`GradientCapture` takes their gradients, epoch by epoch and at the end; then every rule of `RULES` looks at the scores
that it goes with. In the cells stands the share of the rows that it drops, and below `believed wrong` what `auto`
estimates. The sets themselves may have some wrong labels, which count as false alarms here.

With `--share 0.2` that many labels are flipped, and the table says which share of the dropped rows was wrong as well: a
rule that drops nothing raises no false alarms, either. `false_alarms_answers.py` asks the same of answers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from glue import Parts, fine_tune, options, tokens, trained_how
from series import Given, each, finish, runs_of, scored

from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadSetting
from hf_influence.evaluation import Run, Runs, Table
from hf_influence.filter import DatasetFilter, discovery
from hf_influence.filter.thresholds import Threshold
from hf_influence.pretrained import load_classifier

Rule: TypeAlias = tuple[str, str | Threshold]
"""Method, and what is given to `DatasetFilter(drop=…)`."""

RULES: dict[str, Rule] = {
    "auto, doubtful": ("auto", "doubtful"),
    "auto, negative": ("auto", "negative"),
    "loss_mean, mixture": ("loss_mean", "mixture"),
    "loss_mean, otsu": ("loss_mean", "otsu"),
    "kernel_ridge, mixture": ("kernel_ridge", "mixture"),
    "kernel_ridge, negative": ("kernel_ridge", "negative"),
    "cosine, discovery(0.1)": ("cosine", discovery(0.1)),
}


def alarms(rules: Mapping[str, Rule], store: Path, given: Given, train: Dataset) -> dict[str, dict[str, float]]:
    """Rule -> share of the rows that it drops, and of these the share that is wrong; first what `auto` believes."""
    wrong = torch.tensor(train["is_wrong"])
    scores = {method: scored(store, method, given) for method in dict.fromkeys(method for method, _ in rules.values())}
    found: dict[str, dict[str, float]] = {"believed wrong": {"dropped": scores["auto"].report["estimated_share_wrong"]}}
    for rule, (method, drop) in rules.items():
        try:
            decision = DatasetFilter(drop=drop).decide(train, scores[method])
        except BadSetting as error:  # it would drop all, or goes by probabilities that are not known
            found[rule] = {"left out": str(error)}
            continue
        gone = torch.tensor([action == "drop" for action in decision.actions])
        found[rule] = {"dropped": float(gone.double().mean())}
        if wrong.any() and gone.any():
            found[rule]["wrong of them"] = float(wrong[gone].double().mean())
    return found


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What each rule drops."""
    parts = Parts.of(name, args, seed)
    _, tokenizer = load_classifier(args.model)
    train, query = tokens(parts.train, tokenizer), tokens(parts.query, tokenizer)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        fine_tune(train, args, seed, GradientCapture(Path(folder), query, during="epochs"))
        found = alarms(RULES, Path(folder), parts.given(seed), parts.train)
    print(f"{name} seed {seed}: {found}", flush=True)
    return found


def tabulate(runs: Runs, how: str, args: argparse.Namespace) -> None:
    """The table of all runs."""
    metrics = ("dropped", "wrong of them") if args.share else ("dropped",)
    title = f"Share of the rows that each rule drops. {how}"
    finish(Table(title=title, metrics=metrics, baselines=(), higher_is_better=False), columns, runs, args)


def columns(run: Run) -> Iterator[tuple[str, Any]]:
    yield run.key["set"], run.result


def main() -> None:
    made = options(__doc__, share=0.0, queries=400, held_out=0)
    args = made.parse_args()
    runs = runs_of(args, "sets", "seeds")
    each(runs, partial(run, args=args), set=args.sets, seed=args.seeds)
    tabulate(runs, trained_how(args), args)


if __name__ == "__main__":
    main()
