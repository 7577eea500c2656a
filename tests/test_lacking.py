"""What a store lacks for each method: said before it is tried, and true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stores import make_store, make_trained_store
from test_methods_exact import QUERY, TRAIN
from typer.testing import CliRunner

from hf_influence.attribution import attribute, lacking
from hf_influence.cli import app
from hf_influence.errors import InfluenceError

STATS = {"loss": torch.rand(20), "label": torch.arange(20) % 2}
STORES: dict[str, Any] = {
    "rows alone": lambda path: make_store(path, TRAIN),
    "rows, queries, statistics": lambda path: make_store(path, TRAIN, QUERY, stats=STATS),
    "training": lambda path: make_trained_store(path, TRAIN, QUERY, stats=STATS),
}


@pytest.mark.parametrize("kind", STORES)
def test_what_lacks_nothing_runs_and_what_lacks_something_is_refused(tmp_path: Path, kind: str) -> None:
    store = STORES[kind](tmp_path)
    for method, lacks in lacking(store).items():
        if lacks:
            with pytest.raises(InfluenceError):
                attribute(store, method)
        else:
            assert len(attribute(store, method)) == 20


def test_the_command_line_says_which_methods_can_run(tmp_path: Path) -> None:
    make_store(tmp_path, TRAIN, QUERY)
    said = CliRunner().invoke(app, ["methods", "--store", str(tmp_path)]).stdout
    now, later = said.split("lack something:")
    assert "  datainf\n" in now
    assert "  tracin: points\n" in later
    assert "  arnoldi: hessian\n" in later
