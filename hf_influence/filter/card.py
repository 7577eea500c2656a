"""What a dataset card says of a decision, and a folder that has the curated dataset with it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from datasets import Dataset, DatasetDict
from huggingface_hub import DatasetCard

from hf_influence.dataset.contents import code_of_all
from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter.actions import DONE
from hf_influence.filter.advice import percent
from hf_influence.filter.on_disk import text_of
from hf_influence.filter.wording import markdown
from hf_influence.saving import write_whole

if TYPE_CHECKING:
    from hf_influence.filter.decision import Decision

GROUPS = 20
WHOLE = ("decision.json", "dataset_dict.json", "dataset_info.json", "state.json")
"""The files without which neither a decision nor a dataset is loaded from a folder."""
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
    for estimate in decision.estimates:
        how = "told" if estimate["told"] else "estimated"
        facts.append((f"labels taken for wrong by {estimate['method']}", f"{percent(estimate['wrong'])}, {how}"))
        facts.append((f"AUC of right and wrong labels of the queries by {estimate['method']}", estimate["auc"]))
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

    Raises:
        StoreError: The disk is full or not writable; a card that was there is still there.
    """
    if isinstance(card, DatasetCard):
        card.text = with_section(card.text, section(decision))
        return card
    file = Path(card).expanduser()
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
    formats and transforms are set anew on what is loaded. What was saved there before is given up first, so that a
    save that fails leaves nothing that passes for whole.

    Raises:
        BadExample: Not a dataset with a length.
        BadSetting: No decision, one that cannot be saved, or one that did not make the dataset; the folder of a store
            or of the dataset itself, or a file. Nothing is written then.
        StoreError: The decision or the card cannot be written: the disk is full or not writable.
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
    folder = Path(folder).expanduser()
    check_folder(folder)
    is_dict = isinstance(curated, DatasetDict)
    parts = {folder / name: rows for name, rows in curated.items()} if is_dict else {folder: curated}
    files = [Path(file["filename"]) for rows in parts.values() for file in rows.cache_files]
    places = {folder, *parts}
    if {file.resolve().parent for file in files} & {place.resolve() for place in places}:
        raise BadSetting(f"the dataset is read from {folder}, and its own rows would be lost. Name another folder.")
    if unlike := _unlike(decision, curated):
        raise BadSetting(
            f"the decision did not make this dataset: {unlike}. Its card would say what is not so. Pass what `apply` "
            "gave, and the report that it left: save_curated(curated, trim.report, folder)."
        )
    text = text_of(decision)
    for place in places:
        for name in WHOLE:
            (place / name).unlink(missing_ok=True)
    curated.with_format(None).save_to_disk(str(folder))
    add_to_card(folder, decision)
    write_whole(folder / "decision.json", text)


def check_folder(folder: Path) -> None:
    """BadSetting unless a curated dataset may go there."""
    if (folder / "store.json").is_file():
        raise BadSetting(f"{folder} is a gradient store, which the dataset would be mixed with. Name another folder.")
    if file := next((place for place in (folder, *folder.parents) if place.is_file()), None):
        raise BadSetting(
            f"{file} is a file, and the dataset, its decision and its card go into a folder. Name a folder."
        )


def _unlike(decision: Decision, curated: Dataset | DatasetDict) -> str:
    """How a dataset differs from what the decision made; empty where it need not.

    Of a DatasetDict one split is enough, or all groups. Rows and columns may have been changed since on purpose, so
    only their number is looked at, and the columns that are written.
    """
    if decision.columns is None:  # made on a stream, of which rows may come twice or have no score
        return ""
    if not isinstance(curated, DatasetDict):
        return _unlike_rows(decision, curated)
    sizes = {name: len(rows) for name, rows in curated.items()}
    for column in decision.writes:
        if column.name == decision.split_by:
            groups = Counter(column.new[i] for i in decision.kept)
            missing = Counter(groups.values()) - Counter(sizes.values())
            return f"its splits have {sizes} rows, and the groups {dict(groups)}" if missing else ""
    unlike = {name: _unlike_rows(decision, rows) for name, rows in curated.items()}
    return "; ".join(f"of {name!r}, {how}" for name, how in unlike.items()) if all(unlike.values()) else ""


def _unlike_rows(decision: Decision, rows: Dataset) -> str:
    if len(rows) != decision.after:
        return f"it has {len(rows)} rows, and {decision.after} were to be kept"
    for column in decision.writes:
        if column.name not in rows.column_names:
            return f"it lacks the column {column.name!r}, which was to be written"
        new, old = ([values[i] for i in decision.kept] for values in (column.new, column.old or column.new))
        if old != new and rows.with_format(None)[column.name][:] == old:
            return f"its column {column.name!r} holds what was to be replaced"
    return ""
