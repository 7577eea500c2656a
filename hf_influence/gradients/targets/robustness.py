"""Robustness as a target: the loss of the queries after an adversary has moved them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_influence.errors import BadSetting, UnsupportedModel
from hf_influence.gradients.batches import inputs_of
from hf_influence.gradients.example_losses import losses_by
from hf_influence.task import Classification, Task, task_of, unwrapped

Direction = Literal["sign", "gradient"]
Scalars = Callable[[nn.Module, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class MovedQueries(ABC):
    """The summed loss of the queries at moved inputs, `Σ_j ℓ(x_j + δ_j, y_j)`; δ is held fixed in its gradient.

    What moves is the input itself where that is real numbers (pixels, features), and else what the input embedding
    makes of the tokens.
    """

    task: Task | None = field(default=None, kw_only=True, repr=False)
    """What says which loss; `None` for that of the model."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with self.moving(model, batch) as moved:
            return self.losses(model, moved).sum()

    def with_task(self, task: Task) -> MovedQueries:
        """The same by another loss."""
        return replace(self, task=task)

    def losses(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """That of each example, `[b]`."""
        return losses_by(self.task or task_of(model), model, batch)

    @contextmanager
    def moving(self, model: nn.Module, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Inside it the model sees the queries as the adversary has moved them; gives the batch to run it on."""
        with torch.enable_grad():
            shift = self.adversary(model, batch).detach()
        with _moved(model, batch, lambda x: x + shift.to(x)) as moved:
            yield moved

    @abstractmethod
    def adversary(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The displacement δ of the inputs, `[b, …]`."""

    def _slope(self, model: nn.Module, batch: dict[str, Any], shift: Tensor, of: Scalars) -> tuple[Tensor, Tensor]:
        """A number of each example at moved inputs, `[b]`, and its gradient at the input, `[b, …]`."""
        seen: list[Tensor] = []

        def look(x: Tensor) -> Tensor:
            seen.append((x.detach() + shift.to(x)).requires_grad_())
            return seen[0]

        with _moved(model, batch, look) as moved:
            numbers = of(model, moved)
        (g,) = torch.autograd.grad(numbers.sum(), seen[0])
        return numbers.detach(), g


@dataclass(frozen=True)
class Robustness(MovedQueries):
    """Queries moved up their own loss, in `steps` steps of ε/steps.

        δ ← δ + ε/steps · sign(∇_x ℓ)        or        δ ← δ + ε/steps · ∇_x ℓ / ‖∇_x ℓ‖₂

    A query whose gradient is 0 stays where it is.

    Source: Revisiting Inner Product (IP Ensemble), eq. 4, with the adversary of Goodfellow et al., Explaining and
    Harnessing Adversarial Examples, ICLR 2015.
    """

    epsilon: float = 0.1
    steps: int = 1
    direction: Direction = "gradient"

    def __post_init__(self) -> None:
        if not self.epsilon > 0 or self.steps < 1 or self.direction not in ("sign", "gradient"):
            raise BadSetting(
                f"robustness(epsilon={self.epsilon}, steps={self.steps}, direction={self.direction!r}): epsilon must "
                "be above 0, steps at least 1, and direction 'sign' or 'gradient'."
            )

    def adversary(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The displacement δ of the inputs, `[b, …]`."""
        shift = torch.zeros(())
        for _ in range(self.steps):
            _, g = self._slope(model, batch, shift, self.losses)
            step = g.sign() if self.direction == "sign" else _unit(g)[0]
            shift = shift.to(step) + step * (self.epsilon / self.steps)
        return shift


@dataclass(frozen=True)
class Evasion(MovedQueries):
    """Queries moved to the other side of the decision boundary, γ times their distance to it.

        δ_j = −γ m_j ∇_x m_j / ‖∇_x m_j‖²,   m the logit of the label minus the best other one

    Exact for a model that is linear in its input, where it is the closed form of the paper; for others the boundary of
    the model linearised at x. As in the paper, a query on the wrong side is moved to the right one. A query whose
    margin does not change with its input has no boundary to cross and stays where it is.

    Source: Revisiting Inner Product (IP Ensemble), eq. 4.
    """

    gamma: float = 1.1

    def __post_init__(self) -> None:
        if not self.gamma > 1:
            raise BadSetting(f"evasion(gamma={self.gamma}): gamma must be above 1 to cross the boundary.")

    def adversary(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The displacement δ of the inputs, `[b, …]`."""
        margin, g = self._slope(model, batch, torch.zeros(()), _margins)
        unit, length = _unit(g)
        distance = margin.to(length) / length.where(length > 0, torch.inf)  # [b]
        return unit * (-self.gamma * distance).reshape(-1, *[1] * (g.ndim - 1))


def robustness(epsilon: float, steps: int = 1, *, direction: Direction = "gradient") -> Robustness:
    """The loss of the queries after each was moved up its own loss, as a target for `collect_target`.

    Higher scores are worth keeping for robustness: without such an example the loss under attack is predicted to rise.
    The loss is that of the rows in the store, be it label smoothing or a function of one's own.

    Args:
        epsilon: How far a query is moved: each entry of its input by at most that much with direction="sign", the whole
            of it (all tokens together) by at most that length with "gradient". In units of the input where that is real
            numbers, else of the input embedding; `model.get_input_embeddings().weight.norm(dim=1)` shows these.
        steps: In so many steps, with the gradient taken anew in each.
        direction: Along the loss gradient, or along the signs of its entries.
    """
    return Robustness(epsilon, steps, direction)


def evasion(gamma: float = 1.1) -> Evasion:
    """The loss of the queries after each was moved across the decision boundary, as a target for `collect_target`.

    Args:
        gamma: 1 is on the boundary (to first order), 2 as far behind it as the query was before it.
    """
    return Evasion(gamma)


def _margins(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The logit of the label minus the best other one, `[b]`."""
    task = task_of(model)
    inputs, labels, _ = inputs_of(model, batch, task)
    if not isinstance(task, Classification) or task.settled(labels).problem != "single_label_classification":
        raise UnsupportedModel(
            f"{type(model).__name__} has no decision boundary between classes with one label an example. Use "
            "robustness(epsilon=…), which moves a query along the gradient of its loss."
        )
    z = model(**inputs).logits  # [b, c]
    own = labels.reshape(-1, 1)
    return z.gather(1, own)[:, 0] - z.scatter(1, own, -torch.inf).amax(1)


@contextmanager
def _moved(model: nn.Module, batch: dict[str, Any], move: Callable[[Tensor], Tensor]) -> Iterator[dict[str, Any]]:
    """Inside it the model sees `move(x)` in place of x, the input or its embedding; gives the batch to run it on."""
    inputs, _, _ = inputs_of(model, batch, task_of(model))
    main = "input_ids" if "input_ids" in inputs else next(iter(inputs))
    if inputs[main].is_floating_point():
        yield {**batch, main: move(batch[main])}
        return
    calls: list[int] = []

    def look(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        calls.append(1)
        return move(out) if len(calls) == 1 else out  # a decoder that shares the table comes second

    handle = _embedding(model).register_forward_hook(look)
    try:
        yield batch
    finally:
        handle.remove()
    if not calls:
        raise _without_embedding(model, "which it does not call")


def _embedding(model: nn.Module) -> nn.Module:
    """What looks up the input tokens; an encoder has a module of its own for that, if with the decoder's weights."""
    base = unwrapped(model)
    encodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    try:
        found = (base.get_encoder() if encodes else base).get_input_embeddings()
    except (AttributeError, NotImplementedError) as error:
        raise _without_embedding(model, "of which it has none") from error
    if not isinstance(found, nn.Module):
        raise _without_embedding(model, "of which it names none")
    return found


def _without_embedding(model: nn.Module, found: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the adversary moves tokens by way of the model's input embedding, {found} ({type(model).__name__}). Write a "
        "target of your own that moves the inputs: collect_target(..., target=function)."
    )


def _unit(g: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's whole gradient at length 1, `[b, …]`, and its length, `[b]`; both 0 where there is no gradient.

    In units of the largest entry meanwhile: of a sure example all entries are so small that their squares are 0.
    """
    flat = g.flatten(1).to(torch.promote_types(g.dtype, torch.float32))
    largest = flat.abs().amax(1, keepdim=True)
    scaled = flat / largest.where(largest > 0, 1)
    length = torch.linalg.vector_norm(scaled, dim=1) * largest[:, 0]
    return F.normalize(scaled, dim=1).view_as(g), length
