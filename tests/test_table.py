"""Tables of figures: mean and spread, what they stand beside, and what is missing."""

import json

import numpy as np
import pytest

from hf_influence.evaluation import Table

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


def test_lower_may_be_better_and_a_single_run_has_no_spread():
    table = Table(title="Loss.", metrics=["loss"], higher_is_better=False, baselines=())
    table.add("all", {"a": {"loss": 2.0}, "b": {"loss": 1.0}, "c": {}})
    lines = table.markdown([]).splitlines()
    assert lines[2] == "loss: mean ± standard deviation over 1 run (no spread)."
    assert lines[-3:] == ["| `b` | 1.000 |", "| `a` | 2.000 |", "| `c` | – |"]
