"""A series of runs, each kept as soon as it is finished, so that an interrupted series goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_influence.errors import BadSetting, StoreError, StoreMismatch
from hf_influence.evaluation.provenance import provenance
from hf_influence.saving import as_kept, write_json


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        key: What tells it from the others of the series: set, rank, seed.
        settings: What all runs of the series share.
        about: Command, date, machine class and versions.
        seconds: How long it took.
        result: What it found.
    """

    key: dict[str, Any]
    settings: dict[str, Any]
    about: dict[str, Any]
    seconds: float
    result: Any


class Runs:
    """A folder with one JSON file for each finished run.

    >>> from tempfile import TemporaryDirectory
    >>> folder = TemporaryDirectory()
    >>> runs = Runs(folder.name, {"rows": 100})
    >>> [runs.do({"seed": seed}, lambda seed=seed: {"auc": seed / 10}) for seed in (7, 8)]
    [{'auc': 0.7}, {'auc': 0.8}]
    >>> [run.key["seed"] for run in Runs(folder.name, {"rows": 100})]       # another process goes on from here
    [7, 8]
    >>> folder.cleanup()

    Args:
        folder: Made if it is not there; `None` keeps the runs in memory alone.
        settings: What all runs share, as plain values: runs of other settings are refused, never mixed in.
    """

    def __init__(self, folder: str | Path | None = None, settings: Mapping[str, Any] | None = None):
        self.folder = None if folder is None else Path(folder)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings or {}, default=str))
        self._kept: dict[str, Run] = {}

    def do(self, key: Mapping[str, Any], work: Callable[[], Any]) -> Any:
        """The result of the run with this key: read if it is there, else worked out and written at once.

        Args:
            key: Plain values, the name of the file.
            work: What to do; returns plain values (they go through JSON).

        Raises:
            BadSetting: An empty key, or one that is no plain values.
            StoreMismatch: The folder holds that run with other settings, or another run under the same name.
        """
        key = as_kept(dict(key))
        name = _file_name(key)
        run = self._read(self.folder / name) if self.folder and (self.folder / name).is_file() else self._kept.get(name)
        if run is None:
            started = time.perf_counter()
            result = work()
            content = {
                "key": key,
                "settings": self.settings,
                "about": provenance(),
                "seconds": time.perf_counter() - started,
                "result": result,
            }
            run = Run(**json.loads(json.dumps(content)))
            if self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / name, content)
            else:
                self._kept[name] = run
        elif run.key != key:
            raise StoreMismatch(
                f"{name} is the run {run.key}, and {key} has the same name, so one would be taken for the other. Use "
                "values in the keys that read differently, or another folder."
            )
        return run.result

    def __iter__(self) -> Iterator[Run]:
        """All finished runs, whoever made them, in the order of their keys."""
        files = self.folder.glob("*.json") if self.folder else ()
        runs = [self._read(file) for file in files] or list(self._kept.values())
        yield from sorted(runs, key=lambda run: [(str(type(v)), v) for v in run.key.values()])

    def _read(self, file: Path) -> Run:
        try:
            run = Run(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(
                f"{file} is not a finished run ({error}). Delete that file, and the run is done again."
            ) from error
        if run.settings != self.settings:
            names = [*self.settings, *run.settings]
            name = next(n for n in names if run.settings.get(n, ...) != self.settings.get(n, ...))
            raise StoreMismatch(
                f"{file} was made with {name}={run.settings.get(name)!r}, and now it is {self.settings.get(name)!r}: "
                "the two do not belong in one table. Choose another folder for the results, or the same settings."
            )
        return run


def _file_name(key: Mapping[str, Any]) -> str:
    if not key:
        raise BadSetting("the key of a run is empty, so it cannot be told from others. Name at least its seed.")
    name = ",".join(f"{field}={value}" for field, value in key.items())
    plain = re.sub(r"[^\w=.,+-]", "_", name)[:150]
    return plain + ("" if plain == name else "-" + hashlib.sha256(name.encode()).hexdigest()[:8]) + ".json"
