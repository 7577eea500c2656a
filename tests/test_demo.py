"""The demo from end to end, with a tiny model in place of SmolLM2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets.utils.logging import enable_progress_bar
from models import of_characters
from rich.console import Console
from transformers.utils import logging

from hf_influence.attribution import lacking
from hf_influence.demo import Demo
from hf_influence.errors import BadSetting


@pytest.fixture(autouse=True)
def _loud_again() -> Iterator[None]:
    """The demo makes other libraries quiet, and other tests run in this process."""
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()
    enable_progress_bar()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return of_characters(tmp_path)


def test_the_demo_finds_drops_retrains_and_says_what_it_measured(model: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    found = Demo(model=str(model), size=20, held_out=10, epochs=2, output=tmp_path / "demo").run(console)
    assert found == json.loads((tmp_path / "demo" / "results.json").read_text())
    printed = console.export_text()
    assert all(title in printed for title in ("1. Which training", "2. Which answers", "3. 10 clean held-out prompts"))

    assert {"cosine", "datainf", "outlier_classwise"} <= found["class_detection"].keys()
    assert {"auto", "auto, groups=task", "loss_mean", "vote_mean", "aum", "tracin"} <= found["mistake_detection"].keys()
    assert lacking(tmp_path / "demo" / "store")["auto"] == ()
    held_out = found["held_out"]
    assert [row["prompts"] for row in held_out.values()] == [20, 16, 16, 16]
    assert held_out["all data"]["wrong"] == 4
    assert held_out["the truly clean data"]["wrong"] == 0
    assert held_out["all data"]["gain"] == 0


def test_no_folder_is_deleted_but_that_of_an_earlier_demo(tmp_path: Path) -> None:
    """Such as `--output .`, or a folder with a store of one's own."""
    for name, mine in (("work", "thesis.txt"), ("runs", "store"), ("both", "results.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / mine).write_text("mine")
    (tmp_path / "both" / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for name in ("work", "runs", "both"):
        with pytest.raises(BadSetting, match=r"which is no earlier demo.* Name a new or an empty folder"):
            Demo(output=tmp_path / name).run(Console(quiet=True))
    assert sorted(tmp_path.rglob("*")) == before
    demo = Demo(output=tmp_path / "demo")
    for _ in range(2):  # new, and interrupted
        demo._make_room()
        assert [path.name for path in demo.output.iterdir()] == ["results.json"]
        (demo.output / "store").mkdir()
