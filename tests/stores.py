"""Small stores for tests, filled through the writer like any other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_influence.gradients.compress import Compressor
from hf_influence.store import GradientStore, Header, PointAbout, number_of
from hf_influence.store.artifacts import write_artifact

Blocks = dict[str, Tensor]
"""Block -> rows `[n, d]`."""


def random_blocks(
    n: int, seed: int, widths: Sequence[int] | Mapping[str, int] = (7, 26), dtype: torch.dtype = torch.float64
) -> Blocks:
    """Rows from a normal distribution. Blocks that are given no names are layer0, layer1, …"""
    named = widths if isinstance(widths, Mapping) else {f"layer{i}": d for i, d in enumerate(widths)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, d, generator=generator, dtype=dtype) for name, d in named.items()}


def stats_with_copies(n: int) -> dict[str, Tensor]:
    """Statistics of examples of many lengths; the first three of them are the same example, and the next two."""
    return {
        "length": torch.arange(n) // 2 + 3,
        "n_tokens": torch.ones(n, dtype=torch.long),
        "hash": torch.tensor([7, 7, 7, 8, 8, *range(100, 95 + n)]),
        "loss": torch.linspace(-1, 2, n, dtype=torch.float64).square(),
    }


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
    query_stats: dict[str, Tensor] | None = None,
    mislabelled: Blocks | None = None,
    mislabelled_stats: dict[str, Tensor] | None = None,
    about: PointAbout | None = None,
    rows: bool = True,
    task: dict[str, Any] | None = None,
) -> GradientStore:
    """A store of these whole rows, compressed by `compress`, each split in as many shards, the last rows first.

    `mislabelled` are those of the queries under wrong labels.

    Another call adds another point. Of the training examples a point may hold only those at the positions `present`.
    With `rows=False` the point holds the statistics alone.
    """
    shapes = {name: list(g.shape[1:]) for name, g in train.items()}
    dtype = str(next(iter(train.values())).dtype).removeprefix("torch.")
    header = Header(
        model={},
        task=task or {},
        blocks=shapes,
        compress=compress.settings() if compress else None,
        widths={name: compress.width(shape) for name, shape in shapes.items()} if compress else None,
        dtype=dtype,
    )
    store = GradientStore.create(path, header)
    splits = (("train", train, stats or {}, ids), ("query", query, query_stats or {}, None))
    for split, blocks, notes, names in (*splits, ("query-mislabelled", mislabelled, mislabelled_stats or {}, None)):
        if blocks is None:
            continue
        n = len(next(iter(blocks.values())))
        writer = store.writer(split, adapter="", dataset="", n=n, ids=names, point=point, about=about, blocks=rows)
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

    There one column has the other sign, another one at each point, so that the points hold other rows with the same
    lengths and angles, and the statistics are others as well. Members of both ensembles are there, too.
    """
    n = len(next(iter(train.values())))
    m = len(next(iter(query.values()))) if query else 0
    stats = {"loss": torch.zeros(n), **(stats or {})}
    store = make_store(path, train, query, stats=stats, query_stats={"loss": torch.zeros(m)}, **options)
    make_members(path, train, query, stats=stats, **options)
    make_artifacts(store)
    for epoch, factor in ((1, 1.0), (2, 0.5), (3, 2.0)):
        g, v = ({k: _mirrored(rows, epoch) for k, rows in (side or {}).items()} for side in (train, query))
        notes = {k: value * factor if value.is_floating_point() else value for k, value in stats.items()}
        notes |= {"step": torch.full((n,), 10 * epoch), "epoch": torch.full((n,), epoch)}
        notes |= {"learning_rate": torch.full((n,), 0.1 / epoch, dtype=torch.float64)}
        make_store(path, g, v or None, stats=notes, point=epoch, **options)
    return store


def _mirrored(rows: Tensor, epoch: int) -> Tensor:
    return torch.where(torch.arange(rows.shape[1]) == epoch % rows.shape[1], -rows, rows)


def make_members(
    path: Path, train: Blocks, query: Blocks | None = None, *, stats: dict[str, Tensor] | None = None, **options: Any
) -> GradientStore:
    """Members of all ensembles around point 0: rows under parameter dropout, losses where more SGD or a draw led.

    The rows of the ones are near those at point 0; the losses of the others change as the rows at point 0 say.
    """
    draw = torch.Generator().manual_seed(5)
    sides = {"stats": train, "query_stats": query or {}}
    for member in range(2):
        about = PointAbout("parameter_dropout", {"member": member}, "")
        near = [{k: g * (1 + 0.1 * member) for k, g in side.items()} for side in sides.values()]
        make_store(path, near[0], near[1] or None, stats=stats, about=about, point=number_of(path, about), **options)
    for kind, member in product(("continued_sgd", "laplace"), range(3)):
        about = PointAbout(kind, {"member": member}, "")
        point = number_of(path, about)
        step = {k: torch.randn(g.shape[1], generator=draw, dtype=torch.float64) for k, g in train.items()}
        notes = {side: {"loss": sum(g.double() @ step[k] for k, g in g_of.items())} for side, g_of in sides.items()}
        notes["stats"]["loss"] += (stats or {}).get("loss", 0)
        losses: dict[str, Any] = {side: note for side, note in notes.items() if sides[side]}
        make_store(path, train, query, **losses, about=about, point=point, rows=False, **{**options, "shards": 1})
        GradientStore.open(path).displacement(point).save(step)
    return GradientStore.open(path)


def make_artifacts(store: GradientStore) -> None:
    """What methods need from a model, at point 0: eigenpairs, Kronecker bases and the state of Adam, all at random."""
    draw = torch.Generator().manual_seed(6)
    widths = {name: math.prod(shape) for name, shape in store.header.blocks.items()}

    def basis(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))[0]

    whole = basis(sum(widths.values()))
    vectors = dict(zip((f"vectors.{name}" for name in widths), whole.split(list(widths.values()), 1), strict=True))
    values = torch.linspace(3, 1, len(whole), dtype=torch.float64)
    write_artifact(store, "hessian", {**vectors, "values": values}, {}, adapter="")
    write_artifact(store, "ekfac", {f"left.{name}": basis(d) for name, d in widths.items()}, {}, adapter="")
    moments = {f"exp_avg.{name}": torch.zeros(d) for name, d in widths.items()}
    moments |= {f"exp_avg_sq.{name}": 1 + torch.rand(d, generator=draw) for name, d in widths.items()}
    about = {"steps": 10.0, "betas": [0.9, 0.999], "eps": 1e-8}
    details = {what: dict.fromkeys(widths, value) for what, value in about.items()}
    write_artifact(store, "adam", moments, details, adapter="")
