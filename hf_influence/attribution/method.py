"""What a method is, and the table of all methods."""

from __future__ import annotations

import math
import re
import reprlib
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from inspect import cleandoc
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from hf_influence.attribution.selection import Selection
from hf_influence.errors import BadSetting, UnknownMethod

_TABLE: dict[str, type[Method]] = {}


@dataclass(frozen=True, kw_only=True)
class About:
    """One row of the table of methods: all that is said about a method anywhere comes from here.

    Attributes:
        name: What `attribute(store, method=...)` takes.
        summary: What you get, in a sentence.
        formula: How it is computed, in the notation of the paper.
        needs: What must be stored: "rows", "queries" (the query split, with rows where those of the training examples
            are needed), "points" (what is needed at points of training), "members" (at those of an ensemble), "labels",
            "texts" (passed as settings), an artifact collected from the model ("hessian", "ekfac", "adam"), or a
            statistic by its name, "query loss" that of the queries.
        cost: Time and memory, in words.
        use: When to choose it.
        source: Where it comes from.
        settings: Its settings and their defaults.
    """

    name: str
    summary: str
    formula: str
    needs: tuple[str, ...]
    cost: str
    use: str
    source: str
    settings: dict[str, Any]


@dataclass(kw_only=True)
class Method(ABC):
    """A way to score training examples: its fields are its settings, its docstring its row in the table.

    A subclass with a name is added to the table: `class DataInf(MeanInverse, InnerProduct, name="datainf")`. Its
    docstring has a summary, an indented formula, and paragraphs "Cost:", "Use when:" and "Source:". A field may carry
    `metadata` with the bounds "above", "below", "least" or the "choices" that its value must respect. It sees the rows
    at one parameter point, unless it is one of `OverPoints`.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    joint: ClassVar[bool] = False
    """Whether all queries have one column together."""

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            _TABLE[name] = cls

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            wrong = "" if value is None and setting.default is None else _wrong(value, **setting.metadata)
            if isinstance(setting.default, bool) and not isinstance(value, bool):
                wrong = "True or False"
            if wrong:
                raise BadSetting(f"method '{self.name}': {setting.name}={value!r} must be {wrong}.")

    def select(self, rows: Selection, point: int | None) -> Selection:
        """The rows that the method looks at: those of the point asked for, or of point 0."""
        return rows.at(point or 0)

    @abstractmethod
    def score(self, rows: Selection) -> Tensor:
        """The scores `[n, q]` in dataset order, one column without queries; higher = more worth keeping."""

    @cached_property
    def report(self) -> dict[str, Any]:
        """What `score` found on the way and is no setting, such as how far it has converged; kept as JSON."""
        return {}

    def columns(self, rows: Selection) -> list[Any] | None:
        """The ids of the columns, or `None` for a method without queries."""
        if "queries" not in self.needs:
            return None
        return [self.name] if self.joint else rows.query.ids

    def record(self, rows: Selection) -> dict[str, Any]:
        """The settings to store with the scores, those that depend on the rows filled in."""
        return asdict(self)

    @classmethod
    def about(cls) -> About:
        """What the docstring and the fields of the method say."""
        text = cleandoc(cls.__doc__ or "")
        paragraphs = dict(re.findall(r"^([A-Z][a-z ]+): (.*?)(?=\n[A-Z][a-z ]+: |\n\n|\Z)", text, re.M | re.S))
        cost, use, source = (" ".join(paragraphs.get(key, "").split()) for key in ("Cost", "Use when", "Source"))
        return About(
            name=cls.name,
            summary=" ".join(text.split("\n\n")[0].split()),
            formula=cleandoc("\n".join(re.findall(r"^ {4}.*$", text, re.M))),
            needs=cls.needs,
            cost=cost,
            use=use,
            source=source,
            settings={setting.name: setting.default for setting in fields(cls)},
        )


def methods() -> dict[str, About]:
    """The table of methods: name -> what there is to say about it; the default first, then those with queries."""
    order = sorted(
        _TABLE,
        key=lambda name: (name != "auto", "queries" not in _TABLE[name].needs, "rows" not in _TABLE[name].needs),
    )
    return {name: _TABLE[name].about() for name in order}


def class_of(name: str) -> type[Method]:
    """The class behind a name in the table."""
    return _TABLE[name]


def make_method(name: str, settings: dict[str, Any]) -> Method:
    """The method of that name with these settings.

    Raises:
        UnknownMethod: No such name.
        BadSetting: No such setting, or a value out of bounds or of the wrong kind.
    """
    listing = "`hf-influence methods` or hf_influence.attribution.methods() list them"
    if name not in _TABLE:
        raise UnknownMethod(f"unknown method {name!r}{_nearest(name, _TABLE)} {listing}.")
    allowed = [setting.name for setting in fields(_TABLE[name])]
    for given in settings:
        if given not in allowed:
            raise BadSetting(
                f"method '{name}' has no setting {given!r}{_nearest(given, allowed)} It takes: "
                f"{', '.join(allowed) or 'none'}."
            )
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in settings.items()}
    try:
        return _TABLE[name](**plain)
    except TypeError as error:
        given = ", ".join(f"{key}={reprlib.repr(value)}" for key, value in settings.items())
        raise BadSetting(
            f"method '{name}' cannot use {given}: a value is of the wrong kind ({error}). `hf-influence methods "
            "--json` has the settings and their defaults."
        ) from error


def _nearest(word: object, known: Any) -> str:
    close = get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _wrong(
    value: Any,
    above: float | None = None,
    below: float | None = None,
    least: int | None = None,
    choices: tuple[str, ...] = (),
) -> str:
    """What `value` should be and is not; empty if it is."""
    one_of = ", ".join(map(repr, choices))
    if choices and value in choices:
        return ""
    if choices and above is None:
        return f"one of {one_of}"
    number = not isinstance(value, bool)  # which Python takes for 0 or 1
    if least is not None:
        return "" if number and isinstance(value, int) and value >= least else f"a whole number, at least {least}"
    if above is not None:
        high = math.inf if below is None else below
        bounds = f"above {above}" + ("" if below is None else f" and below {below}")
        bounds += f", or {one_of}" if choices else ""
        return "" if number and isinstance(value, int | float) and above < value < high else f"a number {bounds}"
    return ""
