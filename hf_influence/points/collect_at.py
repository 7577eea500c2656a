"""Rows or losses of any splits at a list of parameter points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import BadSetting, StoreMismatch
from hf_influence.gradients.collect import collect
from hf_influence.gradients.identity import adapter_identity
from hf_influence.gradients.processes import rank
from hf_influence.points.point import Point, trainable, trainable_values
from hf_influence.store import GradientStore, PointAbout, number_of


def collect_at(
    model: nn.Module,
    datasets: Mapping[str, Any],
    path: str | Path,
    points: Sequence[Point],
    *,
    rows: bool = True,
    overwrite: bool = False,
    **options: Any,
) -> GradientStore:
    """What `collect` gives for each split, at each of several parameter points.

    The model enters one point after the other and comes back as it was. The store gives each point a number, and keeps
    its kind and details: `store.points("checkpoint")`, `store.point_about(number)`. Stopped half way, the same call
    goes on where it stopped.

    Cost: for each point and split that of `collect`; with `rows=False` that of its forward passes.

    Args:
        model: As in `collect`, with the weights after training.
        datasets: Split -> dataset, `{"train": …, "query": …}`.
        path: Folder of the store; made if it is not there.
        points: From `checkpoints`, `parameter_dropout`, `continued_sgd` or `laplace`; `present()` is the weights as
            they are.
        rows: False keeps the statistics alone (the losses, for `gex`).
        overwrite: Replace points of another model or dataset instead of refusing.
        **options: As in `collect`: data_collator, batch_size, loss_reduction, task, compress, modules, skip,
            id_column, remove_unused_columns.

    Returns:
        The store.

    Raises:
        BadSetting: No points, or no datasets.
        StoreMismatch: The points were made from other weights than the model has, or than those of point 0 of the
            store, or otherwise than those that are there; or see `collect`.

    And all that `collect` raises.
    """
    path, given = Path(path).expanduser(), points
    points = list(given) if isinstance(given, Iterable) else []
    listed = points and all(isinstance(point, Point) for point in points)
    if not listed or not isinstance(datasets, Mapping) or not datasets:
        raise BadSetting(
            f"collect_at with a {type(datasets).__name__} for the datasets and {brief(given)} for the points: it takes "
            'at least one dataset by the name of its split, as {"train": dataset}, and a list of points, as '
            "parameter_dropout(), checkpoints(folder) or [present()]."
        )
    own = adapter_identity(model)
    abouts = [point.about(own) for point in points]
    for about in abouts:
        _check_start(about, own, path)
    before = trainable_values(model)
    for point, about in zip(points, abouts, strict=True):
        number = number_of(path, about)
        with point.entered(model):
            if not overwrite:
                _check_again(about, model, path, number)
            for split, dataset in datasets.items():
                collect(
                    model, dataset, path, split, point=number, about=about, rows=rows, overwrite=overwrite, **options
                )
            if about.start is not None and rank() == 0:
                GradientStore.open(path).displacement(number).save(_moved(model, before))
    return GradientStore.open(path)


def _moved(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far each trainable parameter lies from its value before, at least in float32."""
    exact = {name: torch.promote_types(value.dtype, torch.float32) for name, value in before.items()}
    return {name: w.detach().to(exact[name]) - before[name].to(exact[name]) for name, w in trainable(model).items()}


def _check_start(about: PointAbout, own: str, path: Path) -> None:
    """The members of an ensemble belong to the weights that the model has, and these are those of point 0."""
    if about.start is None:
        return
    if about.start != own:
        raise StoreMismatch(
            f"the point {about.details} of kind {about.kind!r} was made from other weights (hash {about.start}) than "
            f"the model has now ({own}). Load the weights that it was made from, or make the points again."
        )
    stored = GradientStore.open(path).adapter() if (path / "store.json").is_file() else None
    if stored not in (None, own):
        raise StoreMismatch(
            f"point 0 of {path} holds rows at other weights (hash {stored}) than the model has now ({own}), and the "
            f"points of kind {about.kind!r} are made from the model's. Load the weights of point 0, replace its rows "
            "first (collect(…, overwrite=True)), or choose another folder."
        )


def _check_again(about: PointAbout, model: nn.Module, path: Path, number: int) -> None:
    """A member that is made again from the same weights has the values of the one that is there."""
    if about.start is None or not (path / "store.json").is_file():
        return
    store = GradientStore.open(path)
    stored, now = store.adapter(number), adapter_identity(model)
    if stored not in (None, now) and store.point_about(number).start == about.start:
        raise StoreMismatch(
            f"point {number} of {path} is the point {about.details} of kind {about.kind!r} at other values (hash "
            f"{stored}) than it has now ({now}), although both were made from the same weights: passes over the "
            "dataset round otherwise with another batch_size, padding or device. Make the points as before, replace "
            "those that are there (overwrite=True), or choose another folder."
        )
