"""Which examples belong together: the value of a class, a task or a source, made fit to be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from typing import Any


def group_of(value: Any) -> Hashable:
    """The group that a value stands for: equal values are of one group.

    NaN, which is not even equal to itself, is the group of None; numbers of numpy and torch are plain ones; a list, an
    array or a dictionary is the JSON text of what it holds.

    >>> [group_of(value) for value in ("a", 2, math.nan, None, ["x", 1], {"b": 1, "a": 2})]
    ['a', 2, None, None, '["x", 1]', '{"a": 2, "b": 1}']
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, (list, tuple, dict)) or not isinstance(value, Hashable):
        return json.dumps(
            value, sort_keys=True, default=lambda held: held.tolist() if hasattr(held, "tolist") else repr(held)
        )
    return value
