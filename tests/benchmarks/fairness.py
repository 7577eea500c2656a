"""Does trimming by the fairness target make a model fairer, and what does it cost in accuracy?

    python tests/benchmarks/fairness.py --data FOLDER --results runs/fairness --markdown fairness.md

FOLDER is that of `mislabel.py`. The bias is planted, since GLUE says nothing of who speaks: each text is given a
speaker of one of two groups ("the actress said : …"), drawn evenly, and a share of the training rows (`--share`), all
of women and of class 1, get the label 0. The real texts keep their own he's and she's. MiniLM with LoRA on query and
value learns these rows, their gradients are taken at the end, and so is that of the gap between the mean predictions
for clean held-out texts told by the one group and the very same texts told by the other (`collect_target`, `fairness`).
Each method ranks the training rows by that target; then the model is trained again, from the same head and adapter and
for as many steps, on

    clean        the rows whose label was not changed
    drop M       without the lowest scores by method M, the given share of the rows; `drop random` is a random drop

and judged by other clean held-out texts, each as a woman and as a man tell it (`swap_terms`):

    fair score   share of texts whose predicted class changes with the speaker; lower is fairer
    parity       gap between the mean predicted probabilities of class 1; lower is fairer
    accuracy     over both versions; higher is better, and a model that always says the same is perfectly fair

`biased` is the first training. `auc` says how well the scores find the changed labels, over all rows alike.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset, concatenate_datasets
from glue import MODEL, TEXTS, clean_rows, fine_tune, options, texts, tokens, training_rows
from series import PLAIN, Given, each, finish, named, runs_of, scored, whole_run, with_baselines
from torch import nn

from hf_influence import collect, collect_target, fairness
from hf_influence.evaluation import (
    Run,
    Table,
    biased_labels,
    demographic_parity,
    fair_score,
    mislabel_detection,
    swap_terms,
)
from hf_influence.filter import DatasetFilter
from hf_influence.gradients import losses
from hf_influence.pretrained import load_classifier

GROUPS = ("man", "woman")
SPEAKERS = (
    ("man", "woman"),
    ("boy", "girl"),
    ("brother", "sister"),
    ("father", "mother"),
    ("son", "daughter"),
    ("uncle", "aunt"),
    ("actor", "actress"),
    ("king", "queen"),
)
SAID = " said : "


def told(rows: Dataset, seed: int | str) -> Dataset:
    """Each text told by a speaker, whose group is the new column `group`."""
    draw = Random(seed)
    column = TEXTS[0]
    groups = [draw.randrange(2) for _ in range(len(rows))]
    speakers = [draw.choice(SPEAKERS)[group] for group in groups]
    spoken = [f"the {who}{SAID}{text}" for who, text in zip(speakers, rows[column], strict=True)]
    rows = rows.remove_columns(column).add_column(column, spoken)
    return rows.add_column("group", [GROUPS[group] for group in groups])


def both(rows: Dataset) -> Dataset:
    """The same texts told by the other group, after all as they are."""
    column = TEXTS[0]
    parts = [text.partition(SAID) for text in rows[column]]
    others = swap_terms([speaker for speaker, _, _ in parts], SPEAKERS)
    spoken = [other + said + text for other, (_, said, text) in zip(others, parts, strict=True)]
    other = rows.remove_columns(column).add_column(column, spoken)
    swapped = [GROUPS[1 - GROUPS.index(group)] for group in rows["group"]]
    other = other.remove_columns("group").add_column("group", swapped).select_columns(rows.column_names)
    return concatenate_datasets([rows, other])


def parts(name: str, args: argparse.Namespace, seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """Training rows with biased labels, queries and held-out rows that are clean and told both ways."""
    rows = training_rows(name, args, seed).select(range(args.rows))
    train = biased_labels(told(rows, seed), args.share, within="group", group="woman", seed=seed)
    clean = told(clean_rows(name, args, seed), f"{seed} clean")
    query, held_out = clean.select(range(args.queries)), clean.select(range(args.queries, len(clean)))
    return train, both(query), both(held_out)


def judged(model: nn.Module, held_out: Dataset, groups: list[str]) -> dict[str, float]:
    """The figures of a model on texts of which the second half is the first one swapped."""
    stats = losses(model, held_out)
    y, half = stats["probabilities"], len(groups) // 2
    classes = y.argmax(1)
    return {
        "fair score": fair_score(classes[:half], classes[half:]),
        "parity": demographic_parity(y[:, 1], groups),
        "accuracy": float(stats["correct"].double().mean()),
    }


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Share that is dropped -> training set -> figures."""
    train, query, held_out = parts(name, args, seed)
    _, tokenizer = load_classifier(args.model)
    as_tokens, test = tokens(train, tokenizer), tokens(held_out, tokenizer)
    wrong, groups = train["is_wrong"], list(held_out["group"])
    found: dict[str, dict[str, dict[str, float]]] = {str(drop): {} for drop in args.drops}

    def note(where: str, rows: str, model: nn.Module, **more: float) -> None:
        found[where][rows] = {**judged(model, test, groups), **more}
        figures = ", ".join(f"{key} {value:.3f}" for key, value in found[where][rows].items())
        print(f"{name} seed {seed}, {where} {rows}: {figures}", flush=True)

    first, *others = found
    again = partial(fine_tune, args=args, seed=seed, steps=whole_run(args))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        model = fine_tune(as_tokens, args, seed)
        note(first, "biased", model)
        collect(model, as_tokens, folder)
        people = tokens(query, tokenizer).add_column("group", query["group"])
        collect_target(model, people, folder, target=fairness("group", groups=GROUPS), split="query")
        given = Given(list(train["label"]), texts(train), texts(query), seed)
        scores = {method: scored(Path(folder), method, given) for method in args.methods}
    note(first, "clean", again(as_tokens.select([i for i, flag in enumerate(wrong) if not flag])))
    for drop in others:
        found[drop] |= found[first]
    for drop in args.drops:
        for method, own in scores.items():
            rows = DatasetFilter(drop=drop).apply(as_tokens, own)
            note(str(drop), f"drop {method}", again(rows), auc=mislabel_detection(own, wrong).auc)
    return found


def columns(run: Run) -> Iterator[tuple[str, Any]]:
    for drop, rows in run.result.items():
        yield f"{run.key['set']}, drop {float(drop):.0%}", rows


def main() -> None:
    made = options(
        __doc__, sets=["sst2"], rows=600, queries=100, epochs=3, share=0.15, held_out=600, learning_rate=3e-3
    )
    made.add_argument("--methods", nargs="+", default=["ip", "datainf", "fisher"])
    made.add_argument("--drops", nargs="+", type=float, default=[0.1, 0.2], help="shares of the rows to leave out")
    args = made.parse_args()
    args.methods = with_baselines(args.methods, PLAIN)
    runs = runs_of(args, "sets", "seeds")
    each(runs, partial(run, args=args), set=args.sets, seed=args.seeds)
    title = (
        f"{named(args.model, MODEL)} + LoRA r={args.rank}, {args.rows} training rows told by women and men, "
        f"{args.share:.0%} planted (by women, of class 1, labelled 0), {args.queries} clean queries and at most "
        f"{args.held_out} held-out texts told both ways, {args.epochs} epochs, batch {args.batch_size}, "
        f"learning rate {args.learning_rate}. Fair score and parity: lower is fairer."
    )
    table = Table(
        title=title,
        metrics=("fair score", "parity", "accuracy"),
        beside=("auc",),
        baselines=("biased", "clean", *(f"drop {method}" for method in PLAIN)),
        higher_is_better=False,
    )
    finish(table, columns, runs, args)


if __name__ == "__main__":
    main()
