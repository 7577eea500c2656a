"""Curation from round to round: what is dropped is gone, and a call that was cut short goes on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import Example, bert, labelled, lora, padding, prompts, tiny
from torch import Tensor
from trainers import EXAMPLES, QUERIES, Recording, trainer, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_influence import DatasetFilter, GradientStore, attribute
from hf_influence.callbacks import GradientCapture, WeightedTrainer, curate_and_retrain, soft_cross_entropy
from hf_influence.errors import BadExample, BadSetting, StoreMismatch
from hf_influence.filter import Decision, Prune, Relabel, Reweight, discovery
from hf_influence.gradients import dropout, label_smoothing
from hf_influence.scores import Scores


class Makes:
    """Makes Trainers, and remembers them."""

    def __init__(self, folder: Path, kind: type[Trainer] = Recording, **options: Any):
        self.folder, self.kind, self.options = folder, kind, options
        self.made: list[Any] = []

    def __call__(self, data: Dataset, callbacks: list[TrainerCallback]) -> Any:
        self.made.append(trainer(self.folder, callbacks, data, self.kind, num_train_epochs=1, **self.options))
        return self.made[-1]


def test_one_round_is_train_score_drop_and_train_anew(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    make = Makes(tmp_path)
    done = curate_and_retrain(make, data, DatasetFilter(drop=0.25), tmp_path / "r", "datainf", query_dataset=QUERIES)

    capture = GradientCapture(tmp_path / "by-hand", QUERIES)
    trainer(tmp_path, [capture], num_train_epochs=1).train()
    by_hand = DatasetFilter(drop=0.25).apply(data, attribute(capture.path, "datainf"))
    last = trainer(tmp_path, [], by_hand, num_train_epochs=1)
    last.train()

    assert done.dataset.to_list() == by_hand.to_list()
    torch.testing.assert_close(weights(done.trainer), weights(last), rtol=0, atol=0)
    assert done.trainer is make.made[-1]
    assert len(make.made) == 2


def test_ids_stay_those_of_the_original_dataset(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    make = Makes(tmp_path)
    done = curate_and_retrain(make, data, DatasetFilter(drop=2), tmp_path / "r", "loss", rounds=3)
    assert [len(run.train_dataset) for run in make.made] == [12, 10, 8, 6]
    for run, decision in zip(make.made[1:], done.decisions, strict=True):
        assert {at for batch in run.batches for at in batch} == set(decision.kept)
        assert decision.replay(data).to_list() == run.train_dataset.to_list()
    assert [len(set(decision.ids)) for decision in done.decisions] == [12] * 3
    gone = [row.id for row in done.decisions[-1].removed]
    assert gone[:4] == [row.id for row in done.decisions[1].removed]
    assert sorted(gone + done.decisions[-1].kept) == list(range(12))
    assert done.dataset.to_list() == [EXAMPLES[at] for at in done.decisions[-1].kept]
    loaded = Decision.load(tmp_path / "r/round-03/decision.json")
    assert loaded.replay(data).to_list() == done.dataset.to_list()


def with_weights(features: list[Example]) -> dict[str, Tensor]:
    batch = padding()(features)
    if "weight" in features[0]:
        batch["weight"] = torch.tensor([row["weight"] for row in features])
    return batch


def told_by_a_token(n: int, seed: int, classes: int = 2) -> list[Example]:
    """Sequences of class k that begin with token 5 + k."""
    rows = labelled(lambda i: i % classes, n, seed)
    return [{**row, "input_ids": [5 + row["labels"]] * 6 + row["input_ids"][:3]} for row in rows]


class Classifies:
    """Makes Trainers of a classifier that learn from class probabilities as well, and remembers them."""

    def __init__(self, folder: Path, classes: int = 2, loss: Any = soft_cross_entropy, **options: Any):
        self.folder, self.classes, self.options = folder, classes, {"num_train_epochs": 8, **options}
        self.loss = loss
        self.made: list[Any] = []

    def __call__(self, rows: Dataset, callbacks: list[TrainerCallback]) -> Any:
        torch.manual_seed(0)
        base = bert(num_labels=self.classes)
        model = lora(base, ["query", "value"], dtype=torch.float32, modules_to_save=["classifier"])
        settings: dict[str, Any] = {"learning_rate": 3e-2, "save_strategy": "no", **self.options}
        args = TrainingArguments(str(self.folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
        self.made.append(Trainer(model, args, padding(), rows, callbacks=callbacks, compute_loss_func=self.loss))
        return self.made[-1]


def test_one_round_may_relabel_and_train_on_what_is_believed(tmp_path: Path) -> None:
    right, clean = told_by_a_token(40, 0), Dataset.from_list(told_by_a_token(12, 1))
    wrong = [{**row, "labels": 1 - row["labels"]} for row in right[:6]]
    data = Dataset.from_list([*wrong, *right[6:]])
    make, capture = Classifies(tmp_path), {"during": "epochs"}
    rule = Relabel(how="posterior", label="labels")
    done = curate_and_retrain(make, data, rule, tmp_path / "r", query_dataset=clean, capture=capture)
    scores = Scores.load(tmp_path / "r/round-01/scores.safetensors")
    assert done.dataset["labels"][:] == rule.apply(data, scores)["labels"][:] == make.made[1].train_dataset["labels"][:]
    assert sorted(scores.lowest(6)) == list(range(6))
    believed = scores.probability_wrong()
    assert believed[:6].mean() > 0.15
    assert believed[:6].min() > 0.03 > believed[6:].mean()
    with pytest.raises(BadSetting, match="wants to relabel rows"):
        curate_and_retrain(make, data, rule, tmp_path / "two", query_dataset=clean, capture=capture, rounds=2)


def test_of_more_than_two_classes_a_round_takes_the_probabilities_from_its_store(tmp_path: Path) -> None:
    right, clean = told_by_a_token(45, 0, 3), Dataset.from_list(told_by_a_token(30, 1, 3))
    wrong = [{**row, "labels": (row["labels"] + 1) % 3} for row in right[:6]]
    data = Dataset.from_list([*wrong, *right[6:]])
    make, rule = Classifies(tmp_path, 3), Relabel(how="posterior", label="labels")
    place, given = tmp_path / "r/round-01", {"query_dataset": clean, "capture": {"during": "epochs"}}
    done = curate_and_retrain(make, data, rule, tmp_path / "r", **given)
    phi = GradientStore.open(place / "rows").rows("train").stats["probabilities"]
    told = replace(rule, probabilities=phi)
    expected = told.apply(data, Scores.load(place / "scores.safetensors"))["labels"][:]
    assert done.dataset["labels"][:] == expected == rule.apply(data, place / "rows")["labels"][:]
    assert torch.tensor(expected).shape == (45, 3)
    assert {"labels": expected[0]}.items() <= make.made[-1].train_dataset[0].items()
    again = curate_and_retrain(make, data, rule, tmp_path / "r", **given)
    assert again.dataset.to_list() == done.dataset.to_list()


@pytest.mark.parametrize("column", [None, "id"])
def test_where_not_all_rows_are_scored_each_has_its_own_probabilities(tmp_path: Path, column: str | None) -> None:
    data = Dataset.from_list([{**row, "id": f"id {i}"} for i, row in enumerate(told_by_a_token(14, 0, 3))])
    make = Classifies(tmp_path, 3, num_train_epochs=1, per_device_train_batch_size=5, dataloader_drop_last=True)
    rule, capture = Relabel(suspects=DatasetFilter(drop=0.5), label="labels"), {"during": "epochs", "at_end": False}
    capture |= {"id_column": column}
    (decision,) = curate_and_retrain(make, data, rule, tmp_path / "r", "loss_mean", capture=capture).decisions
    rows = GradientStore.open(tmp_path / "r/round-01/rows").rows("train", 1)
    phi = dict(zip(rows.positions.tolist(), rows.stats["probabilities"], strict=True))
    changed = [i for i, action in enumerate(decision.actions) if action == "relabel"]
    assert len(phi) == 10
    assert len(changed) == 5
    for i in changed:
        phi[i][data["labels"][i]] = -1
        assert decision.writes[0].new[i] == int(phi[i].argmax())
    for i in set(range(12)) - set(changed):
        assert (decision.actions[i], decision.writes[0].new[i]) == ("keep", data["labels"][i])
    assert decision.writes[0].old == data["labels"][:]


def test_a_round_scored_with_other_settings_is_refused(tmp_path: Path) -> None:
    data, groups = Dataset.from_list(EXAMPLES), [0, 1] * 6
    rule, folder = DatasetFilter(drop=2), tmp_path / "r"
    curate_and_retrain(Makes(tmp_path), data, rule, folder, groups=groups)
    assert len(curate_and_retrain(Makes(tmp_path), data, rule, folder, groups=tuple(groups)).dataset) == 10
    for other in ({}, {"groups": groups[::-1]}):
        with pytest.raises(StoreMismatch, match=r"was scored by auto with .*groups"):
            curate_and_retrain(Makes(tmp_path), data, rule, folder, **other)
    parts = ({"vote": {"k": k}, "loss": {}} for k in (1, 2))
    folder = tmp_path / "parts"
    curate_and_retrain(Makes(tmp_path), data, rule, folder, query_dataset=QUERIES, parts=next(parts))
    with pytest.raises(StoreMismatch, match=r"was scored by auto with .*parts"):
        curate_and_retrain(Makes(tmp_path), data, rule, folder, query_dataset=QUERIES, parts=next(parts))


def test_a_round_with_other_queries_or_another_capture_is_refused(tmp_path: Path) -> None:
    data, rule, folder = Dataset.from_list(EXAMPLES), DatasetFilter(drop=2), tmp_path / "r"
    task = label_smoothing(0.1)
    given: dict[str, Any] = {"query_dataset": QUERIES, "capture": {"compress": dropout(4), "task": task}}
    curate_and_retrain(Makes(tmp_path), data, rule, folder, "ip", **given)
    make = Makes(tmp_path)
    same = {"query_dataset": QUERIES.to_list(), "capture": {"task": task, "compress": dropout(4), "batch_size": 2}}
    assert len(curate_and_retrain(make, data, rule, folder, "ip", **same).dataset) == 10
    others: dict[str, dict[str, Any]] = {
        "query_dataset": {"query_dataset": QUERIES.select(range(2))},
        r"capture.*'r': 4.*'r': 5": {"capture": {"compress": dropout(5), "task": task}},
        r"capture.*'label_smoothing': 0\.1.*'label_smoothing': 0\.2": {
            "capture": {"compress": dropout(4), "task": label_smoothing(0.2)}
        },
        r"capture.*now {'capture': {}}": {"capture": None},
    }
    for message, other in others.items():
        with pytest.raises(StoreMismatch, match=f"was scored by ip with .*{message}"):
            curate_and_retrain(make, data, rule, folder, "ip", **given | other)
    assert len(make.made) == 1


def test_rows_that_a_round_has_not_scored_stay(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    make = Makes(tmp_path, per_device_train_batch_size=5, dataloader_drop_last=True)
    capture = {"during": "epochs", "at_end": False}
    done = curate_and_retrain(make, data, DatasetFilter(drop=3), tmp_path / "r", "loss_mean", capture=capture)
    missed = sorted(set(range(12)) - {at for batch in make.made[0].batches for at in batch})
    assert len(missed) == 2
    assert set(missed) < set(done.decisions[0].kept)
    assert "has no score yet" in done.decisions[0].explain(missed[0])
    assert len(done.dataset) == 9


def test_weights_are_made_anew_each_round(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    made: list[Any] = []

    def make(rows: Dataset, callbacks: list[TrainerCallback]) -> Any:
        kind = WeightedTrainer if "weight" in rows.column_names else Trainer
        made.append(trainer(tmp_path, callbacks, rows, kind, with_weights, num_train_epochs=1))
        return made[-1]

    done = curate_and_retrain(make, data, Reweight(), tmp_path / "r", "loss", rounds=2)
    assert [type(run) for run in made] == [Trainer, WeightedTrainer, WeightedTrainer]
    first, second = (run.train_dataset["weight"][:] for run in made[1:])
    assert first != second
    assert second == done.decisions[1].writes[0].new == done.dataset["weight"][:]


def test_a_trainer_that_takes_no_notice_of_what_was_written_is_refused(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    with pytest.raises(BadSetting, match=r"no notice of the weights in the column 'weight'.*WeightedTrainer"):
        curate_and_retrain(Makes(tmp_path), data, Reweight(), tmp_path / "weights", "loss")
    assert (tmp_path / "weights/round-01/decision.json").is_file()  # so the same call goes on with another Trainer
    rows = Dataset.from_list(labelled(lambda i: i % 3, 12))
    relabel = Relabel(suspects=DatasetFilter(drop=0.5), how="soft", label="labels")
    with pytest.raises(BadSetting, match=r"'labels' has class probabilities.*compute_loss_func=soft_cross_entropy"):
        curate_and_retrain(Classifies(tmp_path, 3, loss=None), rows, relabel, tmp_path / "labels", "loss")


def test_an_interrupted_call_goes_on_after_its_last_finished_round(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    whole = curate_and_retrain(Makes(tmp_path), data, DatasetFilter(drop=2), tmp_path / "a", "loss", rounds=2)

    class Stops(Makes):
        def __call__(self, rows: Dataset, callbacks: list[TrainerCallback]) -> Any:
            if len(self.made) == 1:
                raise KeyboardInterrupt
            return super().__call__(rows, callbacks)

    with pytest.raises(KeyboardInterrupt):
        curate_and_retrain(Stops(tmp_path), data, DatasetFilter(drop=2), tmp_path / "b", "loss", rounds=2)
    make = Makes(tmp_path)
    done = curate_and_retrain(make, data, DatasetFilter(drop=2), tmp_path / "b", "loss", rounds=2)
    assert [len(run.train_dataset) for run in make.made] == [10, 8]
    assert done.dataset.to_list() == whole.dataset.to_list()
    torch.testing.assert_close(weights(done.trainer), weights(whole.trainer), rtol=0, atol=0)

    with pytest.raises(StoreMismatch, match="with another outcome"):
        curate_and_retrain(make, data, DatasetFilter(drop=3), tmp_path / "b", "loss", rounds=2)
    with pytest.raises(StoreMismatch, match=r"was scored by loss.*'method': 'margin'"):
        curate_and_retrain(make, data, DatasetFilter(drop=2), tmp_path / "b", "margin", rounds=2)
    other = Dataset.from_list(prompts(12, seed=9))
    with pytest.raises(StoreMismatch, match=r"was scored by loss with {'dataset': "):
        curate_and_retrain(make, other, DatasetFilter(drop=2), tmp_path / "b", "loss", rounds=2)


class Refuses(DatasetFilter):
    """Cannot decide by the scores of a true round."""

    def decide(self, dataset: Any, scores: Any, by: Any = None) -> Decision:
        if scores.settings:
            raise BadSetting("not by these scores")
        return super().decide(dataset, scores, by)


def test_a_round_that_was_scored_is_not_trained_again_for_another_rule(tmp_path: Path) -> None:
    data, make, folder = Dataset.from_list(EXAMPLES), Makes(tmp_path), tmp_path / "r"
    with pytest.raises(BadSetting, match="not by these scores"):
        curate_and_retrain(make, data, Refuses(drop=2), folder, query_dataset=QUERIES)
    assert len(make.made) == 1
    done = curate_and_retrain(make, data, DatasetFilter(drop=2), folder, query_dataset=QUERIES)
    assert [len(run.train_dataset) for run in make.made] == [12, 10]
    whole = curate_and_retrain(Makes(tmp_path), data, DatasetFilter(drop=2), tmp_path / "w", query_dataset=QUERIES)
    assert done.decisions[0].scores == whole.decisions[0].scores
    with pytest.raises(BadSetting, match="not by these scores"):
        curate_and_retrain(make, data, Refuses(drop=2), tmp_path / "m", "loss", query_dataset=QUERIES)
    curate_and_retrain(make, data, DatasetFilter(drop=2), tmp_path / "m", "ip", query_dataset=QUERIES)
    assert [len(run.train_dataset) for run in make.made[2:]] == [12, 12, 10]  # it was scored in another way


DROPS = DatasetFilter(drop=2)
MANY = [QUERIES[i % len(QUERIES)] for i in range(12)]
FLIPS = Relabel(suspects=DROPS, how="flip", label="kind")
BEFORE: dict[str, tuple[Any, str, dict[str, Any], type[Exception], str]] = {
    "no column": (DatasetFilter(drop=2, within="sorce"), "loss", {}, BadExample, "'sorce'"),
    "no label": (Relabel(suspects=DROPS, how="flip"), "loss", {}, BadExample, "no column 'label'"),
    "own probabilities": (replace(FLIPS, probabilities=torch.ones(12, 2)), "loss", {}, BadSetting, "Leave them out"),
    "relabels twice": (FLIPS, "loss", {"rounds": 2}, BadSetting, "wants to relabel rows"),
    "leaves none": (DatasetFilter(drop=12), "loss", {}, BadSetting, "leaves none"),
    "no gaps": (DatasetFilter(drop="otsu"), "auto", {}, BadSetting, "a ranking on a scale"),
    "doubts without queries": (DatasetFilter(drop="doubtful"), "auto", {}, BadSetting, "no probabilities"),
    "prunes by queries": (Prune(), "ip", {"query_dataset": QUERIES}, BadSetting, "without queries"),
    "prunes by default": (Prune(), "auto", {"query_dataset": QUERIES}, BadSetting, "without queries"),
    "one column": (DatasetFilter(drop=discovery(0.1)), "vote", {"query_dataset": MANY}, BadSetting, "at least 8"),
    "their mean": (
        DatasetFilter(drop=discovery(0.1)),
        "ip",
        {"query_dataset": MANY, "queries": "mean"},
        BadSetting,
        "at least 8",
    ),
    "no queries": (DROPS, "datainf", {}, BadSetting, "'datainf' compares with queries, and there are none"),
    "part without queries": (DROPS, "auto", {"parts": {"vote": {}}}, BadSetting, "'vote' compares with queries"),
    "no points": (DROPS, "loss_mean", {}, BadSetting, "'loss_mean' goes over points of training"),
    "made later": (DROPS, "self_ekfac", {}, BadSetting, "'self_ekfac' needs passes over the model"),
    "capture": (DROPS, "loss", {"capture": {"every": 2}}, BadSetting, "set during="),
}


def test_a_rule_that_true_scores_do_not_allow_leaves_the_round_to_another(tmp_path: Path) -> None:
    data, make = Dataset.from_list(EXAMPLES), Makes(tmp_path)
    with pytest.raises(BadSetting, match=r"no probabilities.* Round 1 is trained and scored: the same call"):
        curate_and_retrain(make, data, DatasetFilter(), tmp_path / "r", query_dataset=QUERIES.select([0]))
    assert len(make.made) == 1
    curate_and_retrain(make, data, DatasetFilter(drop=0.25), tmp_path / "r", query_dataset=QUERIES.select([0]))
    assert len(make.made) == 2


@pytest.mark.parametrize("case", BEFORE)
def test_what_cannot_work_is_refused_before_the_first_training(tmp_path: Path, case: str) -> None:
    rule, method, options, error, message = BEFORE[case]
    make, data = Makes(tmp_path), Dataset.from_list(EXAMPLES).add_column("kind", [0, 1] * 6)
    with pytest.raises(error, match=message):
        curate_and_retrain(make, data, rule, tmp_path / "r", method, **options)
    assert not make.made


def test_what_makes_no_trainer_is_refused(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    made: Any = Makes(tmp_path)(data, [])
    with pytest.raises(BadSetting, match=r"make_trainer is a Recording, and each round trains a fresh model"):
        curate_and_retrain(made, data, DROPS, tmp_path / "r", "loss")
    with pytest.raises(BadSetting, match=r"gave a NoneType and no Trainer"):
        curate_and_retrain(lambda rows, callbacks: None, data, DROPS, tmp_path / "r", "loss")


@pytest.mark.parametrize(
    ("make", "taken"),
    [
        (lambda rows: None, r"\(rows\)"),
        (lambda rows, callbacks, args: None, r"\(rows, callbacks, args\)"),
        (lambda rows, *, callbacks: None, r"\(rows, \*, callbacks\)"),
    ],
)
def test_what_does_not_take_the_callbacks_is_refused_before_it_is_called(tmp_path: Path, make: Any, taken: str) -> None:
    told = rf"make_trainer takes {taken}, and each round calls it with .*Write make_trainer\(train_dataset, callbacks\)"
    with pytest.raises(BadSetting, match=told):
        curate_and_retrain(make, Dataset.from_list(EXAMPLES), DROPS, tmp_path / "r", "loss")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    curate_and_retrain(Makes(tmp_path), Dataset.from_list(EXAMPLES), DROPS, "~/r", "loss")
    assert (tmp_path / "home/r/round-01/decision.json").is_file()
    assert (tmp_path / "home/r/round-01/scores.safetensors").is_file()
    assert not (tmp_path / "~").exists()


def test_rounds_that_cannot_work_are_refused(tmp_path: Path) -> None:
    data, rule = Dataset.from_list(EXAMPLES), DatasetFilter(drop=2)
    with pytest.raises(BadSetting, match="at least 1"):
        curate_and_retrain(Makes(tmp_path), data, rule, tmp_path, "loss", rounds=0)
    with pytest.raises(BadSetting, match="which each round sets"):
        curate_and_retrain(Makes(tmp_path), data, rule, tmp_path, "loss", capture={"path": "x"})
    with pytest.raises(BadExample, match="is not a datasets"):
        curate_and_retrain(Makes(tmp_path), EXAMPLES, rule, tmp_path, "loss")
    with pytest.raises(BadSetting, match="without these callbacks"):
        curate_and_retrain(lambda rows, _: Makes(tmp_path)(rows, []), data, rule, tmp_path / "a", "loss")
    with pytest.raises(BadSetting, match="was given 10 rows and made a Trainer of 12"):
        curate_and_retrain(lambda _, callbacks: Makes(tmp_path)(data, callbacks), data, rule, tmp_path / "e", "loss")
    model = tiny(torch.float32)

    def same_model(rows: Dataset, callbacks: list[TrainerCallback]) -> Any:
        run = trainer(tmp_path, callbacks, rows, num_train_epochs=1)
        run.model = run.model_wrapped = model
        return run

    with pytest.raises(BadSetting, match="trained before"):
        curate_and_retrain(same_model, data, rule, tmp_path / "b", "loss")


def test_groups_of_all_examples_are_those_of_the_ones_that_are_left(tmp_path: Path) -> None:
    data, groups = Dataset.from_list(EXAMPLES), [0, 1] * 6
    done = curate_and_retrain(Makes(tmp_path), data, DatasetFilter(drop=2), tmp_path / "r", rounds=2, groups=groups)
    assert len(done.dataset) == 8
    assert Scores.load(tmp_path / "r/round-02/scores.safetensors").settings["groups"].startswith("2 groups")


def test_groups_of_as_many_queries_as_there_are_examples_stay(tmp_path: Path) -> None:
    data, options = Dataset.from_list(EXAMPLES), {"query_dataset": MANY, "queries": ["a", "b"] * 6}
    done = curate_and_retrain(Makes(tmp_path), data, DatasetFilter(drop=2), tmp_path / "r", "ip", rounds=2, **options)
    assert len(done.dataset) == 8
    assert Scores.load(tmp_path / "r/round-02/scores.safetensors").query_ids == ["a", "b"]


def test_the_classes_of_a_round_that_relabels_are_those_that_it_gives(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES).add_column("task", [0, 1] * 6)
    flips = Relabel(suspects=DatasetFilter(drop=3), how="flip", label="task")
    done = curate_and_retrain(Makes(tmp_path), data, flips, tmp_path / "r", "loss")
    after = Counter(done.dataset["task"])
    assert after != Counter(data["task"])
    assert done.decisions[-1].groups == {kind: (6, after[kind]) for kind in (0, 1)}
