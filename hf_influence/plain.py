"""What is to be kept in a file, as the plain values that JSON has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hf_influence.errors import BadSetting


def as_json(content: Any) -> str:
    """JSON text; numbers of numpy, tensors, arrays and columns as the plain values that they hold.

    Raises:
        BadSetting: It has something that JSON cannot hold.
    """
    try:
        return json.dumps(content, default=_plain)
    except TypeError as error:
        raise BadSetting(
            f"what is to be saved cannot be written as JSON ({error}), so it could not be read again. Use numbers, "
            "text, lists and dictionaries of text in settings and ids."
        ) from error


def as_kept(content: Any) -> Any:
    """The same as it comes back from a file; errors as in `as_json`."""
    return json.loads(as_json(content))


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"it has a {type(value).__name__}")
