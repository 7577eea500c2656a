"""Writing the rows of one split, a shard at a time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_influence.errors import StoreError, StoreMismatch
from hf_influence.saving import save_tensors, write_json
from hf_influence.store.files import open_shard, sha256
from hf_influence.store.header import Header
from hf_influence.store.rows import Manifest

SHARD_BYTES = 8 << 20
SHARD_SECONDS = 60.0


class RowWriter:
    """Appends rows to one split; a shard is written beside whatever goes on, one at a time.

    Attributes:
        done: Positions of the examples that have been taken, by this run and those before it.
        before_writing: Called before each shard; an error in it keeps the shard from being written.
    """

    def __init__(self, folder: Path, header: Header, about: Manifest):
        self.folder = folder
        self.header = header
        self.before_writing: Callable[[], None] | None = None
        self._pending: list[dict[str, Tensor]] = []
        self._bytes = 0
        self._flushed = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "hf_influence-writer")
        self._writing: Future[None] | None = None
        begun = (folder / "rows.json").is_file()
        self.manifest = Manifest.read(folder) if begun else about
        self._number = 1 + max((int(Path(one["file"]).stem[5:]) for one in self.manifest.shards), default=-1)
        stored = self.manifest
        if (stored.dataset, stored.n) != (about.dataset, about.n):
            raise StoreMismatch(
                f"{folder} holds rows of another tokenised dataset ({stored.n} examples, fingerprint {stored.dataset}; "
                f"now {about.n}, {about.dataset}). Collect into another folder or split, or pass overwrite=True."
            )
        if (stored.n is not None and stored.ids != about.ids) or stored.id_column != about.id_column:
            raise StoreMismatch(
                f"{folder} holds the same rows under other ids (id column {stored.id_column!r}, now "
                f"{about.id_column!r}). Pass the same id_column, or overwrite=True."
            )
        if stored.blocks != about.blocks and not (stored.blocks and stored.complete):  # whole rows have them too
            raise StoreMismatch(
                f"{folder} holds {'rows' if stored.blocks else 'statistics alone'}, and now "
                f"{'rows' if about.blocks else 'statistics alone'} are to come (rows={about.blocks}). Pass "
                f"rows={stored.blocks} to go on with it, or overwrite=True."
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not begun:  # other processes may be looking
            self._list()
        self.done = self._listed()

    @classmethod
    def again(cls, folder: Path, header: Header) -> RowWriter:
        """Of rows that are there."""
        return cls(folder, header, Manifest.read(folder))

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, StoreError):  # an interrupted run keeps what it has
            self.flush()
        self._thread.shutdown()

    def append(self, index: Sequence[int], rows: dict[str, Tensor], stats: dict[str, Tensor]) -> None:
        """Take the rows of some examples; they reach the disk a shard at a time.

        Args:
            index: Positions in the dataset, length b.
            rows: Block -> `[b, d]`; not to be changed afterwards. Nothing, where statistics alone are kept.
            stats: Name -> `[b]` or `[b, c]`.

        Raises:
            StoreError: The shard before could not be written.
            StoreMismatch: The rows that are there have other statistics.
        """
        if odd := sorted(stats.keys() ^ self._statistics(default=stats.keys())):
            raise StoreMismatch(
                f"{self.folder} holds rows with other statistics than those to be added (only one of both has: "
                f"{', '.join(odd)}). Continue with the arguments and the version that it was begun with, or delete "
                "the folder and collect it again."
            )
        tensors = {"index": torch.tensor(list(index), dtype=torch.long)}
        blocks = self.header.blocks if self.manifest.blocks else ()
        tensors |= {f"rows.{name}": rows[name].to(getattr(torch, self.header.dtype)) for name in blocks}
        # copies: what is a view of a batch would keep that, and a file of the worker that made it, open
        tensors |= {f"stats.{name}": value.clone() for name, value in stats.items()}
        self._pending.append({key: value.detach().cpu() for key, value in tensors.items()})
        self._bytes += sum(value.nbytes for value in self._pending[-1].values())
        self.done.update(index)
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._flushed >= SHARD_SECONDS:
            self._hand_over()

    def flush(self) -> None:
        """Everything taken so far is on the disk and listed when this returns.

        Raises:
            StoreError: The disk is full or not writable; everything listed so far stays valid.
        """
        self._hand_over()
        self._wait()

    def close(self) -> None:
        """Flush, and say that nothing more is to come."""
        self.flush()
        self._thread.shutdown()
        self.manifest.closed = True
        self._list()

    def abandon(self) -> None:
        """Write nothing more: what is not handed over yet is given up."""
        self._pending = []
        self._thread.shutdown()

    def parts(self) -> list[RowWriter]:
        """What other processes have written to this split and is not gathered yet."""
        return [RowWriter.again(folder, self.header) for folder in sorted(self.folder.glob("rank-*"))]

    def gather(self, copies: Callable[[int], Sequence[int]] = lambda code: ()) -> None:
        """Take over the rows of all other processes; an example that two of them saw counts once.

        Args:
            copies: The positions of all examples with a content hash: where some are equal, each process gives its rows
                to the first of them, and what comes second is the row of another.
        """
        self.flush()
        for part in self.parts():
            for shard in part.manifest.shards:
                tensors = load_file(part.folder / shard["file"])
                codes = tensors.get("stats.hash")
                new: dict[int, int] = {}  # position -> place in the shard
                for at, position in enumerate(tensors["index"].tolist()):
                    may = [position, *(copies(int(codes[at])) if codes is not None else ())]
                    free = next((own for own in may if own not in self.done and own not in new), None)
                    if free is not None:
                        new[free] = at
                if new:
                    taken = {key: values[list(new.values())] for key, values in tensors.items()}
                    self._write([{**taken, "index": torch.tensor(list(new), dtype=torch.long)}])
                    self.done.update(new)
            shutil.rmtree(part.folder)

    def check_statistics(self, names: Collection[str]) -> None:
        """Refuse rows that lack one of these statistics, if there are rows.

        Raises:
            StoreMismatch: Names it.
        """
        if missing := sorted(name for name in names if self.lacks(name)):
            raise StoreMismatch(
                f"{self.folder} holds rows without the statistic {missing[0]!r}, which cannot be added to them. Pass "
                "overwrite=True to collect them again, or collect into another folder or split."
            )

    def some(self, statistic: str, k: int) -> dict[int, Any]:
        """A statistic `[]` of at most k rows that are there, by position; of none without it."""
        if not self.manifest.shards or self.lacks(statistic):
            return {}
        shard = open_shard(self.folder / self.manifest.shards[0]["file"])
        index, values = shard.get_tensor("index").tolist(), shard.get_tensor(f"stats.{statistic}").tolist()
        step = -(-len(index) // k)
        return dict(zip(index[::step], values[::step], strict=True))

    def lacks(self, statistic: str) -> bool:
        """Whether there are rows without it, to which none with it can be added."""
        return statistic not in self._statistics(default=[statistic])

    def name(self, ids: list[Any]) -> None:
        """Give the examples of a stream their ids; the list may grow, and what is in it is listed with each shard."""
        self.manifest.ids = ids

    def reopen(self) -> None:
        """More is to come after all."""
        if self.manifest.closed:
            self.manifest.closed = False
            self._list()

    def forget_after(self, step: int) -> bool:
        """Take back the rows of training steps later than `step`: training goes on from there and makes them again.

        Returns:
            Whether there were any.
        """
        shards, kept = self.manifest.shards, []
        for shard in shards:
            early = open_shard(self.folder / shard["file"]).get_tensor("stats.step") <= step
            if bool(early.all()):
                kept.append(shard)
            elif bool(early.any()):
                whole = load_file(self.folder / shard["file"])
                kept.append(self._shard({name: values[early] for name, values in whole.items()}))
        if kept == shards:
            return False
        self.manifest.shards, self.manifest.closed = kept, False
        self._list()
        for shard in shards:
            if shard not in kept:
                (self.folder / shard["file"]).unlink()
        self.done = self._listed()
        return True

    def _statistics(self, default: Collection[str]) -> set[str]:
        """The names of the statistics of the rows that are there."""
        if self._pending:
            keys = list(self._pending[0])
        elif self.manifest.shards:
            keys = list(open_shard(self.folder / self.manifest.shards[0]["file"]).keys())
        else:
            return set(default)
        return {key.removeprefix("stats.") for key in keys if key.startswith("stats.")}

    def _listed(self) -> set[int]:
        indices = [open_shard(self.folder / shard["file"]).get_tensor("index") for shard in self.manifest.shards]
        return {position for index in indices for position in index.tolist()}

    def _hand_over(self) -> None:
        """Let the pending rows be written once the shard before is."""
        if not self._pending:
            return
        self._wait()
        if self.before_writing is not None:
            self.before_writing()
        pending, self._pending, self._bytes, self._flushed = self._pending, [], 0, time.monotonic()
        self._writing = self._thread.submit(self._write, pending)

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, pending: list[dict[str, Tensor]]) -> None:
        """Write one shard and list it."""
        self.manifest.shards.append(
            self._shard({key: torch.cat([part[key] for part in pending]) for key in pending[0]})
        )
        self._list()

    def _shard(self, rows: dict[str, Tensor]) -> dict[str, Any]:
        """Write one shard, under a name that none has had; what is to be listed of it."""
        file = self.folder / f"rows-{self._number:05d}.safetensors"
        self._number += 1
        save_tensors(file, rows, advice=self._advice)
        return {"file": file.name, "rows": len(rows["index"]), "bytes": file.stat().st_size, "sha256": sha256(file)}

    def _list(self) -> None:
        write_json(self.folder / "rows.json", asdict(self.manifest), advice=self._advice)

    @property
    def _advice(self) -> str:
        return (
            f"The {self.manifest.stored} rows before it are safe. Make room and run the same command again, or resume "
            "training from its last checkpoint (without one: overwrite=True)."
        )
