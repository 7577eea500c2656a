"""Text from outside, made fit to stand in a sentence."""

from __future__ import annotations

from typing import Any

LONGEST = 80


def printable(value: Any, longest: int = LONGEST) -> str:
    """On one line, without control characters or marks that turn the direction of writing, and not too long."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)[: longest + 1])
    return text if len(text) <= longest else text[: longest - 1] + "…"
