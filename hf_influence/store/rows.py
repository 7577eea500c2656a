"""Reading the rows of one split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_influence.errors import MissingRows, StoreError
from hf_influence.store.files import open_shard, read_json, sha256
from hf_influence.store.header import Header

CHUNK_BYTES = 32 << 20


@dataclass
class Manifest:
    """`rows.json`: which examples the split is made of and which shards are finished.

    Attributes:
        dataset: Fingerprint of the tokenised dataset.
        n: Number of its examples; `None` for a stream, whose examples are numbered as they turn up.
        ids: Their ids, where they are not 0 … n-1.
        id_column: The column that holds those.
        contents: What the dataset is known by, column by column; see `column_codes`.
        classes: The names of the classes, where the dataset has them.
        blocks: The shards hold the blocks of the rows, not the statistics of the examples alone.
        closed: Nothing more is to come, even if some examples have no row: training did not visit them.
        shards: The finished files.
    """

    dataset: str
    n: int | None
    ids: list[Any] | None = None
    id_column: str | None = None
    contents: dict[str, list[Any]] = field(default_factory=dict)
    classes: list[str] | None = None
    blocks: bool = True
    closed: bool = False
    shards: list[dict[str, Any]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.closed or (self.n is not None and self.stored >= self.n)

    @property
    def stored(self) -> int:
        return sum(int(shard["rows"]) for shard in self.shards)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        try:
            manifest = cls(**read_json(folder / "rows.json"))
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
        ids: The examples in dataset order: index in the dataset that was given, or value of the id column. Examples
            that training did not visit are not among them.
        positions: Their positions in the dataset, `[n]`.
        id_column: The name of that column; `None` where the ids are indices.
        dataset: Fingerprint of the tokenised dataset.
        blocks: Parameter name -> number of stored columns.
        statistics_only: There are statistics of the examples and no blocks; asking for one is an error.
    """

    def __init__(self, folder: Path, header: Header, manifest: Manifest):
        self.folder = folder
        self.header = header
        self.id_column = manifest.id_column
        self.dataset = manifest.dataset
        self.statistics_only = not manifest.blocks
        self.blocks = {name: header.width(name) for name in header.blocks}
        self.dtype: torch.dtype = getattr(torch, header.dtype)
        self._manifest = manifest
        self._maps: dict[str, Callable[[Tensor], Tensor]] = {}
        self._shards = [open_shard(folder / shard["file"]) for shard in manifest.shards]
        index = [shard.get_tensor("index") for shard in self._shards]
        seen = torch.cat(index) if index else torch.zeros(0, dtype=torch.long)
        self.positions = seen.sort().values
        whole = torch.equal(self.positions, torch.arange(len(seen) if manifest.n is None else manifest.n))
        if not whole and not (manifest.closed and bool((self.positions.diff() > 0).all())):
            raise StoreError(f"{folder} lists an example twice or not at all. Delete the folder and collect it again.")
        self.ids: list[Any] = self.positions.tolist()
        if manifest.ids is not None:
            self.ids = [manifest.ids[position] for position in self.ids]
        self._index = index if whole else [torch.searchsorted(self.positions, piece) for piece in index]
        self._views: dict[str, list[Tensor]] = {}
        self._sorted = torch.equal(seen, self.positions)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dataset_size(self) -> int | None:
        """Number of examples of the dataset, those without a row among them; `None` for a stream."""
        return self._manifest.n

    @property
    def contents(self) -> dict[str, list[Any]] | None:
        """What the dataset is known by, column by column; see `column_codes`. `None` for a stream."""
        return None if self._manifest.n is None else self._manifest.contents

    @property
    def stats(self) -> dict[str, Tensor]:
        """Per-example numbers in dataset order, each `[n]`: loss, n_tokens, margin, correct, el2n, hash and others.

        Of `probabilities`, `features` and `other_prompt_loss` each example has several, `[n, c]`.
        """
        names = [key for key in self._shards[0].keys() if key.startswith("stats.")] if self._shards else []  # noqa: SIM118  (not a dict: it cannot be iterated)
        return {name.removeprefix("stats."): self._gather(name) for name in names}

    def block(self, name: str) -> Tensor:
        """All rows of one block, `[n, d]`, in dataset order: the parameter's gradient flattened row-major.

        Raises:
            MissingRows: No such block, or the split holds statistics alone.
        """
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

    def chunks(self, name: str, size: int | None = None, *, per_row: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One block in pieces that fit into memory, in the order of the disk.

        Args:
            name: The block.
            size: Rows in a piece at most; by default as many as 32 MiB hold.
            per_row: How many numbers are computed for each row of a piece, where those are more than the row has.

        Yields:
            `(at, rows)`: `rows` is `[b, d]`, `at` is `[b]` and says where they belong in dataset order, so that
            `out[at] = f(rows)` is right whatever the order.
        """
        self._known(name)
        size = size or max(1, CHUNK_BYTES // (max(1, self.header.width(name), per_row) * self.dtype.itemsize))
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
            if sha256(self.folder / shard["file"]) != shard["sha256"]:
                raise StoreError(
                    f"{self.folder / shard['file']} is damaged. Delete {self.folder} and collect it again."
                )

    def _known(self, name: str) -> None:
        if name not in self.blocks:
            raise MissingRows(
                f"no block {name!r} in {self.folder}; it has {len(self.blocks)}, the first is "
                f"{next(iter(self.blocks), None)!r}."
            )
        if self.statistics_only:
            raise MissingRows(
                f"{self.folder} holds the statistics of its examples alone, as it was collected with rows=False, and "
                "the gradients themselves are asked for. Collect it once more with rows=True and overwrite=True, or "
                "choose a method that needs statistics alone, 'loss' or 'gex' for instance."
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
