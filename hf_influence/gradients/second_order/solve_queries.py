"""Queries multiplied by the inverse of the true Hessian, stored as rows."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hf_influence.errors import BadSetting, MissingRows
from hf_influence.gradients.batches import Collator
from hf_influence.gradients.identity import adapter_identity
from hf_influence.gradients.own_loss import OwnTask
from hf_influence.gradients.plan import Plan
from hf_influence.gradients.second_order.hessian import Hessian
from hf_influence.gradients.second_order.solvers import conjugate_gradients, lissa
from hf_influence.gradients.sweep import BatchSize
from hf_influence.store import GradientStore

logger = logging.getLogger(__name__)

ITERATIONS = {"cg": 200, "lissa": 10}


def solve_queries(
    model: nn.Module,
    dataset: Any,
    path: str | Path,
    *,
    damping: float,
    solver: Literal["cg", "lissa"] = "cg",
    query_split: str = "query",
    queries: Literal["each", "mean"] = "each",
    iterations: int | None = None,
    tolerance: float = 1e-4,
    examples: int | None = None,
    seed: int = 0,
    data_collator: Collator | None = None,
    batch_size: BatchSize = "auto",
    remove_unused_columns: bool = True,
    task: OwnTask | None = None,
    point: int = 0,
) -> GradientStore:
    """Influence with the true Hessian: `x = (H + λI)⁻¹ v` of each query, as rows of the split `query-cg`.

    `attribute(path, "ip", query_split="query-cg")` is then the influence function of Koh & Liang: the first order
    effect, times n, of removing an example on the loss of a query. H is the exact Hessian of the mean loss over the
    dataset, over all stored blocks together. An earlier solution in that split is replaced. With every row go the
    statistics `residual` (relative to the query), `iterations` and `damping`.

    Cost: in each iteration a product with the Hessian for every query: a forward and backward pass over the dataset
    and some two backward passes for each query. Memory for four vectors of all trainable parameters for each query.

    Args:
        model: As it was when the rows were collected.
        dataset: The training examples.
        path: The store; it holds the rows of the queries.
        damping: λ in units of the Hessian, not relative to anything; at least 0. With weight decay, or another
            quadratic penalty c/2 ‖θ‖² in the objective of training, c belongs to it.
        solver: "cg" solves to `tolerance` or says that it cannot; "lissa" is cut off after 10 iterations as in the
            papers.
        query_split: The split with the queries.
        queries: "each" for a row a query, "mean" for one row of their mean.
        iterations: The limit; by default 200 for "cg" and 10 for "lissa".
        tolerance: The residual, relative to the query, at which the iteration stops; with "cg", rounding may leave up
            to ten times as much.
        examples: How many examples of the dataset to use, chosen at random; `None` for all.
        seed: Of their choice.
        data_collator: The one of `collect`.
        batch_size: As in `collect`.
        remove_unused_columns: That of `collect`.
        task: That of `collect`; label smoothing is known from the store.
        point: The parameter point.

    Returns:
        The store; the solutions are in the split f"{query_split}-{solver}".

    Raises:
        NotConverged: The iteration diverged, or did not reach the tolerance; the message says which damping would do.
        BadSetting: The rows are of a loss function of your own, and it was not given.
        StoreMismatch: Another model or adapter than that of the rows, or compressed rows.
        MissingRows: There are no queries.
        UnsupportedModel: An operation of the model has no second derivative.
    """
    iterations = ITERATIONS.get(solver, 0) if iterations is None else iterations
    if solver not in ITERATIONS or queries not in ("each", "mean"):
        raise BadSetting(f"solver={solver!r}, queries={queries!r}: choose 'cg' or 'lissa', and 'each' or 'mean'.")
    if not (damping >= 0 and tolerance > 0 and isinstance(iterations, int) and iterations > 0):
        raise BadSetting(
            f"damping={damping!r}, tolerance={tolerance!r}, iterations={iterations!r}: damping is at least 0, the "
            "tolerance above 0 and the iterations are a whole number, at least 1."
        )
    store = GradientStore.open(path)
    store.check_whole("the inverse of the Hessian multiplies whole rows")
    rows = store.rows(query_split, point)
    if not len(rows):
        raise MissingRows(f"{rows.folder} holds no queries, so there is nothing to solve for.")
    plan = Plan.again(store, model, dataset, point, data_collator, remove_unused_columns, task)
    with Hessian(model, plan, store.header, examples=examples, seed=seed, batch_size=batch_size) as hessian:
        right = hessian.joined({name: rows.block(name) for name in rows.blocks})  # [q, D]
        right = right.mean(0, keepdim=True) if queries == "mean" else right
        solve = conjugate_gradients if solver == "cg" else partial(lissa, seed=seed)
        solution, residual, used = solve(hessian, right, damping, iterations, tolerance)
    logger.info("%s: %d iterations, largest relative residual %.2g", solver, used, residual.max())
    split, n = f"{query_split}-{solver}", len(solution)
    ids = ["mean"] if queries == "mean" else None if rows.ids == list(range(n)) else rows.ids
    store.drop(point, split)
    writer = store.writer(
        split,
        adapter=adapter_identity(model),
        dataset=rows.dataset,
        n=n,
        ids=ids,
        id_column=None if queries == "mean" else rows.id_column,
        point=point,
    )
    stats = {"residual": residual, "iterations": torch.full((n,), used), "damping": torch.full_like(residual, damping)}
    with writer:
        writer.append(range(n), hessian.split(solution), stats)
    return store
