"""What belongs to a parameter point and is no row: eigenvectors of its curvature, the state of its optimizer.

    points/0000/hessian.json           hash of the adapter's values, settings, size and checksum of the file beside it
    points/0000/hessian.safetensors    named tensors

The JSON is written last and deleted first, so an artifact is there whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_influence.errors import BadSetting, MissingRows, StoreError, StoreMismatch
from hf_influence.saving import save_tensors, write_json
from hf_influence.store.files import check_room, open_shard, read_json, sha256
from hf_influence.store.gradient_store import GradientStore
from hf_influence.store.points import point_folder
from hf_influence.store.rows import Rows

COLLECTED_BY = {
    "hessian": "collect_hessian(model, dataset, path)",
    "ekfac": "collect_ekfac(model, dataset, path)",
    "adam": "adam_state(model, path, trainer.optimizer)",
}
"""The artifacts that methods need, and what makes them."""


@dataclass(frozen=True)
class Artifact:
    """Named tensors, read when they are asked for.

    Attributes:
        folder: Where it lies.
        details: What it says of itself.
        tensor: Name -> tensor.
        names: Of its tensors.
    """

    folder: Path
    details: dict[str, Any]
    tensor: Callable[[str], Tensor]
    names: frozenset[str]


def write_artifact(
    store: GradientStore,
    name: str,
    tensors: dict[str, Tensor],
    details: dict[str, Any],
    *,
    adapter: str,
    point: int = 0,
) -> None:
    """Keep an artifact at a parameter point; one of that name that is there already is replaced.

    Args:
        store: The store.
        name: Letters only.
        tensors: Name -> tensor.
        details: Plain values to keep with them.
        adapter: Hash of the trainable values at which it was made.
        point: The parameter point; it need not hold rows yet.

    Raises:
        StoreMismatch: The rows of the point were taken at other values of the adapter.
        StoreError: It does not fit onto the disk.
    """
    if not name.isalpha() or name == "point":
        raise BadSetting(f"name={name!r} is not a name of an artifact. Use letters only, and not 'point'.")
    folder = point_folder(store.path, point)
    _check_adapter(folder, name, adapter, store.adapter(point))
    check_room(folder, sum(tensor.nbytes for tensor in tensors.values()))
    about, file = folder / f"{name}.json", folder / f"{name}.safetensors"
    new, advice = file.with_suffix(".new"), "The rows beside it are safe; make room."
    save_tensors(new, tensors, advice=advice)
    try:
        about.unlink(missing_ok=True)
        new.replace(file)
        content = {"adapter": adapter, "bytes": file.stat().st_size, "sha256": sha256(file), "details": details}
        write_json(about, content, advice=advice)
    except OSError as error:
        raise StoreError(f"could not write {about} ({error}). {advice}") from error
    finally:
        new.unlink(missing_ok=True)


def has_artifact(store: GradientStore, name: str) -> bool:
    """Whether an artifact of that name was collected at the weights after training."""
    return (point_folder(store.path, 0) / f"{name}.json").is_file()


def read_artifact(rows: Rows, name: str, needed_by: str, point: int | None = None) -> Artifact:
    """The artifact of that name at the point of these rows, or at another point of their store.

    Args:
        rows: Rows of some split.
        name: Of the artifact.
        needed_by: Who asks, for the message.
        point: The parameter point; by default that of the rows.

    Raises:
        MissingRows: It was not collected.
        StoreMismatch: It was made at other values of the adapter than the rows.
        StoreError: It is damaged.
    """
    folder = rows.folder.parent if point is None else point_folder(rows.folder.parents[2], point)
    about, file = folder / f"{name}.json", folder / f"{name}.safetensors"
    if not about.is_file():
        path = str(folder.parents[1])
        number = "" if int(folder.name) == 0 else f", point={int(folder.name)}"
        call = COLLECTED_BY.get(name, "").replace("path", repr(path)).removesuffix(")") + number + ")"
        raise MissingRows(
            f"{folder} does not hold the artifact {name!r} that {needed_by} needs. It takes the model, so it is "
            f"collected beside the rows: {call}."
        )
    content = read_json(about)
    marker = folder / "point.json"
    _check_adapter(folder, name, content["adapter"], read_json(marker)["adapter"] if marker.is_file() else None)
    if not file.is_file() or file.stat().st_size != content["bytes"]:
        raise StoreError(f"{file} is missing or cut short. Delete {about} and collect the artifact again.")
    handle = open_shard(file)
    return Artifact(folder, content["details"], handle.get_tensor, frozenset(handle.keys()))


def _check_adapter(folder: Path, name: str, artifact: str, rows: str | None) -> None:
    if rows not in (None, artifact):
        raise StoreMismatch(
            f"{folder} holds rows at other values of the adapter than its {name!r} (hash {rows}, and {artifact} for "
            f"{name!r}), so the two do not belong together. Collect both with the same trained model."
        )
