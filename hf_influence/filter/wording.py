"""Values from outside in a report, an explanation or in Markdown."""

from __future__ import annotations

import re
from typing import Any

from hf_influence.dataset.wording import printable

LONGEST_IN_CARD = 400


def quoted(value: Any) -> str:
    """An integer as it is, anything else in quotes, so that its end is seen."""
    text = printable(value)
    return text if isinstance(value, int) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def settings_of(settings: dict[str, Any]) -> str:
    """`damping=0.1, point=0`."""
    return ", ".join(f"{printable(name)}={printable(repr(value))}" for name, value in settings.items())


def markdown(value: Any) -> str:
    """Text that shows in Markdown as it is: no markup, no HTML, no link, no end of a table cell."""
    text = re.sub(r"[\\`*_{}\[\]()#!|~$:@]", r"\\\g<0>", printable(value, LONGEST_IN_CARD))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", text)
