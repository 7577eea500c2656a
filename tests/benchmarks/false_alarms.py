"""How many rows does each rule drop where no label is wrong?

    python tests/benchmarks/false_alarms.py --data FOLDER --results runs/alarms --markdown alarms.md

FOLDER is that of `mislabel.py`. MiniLM with LoRA on query and value learns rows of which no label was flipped, while
`GradientCapture` takes their gradients, epoch by epoch and at the end; then every rule of `RULES` looks at the scores
that it goes with. In the cells stands the share of the rows that it drops, and below `believed wrong` what `auto`
estimates. The sets themselves may have some wrong labels, which count as false alarms here.

With `--share 0.2` that many labels are flipped, and the table says which share of the dropped rows was wrong as well: a
rule that drops nothing raises no false alarms, either.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from glue import Parts, fine_tune, options, tokens, trained_how
from series import each, finish, runs_of, scored

from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadSetting
from hf_influence.evaluation import Run, Table
from hf_influence.filter import DatasetFilter, discovery
from hf_influence.filter.thresholds import Threshold
from hf_influence.pretrained import load_classifier

RULES: dict[str, tuple[str, str | Threshold]] = {
    "auto, doubtful": ("auto", "doubtful"),
    "auto, negative": ("auto", "negative"),
    "loss_mean, mixture": ("loss_mean", "mixture"),
    "loss_mean, otsu": ("loss_mean", "otsu"),
    "kernel_ridge, mixture": ("kernel_ridge", "mixture"),
    "kernel_ridge, negative": ("kernel_ridge", "negative"),
    "cosine, discovery(0.1)": ("cosine", discovery(0.1)),
}
"""Name -> method and what is given to `DatasetFilter(drop=…)`."""


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Rule -> share of the rows that it drops, and of these the share that is wrong."""
    parts = Parts.of(name, args, seed)
    _, tokenizer = load_classifier()
    train, query = tokens(parts.train, name, tokenizer), tokens(parts.query, name, tokenizer)
    wrong = torch.tensor(parts.train["is_wrong"])
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        fine_tune(train, args, seed, GradientCapture(Path(folder), query, during="epochs"))
        methods = dict.fromkeys(method for method, _ in RULES.values())
        scores = {method: scored(Path(folder), method, parts.given(name, seed)) for method in methods}
        found["believed wrong"] = {"dropped": scores["auto"].report["estimated_share_wrong"]}
        for rule, (method, drop) in RULES.items():
            try:
                decision = DatasetFilter(drop=drop).decide(parts.train, scores[method])
            except BadSetting as error:  # it would drop all, or goes by probabilities that are not known
                found[rule] = {"left out": str(error)}
                continue
            gone = torch.tensor([action == "drop" for action in decision.actions])
            found[rule] = {"dropped": float(gone.double().mean())}
            if args.share and gone.any():
                found[rule]["wrong of them"] = float(wrong[gone].double().mean())
    print(f"{name} seed {seed}: {found}", flush=True)
    return found


def columns(run: Run) -> Iterator[tuple[str, Any]]:
    yield run.key["set"], run.result


def main() -> None:
    made = options(__doc__, share=0.0, queries=400, held_out=0)
    args = made.parse_args()
    runs = runs_of(args, "sets", "seeds")
    each(runs, partial(run, args=args), set=args.sets, seed=args.seeds)
    metrics = ("dropped", "wrong of them") if args.share else ("dropped",)
    title = f"Share of the rows that each rule drops. {trained_how(args)}"
    finish(Table(title=title, metrics=metrics, baselines=(), higher_is_better=False), columns, runs, args)


if __name__ == "__main__":
    main()
