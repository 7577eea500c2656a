"""The baselines that need neither gradients nor queries of gradients, against their formulas."""

from __future__ import annotations

import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import make_store
from torch import Tensor

from hf_influence import Scores
from hf_influence.attribution import attribute
from hf_influence.errors import BadSetting, MissingPackage, MissingRows

assert_exact = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)

N, C = 40, 3
DRAW = torch.Generator().manual_seed(0)
P = (2 * torch.randn(N, C, generator=DRAW, dtype=torch.float64)).softmax(1)
LABEL = torch.multinomial(P, 1, generator=DRAW)[:, 0]
LABEL[:8] = (LABEL[:8] + 1) % C
LOSS = -P.gather(1, LABEL[:, None])[:, 0].log()
FEATURES = torch.randn(N, 6, generator=DRAW, dtype=torch.float64)
STATS = {"probabilities": P, "label": LABEL, "loss": LOSS, "features": FEATURES}


def scores_of(path: Path, method: str, stats: dict[str, Tensor] = STATS, **settings: Any) -> Scores:
    rows = {"layer": torch.zeros(len(stats["loss"]), 1, dtype=torch.float64)}
    return attribute(make_store(path, rows, stats=stats), method, **settings)


def test_self_confidence_is_the_probability_of_the_label(tmp_path: Path) -> None:
    expected = [[float(P[i, y])] for i, y in enumerate(LABEL.tolist())]
    assert_exact(scores_of(tmp_path, "self_confidence").values, torch.tensor(expected, dtype=torch.float64))


SMOOTHED = {"label_smoothing": 0.1, "loss": "smoothed_cross_entropy"}


@pytest.mark.parametrize("method", ["self_confidence", "confidence_entropy"])
def test_under_another_loss_the_probability_is_the_stored_one(tmp_path: Path, method: str) -> None:
    plain = scores_of(tmp_path / "plain", method).values
    rows, smoothed = {"layer": torch.zeros(N, 1, dtype=torch.float64)}, 0.9 * LOSS - 0.1 * P.log().mean(1)
    store = make_store(tmp_path / "smoothed", rows, stats=STATS | {"loss": smoothed}, task=SMOOTHED)
    assert_exact(attribute(store, method).values, plain)


def test_another_loss_without_probabilities_has_no_confidence(tmp_path: Path) -> None:
    rows = {"layer": torch.zeros(N, 1, dtype=torch.float64)}
    store = make_store(tmp_path, rows, stats={"loss": LOSS}, task=SMOOTHED)
    with pytest.raises(MissingRows, match=r"does not hold the statistic 'probabilities'"):
        attribute(store, "self_confidence")


def test_probabilities_of_whole_texts_that_are_0_are_refused(tmp_path: Path) -> None:
    losses = {"loss": torch.tensor([80.0, 150, 300])}
    rows = {"layer": torch.zeros(3, 1)}
    with pytest.raises(BadSetting, match=r"loss of example 1 is 150, and its probability is 0 .* method='loss'"):
        attribute(make_store(tmp_path, rows, stats=losses), "self_confidence")


def confidence_entropy(p: list[float], y: int) -> float:
    a = -sum(q * math.log(q) for q in p) / (p[y] * math.log(len(p)))
    return math.log(1 + a) / a


def test_confidence_entropy_is_its_formula(tmp_path: Path) -> None:
    scores = scores_of(tmp_path, "confidence_entropy")
    expected = [[confidence_entropy(p, y)] for p, y in zip(P.tolist(), LABEL.tolist(), strict=True)]
    assert_exact(scores.values, torch.tensor(expected, dtype=torch.float64))


def test_confidence_entropy_is_that_of_cleanlab(tmp_path: Path) -> None:
    rank = pytest.importorskip("cleanlab.rank", reason="the extra 'baselines' is not installed")
    expected = rank.get_label_quality_scores(LABEL.numpy(), P.numpy(), method="confidence_weighted_entropy")
    assert_exact(scores_of(tmp_path, "confidence_entropy").values[:, 0], torch.from_numpy(expected))


def test_a_sure_model_is_right_or_wrong_and_nothing_between(tmp_path: Path) -> None:
    """Where float32 rounds a probability to 0 or 1, entropy alone would call both alike."""
    z = torch.tensor([[200.0, 0.0], [40.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 40.0], [0.0, 200.0]])
    log_p = z.log_softmax(1)
    stats = {"probabilities": log_p.exp(), "loss": -log_p[:, 0], "label": torch.zeros(6, dtype=torch.long)}
    scores = scores_of(tmp_path, "confidence_entropy", stats).values[:, 0]
    assert scores[0] == 1
    assert (scores.diff()[1:] < 0).all()
    assert scores[0] >= scores[1]


def label_issues(p: Tensor, label: list[int]) -> list[bool]:
    """Confident learning as in the paper: the confident joint, calibrated by counting, pruned by noise rate."""
    classes = range(p.shape[1])
    by_class = {c: [i for i, y in enumerate(label) if y == c] for c in classes}
    threshold = {c: sum(float(p[i, c]) for i in members) / len(members) for c, members in by_class.items() if members}
    joint = Counter[tuple[int, int]]()
    for i, y in enumerate(label):
        sure = [c for c in threshold if p[i, c] >= threshold[c] - 1e-6]
        if sure:
            joint[y, max(sure, key=lambda c: float(p[i, c]))] += 1
    wrong = set()
    for given, members in by_class.items():
        counted = sum(joint[given, c] for c in classes)
        for true in classes:
            if true != given and counted:
                number = joint[given, true] / counted * len(members)
                margin = {i: float(p[i, true] - p[i, given]) for i in members}
                worst = sorted(members, key=lambda i: -margin[i])[: int(number + 0.5)]
                wrong |= {i for i in worst if margin[i] > 0 and int(p[i].argmax()) != given}
    return [i in wrong for i in range(len(label))]


def test_confident_learning_puts_label_issues_below_all_others(tmp_path: Path) -> None:
    pytest.importorskip("cleanlab", reason="the extra 'baselines' is not installed")
    scores = scores_of(tmp_path, "confident_learning").values[:, 0]
    margin = torch.stack([p[y] - max(q for c, q in enumerate(p) if c != y) for p, y in zip(P, LABEL, strict=True)])
    issues = torch.tensor(label_issues(P, LABEL.tolist()))
    assert 4 < issues.sum() < 20
    assert_exact(scores, (1 + margin) / 2 - issues.double())
    assert scores[issues].max() < 0 <= scores[~issues].min()


@pytest.mark.parametrize("label", [0, 1])
def test_confident_learning_of_one_class_finds_nothing(tmp_path: Path, label: int) -> None:
    pytest.importorskip("cleanlab", reason="the extra 'baselines' is not installed")
    stats = STATS | {"label": torch.full((N,), label)}
    assert (scores_of(tmp_path, "confident_learning", stats).values >= 0).all()


@pytest.mark.parametrize("k", [1, 5, 39, 100])
@pytest.mark.parametrize("given", [True, False], ids=["labels passed", "labels stored"])
def test_deep_knn_is_the_share_of_neighbours_with_the_label(tmp_path: Path, k: int, given: bool) -> None:
    settings: dict[str, Any] = {"labels": [f"class {y}" for y in LABEL.tolist()]} if given else {}
    stats = {name: value for name, value in STATS.items() if not given or name != "label"}
    scores = scores_of(tmp_path, "deep_knn", stats, k=k, **settings)
    expected = []
    for i in range(N):
        others = sorted((j for j in range(N) if j != i), key=lambda j: float((FEATURES[i] - FEATURES[j]).norm()))[:k]
        expected.append([sum(int(LABEL[j] == LABEL[i]) for j in others) / len(others)])
    assert_exact(scores.values, torch.tensor(expected, dtype=torch.float64))
    assert scores.settings["k"] == min(k, N - 1)


def test_neighbours_of_one_class_all_agree(tmp_path: Path) -> None:
    assert (scores_of(tmp_path, "deep_knn", labels=["one"] * N).values == 1).all()


def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    rows = {"layer": torch.zeros(3, 1)}
    store = make_store(tmp_path, rows, stats={"label": torch.zeros(3), "loss": torch.zeros(3)})
    with pytest.raises(MissingRows, match=r"'features' that method 'deep_knn' needs.*features=True"):
        attribute(store, "deep_knn")
    with pytest.raises(MissingRows, match=r"'probabilities' that method 'confidence_entropy' needs"):
        attribute(store, "confidence_entropy")


DOCUMENTS = ["The house is red, red, RED.", "a ship", "", "red wine and a red house", "Häuser am See", "the the the"]
QUESTIONS = ["a red house", "the ship, the sea", "", "unknown"]


def bm25(question: list[str], document: list[str], documents: list[list[str]], k1: float, b: float) -> float:
    length = sum(map(len, documents)) / len(documents)
    total = 0.0
    for word in question:
        held, times = sum(word in other for other in documents), document.count(word)
        idf = math.log(1 + (len(documents) - held + 0.5) / (held + 0.5))
        total += idf * times / (times + k1 * (1 - b + b * len(document) / length))
    return total


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4)])
def test_bm25_is_its_formula(tmp_path: Path, k1: float, b: float) -> None:
    pytest.importorskip("bm25s", reason="the extra 'baselines' is not installed")
    rows = [torch.zeros(n, 1, dtype=torch.float64) for n in (len(DOCUMENTS), len(QUESTIONS))]
    store = make_store(tmp_path, {"layer": rows[0]}, {"layer": rows[1]})
    scores = attribute(store, "bm25", texts=DOCUMENTS, query_texts=QUESTIONS, k1=k1, b=b)
    documents, questions = (
        [text.lower().replace(",", " ").replace(".", " ").split() for text in side] for side in (DOCUMENTS, QUESTIONS)
    )
    expected = [[bm25(q, d, documents, k1, b) for q in questions] for d in documents]
    assert_exact(scores.values, torch.tensor(expected, dtype=torch.float64))
    assert scores.values[:, 0].argmax() == 3
    assert scores.query_ids == [0, 1, 2, 3]
    assert scores.settings["texts"].startswith("6 texts, sha256 ")
    assert scores.settings["query_texts"].startswith("4 texts, sha256 ")
    with pytest.raises(BadSetting, match=r"not a sequence of 6 texts.*fingerprint.*pass the texts themselves"):
        attribute(store, "bm25", query_texts=QUESTIONS, texts=scores.settings["texts"])


@pytest.mark.parametrize(
    "settings", [{}, {"texts": DOCUMENTS}, {"texts": DOCUMENTS, "query_texts": QUESTIONS[:-1]}, {"texts": "a text"}]
)
def test_texts_that_are_missing_or_too_few_are_named(tmp_path: Path, settings: dict[str, Any]) -> None:
    rows = [torch.zeros(n, 1) for n in (len(DOCUMENTS), len(QUESTIONS))]
    store = make_store(tmp_path, {"layer": rows[0]}, {"layer": rows[1]})
    with pytest.raises(BadSetting, match=r"method 'bm25'.*texts=.*one for each"):
        attribute(store, "bm25", **settings)


@pytest.mark.parametrize("text", [None, ["hi", "there"]])
def test_a_text_that_is_none_is_named(tmp_path: Path, text: Any) -> None:
    store = make_store(tmp_path, {"layer": torch.zeros(2, 1)}, {"layer": torch.zeros(1, 1)})
    with pytest.raises(BadSetting, match=r"texts is to be texts, and that of training example 1 is"):
        attribute(store, "bm25", texts=["a", text], query_texts=["a"])


@pytest.mark.parametrize(("method", "module"), [("confident_learning", "cleanlab"), ("bm25", "bm25s")])
def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, method: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    rows = {"layer": torch.zeros(2, 1)}
    store = make_store(tmp_path, rows, rows, stats={"probabilities": torch.ones(2, 2), "label": torch.zeros(2)})
    settings = {"texts": ["a", "b"], "query_texts": ["a", "b"]} if method == "bm25" else {}
    with pytest.raises(MissingPackage, match=rf"'{module}', which is not installed.*pip install 'hf-influence\[base"):
        attribute(store, method, **settings)
