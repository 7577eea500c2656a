"""Train, score, drop, and train anew from fresh weights, once or several times, as one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from hf_influence.attribution.attribute import attribute
from hf_influence.attribution.given import fingerprint
from hf_influence.attribution.method import make_method
from hf_influence.callbacks.capture import GradientCapture
from hf_influence.callbacks.packing import in_pieces
from hf_influence.callbacks.rule_checks import (
    AFTER_TRAINING,
    check_actions,
    check_decides,
    check_method,
    check_rule,
    check_uses,
)
from hf_influence.dataset.contents import content_of
from hf_influence.dataset.matching import ids_of
from hf_influence.errors import BadExample, BadSetting, StoreMismatch
from hf_influence.filter.carrying_out import carried_out
from hf_influence.filter.decision import Decision
from hf_influence.filter.rankings import statistic_in
from hf_influence.filter.relabel import Relabel
from hf_influence.filter.rule import Decides
from hf_influence.filter.whole import decide_on_scored, on_whole
from hf_influence.gradients.processes import first_process_first, rank, wait_for_all
from hf_influence.saving import as_kept
from hf_influence.scores import LOG_ODDS, Scores

OF_EACH = {"groups", "labels", "texts"}
"""Settings with an entry for each training example."""

ASKED = "asked"
"""In the report of scores: the datasets, the capture, the method and its settings as they were given."""

MakeTrainer = Callable[[Dataset, list[TrainerCallback]], Trainer]


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """What `curate_and_retrain` gives.

    Attributes:
        trainer: The last one, trained on `dataset`.
        dataset: The curated dataset: rows of the original in their order, with the weights if the rule weighs.
        decisions: One a round, all about the original dataset: `decisions[-1].replay(original)` is `dataset`.
    """

    trainer: Trainer
    dataset: Dataset
    decisions: list[Decision]


def curate_and_retrain(
    make_trainer: MakeTrainer,
    dataset: Dataset,
    rule: Decides,
    folder: str | Path,
    method: str = "auto",
    *,
    query_dataset: Any = None,
    rounds: int = 1,
    capture: dict[str, Any] | None = None,
    **settings: Any,
) -> Retrained:
    """Train, score, curate, and train a fresh model on the rest; with one round the protocol of the papers.

        def make_trainer(train_dataset, callbacks):
            return Trainer(fresh_peft_model(), args, train_dataset=train_dataset, data_collator=collator,
                           callbacks=callbacks)

        done = curate_and_retrain(make_trainer, train, DatasetFilter(drop=0.05), "runs/rounds", query_dataset=clean)
        done.trainer.evaluate(held_out)
        print(done.decisions[-1].explain(17))

    Each round trains on what the rounds before have left, scores that, and applies the rule to it: three rounds of
    drop=0.1 leave 0.9³ of the rows. Ids are those of the original dataset throughout, and a row that is dropped stays
    so. Weights are made anew each round, and the first round has none: with `Reweight` let `make_trainer` build a
    `WeightedTrainer` where the dataset has the column. A smaller set has fewer steps an epoch; for trainings of equal
    length set `max_steps`.

    Cost: rounds + 1 trainings, and the disk for the rows of each round.

    The rule is tried out on random scores before the first training, lest a missing column end the call after it.
    Called again after it was interrupted, it goes on after the last round that was finished, whose scores and decision
    are in `folder`; a round that was scored and not decided on, for another rule say, is not trained again.

    Args:
        make_trainer: Gives a Trainer for a training set, with fresh weights each time and these callbacks.
        dataset: What to curate; with the rows that the Trainers train on (text, if they are SFTTrainers).
        rule: `DatasetFilter`, `Reweight`, `Prune`, in a single round `Relabel` as well, which takes the probabilities
            of the classes from the store of the round, or an object with `decide(dataset, scores)`.
        folder: For each round a folder with `rows` (the store), `scores.safetensors` and `decision.json`.
        method: As in `attribute`.
        query_dataset: As in `GradientCapture`.
        rounds: How often to score and curate.
        capture: More settings of `GradientCapture`, such as `{"during": "epochs", "at_end": False}` for a method over
            several points.
        **settings: Of the method.

    Raises:
        BadSetting: Fewer than one round, a rule that does more than drop or weigh in several rounds, a method, rule or
            capture that cannot work, or a `make_trainer` that does not take both arguments, makes no Trainer, loses the
            callbacks, goes on with trained weights, or takes no notice of weights or of labels that are class
            probabilities.
        BadExample: Not a dataset with a length, or one without a column that the rule goes by.
        StoreMismatch: The folder has rounds of another dataset, other queries, or another rule, method or capture.

    See also: CurateEachEpoch (within one training), removal_curve (is it worth it?).
    """
    check_rule(rule)
    make_method(method, settings)
    _check_makes(make_trainer)
    capture = dict(capture or {})
    if taken := {"path", "query_dataset", "train_dataset", "overwrite"} & set(capture):
        raise BadSetting(f"capture={{…}} has {sorted(taken)}, which each round sets for itself. Leave them out.")
    if not isinstance(rounds, int) or rounds < 1:
        raise BadSetting(f"rounds={rounds!r}: pass a whole number, at least 1.")
    if not isinstance(dataset, Dataset):
        raise BadExample(
            f"{type(dataset).__name__} is not a datasets.Dataset, and the rows of each round are found by their places "
            "in it. Make one (Dataset.from_list, Dataset.from_generator)."
        )
    if isinstance(rule, Relabel) and rule.probabilities is not None:
        raise BadSetting(
            "the rule has probabilities=…, and those of a round are those of the model that it trains, which are in "
            "its store. Leave them out: Relabel(how=…)."
        )
    folder = Path(folder).expanduser()
    like = GradientCapture(folder, query_dataset, **capture)
    check_method(method, settings, like, AFTER_TRAINING, "collect that after training, attribute, and apply the rule")
    probable = method == "auto" and not settings.get("parts") and query_dataset is not None
    report: dict[str, Any] = {LOG_ODDS: {}} if probable else {}
    check_decides(_tried(rule, dataset), dataset, method, settings, like, report=report, last=rounds == 1)
    asked = _asked(dataset, query_dataset, capture, method, settings)
    decisions: list[Decision] = []
    models: list[ref[Any]] = []  # those that are still there
    for number in range(1, rounds + 1):
        place, before = folder / f"round-{number:02d}", decisions[-1] if decisions else None
        at = list(range(len(dataset))) if before is None else before.kept
        file = place / "scores.safetensors"
        if not (place / "decision.json").is_file() and not _scored(file, asked):
            current = dataset if before is None else carried_out(before, dataset)
            taker = GradientCapture(place / "rows", query_dataset, train_dataset=current, overwrite=True, **capture)
            if rank() == 0:
                file.unlink(missing_ok=True)  # of other rows than those to come
            _train(make_trainer, current, [taker], models, before)
            if rank() == 0:
                scores = attribute(taker.path, method, **_left(settings, at, dataset))
                scores.report[ASKED] = asked
                scores.save(file)
            wait_for_all()
        scores = Scores.load(file)
        if other := _other(scores, asked):
            was, now = ({name: given.get(name) for name in other} for given in (scores.report.get(ASKED, {}), asked))
            raise StoreMismatch(
                f"{place} was scored by {scores.method} with {was}, and now {now} is asked for. Choose another folder."
            )
        left = dataset.select(at)
        try:
            decision = decide_on_scored(_knowing(rule, left, scores, place / "rows"), left, scores)
        except BadSetting as error:
            raise BadSetting(
                f"{error} Round {number} is trained and scored: the same call with another rule goes on from there."
            ) from error
        check_actions(decision, last=rounds == 1)
        decision = on_whole(decision, dataset, at, before)
        with first_process_first():
            _keep(decision, place / "decision.json")
        decisions.append(decision)
    curated = carried_out(decisions[-1], dataset)
    trainer = _train(make_trainer, curated, [], models, decisions[-1])
    return Retrained(trainer=trainer, dataset=curated, decisions=decisions)


def _check_makes(make_trainer: Any) -> None:
    """BadSetting unless it can be called as each round does."""
    if isinstance(make_trainer, Trainer) or not callable(make_trainer):
        raise BadSetting(
            f"make_trainer is a {type(make_trainer).__name__}, and each round trains a fresh model. Pass a function "
            "make_trainer(train_dataset, callbacks) that makes a Trainer of one."
        )
    try:
        taken = inspect.signature(make_trainer)
    except (TypeError, ValueError):  # as of some callables that are not written in Python
        return
    try:
        taken.bind(None, [])
    except TypeError as error:
        raise BadSetting(
            f"make_trainer takes {taken}, and each round calls it with a training set and the callbacks that capture "
            f"its gradients ({error}). Write make_trainer(train_dataset, callbacks), and pass both on: Trainer(…, "
            "train_dataset=train_dataset, callbacks=callbacks)."
        ) from error


def _train(
    make: MakeTrainer,
    dataset: Dataset,
    callbacks: list[TrainerCallback],
    models: list[ref[Any]],
    decision: Decision | None,
) -> Trainer:
    """One run on what a decision has made, of a trainer that is as it must be; `models` were trained before."""
    trainer = make(dataset, callbacks)
    if not isinstance(trainer, Trainer):
        raise BadSetting(
            f"make_trainer(dataset, callbacks) gave a {type(trainer).__name__} and no Trainer. Let it return the one "
            "that it makes."
        )
    if any(all(other is not callback for other in trainer.callback_handler.callbacks) for callback in callbacks):
        raise BadSetting("make_trainer(dataset, callbacks) made a Trainer without these callbacks. Pass them on.")
    if any(trainer.model is model() for model in models):
        raise BadSetting(
            "make_trainer gave a model that was trained before, and a round that goes on with it has seen what was "
            "dropped. Make a new model in make_trainer each time."
        )
    own = trainer.train_dataset
    if isinstance(own, Dataset) and not getattr(trainer.args, "packing", False) and len(own) > len(dataset):
        raise BadSetting(
            f"make_trainer(dataset, callbacks) was given {len(dataset)} rows and made a Trainer of {len(own)}: what "
            "was dropped is trained on all the same. Let it train on the dataset that it is given."
        )
    if callbacks and in_pieces(trainer):
        raise BadSetting(
            'packing_strategy="bfd_split" trains on pieces of long examples, each with a score of its own, and a round '
            'decides on whole ones. Use packing_strategy="bfd", with a max_length that holds them.'
        )
    check_uses(trainer, () if decision is None else decision.writes)
    models.append(ref(trainer.model))
    trainer.train()
    return trainer


def _knowing(rule: Decides, dataset: Dataset, scores: Scores, store: Path) -> Decides:
    """The rule; if it relabels, with what the store of the round, as long as it is there, has on the classes."""
    if not isinstance(rule, Relabel) or not store.is_dir():
        return rule
    scored = set(scores.ids)
    ids = [name for name in ids_of(dataset, scores.id_column) if name in scored]
    return replace(rule, probabilities=statistic_in(store, scores, "probabilities", ids))


def _left(settings: Mapping[str, Any], at: Sequence[int], dataset: Dataset) -> dict[str, Any]:
    """The settings, of those with an entry for each training example those of the rows that are left."""
    left = dict(settings)
    for name in OF_EACH & settings.keys():
        value = settings[name]
        if hasattr(value, "__len__") and len(value) == len(dataset):
            values = list(value)
            left[name] = [values[i] for i in at]
    return left


def _tried(rule: Decides, dataset: Dataset) -> Decides:
    """The rule; if it relabels, with probabilities, as the store will have them, that are all alike."""
    if not isinstance(rule, Relabel) or rule.label not in dataset.column_names:
        return rule
    labels = [label for label in dataset.with_format(None)[rule.label] if isinstance(label, int)]
    classes = 1 + max([1, *labels])
    return replace(rule, probabilities=torch.full((len(dataset), classes), 1 / classes, dtype=torch.float64))


def _asked(
    dataset: Dataset, queries: Any, capture: Mapping[str, Any], method: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What tells scores that were asked for in another way, as it comes back from a file."""
    taken = {name: _recorded(value) for name, value in capture.items() if name != "batch_size"}  # of no consequence
    given = {name: _recorded(value) for name, value in settings.items()}
    data = {"dataset": content_of(dataset), "query_dataset": None if queries is None else content_of(queries)}
    asked: dict[str, Any] = as_kept({**data, "capture": taken, "method": method, **given})
    return asked


def _recorded(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "settings"):  # a compressor, a task
        return value.settings()
    if callable(value):  # what makes a task: `own_loss` says which
        return getattr(value, "keywords", {}).get("about", getattr(value, "__name__", type(value).__name__))
    return fingerprint(list(value.items() if isinstance(value, Mapping) else value))


def _other(scores: Scores, asked: Mapping[str, Any]) -> list[str]:
    """In what scores were asked for in another way."""
    was = scores.report.get(ASKED, {})
    return [name for name in {**was, **asked} if was.get(name) != asked.get(name)]


def _scored(file: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the rows of a round are there, and scored as is asked for."""
    return file.is_file() and (file.parent / "rows").is_dir() and not _other(Scores.load(file), asked)


def _keep(decision: Decision, file: Path) -> None:
    """Write it; if the round was finished before, see that it is the same."""
    if not file.is_file():
        decision.save(file)
        return
    earlier = Decision.load(file)
    if _outcome(earlier) != _outcome(decision):
        raise StoreMismatch(
            f"{file} was decided by {earlier.rule}, and now it would be by {decision.rule}, with another outcome: the "
            "rounds after it would not follow from it. Choose another folder."
        )


def _outcome(decision: Decision) -> Any:
    return decision.rule, decision.actions, [column.new for column in decision.writes]
