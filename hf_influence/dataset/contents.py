"""Hashes of what a dataset contains, by row and by column: the same after saving, loading and other file formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Value

from hf_influence.errors import BadExample

AT_ONCE = 1000
SAME_EVERYWHERE = ("attention_mask", "token_type_ids", "special_tokens_mask")
"""Columns that tell hardly anything of a row but how long it is."""


def row_codes(dataset: Dataset, columns: Sequence[str]) -> list[str]:
    """The code of each row over some columns.

    Formats and transforms of the dataset do not count, nor do the order of columns and of the fields of a dictionary.
    What is missing in a dictionary is the same as None, since Arrow fills it in. Cost: one pass over the data.
    """
    tables = dataset.select_columns(list(columns)).with_format("arrow").iter(AT_ONCE)
    return [row_code(row, columns) for table in tables for row in table.to_pylist()]


def row_code(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """16 hexadecimal digits of the SHA-256 of the values of these columns.

    Raises:
        BadExample: A value that is no plain data, such as a decoded image.
    """
    plain = {name: _plain(row[name], name) for name in columns if row.get(name) is not None}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def code_of_all(codes: Sequence[str]) -> str:
    """One SHA-256 for the rows in their order."""
    return hashlib.sha256("".join(codes).encode()).hexdigest()


def content_of(dataset: Any) -> str:
    """A hash of the columns and rows of a dataset, or of a list of examples, the same in every process.

    Raises:
        BadExample: Something else than examples.
    """
    if isinstance(dataset, Dataset):
        columns, codes = dataset.column_names, row_codes(dataset, dataset.column_names)
    else:
        rows = [dataset[i] for i in range(len(dataset))]
        if stray := [type(row).__name__ for row in rows if not isinstance(row, Mapping)]:
            raise BadExample(f"an example is a {stray[0]}; it must be a dictionary of columns.")
        columns = list(rows[0]) if rows else []
        codes = [row_code(row, columns) for row in rows]
    return code_of_all([repr(columns), *codes])[:16]


def column_codes(dataset: Any, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Of each column what a dataset of the same rows, perhaps in another order, is known by.

    Args:
        dataset: Of anything else than a `datasets.Dataset` nothing is known, `{}`.
        columns: Which; by default those that hold text, numbers, or lists of tokens or labels.

    Returns:
        Column -> how many values are distinct, the hash of all in their order, and the hash of all whatever the order.
    """
    if not isinstance(dataset, Dataset):
        return {}
    chosen = [name for name in dataset.column_names if _telling(dataset, name)] if columns is None else columns
    found = {}
    for name in chosen:
        codes = row_codes(dataset, [name])
        found[name] = [len(set(codes)), code_of_all(codes)[:16], code_of_all(sorted(codes))[:16]]
    return found


def _telling(dataset: Dataset, name: str) -> bool:
    """Whether the values of a column are worth a hash: no masks, no images, no arrays of floats."""
    kind = dataset.features[name]
    lists = 0
    while isinstance(kind, list) or hasattr(kind, "feature"):
        kind, lists = kind[0] if isinstance(kind, list) else kind.feature, lists + 1
    if isinstance(kind, dict):  # conversations
        return True
    return (
        name not in SAME_EVERYWHERE and isinstance(kind, (Value, ClassLabel)) and not (lists and "float" in kind.dtype)
    )


def _plain(value: Any, column: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"} and value["bytes"] is not None:  # an image or sound: its path is volatile
            return value["bytes"].hex()
        return {str(name): _plain(entry, column) for name, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        first = next((entry for entry in value if entry is not None), None)
        if first is None or type(first) in (bool, int, float, str):
            return list(value)  # Arrow lists are of one type
        return [_plain(entry, column) for entry in value]
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    for read in ("tolist", "isoformat", "total_seconds", "as_tuple"):  # arrays, dates, durations, decimals
        if hasattr(value, read):
            return _plain(str(value) if read == "as_tuple" else getattr(value, read)(), column)
    raise BadExample(
        f"column {column!r} holds a {type(value).__name__}, which is no plain data, so the row cannot be told from "
        "others by its contents. Of images and sounds use the undecoded values: dataset.decode(False)."
    )
