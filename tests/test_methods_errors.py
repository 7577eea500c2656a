"""What is refused, and what the message says about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import make_store, make_trained_store

from hf_influence.attribution import attribute, methods
from hf_influence.errors import BadExample, BadSetting, MissingRows, StoreError, StoreMismatch, UnknownMethod
from hf_influence.gradients.compress import dropout
from hf_influence.store import Claim

TRAIN = {"layer": torch.randn(6, 8, generator=torch.Generator().manual_seed(0))}
QUERY = {"layer": torch.randn(2, 8, generator=torch.Generator().manual_seed(1))}
WITH_ROWS = [name for name, about in methods().items() if "rows" in about.needs]
LABELS = {"label": torch.arange(6) % 2}


def test_unknown_method_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownMethod, match=r"'datinf'; did you mean 'datainf'\?.*methods"):
        attribute(make_store(tmp_path, TRAIN), "datinf")


def test_unknown_setting_names_those_allowed(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"no setting 'dampin'; did you mean 'damping'\? It takes: queries, damping"):
        attribute(make_store(tmp_path, TRAIN), "datainf", dampin=1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("datainf", {"damping": 0}),
        ("datainf", {"damping": -1.0}),
        ("fisher", {"damping": float("nan")}),
        ("fisher", {"damping": "0.1"}),
        ("fisher", {"side": "left"}),
        ("ip", {"queries": "all"}),
        ("dropout", {"r": 0}),
        ("gaussian", {"r": 2.5}),
        ("random", {"seed": -1}),
        ("outlier_iforest", {"trees": 0}),
        ("outlier_iforest", {"eps": 1.0}),
        ("outlier_classwise", {"labels": [0, 1]}),
        ("outlier_classwise", {"labels": "abcdef"}),
        ("vote", {"k": True}),
        ("datainf", {"damping": True}),
        ("tracin", {"points": [True]}),
        ("tracin", {"weighted": "no"}),
        ("arnoldi", {"positive": 0}),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting, match=f"method '{method}': {next(iter(settings))}="):
        attribute(make_store(tmp_path, TRAIN, QUERY), method, **settings)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    store = make_store(tmp_path, TRAIN, QUERY)
    scores = attribute(store, "vote", k=np.int64(2))
    assert scores.settings["k"] == 2
    assert type(scores.settings["k"]) is int
    assert attribute(store, "fisher", damping=np.float32(0.5)).settings["damping"] == 0.5
    assert attribute(store, "ip", point=np.int64(0)).settings["point"] == 0  # type: ignore[arg-type]
    for points in (np.array([0]), torch.tensor([0]), [np.int64(0)]):
        assert attribute(store, "tracin", points=points, weighted=False).settings["points"] == [0]


@pytest.mark.parametrize("parts", [5, {"vote": 3}, [["vote"]]])
def test_parts_of_another_kind_are_refused(tmp_path: Path, parts: Any) -> None:
    with pytest.raises(BadSetting, match=r"method 'auto'.*parts="):
        attribute(make_store(tmp_path, TRAIN, QUERY), parts=parts)


@pytest.mark.parametrize("settings", [{}, {"parts": ["loss", "vote"]}, {"method": "ip"}])
def test_a_split_of_queries_that_is_nowhere_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    store = make_store(tmp_path, TRAIN, QUERY, stats={"loss": torch.rand(6)})
    with pytest.raises(MissingRows, match=r"'typo' at any point \(it has: query, train\).*collect\(.*split='typo'"):
        attribute(store, query_split="typo", **settings)
    assert len(attribute(store, query_split="typo", parts=["loss"])) == 6


@pytest.mark.parametrize("point", ["0", True])
def test_a_point_that_is_no_number_is_refused(tmp_path: Path, point: Any) -> None:
    with pytest.raises(BadSetting, match=r"point=.* is no number.*points\(\)"):
        attribute(make_store(tmp_path, TRAIN, QUERY), "ip", point=point)


def test_a_store_that_a_run_of_another_process_fills_is_scored_with_a_warning(tmp_path: Path) -> None:
    store = make_store(tmp_path, TRAIN, QUERY)
    claim = Claim.take(tmp_path)
    attribute(store, "ip")
    file = tmp_path / "run.json"
    file.write_text(file.read_text().replace(f'"pid": {claim.pid}', '"pid": 1'))
    with pytest.warns(UserWarning, match=r"process 1 on .* goes on or was cut short.*resume_from_checkpoint=True"):
        attribute(store, "ip")


def test_missing_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a gradient store"):
        attribute(tmp_path, "ip")


@pytest.mark.parametrize("method", [name for name, about in methods().items() if "queries" in about.needs])
def test_missing_queries_say_how_to_collect_them(tmp_path: Path, method: str) -> None:
    with pytest.raises(MissingRows, match=r"'query'.*collect(_at)?\(.*'query'"):
        attribute(make_trained_store(tmp_path, TRAIN, stats=LABELS), method)


def test_mean_of_no_queries(tmp_path: Path) -> None:
    store = make_store(tmp_path, TRAIN, {"layer": torch.zeros(0, 8)})
    with pytest.raises(MissingRows, match="no mean query"):
        attribute(store, "ip", queries="mean")
    with pytest.raises(MissingRows, match="holds no examples, so there is no score"):
        attribute(store, "ip", queries=[])


def test_missing_statistic_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(MissingRows, match=r"'margin' that method 'margin' needs \(it has: label\)"):
        attribute(make_store(tmp_path, TRAIN, stats=LABELS), "margin")


def test_missing_labels_say_how_to_pass_them(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="labels="):
        attribute(make_store(tmp_path, TRAIN, QUERY), "outlier_classwise")


@pytest.mark.parametrize(("method", "settings"), [("gaussian", {}), ("dropout", {"r": 5}), ("dropout", {"seed": 1})])
def test_rows_compressed_otherwise_are_refused(tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    store = make_store(tmp_path, TRAIN, QUERY, compress=dropout(4))
    with pytest.raises(StoreMismatch, match=r"dropout\(r=4, seed=0\).*method='fisher'"):
        attribute(store, method, **settings)


@pytest.mark.parametrize("method", WITH_ROWS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("width", [3, 8])
def test_rows_that_are_not_finite_are_refused_by_name(tmp_path: Path, method: str, bad: float, width: int) -> None:
    train = {"layer": TRAIN["layer"][:, :width].clone()}
    train["layer"][4, 2] = bad
    query = {"layer": QUERY["layer"][:, :width]}
    with pytest.raises(BadExample, match=r"example 4 in .*train .*\(block layer\)"):
        attribute(make_trained_store(tmp_path, train, query, stats=LABELS), method)


def test_queries_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    query = {"layer": QUERY["layer"].clone()}
    query["layer"][1, 0] = float("nan")
    with pytest.raises(BadExample, match=r"example 1 in .*query"):
        attribute(make_store(tmp_path, TRAIN, query), "datainf")
