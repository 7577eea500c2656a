"""What stands beside a figure: biases, kinds of mistakes, baselines, spread over seeds, and where it comes from."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from stores import make_store, make_trained_store

from hf_influence import attribute
from hf_influence.dataset.contents import content_of
from hf_influence.errors import BadSetting, MissingRows, StoreError, StoreMismatch
from hf_influence.evaluation import Runs, Table, biases, mislabel_detection, provenance
from hf_influence.evaluation.spearman import spearman
from hf_influence.scores import Scores

N = 40
LENGTH = torch.arange(N) // 2 + 3
STATS = {
    "length": LENGTH,
    "n_tokens": torch.ones(N, dtype=torch.long),
    "hash": torch.tensor([7, 7, 7, 8, 8, *range(100, 135)]),
    "loss": torch.linspace(-1, 2, N, dtype=torch.float64).square(),
}
COPIES = [3, 3, 3, 2, 2, *[1] * 35]


def column(values, ids=None):
    values = torch.as_tensor(values, dtype=torch.float64)[:, None]
    return Scores(values, ids or list(range(len(values))), "mine", {"train_split": "train", "point": 0})


def test_spearman_with_ties_is_that_of_scipy():
    draw = np.random.default_rng(0)
    one, other = draw.integers(0, 6, (30, 5)).astype(float), draw.integers(0, 6, (30, 5)).astype(float)
    expected = [spearmanr(a, b).statistic for a, b in zip(one.T, other.T, strict=True)]
    np.testing.assert_allclose(spearman(one, other), expected, atol=1e-12)
    assert np.isnan(spearman(one[:, :1], np.ones((30, 1))))[0]


@pytest.fixture
def store(tmp_path):
    g = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return make_store(tmp_path / "store", {"layer": g}, {"layer": g[:4]}, stats=STATS, shards=3)


def test_biases_are_rank_correlations_with_length_and_copies(store):
    scores = attribute(store, "loss")
    found = biases(scores, store)
    assert found.length == pytest.approx(spearmanr(-STATS["loss"], LENGTH).statistic)
    assert found.duplicates == pytest.approx(spearmanr(-STATS["loss"], COPIES).statistic)
    assert found.labelled is None, "all examples have as many labelled tokens"
    assert biases(scores, store.path) == found
    assert json.loads(json.dumps(found)) == found


def test_a_score_that_is_length_is_called_so_and_one_that_is_not_is_not(store):
    assert biases(attribute(store, "length"), store).length == pytest.approx(-1)
    mostly = column(LENGTH + 4.0 * torch.randn(N))
    rho = biases(mostly, store).length
    assert 0.7 < rho < 0.95
    (warning,) = biases(mostly, store).warnings
    assert warning.startswith(f"'mine' is mostly the number of tokens (Spearman {rho:.2f}, limit 0.7)")
    assert biases(mostly, store, threshold=0.95).warnings == []
    assert biases(attribute(store, "random"), store).warnings == []
    assert "how often an example occurs" in biases(column(COPIES), store).warnings[0]


def test_biases_follow_the_ids_of_the_scores(store):
    values, order = torch.randn(N), torch.randperm(N).tolist()
    assert biases(column(values[order], order), store) == biases(column(values), store)
    part = [4, 9, 11, 30, 2]
    found = biases(column(values[part], part), store)
    assert found.length == pytest.approx(spearmanr(values[part], LENGTH[part]).statistic)


def test_biases_of_scores_over_points_find_every_example(tmp_path):
    g = torch.randn(N, 3, dtype=torch.float64)
    for point, present in ((1, range(25)), (2, range(15, N))):
        steps = {"step": torch.full((N,), point), "learning_rate": torch.ones(N, dtype=torch.float64)}
        make_store(tmp_path, {"layer": g}, {"layer": g[:4]}, stats=STATS | steps, point=point, present=list(present))
    scores = attribute(tmp_path, "tracin", points=[1, 2])
    assert len(scores) == N
    assert biases(scores, tmp_path).length == pytest.approx(spearmanr(scores.mean(), LENGTH).statistic)


def test_what_biases_cannot_read_is_named(store, tmp_path):
    with pytest.raises(StoreMismatch, match=r"1 of the 2 examples .* \(first: 99\)"):
        biases(column([1.0, 2.0], [0, 99]), store)
    with pytest.raises(BadSetting, match="threshold=0"):
        biases(column(torch.zeros(N)), store, threshold=0)
    bare = make_store(tmp_path / "bare", {"layer": torch.zeros(2, 1)})
    with pytest.raises(MissingRows, match=r"'length' that biases\(\) needs"):
        biases(column([1.0, 2.0]), bare)


def test_each_kind_is_held_against_the_right_examples_alone():
    scores = column([5.0, 4.0, 3.0, 1.0, 3.5, 6.0, 7.0])
    wrong = [False, False, False, True, True, True, True]
    kinds = ["clean", "clean", "truncated", "truncated", "swapped", "swapped", "swapped"]
    found = mislabel_detection(scores, wrong, kinds=kinds)
    # swapped: 3.5 is below two of three, 6 and 7 above all; what is said of right examples does not count
    assert found.auc_by_kind == {"swapped": pytest.approx(2 / 9), "truncated": 1.0}
    assert found.auc == mislabel_detection(scores, wrong).auc


def test_kinds_within_tasks_are_ranked_as_if_the_other_kinds_were_not_there():
    draw = torch.Generator().manual_seed(2)
    values = torch.randn(60, generator=draw)
    task = [i % 4 for i in range(60)]
    kinds = [["clean", "clean", "cut", "swap"][i // 15] for i in range(60)]
    wrong = [kind != "clean" for kind in kinds]
    by_kind = mislabel_detection(column(values), wrong, within=task, kinds=kinds).auc_by_kind
    for kind in ("cut", "swap"):
        rows = [i for i in range(60) if kinds[i] in ("clean", kind)]
        alone = mislabel_detection(column(values[rows]), [wrong[i] for i in rows], within=[task[i] for i in rows])
        assert by_kind[kind] == alone.auc
    with pytest.raises(BadSetting, match=r"kinds has 2 .* cover 60"):
        mislabel_detection(column(values), wrong, kinds=["a", "b"])


def test_a_series_goes_on_where_it_stopped_and_keeps_every_run_at_once(tmp_path):
    done = []

    def series(stop_at=None):
        runs = Runs(tmp_path, {"rows": 10, "share": 0.2})
        for seed in range(4):
            if seed == stop_at:
                raise KeyboardInterrupt
            runs.do({"set": "sst2", "seed": seed}, lambda seed=seed: done.append(seed) or {"auc": seed / 10})
        return runs

    with pytest.raises(KeyboardInterrupt):
        series(stop_at=2)
    assert len(list(tmp_path.glob("*.json"))) == 2
    runs = series()
    assert done == [0, 1, 2, 3]
    assert [(run.key, run.result) for run in runs] == [
        ({"set": "sst2", "seed": seed}, {"auc": seed / 10}) for seed in range(4)
    ]
    assert all(run.seconds >= 0 and run.about["versions"]["torch"] for run in runs)
    assert (tmp_path / "set=sst2,seed=0.json").is_file()
    with pytest.raises(StoreMismatch, match=r"made with share=0\.2, and now it is None"):
        list(Runs(tmp_path, {"rows": 10}))
    with pytest.raises(StoreMismatch, match="made with without=None"):
        list(Runs(tmp_path, {"rows": 10, "share": 0.2, "without": None}))


def test_a_run_that_fails_leaves_nothing_behind(tmp_path):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Runs(tmp_path).do({"seed": 0}, fail)
    assert Runs(tmp_path).do({"seed": 0}, lambda: 1) == 1


def test_runs_of_other_settings_are_never_mixed(tmp_path):
    Runs(tmp_path, {"rows": 10}).do({"seed": 0}, lambda: 1)
    other = Runs(tmp_path, {"rows": 20})
    with pytest.raises(StoreMismatch, match=r"seed=0\.json was made with rows=10, and now it is 20"):
        other.do({"seed": 0}, lambda: 1)
    with pytest.raises(StoreMismatch):
        list(other)
    (tmp_path / "seed=1.json").write_text("{")
    with pytest.raises(StoreError, match=r"seed=1\.json is not a finished run .* Delete that file"):
        Runs(tmp_path, {"rows": 10}).do({"seed": 1}, lambda: 1)
    with pytest.raises(BadSetting, match="key of a run is empty"):
        other.do({}, lambda: 1)


def test_keys_that_are_no_file_names_are_told_apart(tmp_path):
    runs = Runs(tmp_path)
    assert [runs.do({"model": name}, lambda name=name: name) for name in ("a/b", "a:b", "a_b")] == ["a/b", "a:b", "a_b"]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("one", "other"), [({"seed": 1}, {"seed": "1"}), ({"set": "a", "seed": 1}, {"set": "a,seed=1"})]
)
def test_keys_of_the_same_name_are_never_mixed(tmp_path, one, other, in_memory):
    runs = Runs(None if in_memory else tmp_path)
    runs.do(one, lambda: 1)
    with pytest.raises(StoreMismatch, match="has the same name"):
        runs.do(other, lambda: 2)
    assert runs.do(one, lambda: 3) == 1


def test_keys_may_hold_numbers_of_numpy_and_nothing_that_cannot_be_kept(tmp_path):
    assert Runs(tmp_path).do({"seed": np.int64(1), "sizes": (2, 3)}, lambda: 1) == 1
    assert Runs(tmp_path).do({"seed": 1, "sizes": [2, 3]}, lambda: 2) == 1
    with pytest.raises(BadSetting, match="cannot be written as JSON"):
        Runs(tmp_path).do({"model": object()}, lambda: pytest.fail("worked before the key was looked at"))


def test_results_of_the_suites_are_found_by_their_keys():
    files = sorted((Path(__file__).parent / "benchmarks" / "results").glob("*/*.json"))
    assert files
    for file in files:
        kept = json.loads(file.read_text())
        assert Runs(file.parent, kept["settings"]).do(kept["key"], lambda: None) == kept["result"]


def test_results_in_memory_are_remembered_too():
    runs = Runs()
    assert [runs.do({"seed": 0}, lambda value=value: value) for value in (1, 2)] == [1, 1]
    assert [run.result for run in runs] == [1]


def test_the_content_of_a_dataset_tells_it_from_others():
    rows = Dataset.from_dict({"a": ["x", "y"], "b": [1, 2]})
    assert content_of(rows) == content_of(Dataset.from_dict(rows.to_dict())) == content_of(rows.with_format("torch"))
    others = [rows.select([0]), rows.select([1, 0]), rows.rename_column("b", "c"), rows.select([])]
    assert len({content_of(one) for one in [rows, *others]}) == 5


def test_where_figures_come_from_names_no_host_and_no_folder(monkeypatch, tmp_path):
    command = ["tests/bench.py", "--data", "/secret/place/data", "--out=/secret/place/out", "--results", "runs/a b"]
    about = provenance(command)
    assert about["command"] == "python tests/bench.py --data data --out=out --results 'runs/a b'"
    monkeypatch.chdir(tmp_path)
    assert provenance([str(tmp_path / "bench.py")])["command"] == "python bench.py"
    import platform

    assert about["machine"]["cpus"] >= 1
    assert {"torch", "transformers", "hf-influence"} <= set(about["versions"])
    text = json.dumps(about)
    assert "secret" not in text
    assert platform.node() not in text
    assert str(Path.home()) not in text


ABOUT = {
    "command": "python bench.py --seeds 0 1",
    "date": "2026-01-02",
    "machine": {"cpus": 2, "architecture": "x86_64"},
    "python": "3.11.7",
    "versions": {"torch": "2.13.0"},
}


def filled():
    table = Table(title="MiniLM.", metrics=("auc", "precision"), beside=("length_rho", "seconds"))
    for auc in (0.7, 0.8):
        rows = {
            "random": {"auc": 0.5, "precision": 0.2, "length_rho": 0.01, "seconds": 0.0},
            "loss": {"auc": auc, "precision": 0.6, "length_rho": -0.83, "seconds": 0.5},
            "ip": {"auc": auc + 0.1, "precision": 0.7, "length_rho": None, "seconds": 1.0},
            "length": {"auc": 0.55, "precision": 0.3, "length_rho": -1.0, "seconds": 0.0},
            "gex": {"left out": "the store has no members"},
        }
        table.add("sst2 r=2", rows)
    table.add("mrpc r=2", {"ip": {"auc": 0.6, "precision": 0.5, "seconds": 1.0}})
    return table


def test_a_table_shows_mean_and_spread_baselines_and_what_is_missing():
    assert filled().markdown([ABOUT, ABOUT, ABOUT]) == "\n".join(
        [
            "MiniLM.",
            "",
            "auc / precision: mean ± standard deviation over 1 to 2 runs; length_rho, seconds: mean over all of them.",
            "",
            "`python bench.py --seeds 0 1`",
            "2026-01-02, 2 CPU cores, x86_64, Python 3.11.7, torch 2.13.0.",
            "",
            "| method | sst2 r=2 | mrpc r=2 | length_rho | seconds |",
            "|---|---|---|---|---|",
            "| `ip` | 0.850 ± 0.071 / 0.700 ± 0.000 | 0.600 / 0.500 | – | 1.00 |",
            "| `loss` | 0.750 ± 0.071 / 0.600 ± 0.000 |  | -0.83 | 0.50 |",
            "| `length` | 0.550 ± 0.000 / 0.300 ± 0.000 |  | -1.00 | 0.00 |",
            "| `random` | 0.500 ± 0.000 / 0.200 ± 0.000 |  | +0.01 | 0.00 |",
            "| `bm25` | not measured |  |  |  |",
            "",
            "`loss` ranks mostly by length (Spearman -0.83): read its figures beside those of that alone.",
            "Not measured: `gex` (the store has no members).",
            "",
        ]
    )


def test_the_json_of_a_table_has_every_single_figure():
    about = {**ABOUT, "command": "python bench.py --seeds 2"}
    content = json.loads(json.dumps(filled().json([ABOUT, about, ABOUT])))
    assert content["about"] == [ABOUT, about], "each command once"
    cell = content["rows"]["ip"]["columns"]["sst2 r=2"]["auc"]
    assert cell["values"] == pytest.approx([0.8, 0.9])
    assert (cell["mean"], cell["spread"]) == pytest.approx((0.85, np.std([0.8, 0.9], ddof=1)))
    assert content["rows"]["ip"]["columns"]["mrpc r=2"]["auc"]["spread"] is None
    assert content["not measured"] == {"bm25": {}, "gex": {"sst2 r=2": "the store has no members"}}


def test_a_row_that_is_not_everywhere_comes_last_and_columns_count_alike():
    table = Table(title="T.", metrics=["auc"], baselines=())
    for seed in range(3):
        table.add("easy", {"good": {"auc": 0.95}, "fails": {"auc": 0.94}, "poor": {"auc": 0.5}})
        table.add("hard", {"good": {"auc": 0.65}, "fails": {"left out": "NaN"}, "poor": {"auc": 0.5}})
        if seed == 0:
            table.add("hard", {"good": {"auc": 0.65}, "fails": {"auc": 0.9}, "poor": {"auc": 0.5}})
    table.add("third", {"good": {"auc": 0.6}, "poor": {"auc": 0.9}})
    lines = table.markdown([]).splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == ["good", "poor", "fails"]
    assert lines[-1] == "Left out in a run: `fails`, hard (NaN)."
    assert table.json([])["not measured"] == {"fails": {"hard": "NaN"}}


def test_ways_that_a_seed_lacks_are_left_out(series, tmp_path):
    runs = Runs(tmp_path)
    for seed, ways in enumerate((["noisy", "posterior"], ["noisy"])):
        runs.do({"set": "sst2", "seed": seed}, lambda ways=ways: {way: {"accuracy": 0.5} for way in ways})
    assert series.by_seed(runs, "accuracy") == {"sst2": {"noisy": [0.5, 0.5]}}


def test_lower_may_be_better_and_a_single_run_has_no_spread():
    table = Table(title="Loss.", metrics=["loss"], higher_is_better=False, baselines=())
    table.add("all", {"a": {"loss": 2.0}, "b": {"loss": 1.0}, "c": {}})
    lines = table.markdown([]).splitlines()
    assert lines[2] == "loss: mean ± standard deviation over 1 run (no spread)."
    assert lines[-3:] == ["| `b` | 1.000 |", "| `a` | 2.000 |", "| `c` | – |"]


@pytest.fixture
def series(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    return importlib.import_module("series")


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
    assert "| not measured |" not in table.markdown([ABOUT])
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
