"""What every method in the table promises, whatever it computes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import Blocks, make_trained_store, random_blocks

import hf_influence.store.rows
from hf_influence.attribution import attribute, methods
from hf_influence.errors import MissingRows
from hf_influence.scores import Scores
from hf_influence.store import GradientStore

TABLE = methods()
WITH_QUERIES = [name for name, about in TABLE.items() if "queries" in about.needs]
ONE_COLUMN = {"vote", "vote_mean", "kernel_ridge", "kernel_ridge_mean"} | TABLE.keys() - set(WITH_QUERIES)
WORDS = ["", "a red house", "the house", "red red wine", "ship"]
every_method = pytest.mark.parametrize("method", TABLE)


def blocks(n: int, seed: int, widths: tuple[int, ...] = (9, 30)) -> Blocks:
    return random_blocks(n, seed, {f"layer{i}.weight": d for i, d in enumerate(widths)})


def statistics(n: int) -> dict[str, torch.Tensor]:
    """All that any method asks for."""
    generator = torch.Generator().manual_seed(7)
    names = {need for about in TABLE.values() for need in about.needs}
    names -= {"rows", "queries", "labels", "points", "members", "texts", "hessian", "ekfac", "adam", "query loss"}
    stats = {name: torch.rand(n, generator=generator) for name in sorted(names)} | {"label": torch.arange(n) % 2}
    drawn = {name: torch.rand(n, 3, generator=generator) for name in ("features", "probabilities")}
    return stats | drawn | {"probabilities": drawn["probabilities"].softmax(1)}


def passed(method: str, n: int, m: int = 4) -> dict[str, Any]:
    """What must be passed to a method, for the examples in their first order."""
    train, query = ([f"{WORDS[i % len(WORDS)]} number {i // 2}" for i in range(count)] for count in (n, m))
    return {"texts": train, "query_texts": query} if "texts" in TABLE[method].needs else {}


def make(path: Path, n: int = 20, m: int = 4, widths: tuple[int, ...] = (9, 30)) -> GradientStore:
    return make_trained_store(path, blocks(n, 1, widths), blocks(m, 2, widths), stats=statistics(n))


def hashes(store: GradientStore) -> dict[str, str]:
    files = (file for file in store.path.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@every_method
def test_one_finite_score_for_each_example_and_query(tmp_path: Path, method: str) -> None:
    store = make(tmp_path)
    before = hashes(store)
    scores = attribute(store, method, **passed(method, 20))
    assert scores.values.shape == (20, 1 if method in ONE_COLUMN else 4)
    assert scores.values.dtype == torch.float64
    assert (scores.query_ids is not None) == (method in WITH_QUERIES)
    assert hashes(store) == before


@every_method
def test_chunks_and_shards_do_not_change_the_scores(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = attribute(make(tmp_path / "a"), method, **passed(method, 20)).values
    store = make_trained_store(tmp_path / "b", blocks(20, 1), blocks(4, 2), stats=statistics(20), shards=7)
    monkeypatch.setattr(hf_influence.store.rows, "CHUNK_BYTES", 500)
    torch.testing.assert_close(attribute(store, method, **passed(method, 20)).values, expected)


@every_method
def test_permuted_rows_have_permuted_scores(tmp_path: Path, method: str) -> None:
    train, query, stats = blocks(20, 1), blocks(4, 2), statistics(20)
    ids = [f"example {i}" for i in range(20)]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    straight = make_trained_store(tmp_path / "a", train, query, stats=stats, ids=ids)
    permuted = make_trained_store(
        tmp_path / "b",
        {name: g[order] for name, g in train.items()},
        query,
        stats={name: value[order] for name, value in stats.items()},
        ids=[ids[i] for i in order],
    )
    settings = passed(method, 20)
    expected = attribute(straight, method, **settings).values[order]
    settings |= {"texts": [settings["texts"][i] for i in order]} if settings else {}
    torch.testing.assert_close(attribute(permuted, method, **settings).values, expected)


@pytest.mark.parametrize("method", [name for name in WITH_QUERIES if {"rows", "members"} & set(TABLE[name].needs)])
def test_copy_of_the_query_is_worth_keeping_and_its_mislabelled_copy_is_not(tmp_path: Path, method: str) -> None:
    train, query = blocks(40, 1), blocks(1, 2)
    label = torch.arange(40) % 2
    side = 2.0 * label - 1
    for name, v in query.items():  # class 1 looks like the query, class 0 like its opposite
        train[name] = 0.3 * train[name] + 0.5 * side[:, None] * v
        train[name][11], train[name][10] = v[0], -v[0]
    scores = attribute(make_trained_store(tmp_path, train, query, stats={"label": label}), method).values[:, 0]
    assert (scores <= scores[11]).double().mean() > 0.9
    assert (scores >= scores[10]).double().mean() > 0.9
    assert scores[10] < scores[11]


@every_method
def test_settings_survive_save_and_load_and_give_the_same_scores(tmp_path: Path, method: str) -> None:
    store = make(tmp_path / "store")
    scores = attribute(store, method, **passed(method, 20))
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert (loaded.method, loaded.settings, loaded.ids) == (method, scores.settings, scores.ids)
    assert set(TABLE[method].settings) <= set(loaded.settings)
    again = attribute(store, loaded.method, **loaded.settings | passed(method, 20))
    torch.testing.assert_close(again.values, loaded.values)


@pytest.mark.parametrize("method", ["auto", "ip"])
def test_another_split_of_queries_is_among_the_settings(tmp_path: Path, method: str) -> None:
    store = make(tmp_path, m=20)
    writer = store.writer("validation", adapter="", dataset="", n=20)
    writer.append(list(range(20)), blocks(20, 3), {"loss": torch.zeros(20)})
    writer.flush()
    writer.close()
    scores = attribute(store, method, query_split="validation")
    assert scores.settings["query_split"] == "validation"
    torch.testing.assert_close(attribute(store, method, **scores.settings).values, scores.values)
    assert not torch.allclose(attribute(store, method).values, scores.values)


@pytest.mark.filterwarnings("ignore:method 'outlier_classwise' cannot tell what is typical:UserWarning")
@every_method
@pytest.mark.parametrize(("n", "m", "widths"), [(0, 3, (5, 6)), (1, 3, (5,)), (3, 0, (5,)), (2, 1, (1,))])
def test_empty_and_tiny_stores(tmp_path: Path, method: str, n: int, m: int, widths: tuple[int, ...]) -> None:
    store = make(tmp_path, n, m, widths)
    if not m and method in WITH_QUERIES:
        with pytest.raises(MissingRows, match="holds no examples"):
            attribute(store, method, **passed(method, n, m))
        return
    scores = attribute(store, method, **passed(method, n, m))
    assert scores.values.shape == (n, 1 if method in ONE_COLUMN else m)


@every_method
def test_zero_gradients_give_finite_scores(tmp_path: Path, method: str) -> None:
    train, query = blocks(6, 1), blocks(3, 2)
    train["layer0.weight"].zero_()
    train["layer1.weight"][2] = 0
    store = make_trained_store(tmp_path, train, query, stats=statistics(6))
    assert attribute(store, method, **passed(method, 6, 3)).values.isfinite().all()


@every_method
def test_the_table_says_everything(method: str) -> None:
    about = TABLE[method]
    for what in ("summary", "formula", "cost", "use", "source"):
        assert getattr(about, what), f"the docstring of {method!r} lacks its {what}"
    assert about.formula.startswith("score[i")
