"""DatasetFilter: which rows go, which stay, and what is reported."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from stores import make_store

from hf_influence.attribution.combined import combined
from hf_influence.errors import BadExample, BadSetting, StoreError
from hf_influence.filter import DatasetFilter, Prune, Relabel, Reweight, Separate
from hf_influence.filter.thresholds import doubtful, mixture, negative, otsu
from hf_influence.scores import Scores


def numbered(n, **columns):
    return Dataset.from_dict({"row": list(range(n)), **columns})


def scores_of(values, ids=None, id_column=None):
    ids = ids or list(range(len(values)))
    return Scores(torch.tensor(values)[:, None], ids, "self_ip", {"damping": 0.1}, id_column=id_column)


@pytest.mark.parametrize(
    ("rule", "n", "kept"),
    [
        ({"drop": 0.05}, 100, 95),
        ({"drop": 0.05}, 39, 38),
        ({"drop": 0.29}, 100, 71),  # 0.29 * 100 is 28.999999999999996 in floating point
        ({"drop": 0.0}, 5, 5),
        ({"drop": 0}, 5, 5),
        ({"drop": 2}, 5, 3),
        ({"drop": np.int64(2)}, 5, 3),
        ({"drop": np.float32(0.5)}, 5, 3),
        ({"keep": 0.5}, 5, 2),
        ({"keep": 0.29}, 100, 29),
        ({"keep": 5}, 5, 5),
    ],
    ids=str,
)
def test_a_fraction_is_rounded_down_and_a_count_is_exact(rule, n, kept):
    assert len(DatasetFilter(**rule).apply(numbered(n), scores_of([float(i) for i in range(n)]))) == kept


def test_lowest_mean_scores_go_and_the_rest_keeps_its_order():
    values = torch.tensor([[3.0, 1.0], [9.0, -9.5], [0.0, 0.0], [-9.0, 8.0], [1.0, 1.0]])  # means 2, -.25, 0, -.5, 1
    scores = Scores(values, list(range(5)), "ip", query_ids=[0, 1])
    assert DatasetFilter(drop=2).apply(numbered(5), scores)["row"][:] == [0, 2, 4]
    assert DatasetFilter(keep=2).apply(numbered(5), scores)["row"][:] == [0, 4]


def test_how_many_rows_to_drop_may_be_given_without_its_name():
    assert DatasetFilter(0.25) == DatasetFilter(drop=0.25)
    with pytest.raises(TypeError, match="positional"):
        DatasetFilter(0.25, 0.75)
    for name, text, number in (("drop", "10%", "0.1"), ("keep", "2.5 %", "0.025")):
        with pytest.raises(BadSetting, match=f"{name}='{text}' is a text. Give the share as a number: write {number}"):
            DatasetFilter(**{name: text})


def test_ties_fall_to_the_earlier_row_whatever_the_order_of_the_scores():
    assert DatasetFilter(drop=2).apply(numbered(4), scores_of([1.0, 1.0, 1.0, 1.0]))["row"][:] == [2, 3]
    backwards = scores_of([1.0, 1.0, 1.0, 1.0], ids=[3, 2, 1, 0])
    assert DatasetFilter(drop=2).apply(numbered(4), backwards)["row"][:] == [2, 3]


@pytest.mark.parametrize("ids", [[2, 0, 1], ["c", "a", "b"], [30, 10, 20]], ids=["index", "string", "number"])
def test_scores_find_their_rows_by_id(ids):
    dataset = numbered(3, id=sorted(ids))
    kept = DatasetFilter(drop=1).apply(dataset, scores_of([-5.0, 1.0, 2.0], ids, "id"))
    assert kept["row"][:] == [0, 1]
    if ids == [2, 0, 1]:
        assert DatasetFilter(drop=1).apply(dataset, scores_of([-5.0, 1.0, 2.0], ids))["row"][:] == [0, 1]


def test_features_format_and_input_stay_as_they_were():
    features = Features({"text": Value("large_string"), "label": ClassLabel(names=["bad", "good"])})
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]}, features=features).with_format("numpy")
    before = dataset.to_dict()
    kept = DatasetFilter(drop=1, columns=True).apply(dataset, scores_of([1.0, 0.0, 2.0]))
    assert kept.remove_columns(["influence", "influence_rank"]).features == features
    assert kept.format["type"] == "numpy"
    assert dataset.features == features
    assert dataset.to_dict() == before


def test_columns_tell_score_and_rank_of_each_row():
    kept = DatasetFilter(drop=1, columns=True).apply(numbered(3), scores_of([0.5, -1.0, 0.25]))
    assert kept.to_dict() == {"row": [0, 2], "influence": [0.5, 0.25], "influence_rank": [2, 1]}
    assert DatasetFilter(drop=1).apply(numbered(3), scores_of([0.5, -1.0, 0.25])).column_names == ["row"]


def test_report_says_what_was_removed():
    features = Features({"row": Value("int64"), "label": ClassLabel(names=["bad", "good"])})
    dataset = Dataset.from_dict({"row": [0, 1, 2, 3], "label": [0, 1, 1, 1]}, features=features)
    trim = DatasetFilter(drop=0.5)
    assert trim.report is None
    trim.apply(dataset, scores_of([0.5, -1.0, 0.25, 0.75]))
    assert trim.report.removed == ((1, -1.0, 0), (2, 0.25, 1))
    assert trim.report.groups == {"bad": (1, 1), "good": (3, 1)}
    assert str(trim.report).splitlines() == [
        "kept 2 of 4 rows by self_ip(damping=0.1), drop=0.5",
        "least worth keeping: 1 (-1), 2 (0.25)",
        "  good: 3 -> 1",
        "  bad: 1 -> 1",
    ]


def test_report_names_rows_by_their_id():
    trim = DatasetFilter(drop=1)
    trim.apply(numbered(2, id=["x", "y"]), scores_of([-1.0, 1.0], ["y", "x"], "id"))
    assert trim.report.removed[0].id == "y"


def test_targets_that_are_no_classes_are_not_counted():
    trim = DatasetFilter(drop=1)
    trim.apply(numbered(2, label=[0.5, 1.5]), scores_of([0.0, 1.0]))
    assert trim.report.groups == {}


@pytest.mark.parametrize(
    "rule",
    [{"drop": 0.1, "keep": 0.9}]
    + [{name: bad} for name in ("drop", "keep") for bad in (True, 1.0, -1, -0.1, float("nan"), "5%", [1])]
    + [{"keep_tokens": bad} for bad in (0.5, -1, "many")]
    + [{"drop": 1, "keep_tokens": 5}],
    ids=str,
)
def test_rules_that_mean_nothing_are_refused(rule):
    with pytest.raises(BadSetting, match="Give"):
        DatasetFilter(**rule)


@pytest.mark.parametrize(
    ("rule", "dataset", "ids", "error", "message"),
    [
        ({"drop": 1}, numbered(4), [0, 1, 2], BadSetting, "cover 3 examples and the dataset has 4 rows"),
        ({"drop": 3}, numbered(3), [0, 1, 2], BadSetting, "leaves none of the 3 rows"),
        ({"keep": 0}, numbered(3), [0, 1, 2], BadSetting, "leaves none of the 3 rows"),
        ({"keep": 4}, numbered(3), [0, 1, 2], BadSetting, "more rows than the 3"),
        ({"drop": 1}, numbered(0), [0, 1, 2], BadExample, "no rows"),
        ({"drop": 1}, DatasetDict({"test": numbered(3)}), [0, 1, 2], BadExample, "splits .*'test'.* no 'train'"),
        ({"drop": 1}, [{"row": 0}], [0], BadExample, "list is not a datasets.Dataset"),
        ({"drop": 1}, numbered(3), ["a", "b", "c"], BadSetting, "3 of the 3 ids .* index .* 'a'"),
        ({"drop": 1}, numbered(3), [1, 2, 3], BadSetting, "1 of the 3 ids .* first is 3"),
        ({"drop": 1}, numbered(3), [0, 1, 1], BadSetting, "id 1 more than once"),
        ({"drop": 1}, numbered(3), ("id", [0, 1, 2]), BadExample, "no column 'id' among"),
        ({"drop": 1}, numbered(2, id=["a", "a"]), ("id", ["a", "b"]), BadExample, "'a' occurs more than"),
        ({"drop": 1}, numbered(2, id=["a", "b"]), ("id", ["a", "z"]), BadSetting, "no score: 'b' in column 'id'"),
        ({"drop": 1, "columns": True}, numbered(2, influence=[0, 0]), [0, 1], BadExample, "'influence'.* already"),
    ],
)
def test_what_does_not_fit_is_named(rule, dataset, ids, error, message):
    id_column, ids = ids if isinstance(ids, tuple) else (None, ids)
    with pytest.raises(error, match=message):
        DatasetFilter(**rule).apply(dataset, scores_of([float(i) for i in range(len(ids))], ids, id_column))


def test_a_split_of_a_dataset_dict_is_filtered_and_the_others_stay():
    splits = DatasetDict({"train": numbered(3), "test": numbered(2)})
    kept = DatasetFilter(drop=1).apply(splits, scores_of([1.0, 0.0, 2.0]))
    assert {name: split["row"][:] for name, split in kept.items()} == {"train": [0, 2], "test": [0, 1]}
    kept = DatasetFilter(drop=1).apply(splits, scores_of([1.0, 0.0]), split="test")
    assert {name: split["row"][:] for name, split in kept.items()} == {"train": [0, 1, 2], "test": [0]}


@pytest.mark.parametrize(
    ("rule", "kept"), [({"drop": 0.5}, [1, 3, 4]), ({"keep": 1}, [3, 4]), ({"drop": 1}, [1, 2, 3, 4])], ids=str
)
def test_each_group_is_cut_for_itself(rule, kept):
    dataset = numbered(6, task=["a", "a", "a", "a", "b", "b"])
    kept_rows = DatasetFilter(**rule, within="task").apply(dataset, scores_of([1.0, 3.0, 2.0, 4.0, -1.0, -2.0]))
    assert kept_rows["row"][:] == kept


@pytest.mark.parametrize("rule", [{"keep": 0.5}, {"keep": 0.1}, {"drop": 3}, {"drop": 2}], ids=str)
def test_a_share_or_a_count_leaves_a_row_of_each_group(rule):
    dataset = numbered(4, task=["a", "b", "b", "b"])
    trim = DatasetFilter(**rule, within="task")
    kept_rows = trim.apply(dataset, scores_of([-5.0, 1.0, 2.0, 3.0]))
    assert kept_rows["row"][:] == [0, 3]


def test_the_best_rows_that_fit_a_budget_of_tokens_stay():
    dataset = numbered(4, input_ids=[[1] * 5, [1] * 3, [1] * 4, [1]])
    scores = scores_of([0.0, 3.0, 2.0, 1.0])
    for budget, kept in ((8, [1, 2, 3]), (7, [1, 2]), (13, [0, 1, 2, 3]), (3, [1])):
        assert DatasetFilter(keep_tokens=budget).apply(dataset, scores)["row"][:] == kept
    with pytest.raises(BadSetting, match="leaves none"):
        DatasetFilter(keep_tokens=2).apply(dataset, scores)
    with pytest.raises(BadExample, match="tokens="):
        DatasetFilter(keep_tokens=2).apply(numbered(4), scores)


@pytest.mark.parametrize(("cell", "shown"), [(None, "None"), ("a b c", "'a b c'"), (3, "3")])
def test_tokens_that_cannot_be_counted_are_named(cell, shown):
    cells = [cell, cell] if cell is not None else [[1, 2], None]
    row = 0 if cell is not None else 1
    with pytest.raises(BadExample, match=rf"row {row} has {shown} in the column 'input_ids', which is no list of"):
        DatasetFilter(keep_tokens=3).apply(numbered(2, input_ids=cells), scores_of([1.0, 2.0]))


@pytest.mark.parametrize("names", [[3, 2, 1, 0], ["d", "c", "b", "a"]])
def test_scores_by_an_id_column_and_by_place_are_of_the_same_rows(names):
    rows = numbered(4).add_column("uid", names)
    by_id = scores_of([0.0, 1, 2, 3], ids=sorted(names, reverse=True), id_column="uid")
    for both in ([by_id, scores_of([0.0, 1, 2, 3])], [scores_of([0.0, 1, 2, 3]), by_id]):
        assert DatasetFilter(drop=1).apply(rows, both)["row"][:] == [1, 2, 3]


def test_several_scores_drop_what_they_agree_on():
    one, other = scores_of([0.0, 1.0, 2.0, 3.0]), scores_of([-5.0, 3.0, -6.0, 9.0])
    both = DatasetFilter(drop=2)
    assert both.apply(numbered(4), [one, other])["row"][:] == [1, 2, 3]
    assert str(both.report).startswith("kept 3 of 4 rows by self_ip + self_ip(), drop=2")
    assert both.report.removed == ((0, pytest.approx(1 / 6), 0),)  # places 0 and 1/3
    assert DatasetFilter(drop=2, agree=1).apply(numbered(4), [one, other])["row"][:] == [3]
    with pytest.raises(BadSetting, match="agree=3 of 2"):
        DatasetFilter(drop=2, agree=3).apply(numbered(4), [one, other])


def test_a_threshold_chooses_the_number_of_rows():
    scores = scores_of([0.9, -3.0, 1.1, 1.0, -2.9])
    trim = DatasetFilter(drop="otsu")
    assert trim.apply(numbered(5), scores)["row"][:] == [0, 2, 3]
    assert "drop='otsu'" in str(trim.report)
    assert DatasetFilter(drop="negative").apply(numbered(5), scores)["row"][:] == [0, 2, 3]
    bad_source = numbered(5, source=list("abaab"))
    assert DatasetFilter(drop="negative", within="source").apply(bad_source, scores)["row"][:] == [0, 2, 3]
    for rule in ("negative", negative):
        with pytest.raises(BadSetting, match="no score is above zero"):
            DatasetFilter(drop=rule).apply(numbered(2), scores_of([-1.0, -2.0]))
    assert DatasetFilter(drop=lambda values: values.mean(1) < -2.95).apply(numbered(5), scores)["row"][:] == [
        0,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize("rule", ["otsu", "mixture", otsu, mixture])
def test_no_gap_is_looked_for_in_places_of_a_ranking(rule):
    scores = Scores(torch.tensor([[-1.0], [0.0], [1.0]]), ids=[0, 1, 2], method="auto")
    for ranking in (scores, combined(scores, scores)):
        with pytest.raises(BadSetting, match=f'by {ranking.method!r} are a ranking.*Use drop="doubtful"'):
            DatasetFilter(drop=rule).apply(numbered(3), ranking)
        with pytest.raises(BadSetting, match=f"by {ranking.method!r} are a ranking here, of which none is negative"):
            DatasetFilter(drop="negative").apply(numbered(3), ranking)
    odds = Scores(scores.values, scores.ids, "auto", report={"log_odds": {}})
    assert DatasetFilter(drop="negative").apply(numbered(3), odds)["row"][:] == [1, 2]


def test_nothing_is_negative_on_a_scale_from_0_to_1():
    values = torch.tensor([[0.0], [0.4], [1.0]])
    for rule in ("negative", negative):
        with pytest.raises(BadSetting, match="'self_confidence' all lie between 0 and 1"):
            DatasetFilter(drop=rule).apply(numbered(3), Scores(values, [0, 1, 2], "self_confidence"))
    for other in (
        Scores(values * 3, [0, 1, 2], "margin"),
        Scores(values, [0, 1, 2], "cosine", query_ids=[0]),
        Scores(values, [0, 1, 2], "auto", report={"log_odds": {}}),
    ):
        assert len(DatasetFilter(drop="negative").apply(numbered(3), other)) == 3, "no row does harm"


def test_doubtful_labels_are_those_that_are_not_twice_as_probably_right_as_wrong():
    wrong = torch.tensor([[0.2], [0.34], [0.33], [0.9]], dtype=torch.float64)
    scores = Scores(-torch.logit(wrong), ids=[0, 1, 2, 3], method="auto", report={"log_odds": {}})
    assert DatasetFilter(drop="doubtful").apply(numbered(4), scores)["row"][:] == [0, 2]
    assert DatasetFilter() == DatasetFilter(drop="doubtful")
    for rule in ("doubtful", doubtful, None):
        told = r"'ip' rank the examples and are no probabilities.*say how much is to go: DatasetFilter\(drop=0\.05\)"
        with pytest.raises(BadSetting, match=told):
            DatasetFilter(drop=rule).apply(numbered(4), Scores(-wrong, [0, 1, 2, 3], "ip"))


def test_a_store_is_scored_by_the_default_method(tmp_path: Path) -> None:
    train = {"a": torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.5], [0.5, 1.0]])}
    stats = {"loss": torch.tensor([0.1, 2.0, 0.2, 0.3])}
    store = make_store(tmp_path, train, {"a": torch.tensor([[1.0, 0.0]])}, stats=stats)
    rows = Dataset.from_dict({"text": ["good", "bad", "fine", "fair"]})
    for given in (store, tmp_path, str(tmp_path), [store]):
        trim = DatasetFilter(drop=1)
        assert trim.apply(rows, given)["text"][:] == ["good", "fine", "fair"]
        assert trim.report is not None
        assert trim.report.sources[0]["method"] == "auto"


def test_scores_are_read_from_their_file(tmp_path: Path) -> None:
    scores = scores_of([1.0, -1.0, 2.0])
    scores.save(tmp_path / "s.st")
    for given in (tmp_path / "s.st", str(tmp_path / "s.st"), [scores, tmp_path / "s.st"]):
        assert DatasetFilter(drop=1).apply(numbered(3), given)["row"][:] == [0, 2]
    trim, labelled = DatasetFilter(drop=1), numbered(3, label=[0, 0, 1])
    flip = Relabel(suspects=trim, probabilities=torch.tensor([[0.1, 0.9]] * 3))
    assert flip.apply(labelled, str(tmp_path / "s.st"))["label"][:] == [0, 1, 1]
    with pytest.raises(BadSetting, match="needs the model's probabilities"):
        Relabel(suspects=trim).apply(labelled, str(tmp_path / "s.st"))
    (tmp_path / "other").write_text("x")
    with pytest.raises(StoreError, match="does not hold scores"):
        DatasetFilter(drop=1).apply(numbered(3), tmp_path / "other")


@pytest.mark.parametrize("rule", [DatasetFilter(drop=1), Reweight(), Relabel(how="posterior"), Prune(), Separate()])
def test_what_is_no_scores_is_named(rule) -> None:
    data, scores = numbered(3, label=[0, 1, 1]), scores_of([1.0, -1.0, 2.0])
    for given, kind in (
        (scores.values, "Tensor"),
        (scores.values.numpy(), "ndarray"),
        ([1.0, -1.0, 2.0], "float"),
        (None, "NoneType"),
        ([[scores]], "list"),
    ):
        with pytest.raises(BadSetting, match=f"{kind} is no scores"):
            rule.decide(data, given)
    with pytest.raises(BadSetting, match="no scores were given"):
        rule.decide(data, [])
    for swapped in (rule.decide, rule.apply):
        with pytest.raises(BadSetting, match=r"Dataset is no scores.*after the dataset"):
            swapped(scores, data)
    for other in ([{"row": 0}], scores):
        with pytest.raises(BadExample, match=r"is not a datasets\.Dataset"):
            rule.apply(other, scores)
    with pytest.raises(BadExample, match=r"the split that was scored, of \['train', 'test'\]"):
        rule.decide(DatasetDict(train=data, test=data), scores)
