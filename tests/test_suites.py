"""What the benchmark suites share: runs that are kept, every method beside the baselines, and the table of a series."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stores import make_trained_store, stats_with_copies

from hf_influence import attribute
from hf_influence.errors import StoreMismatch
from hf_influence.evaluation import Runs, Table, mislabel_detection

N = 40
STATS = stats_with_copies(N)


@pytest.fixture
def series(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    return importlib.import_module("series")


def test_results_of_the_suites_are_found_by_their_keys():
    files = sorted((Path(__file__).parent / "benchmarks" / "results").glob("*/*.json"))
    assert files
    for file in files:
        kept = json.loads(file.read_text())
        assert Runs(file.parent, kept["settings"]).do(kept["key"], lambda: None) == kept["result"]


def test_ways_that_a_seed_lacks_are_left_out(series, tmp_path):
    runs = Runs(tmp_path)
    for seed, ways in enumerate((["noisy", "posterior"], ["noisy"])):
        runs.do({"set": "sst2", "seed": seed}, lambda ways=ways: {way: {"accuracy": 0.5} for way in ways})
    assert series.by_seed(runs, "accuracy") == {"sst2": {"noisy": [0.5, 0.5]}}


def test_benchmarks_measure_every_method_and_all_baselines(series, tmp_path):
    pytest.importorskip("bm25s", reason="the extra 'baselines' is not installed")
    g = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    make_trained_store(tmp_path, {"layer": g}, {"layer": g[:4]}, stats=STATS)
    wrong = [i % 5 == 0 for i in range(N)]
    words = [f"word{i % 7} again" for i in range(N)]
    given = series.Given([i % 2 for i in range(N)], words, words[:4], seed=3)
    found = series.every_method(tmp_path, given, lambda method, scores: mislabel_detection(scores, wrong))
    expected = mislabel_detection(attribute(tmp_path, "random", seed=3), wrong)
    assert {name: found["random"][name] for name in expected} == expected
    assert found["length"]["length_rho"] == pytest.approx(-1)
    for method in ("loss", "ip", "datainf", "tracin", "gex", "outlier_classwise", "bm25"):
        assert 0 <= found[method]["auc"] <= 1
        assert found[method]["seconds"] >= 0
    assert found["margin"] == {"left out": "the store has no margin"}
    table = Table(title="All.", metrics=["auc"])
    table.add("toy", found)
    assert "| not measured |" not in table.markdown([])
    few = series.every_method(tmp_path, given, lambda method, scores: {"auc": 1.0} if method == "ip" else None)
    assert {method for method, row in few.items() if "auc" in row} == {"ip"}
    assert series.best(found, "auc", 2).count(" ") == 3


def test_the_mean_query_gives_the_figures_of_all_queries(series, tmp_path):
    rows = torch.randn(N + 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g, v = rows.split([N, 4])
    make_trained_store(tmp_path, {"layer": g}, {"layer": v}, stats=STATS)
    each = series.Given([i % 2 for i in range(N)], [], [], seed=3)
    for method in ("cg", "cosine", "gex", "tda", "tracin", "vote"):
        all_queries = series.scored(tmp_path, method, each)
        one = series.scored(tmp_path, method, replace(each, queries="mean"))
        assert one.values.shape == (N, 1)
        torch.testing.assert_close(one.mean(), all_queries.mean(), rtol=1e-4, atol=1e-6)
    left_out = series.every_method(tmp_path, each, lambda *_: None, without=["cg", "ip"])
    assert left_out["cg"] == {"left out": series.SLOW["cg"]}
    assert left_out["ip"] == {"left out": "by the option --without"}
    assert list(series.every_method(tmp_path, each, lambda *_: {"auc": 1.0}, only=["ip", "tda"])) == ["ip", "tda"]


def test_the_options_that_a_series_goes_over_do_not_tell_its_runs_apart(series, tmp_path):
    options = series.parser("Words.")
    options.add_argument("--seeds", nargs="+", type=int)
    options.add_argument("--rows", type=int)
    one, other, more = (
        options.parse_args(["--results", str(tmp_path), "--seeds", *seeds, "--rows", rows])
        for seeds, rows in ((["0"], "5"), (["0", "1"], "5"), (["0"], "6"))
    )
    series.runs_of(one, "seeds").do({"seed": 0}, lambda: 1)
    assert series.runs_of(other, "seeds").do({"seed": 0}, lambda: 2) == 1
    with pytest.raises(StoreMismatch, match="rows=5"):
        series.runs_of(more, "seeds").do({"seed": 0}, lambda: 2)


def test_the_table_of_a_series_is_made_of_the_runs_that_are_there(series, tmp_path, capsys):
    args = series.parser("").parse_args(
        ["--results", str(tmp_path / "runs"), "--json", str(tmp_path / "t.json"), "--markdown", str(tmp_path / "t.md")]
    )
    for seed in range(3):
        series.runs_of(args).do({"seed": seed}, lambda seed=seed: {"ip": {"auc": 0.5 + seed / 10}})
    (tmp_path / "runs" / "seed=1.json").unlink()
    table = Table(title="T.", metrics=["auc"], baselines=())
    series.finish(table, lambda run: iter([("toy", run.result)]), series.runs_of(args), args)
    text = (tmp_path / "t.md").read_text()
    assert "| `ip` | 0.600 ± 0.141 |" in text
    assert capsys.readouterr().out.strip() == text.strip()
    assert json.loads((tmp_path / "t.json").read_text())["rows"]["ip"]["columns"]["toy"]["auc"]["values"] == [0.5, 0.7]
