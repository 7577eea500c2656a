"""A hash of what a row of a dataset contains: the same after saving, loading and other file formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from hf_influence.errors import BadExample

AT_ONCE = 1000


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
