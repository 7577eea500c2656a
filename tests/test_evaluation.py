"""Class detection and mislabel detection against values worked out by hand and by brute force."""

import json
import math
from itertools import permutations

import numpy as np
import pytest
import torch

from hf_influence.errors import BadExample, BadSetting
from hf_influence.evaluation import class_detection, mislabel_detection
from hf_influence.scores import Scores

CLASSES = ["math", "poem", "math", "poem", "math", "poem"]


def per_query(values, ids=None):
    values = torch.as_tensor(values)
    return Scores(values, ids or list(range(len(values))), "ip", query_ids=list(range(values.shape[1])))


def one_column(values, ids=None):
    values = torch.as_tensor(values)[:, None]
    return Scores(values, ids or list(range(len(values))), "self_ip")


def random_scores(n=6, q=4, levels=3):
    return torch.randint(-levels, levels + 1, (n, q), generator=torch.Generator().manual_seed(1)).float()


def test_class_detection_gives_the_hand_computed_values():
    scores = per_query([[5.0, 1.0], [1.0, 2.0], [-4.0, 3.0], [2.0, 4.0]])
    result = class_detection(scores, ["a", "b", "a", "b"], ["a", "b"])
    # query a: 5 and 4 against 1 and 2: perfect. query b: 2 and 4 against 1 and 3: three of four pairs, one of top two.
    assert result == {"auc_mean": 0.875, "auc_std": 0.125, "recall_mean": 0.75, "recall_std": 0.25, "skipped": 0}


def test_signed_scores_are_ranked_by_sign_only_when_asked():
    scores = per_query([[5.0], [1.0], [-4.0], [2.0]])
    assert class_detection(scores, ["a", "b", "a", "b"], ["a"], absolute=True).auc_mean == 1
    assert class_detection(scores, ["a", "b", "a", "b"], ["a"], absolute=False).auc_mean == 0.5


def test_scores_that_are_all_equal_are_worth_chance():
    result = class_detection(per_query(torch.ones(8, 1)), ["a", "a", "b", "b", "b", "b", "b", "b"], ["a"])
    assert (result.auc_mean, result.recall_mean) == (0.5, 0.25)


def test_recall_is_its_expectation_over_random_tie_breaking():
    strength, member = [3.0, 2.0, 2.0, 2.0, 1.0], [True, True, False, True, False]
    result = class_detection(per_query([[s] for s in strength]), member, [True])
    draws = [
        sum(member[i] for i in sorted(order, key=lambda i: -strength[i])[:3]) / 3  # sort is stable: order breaks ties
        for order in permutations(range(5))
    ]
    assert result.recall_mean == pytest.approx(np.mean(draws))


@pytest.mark.parametrize("absolute", [True, False])
def test_order_of_the_rows_does_not_matter(absolute):
    values, order = random_scores(), [4, 2, 5, 0, 3, 1]
    query = ["math", "poem", "poem", "math"]
    expected = class_detection(per_query(values), CLASSES, query, absolute=absolute)
    moved_rows = class_detection(per_query(values[order]), [CLASSES[i] for i in order], query, absolute=absolute)
    assert moved_rows == pytest.approx(expected)
    moved_ids = class_detection(per_query(values[order], ids=order), CLASSES, query, absolute=absolute)
    assert moved_ids == pytest.approx(expected), "labels in dataset order must follow the ids of the scores"


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_labels_may_be_any_sequence(kind):
    codes = [0 if label == "math" else 1 for label in CLASSES]
    expected = class_detection(per_query(random_scores(q=2)), CLASSES, ["math", "poem"])
    assert class_detection(per_query(random_scores(q=2)), kind(codes), kind([0, 1])) == expected


def test_query_labels_belong_to_the_columns_as_they_stand():
    """Those of groups and of an id column are often 0 … q − 1 in another order, and are no places."""
    values = torch.tensor([[0.0, 1.0]] * 3 + [[1.0, 0.0]] * 3)
    groups = Scores(values, list(range(6)), "ip", query_ids=[1, 0])
    assert class_detection(groups, [0, 0, 0, 1, 1, 1], groups.query_ids).auc_mean == 1
    ids, values, query = [4, 2, 5, 0, 3, 1], random_scores(), CLASSES[2:] + CLASSES[:2]
    named = Scores(values, ids, "ip", query_ids=ids[:4], id_column="idx")
    assert class_detection(named, CLASSES, query[:4]) == class_detection(per_query(values), CLASSES, query[:4])


def test_examples_with_several_labels_are_named():
    scores, several = per_query(random_scores(q=2)), [[0], [1], [0, 1], [1], [0], [1]]
    with pytest.raises(BadExample, match=r"train_labels holds \[0\], .* a single label"):
        class_detection(scores, several, [0, 1])
    with pytest.raises(BadExample, match=r"query_labels holds \[0, 1\], .* a single label"):
        class_detection(scores, CLASSES, np.array([[0, 1], [1, 0]]))


def test_queries_whose_class_cannot_be_measured_are_counted_and_left_out():
    values = random_scores(q=2)
    result = class_detection(per_query(values), CLASSES, ["math", "unseen"])
    alone = class_detection(per_query(values[:, :1]), CLASSES, ["math"])
    assert result == {**alone, "skipped": 1}


def test_results_can_be_written_as_json():
    result = class_detection(per_query(random_scores()), CLASSES, CLASSES[:4])
    assert json.loads(json.dumps(result)) == result
    assert result["auc_mean"] == result.auc_mean
    flags = mislabel_detection(one_column([1.0, 2.0]), [True, False])
    assert json.loads(json.dumps(flags)) == flags


@pytest.mark.parametrize(
    ("scores", "train", "query", "message"),
    [
        (one_column([1.0] * 6), CLASSES, ["math"], "belongs to no query"),
        (per_query(random_scores(q=2)), CLASSES[:5], ["math", "poem"], "train_labels has 5 .* cover 6"),
        (per_query(random_scores(q=2)), CLASSES, ["math"], "query_labels has 1 .* cover 2 queries or groups"),
        (per_query(random_scores(q=2)), CLASSES, ["m", "p"], "'m', 'p'; of the training examples: 'math', 'poem'"),
        (per_query(random_scores(q=1)), ["math"] * 6, ["math"], "in and outside"),
    ],
    ids=["no queries", "train length", "query length", "other labels", "one class"],
)
def test_class_detection_says_what_does_not_fit(scores, train, query, message):
    with pytest.raises(BadSetting, match=message):
        class_detection(scores, train, query)


def test_lowest_scores_are_the_suspects():
    scores, wrong = one_column([0.9, -0.4, 0.2, -0.1]), [False, True, False, True]
    assert mislabel_detection(scores, wrong) == {"auc": 1.0, "average_precision": 1.0}
    assert mislabel_detection(scores, [not flag for flag in wrong]).auc == 0


def test_probabilities_are_compared_with_what_is_wrong():
    """Twenty examples in bins of two: .2 for a bin with none wrong, .8 for one with one of two."""
    wrongly = torch.tensor([0.2] * 10 + [0.8] * 10, dtype=torch.float64)
    scores = Scores(-torch.logit(wrongly)[:, None], list(range(20)), "auto", report={"log_odds": {}})
    flags = [False] * 10 + [True, False] * 5
    assert mislabel_detection(scores, flags).calibration_error == pytest.approx((10 * 0.2 + 10 * 0.3) / 20)
    ties = Scores(torch.full((100, 1), math.log(4.0)), list(range(100)), "auto", report={"log_odds": {}})
    for flags in ([i < 20 for i in range(100)], [i % 5 == 0 for i in range(100)]):
        assert mislabel_detection(ties, flags).calibration_error == pytest.approx(0, abs=1e-6), "whatever the order"
    assert "calibration_error" not in mislabel_detection(one_column([1.0, 2.0]), [True, False])


def test_mislabel_detection_gives_the_hand_computed_values():
    # suspicion falls from left to right: right, wrong, right, wrong -> 1 of 4 pairs; precision 1/2 and 2/4
    result = mislabel_detection(one_column([-4.0, -3.0, -2.0, -1.0]), [False, True, False, True])
    assert result == {"auc": 0.25, "average_precision": 0.5}


def test_columns_are_averaged_over_the_queries():
    assert mislabel_detection(per_query([[9.0, -10.0], [0.0, 0.0]]), [True, False]).auc == 1


def test_flags_follow_the_ids_of_the_scores():
    assert mislabel_detection(one_column([-1.0, 2.0, 3.0], ids=[2, 0, 1]), [False, False, True]).auc == 1
    named = Scores(torch.tensor([[-1.0], [2.0], [3.0]]), ["c", "a", "b"], "self_ip")
    assert mislabel_detection(named, [True, False, False]).auc == 1


def test_ranking_within_groups_removes_what_only_the_group_explains():
    scores = one_column([10.0, 12.0, 14.0, -10.0, -8.0, -6.0])  # the second task is harder, all of it
    wrong, task = [True, False, False, True, False, False], ["easy"] * 3 + ["hard"] * 3
    assert mislabel_detection(scores, wrong).auc == 0.75
    assert mislabel_detection(scores, wrong, within=task).auc == 1


def test_groups_of_unequal_size_get_the_same_mean_suspicion():
    scores = one_column([1.0, 2.0, 2.0, 3.0, 7.0])  # a group of one has no rank to speak of: it stays in the middle
    # suspicions: 1/8, 4/8, 4/8, 7/8 reversed by sign, and 1/2
    result = mislabel_detection(scores, [False, False, True, False, True], within=["a", "a", "a", "a", "b"])
    assert result.auc == 0.5


@pytest.mark.parametrize(
    ("flags", "within", "message"),
    [
        ([True, False], None, "is_mislabeled has 2 .* cover 3"),
        ([True, False, False], ["a", "b"], "within has 2 .* cover 3"),
        ([True] * 3, None, "3 of 3"),
        ([False] * 3, None, "0 of 3"),
        ([0, 1, 2], None, "holds 2"),
    ],
)
def test_mislabel_detection_says_what_does_not_fit(flags, within, message):
    with pytest.raises(BadSetting, match=message):
        mislabel_detection(one_column([1.0, 2.0, 3.0]), flags, within=within)


def test_each_kind_is_held_against_the_right_examples_alone():
    scores = one_column([5.0, 4.0, 3.0, 1.0, 3.5, 6.0, 7.0])
    wrong = [False, False, False, True, True, True, True]
    kinds = ["clean", "clean", "truncated", "truncated", "swapped", "swapped", "swapped"]
    found = mislabel_detection(scores, wrong, kinds=kinds)
    # swapped: 3.5 is below two of three, 6 and 7 above all; what is said of right examples does not count
    assert found.auc_by_kind == {"swapped": pytest.approx(2 / 9), "truncated": 1.0}
    assert found.auc == mislabel_detection(scores, wrong).auc


def test_kinds_within_tasks_are_ranked_as_if_the_other_kinds_were_not_there():
    draw = torch.Generator().manual_seed(2)
    values = torch.randn(60, generator=draw)
    task = [i % 4 for i in range(60)]
    kinds = [["clean", "clean", "cut", "swap"][i // 15] for i in range(60)]
    wrong = [kind != "clean" for kind in kinds]
    by_kind = mislabel_detection(one_column(values), wrong, within=task, kinds=kinds).auc_by_kind
    for kind in ("cut", "swap"):
        rows = [i for i in range(60) if kinds[i] in ("clean", kind)]
        alone = mislabel_detection(one_column(values[rows]), [wrong[i] for i in rows], within=[task[i] for i in rows])
        assert by_kind[kind] == alone.auc
    with pytest.raises(BadSetting, match=r"kinds has 2 .* cover 60"):
        mislabel_detection(one_column(values), wrong, kinds=["a", "b"])
