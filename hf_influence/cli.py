"""The command line, `hf-influence`. It prints; everything that is computed lives elsewhere."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from functools import partial
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


def _at_home(path: Any) -> Any:
    """The path with the home folder for a leading ~, which a shell leaves in --output=~/x."""
    return path if path is None else type(path)(os.path.expanduser(path))


_path_argument = partial(typer.Argument, callback=_at_home)
_path_option = partial(typer.Option, callback=_at_home)


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option(help="As a Markdown table, for the README.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="All that is known of each method, or what it lacks in a store, as JSON.")
    ] = False,
    store: Annotated[
        Path | None, _path_option(help="A store: which methods can run on it, what the others lack.")
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
    store: Annotated[Path, _path_argument(help="A store of rows, as GradientCapture and collect leave it.")],
    method: Annotated[str, typer.Option(help="`hf-influence methods` lists them.")] = "auto",
    setting: Annotated[list[str] | None, typer.Option("--set", help="Of the method, as JSON: --set k=5.")] = None,
    groups: Annotated[
        str | None, typer.Option(help="A column of --data, such as the task: each example among its own kind.")
    ] = None,
    data: Annotated[str | None, _path_option(help="What was scored, for --groups; as for filter.")] = None,
    split: Annotated[str, typer.Option(help="Of a dataset with several.")] = "train",
    lowest: Annotated[int, typer.Option(min=0, help="How many of the examples least worth keeping to show.")] = 10,
    output: Annotated[Path | None, _path_option(help="File for the scores; Scores.load reads it.")] = None,
) -> None:
    """Score the training examples of a store; higher = more worth keeping."""
    from hf_influence.attribution import attribute as score
    from hf_influence.dataset.matching import positions
    from hf_influence.dataset.reading import of_split, read_dataset
    from hf_influence.dataset.wording import printable
    from hf_influence.errors import BadSetting
    from hf_influence.saving import as_json

    if output is not None and output.is_dir():
        raise BadSetting(f"--output {output} is a folder, and scores go into a file. Name one: {output}/scores.st.")
    settings, rows = dict(map(_setting, setting or [])), None
    if (groups is None) != (data is None):
        raise BadSetting("--groups is a column of --data. Give both: --data train.parquet --groups task.")
    if groups is not None and data is not None:
        rows = read_dataset(data, split, _text_ids(_rows(store, settings.get("train_split", "train"))))
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
        str, _path_argument(help="A parquet, Arrow, JSON, CSV or TSV file, a folder of save_to_disk, or a hub name.")
    ],
    scores: Annotated[Path, _path_argument(help="A file of scores, or a store, which is then scored by auto.")],
    output: Annotated[Path, _path_option(help="Folder for the curated dataset, the decision and a dataset card.")],
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
    data: Annotated[str, _path_argument(help="As for filter.")],
    scores: Annotated[Path, _path_argument(help="As for filter.")],
    output: Annotated[Path, _path_option(help="Folder for the relabelled dataset, the decision and a dataset card.")],
    how: Annotated[
        str, typer.Option(help="posterior (class probabilities in place of labels), predicted, soft or flip.")
    ] = "posterior",
    label: Annotated[str, typer.Option(help="The column of class numbers; of two names with flip.")] = "label",
    suspects: Annotated[str | None, typer.Option(help="Only the rows that filter --drop would leave out.")] = None,
    store: Annotated[
        Path | None, _path_option(help="The store that was scored, where there are more than two classes.")
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
        Path, _path_option(help="Folder for stores and results.json; an earlier demo is replaced.")
    ] = Path("runs/demo"),
) -> None:
    """Fine-tune SmolLM2 on prompts with wrong answers; find them, drop them, retrain, and see what it brings."""
    from hf_influence.demo import Demo

    Demo(model=model, size=size, seed=seed, output=output).run(Console())


def _curate(rule: Any, data: str, split: str, scores: Path, output: Path) -> None:
    """Apply a rule of the filter module, and keep what comes of it."""
    from hf_influence.dataset.reading import read_dataset
    from hf_influence.errors import BadSetting, StoreError
    from hf_influence.filter import save_curated
    from hf_influence.filter.card import check_folder
    from hf_influence.scores import Scores

    if _holds_scores(Path(data)):
        raise BadSetting(
            f"{data} is a store or a file of scores, and no dataset. The dataset comes first, then the scores: "
            f"DATASET {data} --output …."
        )
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
    curated = rule.apply(read_dataset(data, split, texts), given, split=split)
    save_curated(curated, rule.report, output)
    print(f"{rule.report}\nwritten to {output}; datasets.load_from_disk({str(output)!r}) reads it")


def _holds_scores(path: Path) -> bool:
    """Whether it is a store, or a file of scores."""
    from hf_influence.errors import StoreError
    from hf_influence.scores import Scores

    if not path.is_file():
        return (path / "store.json").is_file()
    try:
        Scores.load(path)
    except StoreError:
        return False
    return True


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
