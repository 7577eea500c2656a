"""The store: a folder of parameter points, each with its splits."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_influence.errors import BadSetting, MissingRows, StoreError, StoreMismatch
from hf_influence.store.files import check_room, read_json, write_json
from hf_influence.store.header import Header
from hf_influence.store.rows import Manifest, Rows
from hf_influence.store.writer import RowWriter

SCHEMA = 1


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
        about = read_json(path / "store.json")
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
        write_json(path / "store.json", {"schema": SCHEMA, **asdict(header)})
        return cls(path, header)

    @property
    def blocks(self) -> list[str]:
        """Parameter names, in the order of the model."""
        return list(self.header.blocks)

    def adapter(self, point: int = 0) -> str | None:
        """Hash of the trainable values at which the rows of a point were taken.

        `None` without rows, and where all were taken from training steps.
        """
        file = self._point(point) / "point.json"
        return read_json(file)["adapter"] if file.is_file() else None

    def points(self) -> list[int]:
        """The parameter points that hold rows.

        0 is the weights at which `collect` found the model, after training as a rule. With rows captured during
        training, point e is the e-th epoch, or point s the s-th step.
        """
        return sorted(int(entry.parent.name) for entry in (self.path / "points").glob("*/point.json"))

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
            others = [other for other in self.points() if split in self.splits(other)]
            there = f" Points with rows of it: {', '.join(map(str, others))}; choose with point=…." if others else ""
            raise MissingRows(
                f"{self.path} holds no rows of the split {split!r} at point {point} (it has: {have}).{there} Collect "
                f"them: collect(model, dataset, {str(self.path)!r}, split={split!r})."
            )
        manifest = Manifest.read(folder)
        if not manifest.complete:
            raise MissingRows(
                f"{folder} holds {manifest.stored} of {manifest.n} rows: the run that filled it was interrupted. Run "
                "the same collect(...) again; it continues where this one stopped."
            )
        return Rows(folder, self.header, manifest)

    def writer(
        self,
        split: str,
        *,
        adapter: str | None,
        dataset: str,
        n: int,
        ids: Sequence[Any] | None = None,
        id_column: str | None = None,
        point: int = 0,
        rank: int = 0,
        overwrite: bool = False,
    ) -> RowWriter:
        """Start or continue a split.

        Args:
            split: Name of the split, a plain folder name.
            adapter: Hash of the values of the trainable parameters at this point; `None` for rows of training steps,
                whose weights move.
            dataset: Fingerprint of the tokenised dataset.
            n: Number of its examples.
            ids: Their ids, where they are not 0 … n-1.
            id_column: The column that holds those.
            point: The parameter point.
            rank: Of several processes that share the work, each writes to a folder of its own until the writer of
                rank 0 gathers them.
            overwrite: Delete what is there of another adapter state or dataset, instead of refusing.

        Raises:
            StoreMismatch: The point or the split belongs to another adapter state or dataset.
            StoreError: The rows do not fit onto the disk.
        """
        if not split or not all(c.isalnum() or c in "-_" for c in split):
            raise BadSetting(f"split={split!r} is not a folder name. Use letters, digits, '-' and '_'.")
        folder = self._point(point)
        stored = self.adapter(point)
        if adapter is None:
            adapter = stored
        elif stored not in (None, adapter):
            if overwrite:
                shutil.rmtree(folder)
            else:
                raise StoreMismatch(
                    f"{folder} holds rows at other values of the adapter (stored hash {stored}, now {adapter}). "
                    "Gradients at different weights cannot be compared: collect all splits with the same trained "
                    "model, or into another folder."
                )
        about = Manifest(dataset, n, None if ids is None else list(ids), id_column)
        if rank > 0:
            writer = RowWriter(folder / split / f"rank-{rank}", self.header, about)
            writer.done |= RowWriter(folder / split, self.header, about).done
            return writer
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "point.json", {"adapter": adapter})
        try:
            writer = RowWriter(folder / split, self.header, about)
        except StoreError:
            if not overwrite:
                raise
            shutil.rmtree(folder / split)
            writer = RowWriter(folder / split, self.header, about)
        check_room(folder, self.header.row_bytes() * (n - len(writer.done)))
        return writer

    def drop(self, point: int, split: str | None = None) -> None:
        """Delete a split of a parameter point, or the whole point; what is not there is no error."""
        folder = self._point(point)
        if split is None:
            shutil.rmtree(folder, ignore_errors=True)
        elif (folder / split).is_dir():
            shutil.rmtree(folder / split)
            if not self.splits(point) or self.splits(point) == ["train"]:
                write_json(folder / "point.json", {"adapter": None})

    def _point(self, point: int) -> Path:
        return self.path / "points" / f"{point:04d}"
