"""The command line, `hf-influence`. It prints; everything that is computed lives elsewhere."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    help="Which fine-tuning examples help and which hurt, and a better dataset.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_KINDS: dict[str, tuple[type, str]] = {
    "point": (int, "a whole number"),
    "train_split": (str, "text"),
    "query_split": (str, "text"),
}
"""Settings that no method checks, as they say what is scored."""

_READERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Suffix of a file -> what `datasets` reads it with."""

_QUOTED = re.compile(r'"([^"]|"")*"')
"""A cell in quotation marks, those within it doubled."""


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option(help="As a Markdown table, for the README.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="All that is known of each method, or what it lacks in a store, as JSON.")
    ] = False,
    store: Annotated[
        Path | None, typer.Option(help="A store: which methods can run on it, what the others lack.")
    ] = None,
) -> None:
    """List the methods: what each gives you, what it needs, what it costs and when to use it."""
    from hf_influence.attribution import lacking
    from hf_influence.attribution import methods as table_of_methods
    from hf_influence.errors import BadSetting

    if markdown and (as_json or store is not None):
        raise BadSetting("--markdown gives the whole table, for the README. Leave it out, or --json and --store.")
    if store is not None:
        lacks = lacking(store)
        if as_json:
            print(json.dumps(lacks, indent=1))
            return
        print("\n".join(["can run now:", *(f"  {name}" for name, what in lacks.items() if not what)]))
        print("\n".join(["lack something:", *(f"  {name}: {', '.join(w)}" for name, w in lacks.items() if w)]))
        return

    table = table_of_methods()
    if as_json:
        print(json.dumps({name: asdict(about) for name, about in table.items()}, indent=1))
    elif markdown:
        print(markdown_table())
    else:
        shown = Table(title='attribute(store, method="…"): higher = more worth keeping', show_lines=True)
        for column in ("method", "what you get", "needs", "cost", "use when"):
            shown.add_column(column, overflow="fold")
        for about in table.values():
            shown.add_row(about.name, about.summary, ", ".join(about.needs), about.cost, about.use)
        Console().print(shown)


@app.command()
def attribute(
    store: Annotated[Path, typer.Argument(help="A store of rows, as GradientCapture and collect leave it.")],
    method: Annotated[str, typer.Option(help="`hf-influence methods` lists them.")] = "auto",
    setting: Annotated[list[str] | None, typer.Option("--set", help="Of the method, as JSON: --set k=5.")] = None,
    groups: Annotated[
        str | None, typer.Option(help="A column of --data, such as the task: each example among its own kind.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="What was scored, for --groups; as for filter.")] = None,
    split: Annotated[str, typer.Option(help="Of a dataset with several.")] = "train",
    lowest: Annotated[int, typer.Option(min=0, help="How many of the examples least worth keeping to show.")] = 10,
    output: Annotated[Path | None, typer.Option(help="File for the scores; Scores.load reads it.")] = None,
) -> None:
    """Score the training examples of a store; higher = more worth keeping."""
    from hf_influence.attribution import attribute as score
    from hf_influence.dataset.matching import positions
    from hf_influence.errors import BadSetting
    from hf_influence.filter.carrying_out import of_split
    from hf_influence.filter.wording import printable
    from hf_influence.saving import as_json

    if output is not None and output.is_dir():
        raise BadSetting(f"--output {output} is a folder, and scores go into a file. Name one: {output}/scores.st.")
    settings, rows = dict(map(_setting, setting or [])), None
    if (groups is None) != (data is None):
        raise BadSetting("--groups is a column of --data. Give both: --data train.parquet --groups task.")
    if groups is not None and data is not None:
        rows = _load(data, split, _text_ids(_rows(store, settings.get("train_split", "train"))))
        rows = of_split(rows, split) if isinstance(rows, dict) else rows
        if groups not in rows.column_names:
            raise BadSetting(f"--groups {groups} is no column of {data}, which has {rows.column_names}.")
        settings["groups"] = rows[groups][:]
    scores = score(store, method, **settings)
    if rows is not None and positions(rows, scores).diff().ne(1).any():
        raise BadSetting(f"the rows of {data} are in another order than those of {store}, and so are the groups.")
    print(f"{len(scores)} examples by {scores.method}; {as_json(scores.settings)}")
    for what, found in scores.report.items():
        print(f"{what}: {as_json(found)}")
    means = dict(zip(scores.ids, scores.mean().tolist(), strict=True))
    lines = [f"  {printable(name)}  {means[name]:.6g}" for name in scores.lowest(lowest)]
    print("\n".join(["least worth keeping:", *lines]))
    if output is not None:
        scores.save(output)
        print(f"written to {output}")


@app.command()
def filter(
    data: Annotated[
        str, typer.Argument(help="A parquet, Arrow, JSON, CSV or TSV file, a folder of save_to_disk, or a hub name.")
    ],
    scores: Annotated[Path, typer.Argument(help="A file of scores, or a store, which is then scored by auto.")],
    output: Annotated[Path, typer.Option(help="Folder for the curated dataset, the decision and a dataset card.")],
    drop: Annotated[
        str | None,
        typer.Option(help="A share (0.05), a count (20), doubtful (the default), negative, otsu or mixture."),
    ] = None,
    keep: Annotated[str | None, typer.Option(help="A share or a count.")] = None,
    within: Annotated[str | None, typer.Option(help="A column; each of its values is cut for itself.")] = None,
    split: Annotated[str, typer.Option(help="Of a dataset with several; the others stay as they are.")] = "train",
) -> None:
    """Leave out the examples least worth keeping: a better dataset, and why each row stays or goes."""
    from hf_influence.filter import DatasetFilter

    _curate(DatasetFilter(drop=_amount(drop), keep=_amount(keep), within=within), data, split, scores, output)


@app.command()
def relabel(
    data: Annotated[str, typer.Argument(help="As for filter.")],
    scores: Annotated[Path, typer.Argument(help="As for filter.")],
    output: Annotated[Path, typer.Option(help="Folder for the relabelled dataset, the decision and a dataset card.")],
    how: Annotated[
        str, typer.Option(help="posterior (class probabilities in place of labels), predicted, soft or flip.")
    ] = "posterior",
    label: Annotated[str, typer.Option(help="The column of class numbers; of two names with flip.")] = "label",
    suspects: Annotated[str | None, typer.Option(help="Only the rows that filter --drop would leave out.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="The store that was scored, where there are more than two classes.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a dataset with several; the others stay as they are.")] = "train",
) -> None:
    """Give the examples the labels they should have, as far as that is known; all of them stay."""
    from hf_influence.filter import DatasetFilter, Relabel

    rows = None if suspects is None else DatasetFilter(drop=_amount(suspects))
    rule = Relabel(suspects=rows, how=how, label=label, probabilities=store)
    _curate(rule, data, split, scores, output)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Folder or hub name of a causal language model.")] = None,
    size: Annotated[int, typer.Option(min=20, help="Number of training prompts.")] = 64,
    seed: Annotated[int, typer.Option(help="Of data, wrong answers and training.")] = 0,
    output: Annotated[
        Path, typer.Option(help="Folder for stores and results.json; an earlier demo is replaced.")
    ] = Path("runs/demo"),
) -> None:
    """Fine-tune SmolLM2 on prompts with wrong answers; find them, drop them, retrain, and see what it brings."""
    from hf_influence.demo import Demo

    Demo(model=model, size=size, seed=seed, output=output).run(Console())


def _curate(rule: Any, data: str, split: str, scores: Path, output: Path) -> None:
    """Apply a rule of the filter module, and keep what comes of it."""
    from hf_influence.errors import BadSetting, StoreError
    from hf_influence.filter import save_curated
    from hf_influence.filter.card import check_folder
    from hf_influence.scores import Scores

    if not scores.exists():
        raise StoreError(
            f"there is no file or folder {scores}. Name scores, as `hf-influence attribute STORE --output FILE` writes "
            "them, or a store."
        )
    if Path(data).is_dir() and Path(data).resolve() in (output.resolve(), *output.resolve().parents):
        raise BadSetting(
            f"--output {output} is the dataset itself, or in it, and rows would be lost. Name another folder."
        )
    check_folder(output)
    given = Scores.load(scores) if scores.is_file() else scores
    texts = _text_ids(given if isinstance(given, Scores) else _rows(given))
    curated = rule.apply(_load(data, split, texts), given, split=split)
    save_curated(curated, rule.report, output)
    print(f"{rule.report}\nwritten to {output}; datasets.load_from_disk({str(output)!r}) reads it")


def _setting(text: str) -> tuple[str, Any]:
    """`name=value` with a JSON value; what is no JSON is a string."""
    from hf_influence.errors import BadSetting

    name, equals, value = text.partition("=")
    if not equals:
        raise BadSetting(f"--set {text} has no value. Write --set {text}=….")
    if name in ("store", "method"):
        raise BadSetting(f"--set {text} is no setting of a method. Write hf-influence attribute STORE --method NAME.")
    try:
        read = json.loads(value)
    except json.JSONDecodeError:
        read = value
    kind, what = _KINDS.get(name, (object, ""))
    if not isinstance(read, kind):
        raise BadSetting(f"--set {text} cannot be used: {name} must be {what}.")
    return name, read


def _amount(text: str | None) -> Any:
    """A whole number is a count, another a share, a word a threshold."""
    for read in (int, float):
        try:
            return None if text is None else read(text)
        except ValueError:
            continue
    return text


def _text_ids(named: Any) -> str | None:
    """The column that the ids of scores, or of the rows of a store, are from, if they are texts."""
    return named.id_column if named and isinstance(named.ids[0], str) else None


def _rows(path: Path, split: str = "train") -> Any:
    """The rows of a split of a store at the first point that has it; `None` if none has."""
    from hf_influence.store import GradientStore

    store = GradientStore.open(path)
    return next((store.rows(split, point) for point in store.points() if split in store.splits(point)), None)


def _load(data: str, split: str, texts: str | None = None) -> Any:
    """The dataset that a name stands for; with all its splits, if it has several.

    Args:
        data: A file, a folder or a name on the hub.
        split: Which has to be there.
        texts: A column of texts, also where they look like numbers.

    Raises:
        BadExample: It cannot be read, or has no such split.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    from hf_influence.errors import BadExample
    from hf_influence.filter.carrying_out import of_split
    from hf_influence.filter.wording import printable

    path = Path(data)
    kind = _READERS.get(_suffix(path))
    if kind is None and path.is_file():
        raise BadExample(
            f"{data} is a file, and how to read it does not show in its name. Name a file in one of the formats "
            f"{', '.join(_READERS)} (those of text also packed, as .gz), a folder of save_to_disk or a dataset of the "
            "hub."
        )
    try:
        if path.is_dir():
            loaded = load_from_disk(data)
        elif kind:
            loaded = load_dataset(kind, data_files=glob.escape(data), split="train", **_as_written(path, texts))
        else:
            part = "[" in split or "+" in split  # beside which there are no others
            loaded = load_dataset(data, split=split if part else None)
    except StopIteration as error:  # of a JSON reader that finds no line
        raise BadExample(f"{data} holds no rows, so there is nothing to read. Look at how it was written.") from error
    except (OSError, ValueError, EOFError, zlib.error, DatasetsError) as error:
        cause = error.__cause__ or error  # datasets says no more than that there was one
        raise BadExample(
            f"no dataset can be read from {data} ({type(cause).__name__}: {printable(cause, 300)}). Name a parquet, "
            "Arrow, JSON, CSV or TSV file, a folder of save_to_disk or a dataset of the hub."
        ) from error
    if isinstance(loaded, DatasetDict):
        of_split(loaded, split)
    elif split not in ("train", str(loaded.split)):
        raise BadExample(f"{data} is one dataset without splits, so it has no {split!r}. Leave --split out.")
    return loaded


def _suffix(path: Path) -> str:
    """In small letters, without that of a packed file: ".csv" of data.csv and of data.csv.gz."""
    packed = path.suffix.lower() == ".gz"
    return (path.with_suffix("") if packed else path).suffix.lower()


def _as_written(path: Path, texts: str | None) -> dict[str, Any]:
    """How to read a file of text cells so that each stays what it is, also where it says "None" or "NA".

    A cell in the column of `texts` is a text where it looks like a number, too.
    """
    suffix = _suffix(path)
    if _READERS[suffix] != "csv":
        return {}
    read: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
    if texts is not None:
        read["converters"] = {texts: str}
    if suffix == ".tsv":
        read |= {"sep": "\t", "quoting": csv.QUOTE_NONE if _plain_quotes(path) else csv.QUOTE_MINIMAL}
    return read


def _plain_quotes(path: Path) -> bool:
    """Whether the quotation marks of a TSV file are characters like any other, as in the files of GLUE.

    They are where a cell begins with one and is no quoted cell, such as `"Never,` or `"No" he said`, and no line has
    more or fewer tabs than the others: then no cell needs quotes.
    """
    widths, stray = set(), False
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            cells = line.rstrip("\n").split("\t")
            if cells != [""]:  # an empty line is no row
                widths.add(len(cells))
                stray |= any(cell.startswith('"') and not _QUOTED.fullmatch(cell) for cell in cells)
    return stray and len(widths) == 1 and widths != {1}


def markdown_table() -> str:
    """The table of methods for the README."""
    from hf_influence.attribution import methods as table_of_methods

    lines = ["| method | what you get | needs | use when |", "|---|---|---|---|"]
    for about in table_of_methods().values():
        cells = (f"`{about.name}`", about.summary, ", ".join(about.needs), about.use)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line; an error that was meant for the user, or of the disk, is shown without a traceback."""
    from hf_influence.errors import InfluenceError

    try:
        app()
    except (InfluenceError, OSError) as error:
        Console(stderr=True).print("[bold red]error:[/]", escape(str(error)))
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
