"""The file of a decision: what goes in, and what is accepted when it is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_influence.dataset.contents import code_of_all
from hf_influence.errors import StoreError
from hf_influence.filter.actions import DONE, Written
from hf_influence.saving import as_kept

if TYPE_CHECKING:
    from hf_influence.filter.decision import Decision

SCHEMA = 1


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
    content = as_kept({"schema": SCHEMA, "counts": _counts(decision.actions), "content": whole, **saved})
    return json.dumps({"sha256": checksum(content), **content}, indent=1)


def fields_of(path: str | Path) -> dict[str, Any]:
    """The fields of the decision in a file that `text_of` gave.

    Raises:
        StoreError: It was written in another layout.
        ValueError: It is not as it was written; likewise the other errors of reading.
    """
    saved = json.loads(Path(path).read_text(encoding="utf-8"))
    if saved.get("schema") != SCHEMA:
        raise StoreError(f"{path} was written in another layout. Read it with the version that wrote it.")
    known = saved.pop("sha256", None)
    if known != checksum(saved):
        raise ValueError(
            "it has no checksum" if known is None else "its checksum is that of another content: it was changed"
        )
    del saved["schema"], saved["counts"], saved["content"]
    for name in ("sources", "reasons", "columns"):
        saved[name] = None if saved[name] is None else tuple(saved[name])
    saved["groups"] = {group: (before, after) for group, before, after in saved["groups"]}
    saved["copies"] = dict(saved["copies"])
    saved["estimates"] = tuple(saved.get("estimates", ()))  # which earlier files do not have
    saved["writes"] = tuple(map(Written.of_plain, saved["writes"]))
    saved["known_contents"] = saved.pop("contents")
    return saved


def checksum(content: dict[str, Any]) -> str:
    """The SHA-256 of what a file of JSON says, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _counts(actions: list[str]) -> dict[str, int]:
    return {action: actions.count(action) for action in DONE if action in actions}
