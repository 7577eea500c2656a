"""The command line, `hf-influence`. It prints; everything that is computed lives elsewhere."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    help="Which fine-tuning examples help and which hurt, and a better dataset.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option(help="As a Markdown table, for the README.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known of each method, as JSON.")] = False,
    store: Annotated[
        Path | None, typer.Option(help="A store: which methods can run on it, what the others lack.")
    ] = None,
) -> None:
    """List the methods: what each gives you, what it needs, what it costs and when to use it."""
    from hf_influence.attribution import lacking
    from hf_influence.attribution import methods as table_of_methods

    if store is not None:
        lacks = lacking(store)
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
def demo(
    model: Annotated[str | None, typer.Option(help="Folder or hub name of a causal language model.")] = None,
    size: Annotated[int, typer.Option(min=20, help="Number of training prompts.")] = 80,
    seed: Annotated[int, typer.Option(help="Of data, wrong answers and training.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for stores and results.json; replaced.")] = Path("runs/demo"),
) -> None:
    """Fine-tune SmolLM2 on prompts with wrong answers; find them, drop them, retrain, and see what it brings."""
    from hf_influence.demo import Demo

    Demo(model=model, size=size, seed=seed, output=output).run(Console())


def markdown_table() -> str:
    """The table of methods for the README."""
    from hf_influence.attribution import methods as table_of_methods

    lines = ["| method | what you get | needs | use when |", "|---|---|---|---|"]
    for about in table_of_methods().values():
        cells = (f"`{about.name}`", about.summary, ", ".join(about.needs), about.use)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line; an error that was meant for the user is shown without a traceback."""
    from hf_influence.errors import InfluenceError

    try:
        app()
    except InfluenceError as error:
        Console(stderr=True).print("[bold red]error:[/]", escape(str(error)))
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
