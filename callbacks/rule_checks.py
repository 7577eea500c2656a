"""Whether a rule can decide by the scores of a method: refused before training, and not when it is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from hf_influence.attribution.method import class_of
from hf_influence.callbacks.capture import GradientCapture
from hf_influence.dataset.matching import ids_of
from hf_influence.errors import BadSetting
from hf_influence.filter.actions import Written
from hf_influence.filter.decision import Decision
from hf_influence.filter.rule import Decides
from hf_influence.scores import Scores

ACTIONS = {"keep", "drop", "weight"}
AFTER_TRAINING = {
    "members": "an ensemble that is made after training",
    "hessian": "passes over the model that are made after training",
    "ekfac": "passes over the model that are made after training",
    "adam": "the optimizer's state, which is kept after training",
}
NOT_WHILE_TRAINING = AFTER_TRAINING | {
    "features": "what collect(features=True) stores after training",
    "other_prompt_loss": "losses after other prompts, which are collected after training",
    "texts": "texts alone, and its scores are the same before training: give them to the rule before you train",
}


def check_rule(rule: Any) -> None:
    """Refuse what is no rule.

    Raises:
        BadSetting: Says why.
    """
    if not callable(getattr(rule, "decide", None)):
        raise BadSetting(
            f"rule={rule!r} does not decide anything. Pass DatasetFilter(drop=…), Reweight(), Prune(), or an object "
            "with decide(dataset, scores) -> Decision."
        )
    if getattr(rule, "columns", False):
        raise BadSetting(
            "columns=True writes scores into the dataset, where the next decision would find them. They are in the "
            "decision: leave columns=False."
        )


def check_method(
    method: str, settings: Mapping[str, Any], capture: GradientCapture, lacking: Mapping[str, str], instead: str
) -> None:
    """Refuse a method, or one of its parts, that will not find what it needs in what is captured.

    Args:
        method: Its name.
        settings: Its own.
        capture: What takes the rows.
        lacking: What is not there when the scores are made, in the words of `About.needs` -> what that is.
        instead: What to do, beside choosing another method.

    Raises:
        BadSetting: Says what it lacks.
    """
    for name in settings.get("parts") or [method]:
        needs = set(class_of(name).needs)
        if impossible := sorted(needs & set(lacking)):
            raise BadSetting(
                f"method '{name}' needs {lacking[impossible[0]]}. Choose one that needs rows, queries or statistics "
                f"alone (`hf-influence methods`), or {instead}."
            )
        if "queries" in needs and capture.query_dataset is None:
            raise BadSetting(
                f"method '{name}' compares with queries, and there are none: pass query_dataset=…, or choose a method "
                "without them, such as loss_mean or self_tracin."
            )
        if "points" in needs and capture.schedule is None:
            raise BadSetting(
                f"method '{name}' goes over points of training, and rows are captured at its end alone. Capture with "
                'during="epochs", or choose a method that looks at one point, such as loss or self_ip.'
            )


def check_decides(
    rule: Decides,
    dataset: Dataset,
    method: str,
    settings: Mapping[str, Any],
    capture: GradientCapture,
    *,
    report: Mapping[str, Any] | None = None,
    last: bool = False,
) -> None:
    """Try a rule out on random scores, and refuse what the true ones would not let it do either.

    Args:
        rule: See `Decides`.
        dataset: What it is to decide on.
        method: The name of that by which the scores will be.
        settings: Of the method.
        capture: What takes the rows.
        report: What is found beside such scores.
        last: As in `check_actions`.

    Raises:
        BadExample: The dataset lacks a column that the rule goes by.
        BadSetting: The rule cannot decide by such scores, or does what it may not.
    """
    columns, queried = _columns(method, settings, capture), capture.query_dataset is not None
    parts = {"parts": settings.get("parts") or ["kernel_ridge" if queried else "loss"]} if method == "auto" else {}
    id_column = capture.id_column if capture.id_column in dataset.column_names else None
    draw, levels = torch.Generator().manual_seed(0), torch.linspace(2, -1, len(dataset))  # good ones among them
    values = torch.stack([levels[torch.randperm(len(levels), generator=draw)] for _ in columns or [method]], 1)
    trial = Scores(
        values,
        list(ids_of(dataset, id_column)),
        method,
        query_ids=columns,
        id_column=id_column,
        report={**parts, **(report or {})},
    )
    check_actions(rule.decide(dataset, trial), last)


def _columns(method: str, settings: Mapping[str, Any], capture: GradientCapture) -> list[Any] | None:
    """What the columns of the scores will be of; `None` without queries."""
    kind, queries = class_of(method), settings.get("queries", "each")
    if "queries" not in kind.needs:
        return None
    if kind.joint or queries == "mean":
        return [method]
    return list(range(len(capture.query_dataset)) if isinstance(queries, str) else dict.fromkeys(queries))


def check_actions(decision: Decision, last: bool = False) -> None:
    """Refuse a decision that does more than drop or weigh, or than relabel if it is the last and no more are scored.

    Raises:
        BadSetting: Says what.
    """
    if odd := sorted(set(decision.actions) - ACTIONS - ({"relabel"} if last else set())):
        raise BadSetting(
            f"the rule {decision.rule} wants to {odd[0]} rows, and the scores of later epochs or rounds would be of "
            "other examples than the dataset holds. Use one that drops or weighs (DatasetFilter, Reweight, Prune), or "
            f"{odd[0]} before training."
        )


def check_uses(trainer: Trainer, columns: Sequence[Written]) -> None:
    """Refuse a Trainer for which weights, or labels that are class probabilities, are nothing or something else.

    Args:
        trainer: One that is to train on a curated dataset.
        columns: What the decision has written into it.

    Raises:
        BadSetting: Says which Trainer to take.
    """
    hooks = {"compute_loss", "get_train_dataloader", "_get_train_sampler"}
    own = [kind for kind in type(trainer).__mro__ if hooks & set(vars(kind)) and not _of_libraries(kind)]
    for column in columns:
        if column.old is None and not own:
            raise BadSetting(
                f"{type(trainer).__name__} takes no notice of the weights in the column {column.name!r}. Let "
                f"make_trainer build a WeightedTrainer(…, weight_column={column.name!r}) where the dataset has it."
            )
        if column.new and isinstance(column.new[0], list) and not own and trainer.compute_loss_func is None:
            raise BadSetting(
                f"the column {column.name!r} has class probabilities, and {type(trainer).__name__} would take them for "
                "several labels an example. Let make_trainer build a Trainer(…, compute_loss_func=soft_cross_entropy)."
            )


def _of_libraries(kind: type) -> bool:
    return kind.__module__.split(".")[0] in ("transformers", "trl")
