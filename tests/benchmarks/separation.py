"""Which examples are of the same source? Class detection by source, and groups found without any query.

    python tests/benchmarks/separation.py --data FOLDER --results runs/separation --markdown separation.md

FOLDER is that of `wrong_answers.py`; the sources are those of `instructions` (roleplay, word problems, tool calls) or
the ten tasks of the others. SmolLM2-135M-Instruct with LoRA on q_proj and v_proj learns the whole text of random rows
of all sources with the ordinary Trainer; then whole rows are collected from the part that `--part` names.

Two questions, a table each:

    of the query's source   AUC and recall with which a query's influence finds the training rows of its source; by the
                            size of the influence, but for methods that take labels; a baseline is the same for every
                            query
    groups                  adjusted Rand index between the sources and the groups that `Separate` makes of the scores
                            of a method without queries, as many as there are sources: 1 is perfect, 0 chance, and 0
                            also one group alone. `found` is how many groups have rows; with fewer than there are
                            sources, `Separate` refuses.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import prompts
from class_detection import figures as of_the_same_class
from datasets import Dataset
from series import PLAIN, Given, add_without, best, each, every_method, finish_each, runs_of
from sklearn.metrics import adjusted_rand_score

from hf_influence import collect
from hf_influence.dataset.matching import in_dataset_order
from hf_influence.evaluation import Run, Table
from hf_influence.evaluation.benchmarks import tokenize
from hf_influence.evaluation.benchmarks.tokenization import Part
from hf_influence.filter.separate import components
from hf_influence.pretrained import load_language_model
from hf_influence.scores import Scores

SAME, GROUPS = "of the query's source", "groups"


def figures(train: Dataset, query: Dataset, method: str, scores: Scores) -> dict[str, Any] | None:
    """Class detection for scores with queries and baselines, groups for scores without queries."""
    found = dict(of_the_same_class(list(train["task"]), list(query["task"]), method, scores) or {})
    if scores.query_ids is None:
        group = components(in_dataset_order(train, scores), len(set(train["task"])))
        found |= {"rand": adjusted_rand_score(train["task"], group.tolist()), "found": len(group.unique())}
    return found or None


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Method -> figures."""
    _, tokenizer = load_language_model(args.model)
    data = prompts.load(name, args, tokenizer, seed)
    model = prompts.fine_tune(tokenize(data["train"], tokenizer), args, seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for split, rows in (("train", data["train"]), ("query", data["test"])):
            collect(model, tokenize(rows, tokenizer, gradient=args.part), folder, split)
        texts = [list(data[split][args.part]) for split in ("train", "test")]
        given = Given(list(data["train"]["task"]), *texts, seed)
        found = every_method(Path(folder), given, partial(figures, data["train"], data["test"]), args.without)
    print(f"{name} seed {seed}: {best(found, 'auc_mean')}; groups: {best(found, 'rand')}", flush=True)
    return found


def columns(run: Run) -> Iterator[tuple[str, str, Any]]:
    for table, figure in ((SAME, "auc_mean"), (GROUPS, "rand")):
        yield (
            table,
            run.key["set"],
            {method: row for method, row in run.result.items() if figure in row or "left out" in row},
        )


def main() -> None:
    made = prompts.options(__doc__)
    add_without(made)
    made.add_argument("--part", choices=get_args(Part), default="text", help="where the gradient is taken")
    args = prompts.parsed(made)
    runs = runs_of(args, "sets", "seeds")
    each(runs, partial(run, args=args), set=args.sets, seed=args.seeds)
    title = f"{prompts.trained_how(args)} Gradient of the {args.part}."
    beside = ("length_rho", "duplicates_rho", "seconds")
    tables = {
        SAME: Table(title=title, metrics=("auc_mean", "recall_mean"), beside=beside),
        GROUPS: Table(title=title, metrics=("rand", "found"), beside=beside, baselines=PLAIN),
    }
    finish_each(tables, columns, runs, args)


if __name__ == "__main__":
    main()
