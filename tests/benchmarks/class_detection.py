"""Do the training prompts that influence a query most share its task? AUC and recall of every method on three sets.

    python tests/benchmarks/class_detection.py --train 180 --test 30 --results runs/classes --markdown classes.md

SmolLM2-135M-Instruct with LoRA on q_proj and v_proj learns the whole text of ten sentence transformations or ten kinds
of word problems (without and with reasoning), made by `hf_influence.evaluation.benchmarks`; then whole rows are
collected from the prompt, the answer and the text. The papers train on 900 prompts, 90 of each kind, with 100 queries.

With `--data FOLDER` the sets are those that lie there, as for `wrong_answers.py`; classes are tasks or sources.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import prompts
from datasets import DatasetDict
from series import Given, add_model, add_without, best, each, every_method, finish, named, parser, runs_of

from hf_influence import collect
from hf_influence.attribution import methods
from hf_influence.evaluation import Run, Table, class_detection
from hf_influence.evaluation.benchmarks import math_problems, sentence_transformations, tokenize
from hf_influence.evaluation.benchmarks.tokenization import Part
from hf_influence.evaluation.table import BASELINES
from hf_influence.pretrained import load_language_model
from hf_influence.scores import Scores

SETS: dict[str, Callable[..., DatasetDict]] = {
    "sentence_transformations": sentence_transformations,
    "math": math_problems,
    "math_with_reasoning": partial(math_problems, reasoning=True),
}


def figures(train: list[str], query: list[str], method: str, scores: Scores) -> Mapping[str, Any] | None:
    """AUC and recall where there is a score a query; for the baselines of one column, that column for every query."""
    needs = methods()[method].needs
    if scores.query_ids is None and method in BASELINES:
        same = scores.values.expand(-1, len(query))
        scores = Scores(same, scores.ids, method, scores.settings, list(range(len(query))), scores.id_column)
    if scores.query_ids is None or len(scores.query_ids) != len(query):
        return None  # one column for all queries ranks no single one
    return class_detection(scores, train, query, absolute="labels" not in needs)


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Part of the text -> method -> figures."""
    _, tokenizer = load_language_model(args.model)
    if args.made:
        data = SETS[name](train=args.train, test=args.test, seed=seed)
    else:
        sizes = argparse.Namespace(**vars(args), rows=args.train, queries=args.test)
        data = prompts.load(name, sizes, tokenizer, seed)
    model = prompts.fine_tune(tokenize(data["train"], tokenizer), args, seed)
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for part in get_args(Part):
            store = Path(folder) / part
            for split, rows in (("train", data["train"]), ("query", data["test"])):
                collect(model, tokenize(rows, tokenizer, gradient=part), store, split)
            sides = (list(data["train"]["task"]), list(data["test"]["task"]))
            texts = [list(data[split][part]) for split in ("train", "test")]
            given = Given(sides[0], texts[0], texts[1], seed)
            found[part] = every_method(store, given, partial(figures, *sides), args.without)
            print(name, part, f"seed {seed}", best(found[part], "auc_mean"), flush=True)
    return found


def columns(run: Run) -> Iterator[tuple[str, Any]]:
    for part, rows in run.result.items():
        yield f"{run.key['set']}, {part}", rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="folder of parquet files; without, the sets are made")
    options.add_argument("--max-tokens", type=int, default=256, help="longer rows of the folder are not drawn")
    options.add_argument("--sets", nargs="+", choices=[*SETS, "instructions"], help="all that there are by default")
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--train", type=int, default=900)
    options.add_argument("--test", type=int, default=100)
    options.add_argument("--epochs", type=float, default=3)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--learning-rate", type=float, default=2e-3)
    add_model(options, prompts.MODEL)
    add_without(options)
    args = options.parse_args()
    args.made = args.data is None
    args.sets = args.sets or list(SETS if args.made else prompts.SETS)
    runs = runs_of(args, "sets", "seeds")
    each(runs, partial(run, args=args), set=args.sets, seed=args.seeds)
    title = (
        f"{named(args.model, prompts.MODEL)} + LoRA r=8, {args.train} training and {args.test} test prompts, "
        f"{'generated' if args.made else 'given'} data, {args.epochs} epochs, "
        f"batch {args.batch_size}, learning rate {args.learning_rate}; mean over the queries, absolute influence, but "
        "for methods that take labels."
    )
    beside = ("length_rho", "duplicates_rho", "seconds")
    finish(Table(title=title, metrics=("auc_mean", "recall_mean"), beside=beside), columns, runs, args)


if __name__ == "__main__":
    main()
