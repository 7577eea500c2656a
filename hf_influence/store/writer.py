"""Writing the rows of one split, a shard at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hf_influence.errors import StoreError, StoreMismatch
from hf_influence.store.files import open_shard, sha256, write_json
from hf_influence.store.header import Header
from hf_influence.store.rows import Manifest

SHARD_BYTES = 64 << 20
SHARD_SECONDS = 60.0


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
            self.done.update(open_shard(folder / shard["file"]).get_tensor("index").tolist())

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
                {"file": file.name, "rows": len(shard["index"]), "bytes": file.stat().st_size, "sha256": sha256(file)}
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
        write_json(self.folder / "rows.json", asdict(self.manifest))
