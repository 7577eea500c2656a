"""Small stores for tests, filled through the writer like any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_influence.gradients.compress import Compressor
from hf_influence.store import GradientStore, Header

Blocks = dict[str, Tensor]
"""Block -> rows `[n, d]`."""


def make_store(
    path: Path,
    train: Blocks,
    query: Blocks | None = None,
    *,
    stats: dict[str, Tensor] | None = None,
    ids: Sequence[Any] | None = None,
    compress: Compressor | None = None,
    shards: int = 2,
    point: int = 0,
    present: Sequence[int] | None = None,
) -> GradientStore:
    """A store of these whole rows, compressed by `compress`, each split in as many shards, the last rows first.

    Another call adds another point. Of the training examples a point may hold only those at the positions `present`.
    """
    shapes = {name: list(g.shape[1:]) for name, g in train.items()}
    dtype = str(next(iter(train.values())).dtype).removeprefix("torch.")
    header = Header(model={}, task={}, blocks=shapes, compress=compress.settings() if compress else None, dtype=dtype)
    store = GradientStore.create(path, header)
    for split, blocks, notes, names in (("train", train, stats or {}, ids), ("query", query, {}, None)):
        if blocks is None:
            continue
        n = len(next(iter(blocks.values())))
        writer = store.writer(split, adapter="", dataset="", n=n, ids=names, point=point)
        held = torch.arange(n) if present is None or split != "train" else torch.tensor(present)
        for at in reversed(held.chunk(shards)) if len(held) else ():
            kept = {k: compress.fit(k, g.shape[1])(g[at]) if compress else g[at] for k, g in blocks.items()}
            writer.append(at.tolist(), kept, {key: value[at] for key, value in notes.items()})
            writer.flush()
        writer.close()
    return store


def make_trained_store(
    path: Path, train: Blocks, query: Blocks | None = None, *, stats: dict[str, Tensor] | None = None, **options: Any
) -> GradientStore:
    """The store of a training run: these rows at point 0, and at the points 1 to 3, captured in training steps.

    There the columns are rolled, so that the points hold other rows with the same lengths and angles, and the
    statistics are others as well.
    """
    n = len(next(iter(train.values())))
    store = make_store(path, train, query, stats=stats, **options)
    for epoch, factor in ((1, 1.0), (2, 0.5), (3, 2.0)):
        g, v = ({k: rows.roll(epoch, 1) for k, rows in (side or {}).items()} for side in (train, query))
        notes = {k: value * factor if value.is_floating_point() else value for k, value in (stats or {}).items()}
        notes |= {"step": torch.full((n,), 10 * epoch), "epoch": torch.full((n,), epoch)}
        notes |= {"learning_rate": torch.full((n,), 0.1 / epoch, dtype=torch.float64)}
        make_store(path, g, v or None, stats=notes, point=epoch, **options)
    return store
