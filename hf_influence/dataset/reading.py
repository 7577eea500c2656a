"""Datasets out of files, folders and the hub, with every cell as it was written."""

from __future__ import annotations

import csv
import glob
import gzip
import re
import zlib
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from hf_influence.dataset.wording import printable
from hf_influence.errors import BadExample

READERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Suffix of a file -> what `datasets` reads it with."""

QUOTED = re.compile(r'"([^"]|"")*"')
"""A cell in quotation marks, those within it doubled."""


def read_dataset(data: str, split: str, texts: str | None = None) -> Any:
    """The dataset that a name stands for; with all its splits, if it has several.

    Args:
        data: A file, a folder or a name on the hub.
        split: Which has to be there.
        texts: A column of texts, also where they look like numbers.

    Raises:
        BadExample: It cannot be read, or has no such split.
    """
    path = Path(data)
    kind = READERS.get(_suffix(path))
    if kind is None and path.is_file():
        raise BadExample(
            f"{data} is a file, and how to read it does not show in its name. Name a file in one of the formats "
            f"{', '.join(READERS)} (those of text also packed, as .gz), a folder of save_to_disk or a dataset of the "
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
    if READERS[suffix] != "csv":
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
                stray |= any(cell.startswith('"') and not QUOTED.fullmatch(cell) for cell in cells)
    return stray and len(widths) == 1 and widths != {1}


def of_split(splits: Any, split: str) -> Any:
    """One split of a DatasetDict.

    Raises:
        BadExample: It has no such split.
    """
    if split not in splits:
        raise BadExample(f"the DatasetDict has the splits {list(splits)} and no {split!r}. Pass split=….")
    return splits[split]
