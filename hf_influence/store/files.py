"""Whether files fit and can be written, and reading them with errors that say which it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_influence.errors import StoreError


def check_room(path: Path, need: int) -> None:
    """Whether `need` bytes fit onto the disk of `path`, which need not be there yet.

    Raises:
        StoreError: They do not.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        raise StoreError(
            f"the rows need {_in_words(need)} and the disk of {path} has {_in_words(free)} free. Keep fewer "
            "columns (compress=dropout(16)) or choose another disk."
        )


def _in_words(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def check_writable(folder: Path) -> None:
    """Make the folder if it is not there, and see whether files can be written to it.

    Raises:
        StoreError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StoreError(
            f"{folder} is to be a folder for gradients, and nothing can be written there ({error}). Choose another "
            "path."
        ) from error


def open_shard(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{file} cannot be read ({error}). Delete {file.parent} and collect it again.") from error


def sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        digest = hashlib.sha256()
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} cannot be read ({error}). Delete {file.parent} and collect it again.") from error
    if not isinstance(content, dict):
        raise StoreError(f"{file} is not a JSON object. Delete {file.parent} and collect it again.")
    return content
