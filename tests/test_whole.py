"""Decisions on a part of the rows become decisions on all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from hf_influence import DatasetFilter
from hf_influence.filter import Decision, Prune, Relabel, Reweight
from hf_influence.filter.whole import decide_on_scored, on_whole
from hf_influence.scores import LOG_ODDS, Scores


def test_a_decision_on_a_part_becomes_one_on_the_whole(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": list("abcdef"), "source": list("xxyyxy")})
    scores = Scores(torch.tensor([[0.5], [0.1], [0.9]]), ids=[1, 4, 5], method="ip")
    decision = decide_on_scored(DatasetFilter(drop=1), data, scores)
    assert decision.actions == ["keep"] * 4 + ["drop", "keep"]
    assert [decision.ranks[i] for i in (4, 1, 5, 0, 2, 3)] == list(range(6))
    assert decision.groups == {"x": (3, 2), "y": (3, 3)}
    assert decision.replay(data)["text"][:] == list("abcdf")
    later = DatasetFilter(drop=2).decide(
        data.select(decision.kept), Scores(torch.arange(5.0)[:, None], ids=[0, 1, 2, 3, 4], method="ip")
    )
    both = on_whole(later, data, decision.kept, decision)
    assert both.replay(data)["text"][:] == list("cdf")
    assert [row.id for row in both.removed] == [4, 0, 1]
    assert "drop=1" in both.explain(4)
    assert "drop=2" in both.explain(0)
    assert sorted(both.ranks) == list(range(6))
    assert both.explain(0).endswith("ranks 1 of 6, the rule drop=2 drops 2 of the 5 rows")
    named = Scores(torch.tensor([[0.5], [0.1]]), ids=["c", "a"], method="ip", id_column="text")
    assert decide_on_scored(DatasetFilter(drop=1), data, named).replay(data)["text"][:] == list("bcdef")
    doubled = Dataset.from_dict({"text": list("pqdrds")})
    few = Scores(torch.zeros(4, 1), ids=[2, 3, 4, 5], method="self_ip")
    pruned = decide_on_scored(Prune(), doubled, few)
    pruned.save(tmp_path / "pruned.json")
    for one in (pruned, Decision.load(tmp_path / "pruned.json")):
        assert one.explain(4).endswith("it has the contents of row 2")
    weighted = decide_on_scored(Reweight(), data, scores)
    assert weighted.writes[0].new[0] == 1.0
    assert len(weighted.replay(data)["weight"]) == 6


def test_rows_without_a_score_keep_their_labels() -> None:
    data = Dataset.from_dict({"text": list("abcdef"), "label": [0, 1, 0, 1, 0, 1]})
    scores = Scores(torch.tensor([[-2.0], [3.0], [1.0]]), [1, 3, 4], "auto", report={LOG_ODDS: {}})
    flipped = decide_on_scored(Relabel(how="flip", suspects=DatasetFilter(drop=1)), data, scores)
    assert flipped.replay(data)["label"][:] == [0, 0, 0, 1, 0, 1]
    assert flipped.undo(flipped.replay(data))["label"][:] == data["label"][:]
    assert flipped.actions == ["keep", "relabel", *["keep"] * 4]
    believed = decide_on_scored(Relabel(how="posterior"), data, scores)
    soft = believed.replay(data)["label"][:]
    assert [soft[i] for i in (0, 2, 5)] == [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    assert soft[1] == pytest.approx(torch.sigmoid(torch.tensor([2.0, -2.0])).tolist())
    assert believed.undo(believed.replay(data))["label"][:] == data["label"][:]
