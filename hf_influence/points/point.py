"""A state of the trainable parameters, and how to enter and leave it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_influence.errors import StoreMismatch
from hf_influence.store import WEIGHTS, PointAbout


class Point(ABC):
    """A state of what training moves: `with point.entered(model): …` runs the block in it."""

    kind: ClassVar[str]

    @abstractmethod
    def details(self) -> dict[str, Any]:
        """What tells this point from others of its kind, as plain JSON."""

    @abstractmethod
    def values(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The value of every trainable parameter in this state, `{name: its shape}`, the model being as it is now.

        With those of buffers where the state has its own, such as running statistics.
        """

    def start(self, present: str) -> str | None:
        """Hash of the trainable values that the state was made from, `None` if from none; `present` is the model's."""
        return None

    def about(self, present: str) -> PointAbout:
        """What a store is to say of the point."""
        return PointAbout(self.kind, self.details(), self.start(present))

    @contextmanager
    def entered(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model is in this state; afterwards it has its own values back, bit for bit.

        Raises:
            StoreMismatch: The state is one of another model: its parameters have other names or shapes.
        """
        values = self.values(model)
        _check_fits(self, values, model)
        own = {name: tensor.detach().clone() for name, tensor in moving(model).items() if name in values}
        try:
            set_values(model, values)
            yield
        finally:
            set_values(model, own)


class Present(Point):
    """The values that the model has, as they are: point 0 of a store."""

    kind = WEIGHTS

    def details(self) -> dict[str, Any]:
        """Nothing: there is one such point."""
        return {}

    def values(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Those of the model."""
        return trainable_values(model)


def present() -> Point:
    """The weights that the model has now, for `collect_at`: point 0, with which `gex` compares."""
    return Present()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def trainable_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of their values."""
    return {name: weight.detach().clone() for name, weight in trainable(model).items()}


def moving(model: nn.Module) -> dict[str, Tensor]:
    """What training moves: the trainable parameters, and the buffers that a saved model holds (running statistics)."""
    saved = model.state_dict()
    return {**trainable(model), **{name: buffer for name, buffer in model.named_buffers() if name in saved}}


@torch.no_grad()
def set_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into the parameters and buffers of these names, each in its own dtype and on its own device."""
    places = moving(model)
    for name, value in values.items():
        places[name].copy_(value)


def _check_fits(point: Point, values: Mapping[str, Tensor], model: nn.Module) -> None:
    needed = trainable(model)
    shapes = {name: list(old.shape) for name, old in moving(model).items() if name in needed or name in values}
    found = {name: list(value.shape) for name, value in values.items()}
    if found == shapes:
        return
    odd = next(name for name in (*shapes, *found) if shapes.get(name) != found.get(name))
    raise StoreMismatch(
        f"the point {point.details()} of kind {point.kind!r} does not fit the model: {odd} has the shape "
        f"{found.get(odd, 'of nothing, it is missing')} there and {shapes.get(odd, 'of nothing, it is missing')} among "
        "the model's trainable parameters and buffers. Take the model it was saved from, with the same parameters "
        "trainable (PEFT: from_pretrained(…, is_trainable=True))."
    )
