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
) -> GradientStore:
    """A store of these whole rows, compressed by `compress`, each split in as many shards, the last rows first."""
    shapes = {name: list(g.shape[1:]) for name, g in train.items()}
    dtype = str(next(iter(train.values())).dtype).removeprefix("torch.")
    header = Header(model={}, task={}, blocks=shapes, compress=compress.settings() if compress else None, dtype=dtype)
    store = GradientStore.create(path, header)
    for split, blocks, notes, names in (("train", train, stats or {}, ids), ("query", query, {}, None)):
        if blocks is None:
            continue
        n = len(next(iter(blocks.values())))
        writer = store.writer(split, adapter="", dataset="", n=n, ids=names)
        for at in reversed(torch.arange(n).chunk(shards)) if n else ():
            kept = {k: compress.fit(k, g.shape[1])(g[at]) if compress else g[at] for k, g in blocks.items()}
            writer.append(at.tolist(), kept, {key: value[at] for key, value in notes.items()})
            writer.flush()
    return store
