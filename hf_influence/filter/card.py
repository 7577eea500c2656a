"""What a dataset card says of a decision, and a folder that has the curated dataset with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from datasets import Dataset, DatasetDict
from huggingface_hub import DatasetCard

from hf_influence.dataset.contents import code_of_all
from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter.actions import DONE
from hf_influence.filter.on_disk import text_of
from hf_influence.filter.wording import markdown
from hf_influence.store.files import write_whole

if TYPE_CHECKING:
    from hf_influence.filter.decision import Decision

GROUPS = 20
START, END = "<!-- hf_influence decision: start -->", "<!-- hf_influence decision: end -->"
REPLAY = """```python
from hf_influence.filter import Decision

curated = Decision.load("decision.json").replay(original)  # refused if `original` is another dataset
```"""

Card = TypeVar("Card", str, Path, DatasetCard)


def section(decision: Decision) -> str:
    """The section of a dataset card, in Markdown: method, settings, counts, versions, and how to replay.

    Ids and contents of rows do not go in, but for the classes, tasks or sources of `decision.groups`, the first 20 of
    them. What comes from outside, such as settings and names of columns, shows as the text that it is.
    """
    facts = [
        ("rule", decision.rule),
        ("rows before", decision.before),
        *((f"rows {done}", decision.actions.count(action)) for action, done in DONE.items()),
        ("columns written", ", ".join(column.name for column in decision.writes)),
        ("ids", "positions" if decision.id_column is None else f"column {decision.id_column}"),
        ("content of the original, SHA-256", "" if decision.contents is None else code_of_all(decision.contents)),
        *((f"version of {name}", number) for name, number in decision.versions.items()),
    ]
    for source in decision.sources:
        facts += [(f"{source['method']}, {name}", repr(value)) for name, value in source["settings"].items()]
    lines = [
        START,
        "## How this dataset was curated",
        "",
        f"{decision.after} of {decision.before} rows were kept by the influence scores of {markdown(decision.method)}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {markdown(name)} | {markdown(value)} |" for name, value in facts if value not in ("", 0)),
    ]
    if decision.groups:
        lines += ["", "| group | before | after |", "|---|---|---|"]
        shown = list(decision.groups.items())[:GROUPS]
        lines += [f"| {markdown(group)} | {before} | {after} |" for group, (before, after) in shown]
        if more := len(decision.groups) - len(shown):
            lines += ["", f"and {more} more groups."]
    return "\n".join([*lines, "", "The same decision on the original dataset:", "", REPLAY, END])


def add_to_card(card: Card, decision: Decision) -> Card:
    """Put the section of a decision into a dataset card, in place of an earlier one.

        add_to_card(folder, decision)  # folder/README.md, made if it is not there
        add_to_card(DatasetCard.load("me/data"), decision).push_to_hub("me/data")  # after data.push_to_hub

    Everything else in the card, its metadata too, stays as it is.

    Args:
        card: A folder, a file, or a `huggingface_hub.DatasetCard`.
        decision: What was decided.

    Returns:
        The card.
    """
    if isinstance(card, DatasetCard):
        card.text = with_section(card.text, section(decision))
        return card
    file = Path(card)
    file = file if file.suffix == ".md" else file / "README.md"
    text = ""
    if file.is_file():
        with file.open(encoding="utf-8", newline="") as old:
            text = old.read()
    write_whole(file, with_section(text, section(decision)))
    return card


def with_section(text: str, section: str) -> str:
    """The text of a card with the section, where an earlier one stood or at the end."""
    end = "\r\n" if "\r\n" in text else "\n"
    section = section.replace("\n", end)
    start, stop = re.escape(START), re.escape(END)
    earlier = re.compile(f"{start}(?:(?!{start}).)*?{stop}", re.S)  # not from one that has lost its end
    if earlier.search(text):
        return earlier.sub(lambda _: section, text, count=1)
    return f"{text.rstrip()}{end}{end}{section}{end}" if text.strip() else f"{section}{end}"


def save_curated(curated: Dataset | DatasetDict, decision: Decision, folder: str | Path) -> None:
    """The curated dataset, `decision.json` and the section in `README.md`, in one folder.

    `datasets.load_from_disk(folder)` and `Decision.load(folder)` read them. The rows are saved as they are stored:
    formats and transforms are set anew on what is loaded.

    Raises:
        BadExample: Not a dataset with a length.
        BadSetting: No decision, or one that cannot be saved, or the folder of a store; nothing is written then.
    """
    from hf_influence.filter.decision import Decision

    if not isinstance(curated, (Dataset, DatasetDict)):
        raise BadExample(
            f"{type(curated).__name__} cannot be saved to a folder. Save the decision alone, decision.save(path), and "
            "replay it on the stream."
        )
    if not isinstance(decision, Decision):
        raise BadSetting(
            f"{type(decision).__name__} is no decision. Pass the report of the rule that made the dataset, which "
            "`apply` leaves: save_curated(curated, trim.report, folder)."
        )
    if (Path(folder) / "store.json").is_file():
        raise BadSetting(f"{folder} is a gradient store, which the dataset would be mixed with. Name another folder.")
    text = text_of(decision)
    curated.with_format(None).save_to_disk(str(folder))
    for left in ("dataset_info.json", "state.json") if isinstance(curated, DatasetDict) else ("dataset_dict.json",):
        (Path(folder) / left).unlink(missing_ok=True)  # of a dataset of the other kind, which would be loaded instead
    write_whole(Path(folder) / "decision.json", text)
    add_to_card(Path(folder), decision)
