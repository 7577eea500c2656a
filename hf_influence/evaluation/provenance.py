"""Where a figure comes from: the command, the day, the kind of machine and the versions."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("hf-influence", "torch", "transformers", "peft", "datasets", "scikit-learn")


def provenance(command: Sequence[str] | None = None) -> dict[str, Any]:
    """What to write beside every figure: `command`, `date`, `machine` (class only), `python` and `versions`.

    With the version of this library stands a code of its source, as figures change while the version does not. Neither
    the name of the host nor a folder outside of the working directory is in it; of an absolute path the last part stays
    alone.

    Args:
        command: The program and its arguments; by default those of this process.
    """
    words = list(sys.argv if command is None else command)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {"cpus": cpus, "architecture": platform.machine()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return {
        "command": shlex.join(["python", *map(_without_folder, words)]),
        "date": str(date.today()),
        "machine": machine,
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))} | {"source": _source()},
    }


def described(about: dict[str, Any]) -> str:
    """The same as two lines of Markdown."""
    machine = about["machine"]
    kind = f"{machine['cpus']} CPU cores, {machine['architecture']}" + (
        f", {gpu}" if (gpu := machine.get("gpu")) else ""
    )
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    return f"`{about['command']}`\n{about['date']}, {kind}, Python {about['python']}, {versions}."


def _without_folder(word: str) -> str:
    option, equals, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    path = Path(value)
    if not path.is_absolute():
        return word
    inside = path.is_relative_to(Path.cwd())
    return option + equals + str(path.relative_to(Path.cwd()) if inside else path.name)


@cache
def _source() -> str:
    """Tells one state of the code of this library from another."""
    code = hashlib.sha256()
    for package in ("hf_influence", "hf_influence.callbacks"):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for file in sorted(Path(spec.origin).parent.rglob("*.py")):
            code.update(file.read_bytes())
    return code.hexdigest()[:8]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
