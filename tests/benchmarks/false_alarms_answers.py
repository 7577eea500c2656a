"""How many answers does each rule drop where none is wrong?

    python tests/benchmarks/false_alarms_answers.py --data FOLDER --results runs/alarms --markdown alarms.md

FOLDER is that of `wrong_answers.py`; the table is that of `false_alarms.py`. SmolLM2-135M-Instruct with LoRA on q_proj
and v_proj learns answers of which none was spoilt, while `GradientCapture` takes their gradients, epoch by epoch and at
the end, and reads them after other prompts; `auto` is told the tasks. The sets themselves may have some wrong answers.

With `--share 0.2` that many are spoilt, as many of each of `--kinds`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import prompts
from false_alarms import Rule, alarms, tabulate
from series import add_stores, each, filled, runs_of

from hf_influence.evaluation import Runs, corrupt_answers
from hf_influence.evaluation.corruption_kinds import KINDS
from hf_influence.pretrained import load_language_model

RULES: dict[str, Rule] = {
    "auto, doubtful": ("auto", "doubtful"),
    "auto, negative": ("auto", "negative"),
    "prompt_gain, mixture": ("prompt_gain", "mixture"),
    "prompt_gain, negative": ("prompt_gain", "negative"),
    "loss_mean, mixture": ("loss_mean", "mixture"),
    "loss_mean, otsu": ("loss_mean", "otsu"),
}


def run(name: str, seed: int, args: argparse.Namespace, runs: Runs) -> dict[str, dict[str, float]]:
    """What each rule drops."""
    _, tokenizer = load_language_model(args.model)
    data = prompts.load(name, args, tokenizer, seed)
    train = corrupt_answers(data["train"], args.kinds, args.share, seed=seed)

    def fill(store: Path) -> None:
        prompts.learn(train, data["test"], args, seed, store)

    with filled(runs, args.stores, fill, set=name, share=args.share, seed=seed) as (store, _):
        found = alarms(RULES, store, prompts.given(train, data["test"], seed), train)
    print(f"{name} seed {seed}: {found}", flush=True)
    return found


def main() -> None:
    made = prompts.options(__doc__)
    made.add_argument("--kinds", nargs="+", default=["swapped_within"], choices=list(KINDS))
    made.add_argument("--share", type=float, default=0.0, help="of the answers that are wrong")
    add_stores(made)
    args = prompts.parsed(made)
    runs = runs_of(args, "sets", "seeds")
    each(runs, partial(run, args=args, runs=runs), set=args.sets, seed=args.seeds)
    tabulate(runs, f"{prompts.trained_how(args)} {args.share:.0%} of the answers wrong.", args)


if __name__ == "__main__":
    main()
