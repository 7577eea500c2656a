"""Scores by models that have not seen the example: slow, and the reference where nothing can be memorised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from hf_influence.dataset.contents import column_codes, content_of, row_codes
from hf_influence.dataset.matching import ids_of
from hf_influence.errors import BadExample, BadSetting
from hf_influence.evaluation.runs import Runs
from hf_influence.gradients.batches import Collator
from hf_influence.gradients.losses import losses
from hf_influence.gradients.own_loss import OwnTask, known_of
from hf_influence.gradients.sweep import BatchSize
from hf_influence.scores import Scores
from hf_influence.task import Reduction


def out_of_fold(
    dataset: Dataset,
    fit: Callable[[Dataset], nn.Module],
    folds: int = 5,
    *,
    seed: int = 0,
    id_column: str | None = None,
    folder: str | Path | None = None,
    data_collator: Collator | None = None,
    batch_size: BatchSize = "auto",
    loss_reduction: Reduction = "mean",
    remove_unused_columns: bool = True,
    task: OwnTask | None = None,
) -> Scores:
    """Minus the loss of each example under a model that was trained on the other folds alone.

        score[i] = −ℓ(x_i, y_i; θ_k),   θ_k = fit(all folds but the k-th, which holds i)

    The folds are drawn at random and of like size, and rows of equal contents, but for their ids, stay in one fold: a
    model that has seen the copy of an example has seen it.

    Cost: `folds` trainings, and a forward pass over the dataset.
    Use when: the model memorises its noise, or there are no clean queries and a few short trainings are
    affordable. As one ranking among others: `combined(attribute(store), out_of_fold(...))`.
    Source: cross-validated scores, as in Northcutt et al., Confident Learning, JAIR 2021.

    Args:
        dataset: What `fit` trains on, tokenised.
        fit: Trains a fresh model on some of the rows, and on clean queries as well where there are any, and gives it
            back. It may leave out rows that a filter drops: they are judged all the same.
        folds: At least 2, at most the number of distinct rows.
        seed: Of the folds.
        id_column: The column that names the examples; by default they are indices.
        folder: Where the losses of every fold are kept at once; the same call goes on after an interruption. One folder
            for each way of training: `fit` and the collator cannot be checked.
        data_collator: As in `losses`, like all that follow.
        batch_size: See there.
        loss_reduction: See there.
        remove_unused_columns: See there.
        task: See there: where `fit` trains by a loss of your own, that loss.

    Returns:
        `Scores` of method "out_of_fold" in dataset order, one column.

    Raises:
        BadSetting: A number of folds that cannot be made.
        BadExample: No such id column, or one that names two examples alike.
        StoreMismatch: The folder holds other folds, or those of another dataset, seed or loss.

    See also: loss, loss_mean, confident_learning.
    """
    ids = _ids(dataset, id_column)
    codes = row_codes(dataset, [name for name in dataset.column_names if name != id_column])
    distinct = list(dict.fromkeys(codes))
    if not 2 <= folds <= len(distinct):
        raise BadSetting(
            f"folds={folds}: {len(dataset)} rows with {len(distinct)} distinct contents make 2 to {len(distinct)}."
        )
    Random(seed).shuffle(distinct)
    place = {code: k % folds for k, code in enumerate(distinct)}
    fold = [place[code] for code in codes]
    settings: dict[str, Any] = {"folds": folds, "seed": seed, "loss_reduction": loss_reduction}
    settings |= {} if task is None else {"task": known_of(task)}
    drawn = content_of(Dataset.from_dict({"fold": fold}))
    runs = Runs(folder, {"dataset": content_of(dataset), **settings, "fold_of_rows": drawn})
    scores = torch.zeros(len(dataset), 1)
    for k in range(folds):
        held = [i for i, own in enumerate(fold) if own == k]

        def train(k: int = k, held: list[int] = held) -> list[float]:
            model = fit(dataset.select([i for i, own in enumerate(fold) if own != k]))
            judged = losses(
                model,
                dataset.select(held),
                data_collator=data_collator,
                batch_size=batch_size,
                loss_reduction=loss_reduction,
                remove_unused_columns=remove_unused_columns,
                task=task,
            )
            return judged["loss"].tolist()

        scores[held, 0] = -torch.tensor(runs.do({"fold": k}, train))
    return Scores(scores, ids, "out_of_fold", settings, id_column=id_column, contents=column_codes(dataset))


def _ids(dataset: Dataset, id_column: str | None) -> list[int] | list[str]:
    if id_column is not None and id_column not in dataset.column_names:
        raise BadExample(
            f"no column '{id_column}' among {dataset.column_names}, by which the examples are to be named. Choose one "
            "of them, or leave id_column out: then they are named by their places."
        )
    ids = list(ids_of(dataset, id_column))
    if not all(isinstance(name, (int, str)) for name in ids) or len(set(ids)) < len(ids):
        raise BadExample(
            f"the id column {id_column!r} must hold a different integer or string for each example, as a score could "
            "mean either row otherwise. Use a column of unique ids."
        )
    return ids
