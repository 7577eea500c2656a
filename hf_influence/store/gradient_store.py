"""The store: a folder of parameter points, each with its splits."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_influence.errors import BadSetting, MissingRows, StoreError, StoreMismatch
from hf_influence.saving import write_json
from hf_influence.store.displacement import Displacement
from hf_influence.store.files import check_room, check_writable, open_shard, read_json
from hf_influence.store.header import Header
from hf_influence.store.points import SPAN, PointAbout, point_folder, point_numbers
from hf_influence.store.rows import Manifest, Rows
from hf_influence.store.writer import RowWriter

SCHEMA = 1


class GradientStore:
    """A folder of gradient rows. Open one with `GradientStore.open(path)`, fill one with `collect`."""

    def __init__(self, path: Path, header: Header):
        self.path = path
        self.header = header

    @classmethod
    def open(cls, path: str | Path | GradientStore) -> GradientStore:
        """Open an existing store; one that is open already comes back as it is.

        Raises:
            StoreError: No store there, or one that this version cannot read.
        """
        if isinstance(path, GradientStore):
            return path
        path = Path(path).expanduser()
        if not (path / "store.json").is_file():
            raise StoreError(
                f"{path} is not a gradient store (it has no store.json). GradientCapture({str(path)!r}, …) among the "
                "callbacks of a Trainer fills one when training begins, collect(…) without a Trainer. Is the path "
                "right?"
            )
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
            StoreError: No files can be written to the folder.
        """
        path = Path(path).expanduser()
        if (path / "store.json").is_file():
            try:
                store = cls.open(path)
                store.header.check(header, path)
                return store
            except StoreError:
                if not overwrite:
                    raise
                shutil.rmtree(path / "points", ignore_errors=True)
        check_writable(path)
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

    def points(self, kind: str | None = None) -> list[int]:
        """The parameter points that hold rows.

        0 is the weights at which `collect` found the model, after training as a rule. With rows captured during
        training, point e is the e-th epoch, or point s the s-th step. From a million on come those of `collect_at`.

        Args:
            kind: Only those of this kind: "weights", "checkpoint", "parameter_dropout", "continued_sgd", …
        """
        numbers = point_numbers(self.path)
        return numbers if kind is None else [point for point in numbers if self.point_about(point).kind == kind]

    def point_about(self, point: int = 0) -> PointAbout:
        """What kind of point it is, and what tells it from others of its kind."""
        return PointAbout.read(self._point(point))

    def displacement(self, point: int) -> Displacement:
        """How far the trainable values of a point lie from those that it was made from."""
        return Displacement(self._point(point))

    def splits(self, point: int = 0) -> list[str]:
        """The names of the splits that hold rows at a parameter point."""
        return sorted(entry.parent.name for entry in self._point(point).glob("*/rows.json"))

    def splits_anywhere(self) -> set[str]:
        """The names of the splits that hold rows at any parameter point."""
        return {split for point in self.points() for split in self.splits(point)}

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
            path = str(self.path)
            call = f"collect(model, dataset, {path!r}, split={split!r})"
            if self._of_training(point):
                call = f'GradientCapture({path!r}, query_dataset=…, during="epochs"), for rows of training steps'
            raise MissingRows(
                f"{self.path} holds no rows of the split {split!r} at point {point} (it has: {have}).{there} Collect "
                f"them: {call}."
            )
        manifest = Manifest.read(folder)
        if not manifest.complete:
            again = "Run the same collect(...) again; it continues where this one stopped."
            if self._of_training(point):
                again = (
                    "They came from training steps: go on from the last checkpoint, trainer.train("
                    f"resume_from_checkpoint=True) with the same GradientCapture({str(self.path)!r}, …)."
                )
            raise MissingRows(
                f"{folder} holds {manifest.stored} {'' if manifest.n is None else f'of {manifest.n} '}rows: the run "
                f"that filled it was interrupted. {again}"
            )
        return Rows(folder, self.header, manifest)

    def sighted(self, split: str, point: int) -> dict[Any, int]:
        """Of a stream: id, or content hash, -> number of each example of a split, complete or not."""
        folder = self._point(point) / split
        manifest = Manifest.read(folder)
        if manifest.ids is not None:
            return {name: number for number, name in enumerate(manifest.ids)}
        shards = [open_shard(folder / shard["file"]) for shard in manifest.shards]
        pairs = [(shard.get_tensor("stats.hash").tolist(), shard.get_tensor("index").tolist()) for shard in shards]
        return {code: number for codes, numbers in pairs for code, number in zip(codes, numbers, strict=True)}

    def writer(
        self,
        split: str,
        *,
        adapter: str | None,
        dataset: str,
        n: int | None,
        ids: Sequence[Any] | None = None,
        id_column: str | None = None,
        contents: dict[str, list[Any]] | None = None,
        classes: list[str] | None = None,
        point: int = 0,
        rank: int = 0,
        about: PointAbout | None = None,
        blocks: bool = True,
        statistics: Sequence[str] = (),
        overwrite: bool = False,
    ) -> RowWriter:
        """Start or continue a split.

        Args:
            split: Name of the split, a plain folder name.
            adapter: Hash of the values of the trainable parameters at this point; `None` for rows of training steps,
                whose weights move.
            dataset: Fingerprint of the tokenised dataset.
            n: Number of its examples; `None` for a stream.
            ids: Their ids, where they are not 0 … n-1.
            id_column: The column that holds those.
            contents: What the dataset is known by when scores are applied to it; see `column_codes`.
            classes: The names of its classes, where it has them.
            point: The parameter point.
            rank: Of several processes that share the work, each writes to a folder of its own until the writer of
                rank 0 gathers them.
            about: What the point is; by default what the store says of it, for a new one the weights of training.
            blocks: The rows themselves are to come, not their statistics alone.
            statistics: Those that rows which are there already must have.
            overwrite: Delete what is there of another adapter state or dataset, instead of refusing; of another state
                at point 0 also what is there of the training that led to it.

        Raises:
            StoreMismatch: The point or the split belongs to another adapter state or dataset, lacks a statistic, or
                has other classes than another split.
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
                way = [*self.points("weights"), *self.points("checkpoint")] if point == 0 else []
                for replaced in {point, *way}:
                    self.drop(replaced)
            else:
                raise StoreMismatch(
                    f"{folder} holds rows at other values of the adapter (stored hash {stored}, now {adapter}). "
                    "Gradients at different weights cannot be compared: collect all splits with the same trained "
                    "model, or into another folder."
                )
        about = about or self.point_about(point)
        for other in self.splits(point):
            if other != split:
                _check_classes(classes, split, Manifest.read(folder / other).classes, other)
        manifest = Manifest(dataset, n, None if ids is None else list(ids), id_column, contents or {}, classes, blocks)
        if rank > 0:
            writer = RowWriter(folder / split / f"rank-{rank}", self.header, manifest)
            writer.done |= RowWriter(folder / split, self.header, manifest).done
            return writer
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "point.json", {"adapter": adapter, **asdict(about)})
        try:
            writer = RowWriter(folder / split, self.header, manifest)
            writer.check_statistics(statistics)
            _check_classes(classes, split, writer.manifest.classes, split)
        except StoreError:
            if not overwrite:
                raise
            shutil.rmtree(folder / split)
            writer = RowWriter(folder / split, self.header, manifest)
        check_room(folder, self.header.row_bytes() * (n - len(writer.done)) if blocks and n is not None else 0)
        return writer

    def drop(self, point: int, split: str | None = None) -> None:
        """Delete a split of a parameter point, or the whole point; what is not there is no error."""
        folder = self._point(point)
        if split is None:
            shutil.rmtree(folder, ignore_errors=True)
        elif (folder / split).is_dir():
            shutil.rmtree(folder / split)
            left = self.splits(point)
            if not left or (0 < point < SPAN and left == ["train"]):  # rows of training steps, at weights that moved
                write_json(folder / "point.json", {"adapter": None, **asdict(self.point_about(point))})

    def check_whole(self, because: str) -> None:
        """Refuse compressed rows.

        Args:
            because: What whole rows are needed for, as the second half of a sentence.

        Raises:
            StoreMismatch: They are compressed.
        """
        if self.header.compress is not None:
            raise StoreMismatch(
                f"{self.path} holds rows compressed by {self.header.compress['name']}, and {because}. Collect them "
                "without compress=…, into another folder."
            )

    def clear(self) -> None:
        """Delete every parameter point."""
        for point in self.points():
            self.drop(point)

    def _of_training(self, point: int) -> bool:
        """Whether a point is made by training steps, or would be."""
        return 0 < point < SPAN and self.adapter(point) is None

    def _point(self, point: int) -> Path:
        return point_folder(self.path, point)


def _check_classes(classes: list[str] | None, split: str, theirs: list[str] | None, other: str) -> None:
    if classes and theirs and classes != theirs:
        raise StoreMismatch(
            f"the classes are {classes} in {split!r} and {theirs} in {other!r}, so one number means two classes. Give "
            "both the same, dataset.cast_column('label', other.features['label']) before the labels become numbers, "
            "or use another folder."
        )
