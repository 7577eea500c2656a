"""The file of a decision: what goes in, and what is accepted when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_influence.dataset.contents import code_of_all
from hf_influence.errors import StoreError
from hf_influence.filter.actions import DONE, Written
from hf_influence.scores import as_json

if TYPE_CHECKING:
    from hf_influence.filter.decision import Decision

SCHEMA = 1
_FORM: dict[str, tuple[Any, Any]] = {
    "rule": (str, object),
    "sources": (list, dict),
    "ids": (list, object),
    "id_column": (str | None, object),
    "actions": (list, str),
    "scores": (list, int | float),
    "ranks": (list, int),
    "from_highest": (bool, object),
    "reasons": (list, str),
    "reason": (list, int),
    "copies": (list, list),
    "groups": (list, list),
    "columns": (list | None, str),
    "writes": (list, dict),
    "split_by": (str | None, object),
    "tokens": (list | None, int),
    "per_token": (bool, object),
    "versions": (dict, str),
    "contents": (list | None, str),
}
"""What each part of the file is, and what its entries are."""


def text_of(decision: Decision) -> str:
    """A decision as JSON, with counts and a checksum.

    Raises:
        BadSetting: Settings of the scores, ids or labels that JSON cannot hold.
    """
    contents = decision.contents
    saved = {f.name: getattr(decision, f.name) for f in fields(decision) if f.name not in ("dataset", "known_contents")}
    saved |= {
        "ids": list(decision.ids),
        "groups": [[group, *sizes] for group, sizes in decision.groups.items()],
        "copies": list(decision.copies.items()),
        "writes": [column.plain() for column in decision.writes],
        "contents": contents,
    }
    whole = None if contents is None else code_of_all(contents)
    content = json.loads(as_json({"schema": SCHEMA, "counts": _counts(decision.actions), "content": whole, **saved}))
    return json.dumps({"sha256": checksum(content), **content}, indent=1)


def fields_of(path: str | Path) -> dict[str, Any]:
    """The fields of the decision in a file that `text_of` gave.

    Raises:
        StoreError: It was written in another layout.
        ValueError: It is not as it was written, or its parts do not fit together; likewise the other errors of reading.
    """
    saved = json.loads(Path(path).read_text(encoding="utf-8"))
    if saved.get("schema") != SCHEMA:
        raise StoreError(f"{path} was written in another layout. Read it with the version that wrote it.")
    known = saved.pop("sha256", None)
    if known != checksum(saved):
        raise ValueError(
            "it has no checksum" if known is None else "its checksum is that of another content: it was changed"
        )
    del saved["schema"]
    _check(saved)
    del saved["counts"], saved["content"]
    for name in ("sources", "reasons", "columns"):
        saved[name] = None if saved[name] is None else tuple(saved[name])
    saved["groups"] = {group: (before, after) for group, before, after in saved["groups"]}
    saved["copies"] = dict(saved["copies"])
    saved["writes"] = tuple(map(Written.of_plain, saved["writes"]))
    saved["known_contents"] = saved.pop("contents")
    return saved


def checksum(content: dict[str, Any]) -> str:
    """The SHA-256 of what a file of JSON says, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_whole(file: Path, text: str) -> None:
    """A file that appears when all of the text is in it, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="") as new:
            new.write(text)
            new.flush()
            os.fsync(new.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _counts(actions: list[str]) -> dict[str, int]:
    return {action: actions.count(action) for action in DONE if action in actions}


def _check(saved: dict[str, Any]) -> None:
    """ValueError if a part is not what it should be, or the parts do not fit together."""
    for name, (kind, entry) in _FORM.items():
        value = saved[name]
        entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if not isinstance(value, kind) or not all(isinstance(one, entry) for one in entries):
            raise ValueError(f"its {name!r} is of another kind than in a decision")
    n, writes = len(saved["actions"]), saved["writes"]
    lists = [saved[name] for name in ("ids", "scores", "ranks", "reason", "contents", "tokens")]
    lists += [column[name] for column in writes for name in ("new", "old")]
    if any(values is not None and len(values) != n for values in lists):
        raise ValueError(f"its lists are not all of {n} rows")
    if unknown := set(saved["actions"]) - set(DONE):
        raise ValueError(f"it has the action {sorted(unknown)[0]!r}")
    if saved["counts"] != _counts(saved["actions"]):
        raise ValueError("its counts are not those of its actions")
    if sorted(saved["ranks"]) != list(range(n)):
        raise ValueError(f"its ranks are not the {n} places of an order")
    sources = saved["sources"]
    if not all(isinstance(one.get("method"), str) and isinstance(one.get("settings"), dict) for one in sources):
        raise ValueError("one of its sources has no method or no settings")
    if any(not 0 <= at < len(saved["reasons"]) for at in saved["reason"]):
        raise ValueError("it has a row without a reason")
    if any(not 0 <= i < n for pair in saved["copies"] for i in pair):
        raise ValueError("it has a copy of no row")
    if not writes and not {"keep", "drop"}.issuperset(saved["actions"]):
        raise ValueError("it changes rows and writes no column")
    if "relabel" in saved["actions"] and writes[0]["old"] is None:
        raise ValueError("it relabels rows and does not know their labels")
    if saved["split_by"] not in (None, *(column["name"] for column in writes)):
        raise ValueError("it splits by a column that it does not write")
    if saved["contents"] is not None and code_of_all(saved["contents"]) != saved["content"]:
        raise ValueError("the hashes of its rows were changed")
