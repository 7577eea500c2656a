"""Rows on disk: a folder that describes itself and appears whole.

    runs/sst2/
      store.json                      what all rows share: model, task, blocks, compressor, dtype
      points/0000/point.json          the parameter point: hash of the adapter's values
      points/0000/train/rows.json     dataset, ids, and the list of finished shards with their checksums
      points/0000/train/rows-00000.safetensors

One row is one example at one parameter point: its gradient, cut into blocks (one a parameter), and its statistics.
A shard is written under a temporary name, synced, renamed, and only then listed; so a run that dies loses at most
the rows it had not written, and the next one continues where the list ends. Only safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_influence.errors import BadSetting, MissingRows, StoreError, StoreMismatch

SCHEMA = 1
SHARD_BYTES = 64 << 20
SHARD_SECONDS = 60.0
CHUNK_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Header:
    """What all rows of a store share; rows that differ in any of it cannot be compared.

    Attributes:
        model: Class of the model and hash of its frozen weights.
        task: Kind of loss and how it is reduced over the tokens of an example.
        blocks: Parameter name as in `model.named_parameters()` -> shape of the parameter.
        compress: The compressor's name and settings; `None` for whole rows.
        columns: For a compressor that keeps entries, which: parameter name -> positions in the flattened gradient.
        dtype: Of the rows, "float32" or "float64".
    """

    model: dict[str, Any]
    task: dict[str, Any]
    blocks: dict[str, list[int]]
    compress: dict[str, Any] | None = None
    columns: dict[str, list[int]] | None = None
    dtype: str = "float32"

    def width(self, name: str) -> int:
        """Number of stored columns of a block."""
        if self.compress is None:
            return prod(self.blocks[name])
        return min(int(self.compress["r"]), prod(self.blocks[name]))

    def row_bytes(self) -> int:
        return sum(self.width(name) for name in self.blocks) * getattr(torch, self.dtype).itemsize

    def check(self, other: Header, path: Path) -> None:
        """Refuse `other` (the model at hand) where it differs from this header (the store at `path`).

        Raises:
            StoreMismatch: Says what differs.
        """
        mine, theirs = list(self.blocks), list(other.blocks)
        if mine != theirs:
            odd = next(
                (name for name in (*mine, *theirs) if (name in mine) != (name in theirs)), "none, the order differs"
            )
            raise StoreMismatch(
                f"{path} holds rows of {len(mine)} blocks, the model at hand has {len(theirs)} (first that only one of "
                f"them has: {odd}). Rows of different adapters cannot be compared: collect all splits with the same "
                "target modules, or into another folder."
            )
        for what in fields(self):
            was, now = getattr(self, what.name), getattr(other, what.name)
            if was == now or what.name == "columns":
                continue
            if isinstance(was, dict) and isinstance(now, dict):
                key = next(k for k in (*was, *now) if was.get(k) != now.get(k))
                was, now = f"{key} = {was.get(key)}", f"{key} = {now.get(key)}"
            raise StoreMismatch(
                f"{path} holds rows with another {what.name} (stored: {was}; now: {now}). Collect into another folder, "
                "or delete this one."
            )


class GradientStore:
    """A folder of gradient rows. Open one with `GradientStore.open(path)`, fill one with `collect`."""

    def __init__(self, path: Path, header: Header):
        self.path = path
        self.header = header

    @classmethod
    def open(cls, path: str | Path) -> GradientStore:
        """Open an existing store.

        Raises:
            StoreError: No store there, or one that this version cannot read.
        """
        path = Path(path)
        if not (path / "store.json").is_file():
            raise StoreError(f"{path} is not a gradient store (it has no store.json). Fill one with collect(...).")
        about = _read_json(path / "store.json")
        if about.pop("schema", None) != SCHEMA:
            raise StoreError(f"{path} was written with another store layout. Collect it again with this version.")
        try:
            return cls(path, Header(**about))
        except TypeError as error:
            raise StoreError(f"{path / 'store.json'} is damaged ({error}). Collect the rows again.") from error

    @classmethod
    def create(cls, path: str | Path, header: Header, *, overwrite: bool = False) -> GradientStore:
        """Open the store at `path` for rows described by `header`, making it if it is not there.

        Args:
            path: Its folder.
            header: What all its rows are to share.
            overwrite: Delete the rows that are there if they do not fit, instead of refusing.

        Raises:
            StoreMismatch: The store that is there holds other rows.
        """
        path = Path(path)
        if (path / "store.json").is_file():
            try:
                store = cls.open(path)
                store.header.check(header, path)
                return store
            except StoreError:
                if not overwrite:
                    raise
                shutil.rmtree(path / "points", ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
        _write_json(path / "store.json", {"schema": SCHEMA, **asdict(header)})
        return cls(path, header)

    @property
    def blocks(self) -> list[str]:
        """Parameter names, in the order of the model."""
        return list(self.header.blocks)

    def adapter(self, point: int = 0) -> str | None:
        """Hash of the trainable values at which the rows of a point were taken; `None` without rows."""
        file = self._point(point) / "point.json"
        return _read_json(file)["adapter"] if file.is_file() else None

    def splits(self, point: int = 0) -> list[str]:
        """The names of the splits that hold rows at a parameter point."""
        return sorted(entry.parent.name for entry in self._point(point).glob("*/rows.json"))

    def rows(self, split: str = "train", point: int = 0) -> Rows:
        """The rows of one split, in dataset order.

        Raises:
            MissingRows: The split was never collected, or not to its end.
        """
        folder = self._point(point) / split
        if not (folder / "rows.json").is_file():
            have = ", ".join(self.splits(point)) or "none"
            raise MissingRows(
                f"{self.path} holds no rows of the split {split!r} (it has: {have}). Collect them: collect(model, "
                f"dataset, {str(self.path)!r}, split={split!r})."
            )
        manifest = Manifest.read(folder)
        if manifest.stored < manifest.n:
            raise MissingRows(
                f"{folder} holds {manifest.stored} of {manifest.n} rows: the run that filled it was interrupted. Run "
                "the same collect(...) again; it continues where this one stopped."
            )
        return Rows(folder, self.header, manifest)

    def writer(
        self,
        split: str,
        *,
        adapter: str,
        dataset: str,
        n: int,
        ids: Sequence[Any] | None = None,
        id_column: str | None = None,
        point: int = 0,
        overwrite: bool = False,
    ) -> RowWriter:
        """Start or continue a split.

        Args:
            split: Name of the split, a plain folder name.
            adapter: Hash of the values of the trainable parameters at this point.
            dataset: Fingerprint of the tokenised dataset.
            n: Number of its examples.
            ids: Their ids, where they are not 0 … n-1.
            id_column: The column that holds those.
            point: The parameter point.
            overwrite: Delete what is there of another adapter state or dataset, instead of refusing.

        Raises:
            StoreMismatch: The point or the split belongs to another adapter state or dataset.
            StoreError: The rows do not fit onto the disk.
        """
        if not split or not all(c.isalnum() or c in "-_" for c in split):
            raise BadSetting(f"split={split!r} is not a folder name. Use letters, digits, '-' and '_'.")
        folder = self._point(point)
        stored = self.adapter(point)
        if stored not in (None, adapter):
            if overwrite:
                shutil.rmtree(folder)
            else:
                raise StoreMismatch(
                    f"{folder} holds rows at other values of the adapter (stored hash {stored}, now {adapter}). "
                    "Gradients at different weights cannot be compared: collect all splits with the same trained "
                    "model, or into another folder."
                )
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "point.json", {"adapter": adapter})
        about = Manifest(dataset, n, None if ids is None else list(ids), id_column)
        try:
            writer = RowWriter(folder / split, self.header, about)
        except StoreError:
            if not overwrite:
                raise
            shutil.rmtree(folder / split)
            writer = RowWriter(folder / split, self.header, about)
        check_room(folder, self.header.row_bytes() * (n - len(writer.done)))
        return writer

    def _point(self, point: int) -> Path:
        return self.path / "points" / f"{point:04d}"


@dataclass
class Manifest:
    """`rows.json`: which examples the split is made of and which shards are finished."""

    dataset: str
    n: int
    ids: list[Any] | None = None
    id_column: str | None = None
    shards: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stored(self) -> int:
        return sum(int(shard["rows"]) for shard in self.shards)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        try:
            manifest = cls(**_read_json(folder / "rows.json"))
        except TypeError as error:
            raise StoreError(
                f"{folder / 'rows.json'} is damaged ({error}). Delete {folder} and collect it again."
            ) from error
        for shard in manifest.shards:
            file = folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise StoreError(
                    f"{file} is missing or cut short, although it was listed as complete. Delete {folder} and collect "
                    "it again."
                )
        return manifest


class Rows:
    """The rows of one split at one point; read lazily from memory-mapped shards.

    Attributes:
        ids: The examples in dataset order: index in the dataset that was given, or value of the id column.
        id_column: The name of that column; `None` where the ids are indices.
        dataset: Fingerprint of the tokenised dataset.
        blocks: Parameter name -> number of stored columns.
    """

    def __init__(self, folder: Path, header: Header, manifest: Manifest):
        self.folder = folder
        self.header = header
        self.ids: list[Any] = list(range(manifest.n)) if manifest.ids is None else list(manifest.ids)
        self.id_column = manifest.id_column
        self.dataset = manifest.dataset
        self.blocks = {name: header.width(name) for name in header.blocks}
        self.dtype: torch.dtype = getattr(torch, header.dtype)
        self._manifest = manifest
        self._maps: dict[str, Callable[[Tensor], Tensor]] = {}
        self._shards = [_open_shard(folder / shard["file"]) for shard in manifest.shards]
        self._index = [shard.get_tensor("index") for shard in self._shards]
        seen = torch.cat(self._index) if self._index else torch.zeros(0, dtype=torch.long)
        self._views: dict[str, list[Tensor]] = {}
        self._sorted = torch.equal(seen, torch.arange(len(self.ids)))
        if not torch.equal(seen.sort().values, torch.arange(len(self.ids))):
            raise StoreError(f"{folder} lists an example twice or not at all. Delete the folder and collect it again.")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def stats(self) -> dict[str, Tensor]:
        """Per-example numbers in dataset order, each `[n]`: loss, n_tokens, margin, correct, el2n, hash and others."""
        names = [key for key in self._shards[0].keys() if key.startswith("stats.")] if self._shards else []  # noqa: SIM118  (not a dict: it cannot be iterated)
        return {name.removeprefix("stats."): self._gather(name) for name in names}

    def block(self, name: str) -> Tensor:
        """All rows of one block, `[n, d]`, in dataset order: the parameter's gradient flattened row-major."""
        self._known(name)
        if not self._shards:
            return torch.zeros(0, self.blocks[name], dtype=self.dtype)
        rows = self._gather(f"rows.{name}")
        return self._maps[name](rows) if self._maps else rows

    def columns(self, name: str) -> Tensor | None:
        """Which entries of the flattened gradient the columns of a block are, `[d]`.

        `None` where they are not, or not as stored: random projections, rows that are compressed while they are read.
        """
        self._known(name)
        if self.header.compress is None:
            return None if self._maps else torch.arange(self.blocks[name])
        if self.header.columns is None:
            return None
        return torch.tensor(self.header.columns[name])

    def chunks(self, name: str, size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """One block in pieces that fit into memory, in the order of the disk.

        Args:
            name: The block.
            size: Rows in a piece at most; by default as many as 32 MiB hold.

        Yields:
            `(at, rows)`: `rows` is `[b, d]`, `at` is `[b]` and says where they belong in dataset order, so that
            `out[at] = f(rows)` is right whatever the order.
        """
        self._known(name)
        size = size or max(1, CHUNK_BYTES // max(1, self.header.width(name) * self.dtype.itemsize))
        for rows, index in zip(self._read(f"rows.{name}"), self._index, strict=True):
            for start in range(0, len(index), size):
                piece = rows[start : start + size]
                yield index[start : start + size], self._maps[name](piece) if self._maps else piece

    def mapped(self, maps: dict[str, Callable[[Tensor], Tensor]], widths: dict[str, int]) -> Rows:
        """The same rows seen through one function a block, `[b, d] -> [b, k]` (a compressor applied while reading)."""
        view = Rows(self.folder, self.header, self._manifest)
        view._maps, view.blocks = maps, widths
        return view

    def check(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            StoreError: Names the damaged file.
        """
        for shard in self._manifest.shards:
            if _sha256(self.folder / shard["file"]) != shard["sha256"]:
                raise StoreError(
                    f"{self.folder / shard['file']} is damaged. Delete {self.folder} and collect it again."
                )

    def _known(self, name: str) -> None:
        if name not in self.blocks:
            raise MissingRows(
                f"no block {name!r} in {self.folder}; it has {len(self.blocks)}, the first is "
                f"{next(iter(self.blocks), None)!r}."
            )

    def _read(self, key: str) -> list[Tensor]:
        """One tensor of every shard: views of the mapped files, kept as opening one costs more than a small block."""
        if key not in self._views:
            self._views[key] = [shard.get_tensor(key) for shard in self._shards]
        return self._views[key]

    def _gather(self, key: str) -> Tensor:
        pieces = self._read(key)
        if self._sorted:
            return torch.cat(pieces)
        out = torch.empty(len(self), *pieces[0].shape[1:], dtype=pieces[0].dtype)
        for index, piece in zip(self._index, pieces, strict=True):
            out[index] = piece
        return out


class RowWriter:
    """Appends rows to one split. `done` holds the examples that an earlier, interrupted run has already written."""

    def __init__(self, folder: Path, header: Header, about: Manifest):
        self.folder = folder
        self.header = header
        self._pending: list[dict[str, Tensor]] = []
        self._bytes = 0
        self._flushed = time.monotonic()
        self.manifest = Manifest.read(folder) if (folder / "rows.json").is_file() else about
        stored = self.manifest
        if (stored.dataset, stored.n) != (about.dataset, about.n):
            raise StoreMismatch(
                f"{folder} holds rows of another tokenised dataset ({stored.n} examples, fingerprint {stored.dataset}; "
                f"now {about.n}, {about.dataset}). Collect into another folder or split, or pass overwrite=True."
            )
        if (stored.ids, stored.id_column) != (about.ids, about.id_column):
            raise StoreMismatch(
                f"{folder} holds the same rows under other ids (id column {stored.id_column!r}, now "
                f"{about.id_column!r}). Pass the same id_column, or overwrite=True."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._list()
        self.done: set[int] = set()
        for shard in self.manifest.shards:
            self.done.update(_open_shard(folder / shard["file"]).get_tensor("index").tolist())

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, StoreError):  # an interrupted run keeps what it has
            self.flush()

    def append(self, index: Sequence[int], rows: dict[str, Tensor], stats: dict[str, Tensor]) -> None:
        """Take the rows of some examples; they reach the disk a shard at a time.

        Args:
            index: Positions in the dataset, length b.
            rows: Block -> `[b, d]`.
            stats: Name -> `[b]`.
        """
        tensors = {"index": torch.tensor(list(index), dtype=torch.long)}
        tensors |= {f"rows.{name}": rows[name].to(getattr(torch, self.header.dtype)) for name in self.header.blocks}
        tensors |= {f"stats.{name}": value for name, value in stats.items()}
        self._pending.append({key: value.detach().cpu() for key, value in tensors.items()})
        self._bytes += sum(value.nbytes for value in self._pending[-1].values())
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._flushed >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows as one shard and list it.

        Raises:
            StoreError: The disk is full or not writable; everything listed so far stays valid.
        """
        if not self._pending:
            return
        shard = {key: torch.cat([part[key] for part in self._pending]) for key in self._pending[0]}
        file = self.folder / f"rows-{len(self.manifest.shards):05d}.safetensors"
        part = file.with_suffix(".part")
        try:
            save_file(shard, part)
            with open(part, "rb+") as handle:
                os.fsync(handle.fileno())
            part.replace(file)
            self.manifest.shards.append(
                {"file": file.name, "rows": len(shard["index"]), "bytes": file.stat().st_size, "sha256": _sha256(file)}
            )
            self._list()
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise StoreError(
                f"could not write {file} ({error}). The {len(self.done)} rows before it are safe; make room and run "
                "the same command again to continue."
            ) from error
        self.done.update(shard["index"].tolist())
        self._pending, self._bytes, self._flushed = [], 0, time.monotonic()

    def _list(self) -> None:
        _write_json(self.folder / "rows.json", asdict(self.manifest))


def check_room(path: Path, need: int) -> None:
    """Whether `need` bytes fit onto the disk of `path`, which need not be there yet.

    Raises:
        StoreError: They do not.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        raise StoreError(
            f"the rows need {need / 2**30:.1f} GiB and the disk of {path} has {free / 2**30:.1f} GiB free. Keep fewer "
            "columns (compress=dropout(16)) or choose another disk."
        )


def _open_shard(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{file} cannot be read ({error}). Delete {file.parent} and collect it again.") from error


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        digest = hashlib.sha256()
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} cannot be read ({error}). Delete {file.parent} and collect it again.") from error
    if not isinstance(content, dict):
        raise StoreError(f"{file} is not a JSON object. Delete {file.parent} and collect it again.")
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """Replace `file` in one step, so that a reader sees the old or the new content and never half of one."""
    part = file.with_suffix(".json.part")
    with open(part, "w") as handle:
        json.dump(content, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    part.replace(file)
