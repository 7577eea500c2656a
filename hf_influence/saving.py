"""What is kept in a file: plain values as JSON has them, and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hf_influence.errors import BadSetting, StoreError

ADVICE = "Make room and run the same again."
PART = ".part"


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


def write_json(file: Path, content: dict[str, Any], *, advice: str = ADVICE, suffix: str = PART) -> None:
    """A file of JSON; see `write_whole` for the other arguments and the error."""
    write_whole(file, json.dumps(content, indent=1), advice=advice, suffix=suffix)


def write_whole(file: Path, text: str, *, advice: str = ADVICE, suffix: str = PART) -> None:
    """Replace `file` in one step, so that a reader sees the old or the new text and never half of one.

    Args:
        file: Its folder is made.
        text: Of the file.
        advice: What the error ends in.
        suffix: Of the file that is written first; its own where several processes may write at a time.

    Raises:
        StoreError: The disk is full or not writable; what was there is still there.
    """
    part = file.with_name(file.name + suffix)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("w", encoding="utf-8", newline="") as new:
                new.write(text)
                new.flush()
                os.fsync(new.fileno())
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"could not write {file} ({error}). {advice}") from error


def save_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    *,
    about: Mapping[str, str] | None = None,
    advice: str = ADVICE,
) -> None:
    """Replace `file` in one step by one of named tensors, none of which shares memory with another.

    Args:
        file: A safetensors file; its folder is made.
        tensors: Name -> tensor.
        about: Text to keep in its header, by name.
        advice: What the error ends in.

    Raises:
        StoreError: The disk is full or not writable; what was there is still there.
    """
    part = file.with_name(file.name + PART)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(kept, part, metadata=None if about is None else dict(about))
            with open(part, "rb+") as handle:
                os.fsync(handle.fileno())
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"could not write {file} ({error}). {advice}") from error
