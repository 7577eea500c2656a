"""Relabelling, reweighting, pruning, separating: what changes, what stays, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from models import bert, labelled, lora
from stores import make_store

from hf_influence import GradientStore, attribute, collect
from hf_influence.attribution import combined
from hf_influence.errors import BadExample, BadSetting, StoreError
from hf_influence.filter import (
    DatasetFilter,
    Decision,
    Prune,
    Relabel,
    Reweight,
    Rule,
    Separate,
    StreamRows,
    save_curated,
)
from hf_influence.filter.rankings import rankings_of
from hf_influence.filter.separate import components
from hf_influence.filter.thresholds import doubtful
from hf_influence.scores import Scores

PHI = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.05, 0.05, 0.9], [0.2, 0.5, 0.3]], dtype=torch.float64)


def rows(labels, **columns):
    return Dataset.from_dict({"text": [f"row {i}" for i in range(len(labels))], "label": labels, **columns})


def scores_of(values, ids=None, id_column=None):
    return Scores(torch.tensor(values)[:, None], ids or list(range(len(values))), "ip", id_column=id_column)


def test_suspicious_rows_get_the_other_label_or_the_likeliest_other_one():
    scores = scores_of([3.0, -1.0, 2.0, -2.0])
    flip = Relabel(suspects=DatasetFilter(drop=2), how="flip")
    assert flip.apply(rows([0, 1, 1, 0]), scores)["label"][:] == [0, 0, 1, 1]
    assert flip.suggest(rows([0, 1, 1, 0]), scores)["row"][:] == [3, 1]
    predicted = Relabel(suspects=DatasetFilter(drop=2), probabilities=PHI)
    assert predicted.apply(rows([0, 2, 1, 1]), scores)["label"][:] == [0, 1, 1, 2]  # never the label it has


def test_soft_labels_follow_the_formula():
    soft = Relabel(suspects=DatasetFilter(drop=1), how="soft", probabilities=PHI)
    new = torch.tensor(soft.apply(rows([0, 2, 1, 1]), scores_of([1.0, -1.0, 1.0, 1.0]))["label"][:])
    expected = torch.eye(3)[[0, 2, 1, 1]]
    expected[1] = torch.tensor([math.log(0.4) / (2 * math.log(0.1)), math.log(0.4) / (2 * math.log(0.3)), 0])
    torch.testing.assert_close(new, expected)


def test_soft_labels_of_a_model_that_is_sure_are_finite():
    """Of φ = (1 − 2δ, δ, δ) and label 1 the limit for small δ is (1/4, 0, 0), as δ / ln δ vanishes.

    Of (1 − δ, δ, 0) it is (1/2, 0, 0).
    """
    trim, scores = DatasetFilter(drop=1), scores_of([1.0, -1.0])
    for phi, first in ((torch.tensor([20.0, 0.0, 0.0]).softmax(0), 0.25), (torch.tensor([1.0, 0.0, 0.0]), 0.5)):
        assert phi[0] == 1, "in float32"
        soft = Relabel(suspects=trim, how="soft", probabilities=phi.expand(2, 3))
        new = soft.apply(rows([0, 1]), scores)["label"][:]
        assert new[1] == pytest.approx([first, 0, 0], abs=1e-6)
    certain = soft.apply(rows([0, 0]), scores)["label"][:]
    assert certain[1] == pytest.approx([0, 0.5, 0.5])


def test_soft_labels_of_two_classes_are_flipped_ones():
    phi = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    soft = Relabel(suspects=DatasetFilter(drop=1), how="soft", probabilities=phi)
    for row, scores in enumerate(([-1.0, 1.0], [1.0, -1.0])):
        new = soft.apply(rows([0, 0]), scores_of(scores))["label"][:]
        assert new[row] == [0.0, 1.0]
        assert new[1 - row] == [1.0, 0.0]


def odds(wrong, ids=None, id_column=None):
    """Scores that say how probable it is that each label is wrong."""
    scores = scores_of([math.log((1 - p) / p) for p in wrong], ids, id_column)
    return Scores(scores.values.double(), scores.ids, "auto", id_column=id_column, report={"log_odds": {}})


def test_labels_by_how_far_they_are_believed():
    data = rows([0, 1, 1], id=["a", "b", "c"])
    scores = odds([0.9, 0.2, 0.01], ["c", "a", "b"], "id")
    whole = Relabel(how="posterior")
    new = whole.apply(data, scores)
    torch.testing.assert_close(torch.tensor(new["label"][:]), torch.tensor([[0.8, 0.2], [0.01, 0.99], [0.9, 0.1]]))
    assert whole.suggest(data, scores)["row"][:] == [2, 0, 1]
    assert "the rule relabel how='posterior' gives each class the probability that it is right" in whole.report.explain(
        "c"
    )
    assert whole.report.undo(new)["label"][:] == [0, 1, 1]
    some = Relabel(how="posterior", suspects=DatasetFilter(drop="negative")).apply(data, scores)
    torch.testing.assert_close(torch.tensor(some["label"][:]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]]))


ESTIMATED = "auto estimates 3 % to be wrong (right and wrong ones among the queries are told apart with AUC 0.85); with"
TOLD = "auto was told that 20 % are wrong (right and wrong ones among the queries are told apart with AUC 0.85)"
SOFT = "to train on it: Trainer(…, compute_loss_func=soft_cross_entropy) of hf_influence.callbacks; a plain Trainer t"
WEIGHTS = "to train on it: WeightedTrainer(…{}) of hf_influence.callbacks; a plain Trainer drops the weights"


@pytest.mark.parametrize(
    ("rule", "estimated", "last"),
    [
        (DatasetFilter(), True, None),
        (DatasetFilter(drop=doubtful), True, None),
        (DatasetFilter(drop="negative"), True, None),
        (DatasetFilter(drop=1), False, None),
        (Relabel(how="posterior"), True, SOFT),
        (Relabel(how="posterior", suspects=DatasetFilter(drop=1)), True, SOFT),
        (Relabel(how="soft", suspects=DatasetFilter(drop=1), probabilities=PHI[:3, :2].softmax(1)), False, SOFT),
        (Relabel(how="flip", suspects=DatasetFilter()), True, None),
        (Relabel(how="flip", suspects=DatasetFilter(drop=1)), False, None),
        (Reweight(how="posterior"), True, WEIGHTS.format("")),
        (Reweight(column="w"), False, WEIGHTS.format(", weight_column='w'")),
    ],
    ids=range(11),
)
def test_a_report_ends_with_its_estimate_and_with_how_to_train_on_it(
    tmp_path: Path, rule: Any, estimated: bool, last: str | None
) -> None:
    report = {"log_odds": {"auc": 0.8512}, "estimated_share_wrong": 0.0304}
    for settings, line in (({}, ESTIMATED), ({"share_wrong": 0.2}, TOLD)):
        scores = replace(odds([0.9, 0.2, 0.01]), report=report, settings=settings)
        curated = rule.apply(rows([0, 1, 1]), scores)
        lines = str(rule.report).splitlines()
        assert [said.startswith(line) for said in lines].count(True) == int(estimated)
        assert "to train on it" not in lines[-1] if last is None else lines[-1].startswith(last)
        save_curated(curated, rule.report, tmp_path / "out")
        again = Decision.load(tmp_path / "out")
        assert again == rule.report
        assert str(again) == str(rule.report)
        card = (tmp_path / "out" / "README.md").read_text()
        share = "20 %, told" if settings else "3 %, estimated"
        assert (f"| labels taken for wrong by auto | {share} |" in card) == estimated
    rule.apply(rows([0, 1, 1]), odds([0.9, 0.2, 0.01]))  # log-odds of yours
    assert "to be wrong" not in str(rule.report)


def test_what_is_not_believed_goes_to_the_other_classes_as_the_model_sees_them():
    scores, labels = odds([0.4, 0.1, 0.5, 0.0001]), [0, 2, 1, 1]
    new = torch.tensor(Relabel(how="posterior", probabilities=PHI).apply(rows(labels), scores)["label"][:])
    assert new[range(4), labels].tolist() == pytest.approx([0.6, 0.9, 0.5, 0.9999])
    assert new.sum(1).tolist() == pytest.approx([1.0] * 4)
    assert new[0, 1:].tolist() == pytest.approx([0.4 * 0.2 / 0.3, 0.4 * 0.1 / 0.3])
    certain = torch.tensor([[0.0, 0.0, 1.0]] * 4)  # of the others nothing is known
    new = torch.tensor(Relabel(how="posterior", probabilities=certain).apply(rows(labels), scores)["label"][:])
    assert new[1].tolist() == pytest.approx([0.05, 0.05, 0.9])


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path, Path]:
    """Rows of three classes, and two stores of them: in one they are known by number, in the other by name."""
    torch.manual_seed(0)
    model, folder = lora(bert(num_labels=3), ["query", "value"]), tmp_path_factory.mktemp("classified")
    data = Dataset.from_list([{**row, "id": f"id {i}"} for i, row in enumerate(labelled(lambda i: i % 3))])
    collect(model, data, folder / "numbers")
    collect(model, data, folder / "names", id_column="id")
    return data, folder / "numbers", folder / "names"


@pytest.mark.parametrize("how", ["predicted", "soft", "posterior"])
def test_what_the_model_gives_the_classes_is_found_in_the_store(classified, how):
    data, numbers, names = classified
    phi = GradientStore.open(numbers).rows().stats["probabilities"]
    order = [4, 0, 6, 2, 1, 5, 3]
    wrong = [0.9, 0.1, 0.3, 0.8, 0.2, 0.5, 0.4]
    relabel = Relabel(how=how, suspects=DatasetFilter(drop=3), label="labels")
    by_number, by_name = odds(wrong), odds(wrong, data["id"][:], "id")
    yours, by_text = replace(relabel, probabilities=phi), replace(relabel, probabilities=str(names))
    expected = yours.apply(data, by_number)["labels"][:]
    for store in (numbers, GradientStore.open(numbers)):
        assert replace(relabel, probabilities=store).apply(data, by_number)["labels"][:] == expected
    assert by_text.apply(DatasetDict(train=data), by_name)["train"]["labels"][:] == expected
    assert by_text.apply(data.select(order), by_name)["labels"][:] == [expected[i] for i in order]
    assert by_text.suggest(data, by_name)["label_after"][:] == [expected[i] for i in (0, 3, 5)]
    streamed = relabel.apply(data.to_iterable_dataset(), by_number, by=StreamRows(store=numbers))
    assert [row["labels"] for row in streamed] == expected


@pytest.mark.parametrize("how", ["predicted", "soft"])
def test_a_store_in_place_of_scores_says_what_the_model_gives_the_classes(classified, how):
    data, numbers, names = classified
    phi, relabel = torch.eye(3)[[2, 2, 1, 0, 2, 1, 0]], Relabel(how=how, suspects=DatasetFilter(drop=3), label="labels")
    theirs = GradientStore.open(names).rows().stats["probabilities"]
    expected = replace(relabel, probabilities=theirs).apply(data, attribute(names))["labels"][:]
    for store in (numbers, str(names), GradientStore.open(names)):
        assert relabel.apply(data, store)["labels"][:] == expected
    shuffled = data.select(range(6, -1, -1))
    assert relabel.apply(shuffled, names)["labels"][:] == expected[::-1]
    yours = replace(relabel, probabilities=phi)
    assert yours.apply(data, names)["labels"][:] == yours.apply(data, attribute(names))["labels"][:] != expected


def test_a_store_of_other_labels_or_without_probabilities_is_refused(classified, tmp_path):
    data, numbers, names = classified
    scores, posterior = odds([0.5] * 7), Relabel(how="posterior", label="labels")
    plain = make_store(tmp_path / "plain", {"a": torch.ones(7, 2)}, stats={"loss": torch.rand(7)}).path
    for store in (plain, names):  # in which they have other names
        with pytest.raises(BadSetting, match=r"needs the model's probabilities\. Pass the store that"):
            replace(posterior, probabilities=store).apply(data, scores)
    with pytest.raises(BadSetting, match="'predicted' needs the model's probabilities"):
        Relabel(suspects=DatasetFilter(drop=1), label="labels").apply(data, plain)
    by_number = replace(posterior, probabilities=numbers)
    with pytest.raises(BadSetting, match="row 0 has the label 1 in the dataset and 0 in the store"):
        by_number.apply(data.select([4, *range(1, 7)]).remove_columns("id"), scores)
    with pytest.raises(StoreError, match="is not a gradient store"):
        replace(posterior, probabilities=tmp_path / "nowhere").apply(data, scores)
    of_plain = replace(posterior, probabilities=plain)
    two = of_plain.apply(rows([0, 1] * 3 + [0]).rename_column("label", "labels"), scores)["labels"]
    assert two[:] == [[0.5, 0.5]] * 7, "of two classes none are needed"


def test_probabilities_are_those_of_the_point_that_was_scored(tmp_path):
    n, data = 6, rows([0, 1, 2] * 2)
    phi = torch.rand(4, n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(2)

    def relabelled(scores: Any, probabilities: Any = None) -> list[Any]:
        relabel = Relabel(suspects=DatasetFilter(drop=0.5), how="soft", probabilities=probabilities)
        return relabel.apply(data, scores)["label"][:]

    def make(path, point, **held):
        stats = {"loss": torch.arange(n) * 1.0, "label": torch.tensor(data["label"][:]), "probabilities": phi[point]}
        stats |= {"step": torch.full((n,), point)} if point else {}
        return make_store(path, {"a": torch.ones(n, 2)}, stats=stats, point=point, **held)

    for point in (1, 3, 2):
        make(tmp_path, point, present=range(n if point == 1 else n - point))
    scores = attribute(tmp_path, "loss_mean")
    seen = torch.stack([phi[3, 0], phi[3, 1], phi[3, 2], phi[2, 3], phi[1, 4], phi[1, 5]])
    assert relabelled(tmp_path) == relabelled(scores, seen)
    store = make(tmp_path, 0)
    for given, point in ((scores, 0), (attribute(store), 0), (attribute(store, "loss", point=1), 1)):
        assert relabelled(given, store) == relabelled(given, phi[point])
    assert relabelled(store) == relabelled(attribute(store), phi[0])


def test_weights_by_how_far_labels_are_believed():
    weights = Reweight(how="posterior").apply(rows([0, 1, 1]), odds([0.1, 0.3, 0.9]))["weight"][:]
    assert weights == pytest.approx([2.0, 1.0, 0.0])
    weights = Reweight(how="posterior", temperature=0.5).apply(rows([0, 1, 1]), odds([0.1, 0.3, 0.9]))["weight"][:]
    assert weights == pytest.approx([12 / 5, 3 / 5, 0.0])
    with pytest.raises(BadSetting, match="rather wrong than right"):
        Reweight(how="posterior").apply(rows([0, 1]), odds([0.6, 0.9]))


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], scores_of([1.0, -1.0]), "'ip' rank the examples and are no probabilities"),
        ([0, 1], [odds([0.1, 0.2])] * 2, "one set of scores, and 2 were given"),
        ([0, 2], odds([0.1, 0.2]), r"'posterior' of more than two classes needs the model's.* or --store runs/mine"),
    ],
)
def test_labels_that_nobody_can_say_how_far_to_believe_are_refused(labels, scores, message):
    with pytest.raises(BadSetting, match=message):
        Relabel(how="posterior").apply(rows(labels), scores)
    if max(labels) < 2:
        with pytest.raises(BadSetting, match=message):
            Reweight(how="posterior").apply(rows(labels), scores)


@pytest.mark.parametrize("file", [None, "rows.parquet", "rows.json", "rows.csv"])
@pytest.mark.parametrize("how", ["flip", "predicted", "soft", "posterior"])
def test_labels_may_be_true_and_false(tmp_path, how, file):
    data = rows([True, False, True])
    if file is not None:
        kind = file.partition(".")[2]
        getattr(data, f"to_{kind}")(tmp_path / file)
        options = {"data_files": str(tmp_path / file), "split": "train", "cache_dir": str(tmp_path / "cache")}
        data = load_dataset(kind, **options)
    phi = None if how in ("flip", "posterior") else torch.tensor([[0.3, 0.7]] * 3)
    relabel = Relabel(how=how, suspects=DatasetFilter(drop=1), probabilities=phi)
    new = relabel.apply(data, odds([0.2, 0.1, 0.75]))
    expected = {"soft": [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], "posterior": [[0.0, 1.0], [1.0, 0.0], [0.75, 0.25]]}
    torch.testing.assert_close(torch.tensor(new["label"][:]), torch.tensor(expected.get(how, [True, False, False])))
    if how in ("flip", "predicted"):
        assert new.features["label"] == Value("bool")
        assert relabel.report.explain(2).startswith("row 2 was relabelled from True to False")
    relabel.report.save(tmp_path / "d.json")
    again = Decision.load(tmp_path / "d.json")
    assert again.replay(data).to_dict() == new.to_dict()
    assert again.undo(new).to_dict() == data.to_dict()
    assert again.undo(new).features == data.features


def test_of_two_names_the_other_is_given(tmp_path):
    data = rows(["positive", "negative", "positive"], text=["fine", "awful", "poor"])
    relabel = Relabel(how="flip", suspects=DatasetFilter(drop=1))
    new = relabel.apply(data, scores_of([0.2, 0.1, -0.75]))
    assert new["label"][:] == ["positive", "negative", "negative"]
    assert new.features == data.features
    assert relabel.report.explain(2).startswith("row 2 was relabelled from positive to negative")
    review = relabel.suggest(data, scores_of([0.2, 0.1, -0.75]))
    assert review.select_columns(["row", "label_before", "label_after"])[0] == {
        "row": 2,
        "label_before": "positive",
        "label_after": "negative",
    }
    relabel.report.save(tmp_path / "d.json")
    again = Decision.load(tmp_path / "d.json")
    assert again.replay(data).to_dict() == new.to_dict()
    assert again.undo(new).to_dict() == data.to_dict()


def test_the_label_may_be_the_only_column():
    data = rows([0, 1, 1]).select_columns(["label"])
    flip = Relabel(how="flip", suspects=DatasetFilter(drop=1))
    new = flip.apply(data, scores_of([0.2, 0.1, -0.75]))
    assert new.to_dict() == {"label": [0, 1, 0]}
    assert flip.report.undo(new).to_dict() == data.to_dict()


def test_a_rule_keeps_every_row_until_it_decides_otherwise(tmp_path):
    class KeepAll(Rule):
        def decide(self, dataset, scores, by=None):
            return Decision.keeping_all(dataset, rankings_of(scores), by)

    data, rule = rows([0, 1, 1, 1], id=list("abcd")), KeepAll()
    scores = scores_of([-2.0, 2.0, -1.0, 3.0], list("dcba"), "id")
    assert rule.apply(data, scores).to_dict() == data.to_dict()
    assert rule.apply(data, scores, by=tmp_path / "of a stream").to_dict() == data.to_dict()
    assert rule.report.scores == [3.0, -1.0, 2.0, -2.0]
    assert rule.report.ranks == [3, 1, 2, 0]
    assert rule.report.groups == {0: (1, 1), 1: (3, 3)}
    assert rule.report.but(actions=["keep", "drop", "keep", "keep"]).groups == {0: (1, 1), 1: (3, 2)}
    assert list(rule.apply(data.to_iterable_dataset(), scores)) == data.to_list()
    rule.report.save(tmp_path / "d.json")
    assert Decision.load(tmp_path / "d.json") == rule.report


@pytest.mark.parametrize("remedy", [DatasetFilter(drop=1, columns=True), Reweight(), Relabel(how="posterior")])
def test_a_split_of_a_dataset_dict_is_changed_and_taken_back_and_the_others_stay(remedy):
    splits = DatasetDict(train=rows([0, 1, 1]), test=rows([0, 1, 0]))
    scores = odds([0.2, 0.1, 0.75])
    for split, other in (("train", "test"), ("test", "train")):
        new = remedy.apply(splits, scores, split=split)
        assert list(new) == ["train", "test"]
        assert new[other].to_dict() == splits[other].to_dict()
        assert new[split].to_dict() == remedy.apply(splits[split], scores).to_dict()
        for rest in (splits, splits[split]):
            back = remedy.report.undo(new, rest=rest, split=split)
            assert {name: table.to_dict() for name, table in back.items()} == {
                name: table.to_dict() for name, table in splits.items()
            }
        with pytest.raises(BadExample, match="no 'dev'"):
            remedy.report.undo(new, rest=splits, split="dev")
        with pytest.raises(BadExample, match="no 'dev'"):
            remedy.apply(splits, scores, split="dev")


def test_relabelling_without_suspects_is_for_the_posterior_alone():
    with pytest.raises(BadSetting, match="how='flip' needs to know which rows"):
        Relabel(how="flip")


def test_suggestions_change_nothing_and_name_old_and_new_labels():
    data = rows([0, 1, 1, 0], id=["a", "b", "c", "d"])
    backwards = scores_of([-2.0, 2.0, -1.0, 3.0], ["d", "c", "b", "a"], "id")
    review = Relabel(suspects=DatasetFilter(drop=2), how="flip").suggest(data, backwards)
    assert review.select_columns(["id", "row", "score", "label_before", "label_after", "label"]).to_dict() == {
        "id": ["d", "b"],
        "row": [3, 1],
        "score": [-2.0, -1.0],
        "label_before": [0, 1],
        "label_after": [1, 0],
        "label": [0, 1],
    }
    assert data["label"][:] == [0, 1, 1, 0]


def test_features_and_order_of_columns_stay():
    features = Features({"label": ClassLabel(names=["bad", "good"]), "text": Value("string")})
    data = Dataset.from_dict({"label": [0, 1], "text": ["a", "b"]}, features=features).with_format("numpy")
    new = Relabel(suspects=DatasetFilter(drop=1), how="flip").apply(data, scores_of([1.0, 0.0]))
    assert new.features == features
    assert new.column_names == ["label", "text"]
    assert new.format["type"] == "numpy"
    assert new["label"][:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("how", "data", "probabilities", "error", "message"),
    [
        ("flip", rows([0, 2]), None, BadSetting, "two classes"),
        ("predicted", rows([0, 1]), None, BadSetting, "needs the model's probabilities"),
        ("predicted", rows([0, 2]), [[0.5, 0.5], [0.5, 0.5]], BadSetting, "one column a class"),
        ("soft", rows([0, 1]), [[2.0, -1.0], [0.5, 0.5]], BadSetting, "softmax"),
        ("soft", rows([0, 1]), [[math.nan] * 2, [0.5, 0.5]], BadSetting, "NaN"),
        ("predicted", rows([0, 1]), [[math.nan, 1.0], [0.5, 0.5]], BadSetting, "NaN"),
        ("predicted", rows([True, False]), [[0.1, 0.1, 0.8]] * 2, BadSetting, "the classes false, true, and"),
        ("predicted", rows([0, 1]).cast_column("label", ClassLabel(2)), [[0.1, 0.1, 0.8]] * 2, BadSetting, "0, 1, and"),
        ("flip", rows(["yes", "no"], input_ids=[[1], [2]]), None, BadExample, "tokens beside it .* the old names"),
        ("flip", rows([0.5, 1.0]), None, BadExample, "no class number"),
        ("flip", rows([None, "yes"]), None, BadExample, "None, which is no class number"),
        ("flip", rows(["yes", "yes"]), None, BadExample, "two names"),
        ("posterior", rows(["yes", "no"]), None, BadExample, "class_encode_column"),
        ("flip", rows([0, 1]).remove_columns("label"), None, BadExample, "no column 'label'"),
    ],
)
def test_what_cannot_be_relabelled_is_named(how, data, probabilities, error, message):
    relabel = Relabel(suspects=DatasetFilter(drop=1), how=how, probabilities=probabilities)
    with pytest.raises(error, match=message):
        relabel.apply(data, scores_of([0.0, 1.0]))
    with pytest.raises(BadSetting, match="no way to relabel"):
        Relabel(suspects=DatasetFilter(drop=1), how="guess")


@pytest.mark.parametrize("how", ["softmax", "clipped", "ranks"])
def test_weights_grow_with_the_scores_and_have_mean_one(how):
    values = [3.0, -1.0, 0.5, 0.5, -20.0]
    weight = np.array(Reweight(how=how).apply(rows([0] * 5), scores_of(values))["weight"][:])
    assert weight.mean() == pytest.approx(1)
    assert (weight >= 0).all()
    assert (np.diff(weight[np.argsort(values)]) >= 0).all()
    assert weight[2] == weight[3]
    for value in ([1.0] * 3, [0.1] * 3, [0.3, 0.1 + 0.2, 0.3]):  # the latter two are not equal in the last digit
        same = Scores(torch.tensor(value, dtype=torch.float64)[:, None], [0, 1, 2], "ip")
        equal = Reweight(how=how, temperature=0.2).apply(rows([0] * 3), same)["weight"][:]
        assert equal == pytest.approx([1, 1, 1])


def test_weights_are_those_of_the_formula():
    values = torch.tensor([2.0, 0.0, 1.0, -3.0], dtype=torch.float64)
    z = (values - values.mean()) / values.std(correction=0)
    scores = scores_of(values.tolist(), [2, 0, 3, 1])
    weight = torch.tensor(Reweight(temperature=0.5).apply(rows([0] * 4), scores)["weight"][:], dtype=torch.float64)
    torch.testing.assert_close(weight[[2, 0, 3, 1]], 4 * torch.softmax(z / 0.5, 0))
    ranks = Reweight(how="ranks").apply(rows([0] * 4), scores)["weight"][:]
    assert ranks == pytest.approx([0.8, 0.4, 1.6, 1.2])


def test_bad_weights_are_refused():
    with pytest.raises(BadSetting, match="no way to weigh"):
        Reweight(how="strange")
    with pytest.raises(BadSetting, match="above 0"):
        Reweight(temperature=0)
    with pytest.raises(BadExample, match="already"):
        Reweight(column="text").apply(rows([0]), scores_of([1.0]))


def test_the_most_typical_rows_and_copies_are_pruned() -> None:
    data = Dataset.from_dict({"text": ["a", "b", "a", "c", "d", "b"], "id": list("uvwxyz"), "task": [0, 0, 0, 1, 1, 0]})
    scores = scores_of([-1.0, -2.0, -1.0, -0.1, -9.0, -2.0], list("uvwxyz"), "id")

    def left(**settings: Any) -> list[str]:
        return Prune(**settings).apply(data, scores)["id"][:]

    assert left(drop=3) == ["u", "v", "y"]  # the copies w and z, then the highest
    assert left(drop=0) == ["u", "v", "x", "y"]
    assert left(drop=3, copies=False) == ["v", "y", "z"]
    assert left(drop=1, within="task") == ["u", "v", "y"]
    assert left(drop=2, within="task") == ["u", "v", "y"], "one stays of each"
    prune = Prune(drop=3)
    prune.apply(data, scores)
    assert prune.report.explain("w").endswith("it has the contents of row 'u'")
    assert "ranks 2 of 6 from the highest" in prune.report.explain("x")
    assert [row.id for row in prune.report.removed] == ["w", "z", "x"]
    with pytest.raises(BadSetting, match="self_gex"):
        Prune().apply(data, Scores(torch.zeros(6, 2), list("uvwxyz"), "ip", query_ids=[0, 1], id_column="id"))
    by_queries = Scores(torch.zeros(6, 1), list("uvwxyz"), "auto", id_column="id", report={"parts": {"vote": 1.0}})
    for ranking in (by_queries, combined(by_queries, scores), combined(scores, combined(by_queries))):
        with pytest.raises(BadSetting, match="help the queries"):
            Prune().apply(data, ranking)
    assert Prune(drop=3).apply(data, combined(scores))["id"][:] == ["u", "v", "y"]
    with pytest.raises(BadSetting, match="leaves none"):
        Prune(drop=6).apply(data, scores)
    with pytest.raises(BadSetting, match="neither a fraction"):
        Prune(drop=1.5)


def test_sources_of_different_informativeness_are_separated() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.arange(300) % 3
    values = -torch.tensor([1.0, 10.0, 20.0])[source] + torch.randn(300, generator=generator)
    scores = Scores(values[:, None], list(range(300)), "self_ip")
    data = Dataset.from_dict({"source_number": source.tolist()})
    parts = Separate(groups=3).apply(data, scores)
    assert {name: set(rows["source_number"]) for name, rows in parts.items()} == {
        "group_0": {2},
        "group_1": {1},
        "group_2": {0},
    }
    for how in ("mixture", "otsu"):
        two = Separate(how=how, column="part").apply(data.select(range(300)), scores)
        assert set(two["part"]) == {"group_0", "group_1"}
    one = Scores(torch.randn(300, 1, generator=generator), list(range(300)), "self_ip")
    with pytest.raises(BadSetting, match="fewer than 2 groups"):
        Separate().apply(data, one)
    equal = Scores(torch.tensor([0.3, 0.1 + 0.2] * 150, dtype=torch.float64)[:, None], list(range(300)), "self_ip")
    with pytest.raises(BadSetting, match="fewer than 2 groups"):
        Separate().apply(data, equal)
    with pytest.raises(BadSetting, match="a method without"):
        Separate().apply(data, Scores(torch.zeros(300, 1), list(range(300)), "ip", query_ids=[0]))
    for bad in ({"groups": 1}, {"groups": 3, "how": "otsu"}, {"how": "guess"}):
        with pytest.raises(BadSetting, match=r"groups|separate"):
            Separate(**bad)
    with pytest.raises(BadExample, match="already"):
        Separate(column="source_number").apply(data, scores)


def test_one_split_is_pruned_or_separated_and_the_others_stay() -> None:
    splits = DatasetDict(train=rows([0] * 4), test=rows([0] * 2))
    scores = Scores(torch.tensor([[-0.1], [-5.0], [-0.2], [-6.0]]), [0, 1, 2, 3], "self_ip")
    for remedy in (Prune(drop=2), Separate(how="otsu", column="part")):
        alone = remedy.apply(splits["train"], scores)
        for split, other in (("train", "test"), ("dev", "train")):
            held = DatasetDict({split: splits["train"], other: splits["test"]})
            new = remedy.apply(held, scores, split=split)
            assert list(new) == [split, other]
            assert new[split].to_dict() == alone.to_dict()
            assert new[other].to_dict() == splits["test"].to_dict()
            assert remedy.report.undo(new, rest=held, split=split)[split].to_dict() == splits["train"].to_dict()
        with pytest.raises(BadExample, match="no 'dev'"):
            remedy.apply(splits, scores, split="dev")
    with pytest.raises(BadSetting, match=r"has splits already.*Separate\(column='…'\)"):
        Separate(how="otsu").apply(splits, scores)
    parts = Separate(how="otsu")
    parts.apply(splits["train"], scores)
    with pytest.raises(BadExample, match="has splits already"):
        parts.report.replay(splits)


def test_pruning_and_separating_take_one_set_of_scores_in_any_form(tmp_path: Path) -> None:
    data, loss = rows([0] * 4), torch.tensor([0.1, 5.0, 0.2, 6.0])
    make_store(tmp_path / "store", {"a": torch.ones(4, 2)}, stats={"loss": loss})
    scores = attribute(tmp_path / "store", "loss")
    scores.save(tmp_path / "s.st")
    for remedy in (Prune(drop=2), Separate(how="otsu", column="part")):
        expected = remedy.apply(data, scores).to_dict()
        for given in ([scores], tmp_path / "s.st", [str(tmp_path / "s.st")]):
            assert remedy.apply(data, given).to_dict() == expected
        with pytest.raises(BadSetting, match=r"(Prune|Separate) goes by one set of scores, and 2 were given"):
            remedy.apply(data, [scores, scores])
    assert Prune(drop=2).apply(data, tmp_path / "store").to_dict() == Prune(drop=2).apply(data, scores).to_dict()
    with pytest.raises(BadSetting, match="by 'auto' are a ranking"):
        Separate().apply(data, tmp_path / "store")


def test_groups_have_one_name_however_many_they_are() -> None:
    values = torch.cat([torch.linspace(10 * k, 10 * k + 0.1, 40) for k in range(11)])
    separate = Separate(groups=11)
    parts = separate.apply(rows([0] * 440), Scores(values[:, None], list(range(440)), "self_ip"))
    assert list(parts) == [f"group_{k:02d}" for k in range(11)]
    for i in (0, 439):
        told = separate.report.explain(i)
        assert told.count(f"'group_{i // 40:02d}'") == told.count("'group_") == 2


def test_a_wide_component_does_not_claim_what_lies_beyond_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    narrow = torch.randn(500, generator=generator, dtype=torch.float64) * 0.1
    wide = torch.randn(500, generator=generator, dtype=torch.float64) * 5 - 3
    group = components(torch.cat([narrow, wide])[:, None], 2)
    ordered = group[torch.cat([narrow, wide]).argsort()]
    assert (ordered.diff() >= 0).all()
    assert set(group.tolist()) == {0, 1}
