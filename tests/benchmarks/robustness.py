"""Does curating by the robustness target make a model harder to attack? Accuracy under attack for each remedy.

    python tests/benchmarks/robustness.py --data FOLDER --results runs/robustness --markdown robustness.md

FOLDER is that of `mislabel.py`. A share of the labels is flipped (`--share 0` for the papers' setting, where nothing is
planted and nothing is known to be wrong). MiniLM with LoRA on query and value learns the rows, their gradients are
taken at the end, and so is that of the loss of clean held-out queries under attack (`collect_target`, `robustness`):
the adversary moves the embeddings of each query by `--epsilon` along the gradient of its loss, in `--steps` steps.
Each method ranks the training rows by that target. Then the model is trained again, from the same head and adapter and
for as many steps, with one of the papers' three remedies:

    trim       without the lowest scores, the share `--drop` of the rows
    relabel    with the other label for these rows, or the likeliest other one of several
    reweight   with all rows, the softmax of their standardised scores as weights (`WeightedTrainer`)

and judged on other clean held-out rows by its accuracy under the same attack, made anew for each model, and without
an attack. `noisy` is the first training, the same under each remedy; `clean` drops what was flipped, or gives it its
right label back. `random`, `loss` and `length` are what any method has to beat. `auc` says how well the scores find the
flipped labels.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from glue import WEIGHT, Parts, fine_tune, options, tokens, trained_how
from series import PLAIN, each, finish, runs_of, scored, whole_run, with_baselines
from torch import nn

from hf_influence import collect, collect_target, robustness
from hf_influence.evaluation import Run, Table, accuracy_under_attack, mislabel_detection
from hf_influence.filter import DatasetFilter, Relabel, Reweight
from hf_influence.gradients import losses
from hf_influence.pretrained import load_classifier
from hf_influence.scores import Scores

REMEDIES = ("trim", "relabel", "reweight")

Figures = dict[str, dict[str, dict[str, float]]]
"""Remedy -> training set -> figures."""


def cured(train: Dataset, scores: Scores, store: Path, drop: float) -> dict[str, Dataset]:
    """What each remedy makes of the training rows."""
    trim = DatasetFilter(drop=drop)
    cures = (
        trim.apply(train, scores),
        Relabel(suspects=trim, how="predicted", probabilities=store).apply(train, scores),
        Reweight(column=WEIGHT).apply(train, scores),
    )
    return dict(zip(REMEDIES, cures, strict=True))


def run(name: str, seed: int, args: argparse.Namespace) -> Figures:
    """What is left of the accuracy after each way of curating."""
    parts = Parts.of(name, args, seed)
    _, tokenizer = load_classifier(args.model)
    attack = robustness(args.epsilon, args.steps, direction=args.direction)
    held_out, wrong = tokens(parts.held_out, tokenizer), parts.train["is_wrong"]
    found: Figures = {remedy: {} for remedy in REMEDIES}

    def judge(remedy: str, row: str, model: nn.Module, **more: float) -> None:
        accuracy = float(losses(model, held_out)["correct"].double().mean())
        figures = {"attacked": accuracy_under_attack(model, held_out, attack), "accuracy": accuracy, **more}
        found[remedy][row] = figures
        line = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
        print(f"{name} seed {seed}, {remedy} {row}: {line}", flush=True)

    def again(rows: Dataset) -> nn.Module:
        return fine_tune(tokens(rows, tokenizer), args, seed, steps=whole_run(args))

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        rows = tokens(parts.train, tokenizer)
        model = fine_tune(rows, args, seed)
        judge("trim", "noisy", model)
        collect(model, rows, folder)
        collect_target(model, tokens(parts.query, tokenizer), folder, target=attack, split="query")
        given = parts.given(seed)
        scores = {method: scored(Path(folder), method, given) for method in args.methods}
        curated = [
            (remedy, method, rows)
            for method, own in scores.items()
            for remedy, rows in cured(parts.train, own, Path(folder), args.drop).items()
        ]
    for remedy in REMEDIES:
        found[remedy]["noisy"] = found["trim"]["noisy"]
    if any(wrong):
        judge("trim", "clean", again(parts.train.select([i for i, flag in enumerate(wrong) if not flag])))
        right = parts.train.remove_columns("label").rename_column("right_label", "label")
        judge("relabel", "clean", again(right))
    for remedy, method, rows in curated:
        more = {"auc": mislabel_detection(scores[method], wrong).auc} if any(wrong) else {}
        judge(remedy, method, again(rows), **more)
    return found


def columns(run: Run) -> Iterator[tuple[str, Any]]:
    for remedy, rows in run.result.items():
        yield f"{run.key['set']}, {remedy}", rows


def main() -> None:
    made = options(__doc__, sets=["sst2"], rows=500, queries=100, epochs=3, held_out=600, learning_rate=3e-3)
    made.add_argument("--methods", nargs="+", default=["ip", "datainf"])
    made.add_argument("--drop", type=float, default=0.1, help="share of the rows to leave out or relabel")
    made.add_argument("--epsilon", type=float, default=0.1, help="length of the move of a whole text's embeddings")
    made.add_argument("--steps", type=int, default=1, help="of the attack")
    made.add_argument("--direction", choices=["gradient", "sign"], default="gradient")
    args = made.parse_args()
    args.methods = with_baselines(args.methods, PLAIN)
    runs = runs_of(args, "sets", "seeds")
    each(runs, partial(run, args=args), set=args.sets, seed=args.seeds)
    title = (
        f"{trained_how(args)} Attack along the {args.direction} with epsilon {args.epsilon} in {args.steps} steps, "
        f"at most {args.held_out} held-out rows; {args.drop:.0%} trimmed or relabelled."
    )
    table = Table(title=title, metrics=("attacked", "accuracy"), beside=("auc",), baselines=("noisy", *PLAIN))
    finish(table, columns, runs, args)


if __name__ == "__main__":
    main()
