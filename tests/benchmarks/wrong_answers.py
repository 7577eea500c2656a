"""Which wrong answers does each method find? AUC of every method for each kind of mistake, on three sets of prompts.

    python tests/benchmarks/wrong_answers.py --data FOLDER --results runs/answers --markdown answers.md

FOLDER holds `sentence_transformations` and `math_with_reasoning` (columns prompt, text, task) and `instructions`
(instruction, input, output, source), each with `train.parquet` and `test.parquet`; `--sets` takes others as well, of
your own too (prompt and completion, for instance). Without `--data` the first two are made by
`hf_influence.evaluation.benchmarks`. Each run is kept in `--results` as soon as it is finished.

A fifth of the training answers is wrong, as many of each kind of `corrupt_answers`. SmolLM2-135M-Instruct with LoRA on
q_proj and v_proj learns the answers with the ordinary Trainer. `GradientCapture` takes the rows of the training steps,
epoch by epoch, and whole rows at the end, both of the answer alone; the queries are clean rows of the test part.

One run plants all kinds: that is what real data are like, and one training costs a sixth of six. The column of a kind
has its own mistakes against all right answers, the other kinds out of the ranking; with 200 rows these are 6 or 7 a
run, so read it over several seeds. But what the model learns of one kind may depend on the others: `--apart` trains
once for each kind, which then is the whole fifth. A kind that too few rows of a set allow is named and left out there.

`within` is the AUC of the ranks within each task or source: without what is found only because one task is harder than
another. `auto` is told the tasks (`groups`), and ranks within them from the first. Time is that of `attribute` alone,
from rows on the disk.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import prompts
from datasets import Dataset
from series import add_stores, add_without, best, every_method, filled, finish_each, runs_of

from hf_influence.errors import BadSetting
from hf_influence.evaluation import Run, Runs, Table, corrupt_answers, mislabel_detection
from hf_influence.evaluation.corruption_kinds import KINDS
from hf_influence.pretrained import load_language_model
from hf_influence.scores import Scores

ALL = "all kinds"


def figures(train: Dataset, method: str, scores: Scores) -> dict[str, Any]:
    """Overall and for each kind, among all rows and within tasks."""
    about: dict[str, Any] = {"is_mislabeled": train["is_wrong"], "kinds": train["kind"]}
    whole, within = mislabel_detection(scores, **about), mislabel_detection(scores, within=train["task"], **about)
    kinds = {kind: {"auc": auc, "within": within.auc_by_kind[kind]} for kind, auc in whole.auc_by_kind.items()}
    return {"auc": whole.auc, "within": within.auc, "average_precision": whole.average_precision, "kinds": kinds}


def run(name: str, kinds: tuple[str, ...], seed: int, args: argparse.Namespace, runs: Runs) -> dict[str, Any]:
    """Plant, fine-tune, capture and rank: `methods` with what each finds, or `left out` with the reason."""
    _, tokenizer = load_language_model(args.model)
    data = prompts.load(name, args, tokenizer, seed)
    try:
        train = corrupt_answers(data["train"], kinds, args.share, seed=seed)
    except BadSetting as error:
        if not args.apart:
            raise
        print(f"{name}, {', '.join(kinds)}, seed {seed} is left out: {error}", flush=True)
        return {"left out": str(error)}

    def fill(store: Path) -> None:
        prompts.learn(train, data["test"], args, seed, store)

    with filled(runs, args.stores, fill, set=name, kinds="+".join(kinds), seed=seed) as (store, _):
        found = every_method(store, prompts.given(train, data["test"], seed), partial(figures, train), args.without)
    print(f"{name}, {', '.join(kinds)}, seed {seed}: {best(found, 'auc')}", flush=True)
    return {"methods": found}


def columns(run: Run) -> Iterator[tuple[str, str, Any]]:
    """The kinds of a mixed run, or the one kind of another."""
    found, kinds = run.result.get("methods", {}), run.key["kind"]
    if found:
        yield run.key["set"], kinds, found
    if kinds != ALL:
        return
    for kind in KINDS:
        rows = {method: row["kinds"][kind] for method, row in found.items() if kind in row.get("kinds", ())}
        if rows:
            yield run.key["set"], kind, rows


def main() -> None:
    made = prompts.options(__doc__)
    add_without(made)
    add_stores(made)
    made.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    made.add_argument("--apart", action="store_true", help="a training for each kind, which is all of the share")
    made.add_argument("--share", type=float, default=0.2, help="of the answers that are wrong")
    args = prompts.parsed(made)
    runs = runs_of(args, "sets", "seeds", *(["kinds"] if args.apart else []))
    series = {kind: (kind,) for kind in args.kinds} if args.apart else {ALL: tuple(args.kinds)}
    for name in args.sets:
        for kind, kinds in series.items():
            for seed in args.seeds:
                key = {"set": name, "kind": kind, "seed": seed}
                runs.do(key, partial(run, name, kinds, seed, args, runs))
    how = "each kind in its own runs" if args.apart else "all kinds mixed"
    about = f"{prompts.trained_how(args)} {args.share:.0%} of the answers wrong, {how}."
    left_out: dict[str, list[str]] = {run.key["set"]: [] for run in runs}
    for one in runs:
        if reason := one.result.get("left out"):
            left_out[one.key["set"]].append(f" No {one.key['kind']} for seed {one.key['seed']}: {reason}")
    beside = ("average_precision", "length_rho", "duplicates_rho", "seconds")
    tables = {
        name: Table(title="".join([about, *notes]), metrics=("auc", "within"), beside=beside)
        for name, notes in left_out.items()
    }
    finish_each(tables, columns, runs, args)


if __name__ == "__main__":
    main()
