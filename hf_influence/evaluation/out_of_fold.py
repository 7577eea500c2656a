"""Scores by models that have not seen the example: slow, and the reference where nothing can be learnt by heart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from hf_influence.dataset.contents import column_codes, row_codes
from hf_influence.dataset.matching import ids_of
from hf_influence.errors import BadSetting
from hf_influence.evaluation.runs import Runs, content_of
from hf_influence.gradients.losses import losses
from hf_influence.scores import Scores


def out_of_fold(
    dataset: Dataset,
    fit: Callable[[Dataset], nn.Module],
    folds: int = 5,
    *,
    seed: int = 0,
    id_column: str | None = None,
    folder: str | Path | None = None,
    **options: Any,
) -> Scores:
    """Minus the loss of each example under a model that was trained on the other folds alone.

        score[i] = −ℓ(x_i, y_i; θ_k),   θ_k = fit(all folds but the k-th, which holds i)

    The folds are drawn at random and of like size, and rows of equal contents, but for their ids, stay in one fold: a
    model that has seen the copy of an example has seen it.

    Cost: `folds` trainings, and a forward pass over the dataset.
    Use when: the model learns its noise by heart, or there are no clean queries and a few short trainings are
    affordable. As one ranking among others: `combined(attribute(store), out_of_fold(...))`.
    Source: cross-validated scores, as in Northcutt et al., Confident Learning, JAIR 2021.

    Args:
        dataset: What `fit` trains on, tokenised.
        fit: Trains a fresh model on some of the rows and gives it back.
        folds: At least 2, at most the number of distinct rows.
        seed: Of the folds.
        id_column: The column that names the examples; by default they are indices.
        folder: Where the losses of every fold are kept at once; the same call goes on after an interruption. One folder
            for each way of training: `fit` and the collator cannot be checked.
        **options: As in `losses`: data_collator, batch_size, loss_reduction.

    Returns:
        `Scores` of method "out_of_fold" in dataset order, one column.

    Raises:
        BadSetting: A number of folds that cannot be made.
        StoreMismatch: The folder holds the folds of another dataset, seed or loss.

    See also: loss, loss_mean, confident_learning.
    """
    codes = row_codes(dataset, [name for name in dataset.column_names if name != id_column])
    distinct = list(dict.fromkeys(codes))
    if not 2 <= folds <= len(distinct):
        raise BadSetting(
            f"folds={folds}: {len(dataset)} rows with {len(distinct)} distinct contents make 2 to {len(distinct)}."
        )
    Random(seed).shuffle(distinct)
    place = {code: k % folds for k, code in enumerate(distinct)}
    fold = [place[code] for code in codes]
    reduction = options.get("loss_reduction", "mean")
    runs = Runs(folder, {"dataset": content_of(dataset), "folds": folds, "seed": seed, "loss_reduction": reduction})
    scores = torch.zeros(len(dataset), 1)
    for k in range(folds):
        held = [i for i, own in enumerate(fold) if own == k]

        def train(k: int = k, held: list[int] = held) -> list[float]:
            model = fit(dataset.select([i for i, own in enumerate(fold) if own != k]))
            return losses(model, dataset.select(held), **options)["loss"].tolist()

        scores[held, 0] = -torch.tensor(runs.do({"fold": k}, train))
    return Scores(
        scores,
        list(ids_of(dataset, id_column)),
        "out_of_fold",
        {"folds": folds, "seed": seed, "loss_reduction": reduction},
        id_column=id_column,
        contents=column_codes(dataset),
    )
