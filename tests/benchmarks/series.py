"""What the benchmarks share: the options of a series of runs, every method on a store, the table at the end."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from hf_influence.attribution import attribute, lacking, methods
from hf_influence.attribution.method import make_method
from hf_influence.errors import InfluenceError
from hf_influence.evaluation import Run, Runs, Table, biases
from hf_influence.scores import Scores

LEAVE = ("results", "markdown", "json", "data", "stores", "ways")
"""Options that say where things lie, or what is left out, and do not change a figure; nor do those that a series goes
over."""

PLAIN = ("random", "loss", "length")
"""The baselines where queries are no texts."""

SLOW = {
    "cg": "it equals fisher up to its tolerance, and takes up to a hundred times as long for each of many queries",
    "self_cg": "it equals self_fisher up to its tolerance, and takes many minutes",
    "self_lissa": "it takes many minutes for an inverse that self_fisher has exactly",
}
"""Left out by default, and why."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options of every series."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, help="folder where each run is kept at once; a series goes on from there")
    made.add_argument("--json", type=Path, help="the table and the single figures")
    made.add_argument("--markdown", type=Path, help="the table")
    return made


def add_model(made: argparse.ArgumentParser, default: str) -> None:
    """The option to train another model."""
    made.add_argument("--model", help=f"folder or hub name (default: {default}); LoRA is where PEFT puts it by default")


def named(model: str | None, default: str) -> str:
    """For the title of a table."""
    return Path(model).name if model else default


def add_sampling(made: argparse.ArgumentParser) -> None:
    """The option of which examples make a batch."""
    about = "rows of like lengths in a batch need half of the time that random ones do"
    made.add_argument("--sampling", default="group_by_length", choices=["group_by_length", "random"], help=about)


def add_without(made: argparse.ArgumentParser) -> None:
    """The option to leave methods out."""
    made.add_argument("--without", nargs="*", default=list(SLOW), help="methods to leave out")


def add_stores(made: argparse.ArgumentParser) -> None:
    """The option to keep the gradients."""
    about = "folder to keep the gradients of each run in, gigabytes each: what is there is scored without training"
    made.add_argument("--stores", type=Path, help=about)


def runs_of(args: argparse.Namespace, *over: str) -> Runs:
    """The runs of these options, as far as they are given; `over` names those that the series goes over."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return Runs(args.results, {name: value for name, value in given.items() if name not in (*LEAVE, *over)})


def each(runs: Runs, work: Callable[..., Any], **over: Sequence[Any]) -> None:
    """Every combination of the values that a series goes over; `work` takes them in this order."""
    for values in product(*over.values()):
        runs.do(dict(zip(over, values, strict=True)), partial(work, *values))


def with_baselines(methods: Sequence[str], baselines: Sequence[str]) -> list[str]:
    """The methods asked for and the baselines; a name that is none is refused before the training, not after."""
    both = list(dict.fromkeys([*methods, *baselines]))
    for method in both:
        make_method(method, {})
    return both


def on_the_way(runs: Runs, **key: Any) -> Path | None:
    """Folder for what a run keeps before it is finished: its own for each key and for other settings."""
    if runs.folder is None:
        return None
    code = hashlib.sha256(json.dumps([key, runs.settings], sort_keys=True).encode()).hexdigest()[:8]
    return runs.folder / "on_the_way" / "-".join([*map(str, key.values()), code])


def arguments(folder: str | Path, args: argparse.Namespace, seed: int, steps: int = -1) -> TrainingArguments:
    """How the model of a run is trained: what the options say, and nothing but the rows is kept.

    With `steps`, that many steps of the optimiser instead of the epochs.
    """
    return TrainingArguments(
        str(folder),
        num_train_epochs=args.epochs,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy=vars(args).get("sampling", "random"),
        learning_rate=args.learning_rate,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def whole_run(args: argparse.Namespace) -> int:
    """Steps of a training on all rows, for trainings on fewer that are to have as many."""
    return int(args.epochs * -(-args.rows // args.batch_size))


@contextmanager
def filled(runs: Runs, stores: Path | None, fill: Callable[[Path], Any], **key: Any) -> Iterator[tuple[Path, Any]]:
    """The store of a run, and what `fill` gave when it had filled the folder.

    In `stores`, if given, it is kept, and where it was filled to its end before, under these settings, it is not again.
    """
    kept = stores and stores / "-".join(map(str, key.values()))
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store = Path(folder)

        def begin() -> Any:
            shutil.rmtree(store, ignore_errors=True)  # of a run that was interrupted
            return fill(store)

        settings = {option: value for option, value in runs.settings.items() if option not in ("without", "methods")}
        if "methods" in runs.settings:
            settings["methods"] = "some"  # of the same rows, whichever they are
        yield store, Runs(store, settings).do(key, begin)


def train_again(
    runs: Runs,
    first: Callable[[Path], tuple[str, Mapping[str, float], Iterable[tuple[str, Dataset]]]],
    again: Callable[[str, Dataset], Mapping[str, float]],
    **key: Any,
) -> dict[str, dict[str, float]]:
    """A training, what curating makes of its rows, and a training on each of these.

    Args:
        runs: Each training is kept on the way to the run of this key as soon as it is finished, with the curated rows.
        first: Trains in a folder for its store; gives a name for all rows, figures, and the curated rows by way.
        again: Trains on curated rows, named by the way; gives figures.

    Returns:
        Way of curating -> figures, the first training before the others.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as spare:
        kept = on_the_way(runs, **key) or Path(spare)
        trainings = Runs(kept)

        def begin() -> dict[str, Any]:
            ways = []
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as store:  # gigabytes: gone before the others
                all_rows, figures, curated = first(Path(store))
                for way, rows in curated:
                    rows.save_to_disk(kept / str(len(ways)))
                    ways.append(way)
            return {"rows": all_rows, "figures": figures, "ways": ways}

        begun = trainings.do({"training": "first"}, begin)
        found = {begun["rows"]: begun["figures"]}
        for number, way in enumerate(begun["ways"]):
            rows = Dataset.load_from_disk(kept / str(number))
            found[way] = trainings.do({"training": way}, partial(again, way, rows))
    return found


@dataclass(frozen=True)
class Given:
    """What is passed to the methods that need it, one for each example in dataset order."""

    labels: Sequence[Any]
    texts: Sequence[str]
    query_texts: Sequence[str]
    seed: int
    queries: str = "each"
    """"mean" asks the methods with that setting for their mean over the queries alone. For figures that see nothing
    else it is the same, as these methods are linear in the queries, and a solve costs what one query costs."""
    groups: Sequence[Any] | None = None
    """Task or source, within which methods with that setting rank."""

    def settings(self, method: str) -> dict[str, Any]:
        """Those of one method."""
        about = methods()[method]
        settings: dict[str, Any] = {"seed": self.seed} if method == "random" else {}
        settings |= {"queries": self.queries} if "queries" in about.settings else {}
        settings |= {"groups": self.groups} if self.groups and "groups" in about.settings else {}
        settings |= {"labels": self.labels} if "labels" in about.needs else {}
        return settings | ({"texts": self.texts, "query_texts": self.query_texts} if "texts" in about.needs else {})


def scored(store: Path, method: str, given: Given) -> Scores:
    """The scores of one method with its defaults."""
    return attribute(store, method, **given.settings(method))


def every_method(
    store: Path,
    given: Given,
    figures: Callable[[str, Scores], Mapping[str, Any] | None],
    without: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Method -> what `figures` says of its scores, with biases and seconds of CPU time; or what it was left out for.

    `figures` gives `None` for a method that the benchmark is not about; others than `only`, if given, are not asked.
    """
    found: dict[str, dict[str, Any]] = {}
    for method, lacks in lacking(store).items():
        if only is not None and method not in only:
            continue
        if method in without:
            found[method] = {"left out": SLOW.get(method, "by the option --without")}
            continue
        if missing := set(lacks) - {"labels", "texts"}:
            found[method] = {"left out": f"the store has no {', '.join(sorted(missing))}"}
            continue
        started = time.process_time()
        try:
            scores = scored(store, method, given)
        except InfluenceError as error:
            found[method] = {"left out": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            continue
        took = time.process_time() - started
        if (figure := figures(method, scores)) is not None:
            bias = biases(scores, store)
            rho = {"length_rho": bias.length, "duplicates_rho": bias.duplicates}
            found[method] = {**figure, **rho, "seconds": took}
    return found


def by_seed(runs: Runs, figure: str) -> dict[str, dict[str, list[float]]]:
    """Set -> way of curating -> the figure of each seed; ways that not every seed of the set has are left out."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for way, figures in run.result.items():
            found.setdefault(run.key["set"], {}).setdefault(way, []).append(figures[figure])
    seeds = {name: max(map(len, ways.values())) for name, ways in found.items()}
    return {name: {way: all_ for way, all_ in ways.items() if len(all_) == seeds[name]} for name, ways in found.items()}


def best(found: Mapping[str, Mapping[str, Any]], metric: str, k: int = 5) -> str:
    """The first methods of a run in a line."""
    order = sorted((row for row in found.items() if metric in row[1]), key=lambda row: -row[1][metric])
    return ", ".join(f"{method} {row[metric]:.3f}" for method, row in order[:k])


def finish(
    table: Table, columns: Callable[[Run], Iterator[tuple[str, Any]]], runs: Runs, args: argparse.Namespace
) -> None:
    """Print and write the table of whatever runs are there; `columns` cuts a run into columns."""
    about = []
    for run in runs:
        about.append(run.about)
        for column, rows in columns(run):
            table.add(column, rows)
    publish(table.markdown(about), table.json(about), args)


def finish_each(
    tables: Mapping[str, Table],
    columns: Callable[[Run], Iterator[tuple[str, str, Any]]],
    runs: Runs,
    args: argparse.Namespace,
) -> None:
    """The same with several tables, under their names; `columns` says of each column in which table it is."""
    about: dict[str, list[Any]] = {name: [] for name in tables}
    for run in runs:
        for name, column, rows in columns(run):
            about[name].append(run.about)
            tables[name].add(column, rows)
    text = "\n".join(f"## {name}\n\n{table.markdown(about[name])}" for name, table in tables.items())
    publish(text, {name: table.json(about[name]) for name, table in tables.items()}, args)


def publish(text: str, figures: Any, args: argparse.Namespace) -> None:
    """Print the text, and write what the options ask for."""
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
