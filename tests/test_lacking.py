"""What a store lacks for each method: said before it is tried, and true."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import make_store, make_trained_store
from test_methods_exact import QUERY, TRAIN
from torch import Tensor
from typer.testing import CliRunner

from hf_influence.attribution import attribute, lacking
from hf_influence.cli import app
from hf_influence.errors import InfluenceError
from hf_influence.gradients import dropout, gaussian, logra
from hf_influence.store import GradientStore, PointAbout, number_of

N, M = 20, 5
STATS = {"loss": torch.rand(N, generator=torch.Generator().manual_seed(0)), "label": torch.arange(N) % 2}
LOSSES = {"loss": torch.zeros(M)}
MEMBER, DRAW = 1_000_000, 3_000_000  # the first under parameter dropout and the first from the Laplace posterior


def trained(path: Path, **options: Any) -> GradientStore:
    return make_trained_store(path, TRAIN, QUERY, stats=STATS, **options)


def short_of(path: Path, point: int, split: str = "train") -> GradientStore:
    """As an interrupted run leaves a split."""
    store = trained(path)
    file = path / "points" / f"{point:04d}" / split / "rows.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"closed": False, "shards": manifest["shards"][:-1]}))
    return store


def without(path: Path, split: str, first: int = 0, end: int = 1) -> GradientStore:
    """Without a split at the points from `first` to `end`."""
    store = trained(path)
    for point in store.points():
        if first <= point < end:
            store.drop(point, split)
    return store


def with_queries(path: Path, stats: dict[str, Tensor], *, rows: bool) -> GradientStore:
    """With these statistics of the queries at all points."""
    store = trained(path)
    for point in store.points():
        store.drop(point, "query")
        writer = store.writer("query", adapter="", dataset="", n=M, point=point, blocks=rows)
        writer.append(list(range(M)), QUERY if rows else {}, stats)
        writer.flush()
        writer.close()
    return store


def without_rates(path: Path, *, checkpoints: bool) -> GradientStore:
    """Points of training that do not say their learning rate."""
    for step in (10, 20):
        notes = STATS if checkpoints else STATS | {"step": torch.full((N,), step)}
        about = PointAbout("checkpoint", {"step": step, "learning_rate": None}) if checkpoints else None
        point = number_of(path, about) if about else step
        make_store(path, TRAIN, QUERY, stats=notes, query_stats=LOSSES, about=about, point=point)
    return make_store(path, TRAIN, QUERY, stats=STATS, query_stats=LOSSES)


def without_displacements(path: Path) -> GradientStore:
    store = trained(path)
    for file in path.rglob("displacement.safetensors"):
        file.unlink()
    return store


STORES: dict[str, Any] = {
    "rows alone": lambda path: make_store(path, TRAIN),
    "rows, queries, statistics": lambda path: make_store(path, TRAIN, QUERY, stats=STATS),
    "training": trained,
    "a training point cut short": partial(short_of, point=2),
    "queries of training cut short": partial(short_of, point=2, split="query"),
    "point 0 cut short": partial(short_of, point=0),
    "queries cut short": partial(short_of, point=0, split="query"),
    "a member cut short": partial(short_of, point=MEMBER),
    "a draw cut short": partial(short_of, point=DRAW),
    "no point 0": partial(without, split="train"),
    "no queries at members": partial(without, split="query", first=MEMBER, end=DRAW + 1_000),
    "no displacements": without_displacements,
    "statistics of queries": partial(with_queries, stats=LOSSES, rows=False),
    "no losses of queries": partial(with_queries, stats={}, rows=True),
    "no learning rates": partial(without_rates, checkpoints=False),
    "no learning rates of checkpoints": partial(without_rates, checkpoints=True),
    "dropout": partial(trained, compress=dropout(4)),
    "gaussian": partial(trained, compress=gaussian(4)),
    "logra": partial(trained, compress=logra(2, 2)),
}


@pytest.mark.parametrize("kind", STORES)
def test_what_lacks_nothing_runs_and_what_lacks_something_is_refused(tmp_path: Path, kind: str) -> None:
    store = STORES[kind](tmp_path)
    for method, lacks in lacking(store).items():
        if lacks:
            with pytest.raises(InfluenceError):
                attribute(store, method)
        else:
            assert len(attribute(store, method)) == N, method


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [
        ("rows alone", {"ip": ["queries"], "loss_mean": ["loss", "points"], "self_ip_ensemble": ["members"]}),
        ("training", {"ip": [], "tracin": [], "tda": [], "gex": [], "auto": [], "bm25": ["texts"]}),
        ("a training point cut short", {"tda": ["complete points"], "auto": ["complete points"], "ip": []}),
        ("queries of training cut short", {"tracin": ["complete points"], "auto": [], "tda": [], "self_tracin": []}),
        ("point 0 cut short", {"random": ["examples at point 0"], "ip_ensemble": [], "tda": []}),
        ("queries cut short", {"ip": ["queries"], "loss": [], "auto": []}),
        ("a member cut short", {"ip_ensemble": ["complete ensemble"], "gex": []}),
        ("a draw cut short", {"self_la": ["complete ensemble"], "self_gex": []}),
        ("no point 0", {"random": ["examples at point 0"], "ip": ["examples at point 0"], "tracin": []}),
        ("no queries at members", {"gex": ["complete ensemble"], "self_gex": [], "gex_lin": []}),
        ("no displacements", {"gex_lin": ["complete ensemble"], "gex": []}),
        ("statistics of queries", {"ip": ["queries"], "tda": ["queries"], "gex": [], "auto": [], "bm25": ["texts"]}),
        ("no losses of queries", {"gex": ["query loss"], "la": ["query loss"], "ip": [], "self_la": []}),
        ("no learning rates", {"tracin": ["learning_rate"], "self_tda": ["learning_rate"], "loss_mean": []}),
        ("no learning rates of checkpoints", {"tda": ["learning_rate"], "vote_mean": []}),
        ("dropout", {"gaussian": ["uncompressed rows"], "dropout": [], "gex_lin": ["uncompressed rows"]}),
        ("gaussian", {"arnoldi": ["uncompressed rows"], "less": ["uncompressed rows"], "tracin_rp": []}),
        ("logra", {"self_ekfac": ["uncompressed rows"], "logra": []}),
    ],
)
def test_what_is_lacking_has_a_name(tmp_path: Path, kind: str, lacks: dict[str, list[str]]) -> None:
    found = lacking(STORES[kind](tmp_path))
    assert {method: list(found[method]) for method in lacks} == lacks


@pytest.mark.parametrize("kind", ["statistics of queries", "queries cut short"])
def test_auto_goes_without_queries_that_have_no_rows(tmp_path: Path, kind: str) -> None:
    assert set(attribute(STORES[kind](tmp_path)).report["parts"]) == {"loss_mean"}


def test_the_command_line_says_which_methods_can_run(tmp_path: Path) -> None:
    make_store(tmp_path, TRAIN, QUERY)
    said = CliRunner().invoke(app, ["methods", "--store", str(tmp_path)]).stdout
    now, later = said.split("lack something:")
    assert "  datainf\n" in now
    assert "  vote_mean: points\n" in later
    assert "  arnoldi: hessian\n" in later
