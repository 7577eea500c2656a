"""Exact products with the Hessian of the mean loss, by differentiating twice.

with Hessian(model, plan, store.header) as hessian:
    hessian(v)                     # [k, D] -> [k, D], D = all stored blocks one after the other
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_influence.errors import BadSetting, UnsupportedModel
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.gradients.lora import padding_columns
from hf_influence.gradients.modes import evaluating
from hf_influence.gradients.objective import own_losses
from hf_influence.gradients.plan import Plan
from hf_influence.gradients.sweep import BatchSize, check_batch_size, sweep
from hf_influence.store import Header

INSTEAD = (
    'Load the model with attn_implementation="eager" and without fused kernels, or use a method that needs rows alone, '
    "such as 'fisher'."
)
STEP = 0.01


class Hessian:
    """`H = 1/n Σᵢ ∇²ℓᵢ`, as a function that multiplies by it; a context manager.

    ℓᵢ is the loss whose gradient is the row of example i. Inside, the model is in evaluation mode, attention runs with
    plain matrix products (fused kernels cannot be differentiated twice), and only the parameters of the store's blocks
    require gradients; on the way out everything is as it was.

    Args:
        model: The model.
        plan: Its task and the examples.
        header: Says which parameters count and in which order.
        examples: How many examples to take the mean over, chosen at random; `None` for all.
        seed: Of their choice.
        batch_size: As in `collect`. A product needs three to four times the memory of a gradient.

    Raises:
        UnsupportedModel: Two of the parameters share their storage.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        header: Header,
        *,
        examples: int | None = None,
        seed: int = 0,
        batch_size: BatchSize = "auto",
    ):
        check_batch_size(batch_size)
        n = len(plan.examples)
        if examples is not None and (not isinstance(examples, int) or examples < 1):
            raise BadSetting(f"examples={examples!r}: pass how many examples to use, at least 1, or None for all.")
        self.positions = sorted(random.Random(seed).sample(range(n), min(n, examples or n)))
        self.shapes = header.blocks
        self.size = sum(prod(shape) for shape in self.shapes.values())
        self.dtype: torch.dtype = getattr(torch, header.dtype)
        self._model = model
        self._plan = plan
        self._lengths = plan.examples.survey()[1]
        self._batches: list[list[int]] | None = None
        self._batch_size = batch_size
        self._resting = FixedWeights(model, plan.task, RowCatcher([]))
        weights = dict(model.named_parameters())
        self._weights = [weights[name] for name in self.shapes]
        _check_storage(self.shapes, self._weights)
        self._checked = False
        self._stack = ExitStack()

    def __enter__(self) -> Hessian:
        flags = [(weight, weight.requires_grad) for weight in self._model.parameters()]
        with ExitStack() as stack:
            stack.enter_context(evaluating(self._model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            for weight, flag in flags:
                stack.callback(weight.requires_grad_, flag)
                weight.requires_grad_(False)
            for weight in self._weights:
                weight.requires_grad_(True)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __call__(self, vectors: Tensor) -> Tensor:
        """`H v` for each row of `vectors [k, D]`; one forward pass serves all of them.

        Raises:
            UnsupportedModel: An operation of the model has no second derivative.
        """
        run, total = partial(self._of_batch, vectors), torch.zeros_like(vectors)
        if self._batches is None:  # the first product finds out which batches fit into memory
            seen = []
            sweeping = sweep(
                run, self._plan.examples, self.positions, self._lengths, self._batch_size, self._resting.device, None
            )
            for positions, part in sweeping:
                seen.append(positions)
                total += part
            self._batches = seen
        else:
            for positions in self._batches:
                total += run(self._plan.examples.batch(positions))
        return total / len(self.positions)

    def joined(self, blocks: dict[str, Tensor]) -> Tensor:
        """Block -> `[k, d]` as vectors `[k, D]`."""
        return torch.cat([blocks[name].to(self.dtype) for name in self.shapes], 1)

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """Vectors `[k, D]` as block -> `[k, d]`."""
        return dict(zip(self.shapes, vectors.split([prod(shape) for shape in self.shapes.values()], 1), strict=True))

    def _of_batch(self, vectors: Tensor, batch: dict[str, Any]) -> Tensor:
        """`Σ ∇²ℓᵢ v` over the examples of a batch, `[k, D]`."""
        if not self._checked:
            self._checked = True
            self._check(batch)
        slopes = self._slopes(batch, create_graph=True)
        curved = [at for at, slope in enumerate(slopes) if slope.requires_grad]
        out = torch.zeros_like(vectors)
        for place, v in zip(out, vectors, strict=True) if curved else ():
            directions = self._shaped(v)
            place += _twice([slopes[at] for at in curved], self._weights, [directions[at] for at in curved]).to(place)
        return out

    def _slopes(self, batch: dict[str, Any], create_graph: bool) -> Sequence[Tensor]:
        """The gradient of the summed loss of a batch at each of the weights."""
        with torch.enable_grad():
            seen = self._resting.forward(batch)
            loss = own_losses(self._plan.task, seen.logits, seen.targets).sum()
            return torch.autograd.grad(loss, self._weights, create_graph=create_graph, materialize_grads=True)

    def _shaped(self, vector: Tensor) -> list[Tensor]:
        """A vector `[D]` in the shapes of the weights."""
        parts = zip(self.split(vector[None]).values(), self._weights, strict=True)
        return [part[0].view_as(weight).to(weight) for part, weight in parts]

    def _check(self, batch: dict[str, Any]) -> None:
        """Compare one product with differences of gradients at weights moved a little, `STEP` of their size.

        Autograd drops, silently, what flows through an operation whose backward pass is hidden from it. The difference
        of two steps says how far differences can be trusted.
        """
        generator = torch.Generator().manual_seed(0)
        size = torch.cat([weight.detach().flatten().double().cpu() for weight in self._weights]).square().mean().sqrt()
        v = size * torch.randn(self.size, generator=generator, dtype=torch.float64)
        padding = padding_columns(self._model)
        for weight, part in zip(self._weights, self.split(v[None]).values(), strict=True):
            if id(weight) in padding:  # an embedding is never differentiated by it, and differences are
                part[0].view_as(weight)[:, padding[id(weight)]] = 0
        directions, kept = self._shaped(v), [weight.detach().clone() for weight in self._weights]

        def slopes(step: float) -> list[Tensor]:
            try:
                for weight, direction in zip(self._weights, directions, strict=True):
                    weight.data.add_(direction, alpha=step)
                return [slope.double().cpu() for slope in self._slopes(batch, create_graph=False)]
            finally:
                for weight, value in zip(self._weights, kept, strict=True):
                    weight.data.copy_(value)

        def difference(step: float) -> list[Tensor]:
            return [(up - down) / (2 * step) for up, down in zip(slopes(step), slopes(-step), strict=True)]

        coarse, fine = difference(STEP), difference(STEP / 2)
        exact = self.split(self._of_batch(v[None].to(self.dtype), batch)).items()
        for (name, product), one, other in zip(exact, coarse, fine, strict=True):
            trust = 10 * torch.linalg.vector_norm(one - other) + 0.05 * torch.linalg.vector_norm(other)
            if bool(torch.linalg.vector_norm(product[0].double() - other.flatten()) > trust):
                raise UnsupportedModel(
                    f"the second derivatives at {name} are not those that small steps of the weights show, so an "
                    f"operation of {type(self._model).__name__} hides its backward pass from autograd, as fused "
                    f"kernels do. {INSTEAD}"
                )


def _check_storage(names: Iterable[str], weights: Sequence[Tensor]) -> None:
    owner: dict[int, str] = {}
    for name, weight in zip(names, weights, strict=True):
        first = owner.setdefault(weight.data_ptr(), name)
        if first != name:
            raise UnsupportedModel(
                f"{name} shares its storage with {first} (PEFT: ensure_weight_tying=True), so neither can move on its "
                "own, and products with the Hessian take them one by one. Train without tying them, or use a method "
                "that needs rows alone, such as 'fisher'."
            )


def _twice(slopes: Sequence[Tensor], weights: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """`∂⟨slopes, directions⟩/∂weights` as one vector `[D]`."""
    try:
        parts = torch.autograd.grad(slopes, weights, directions, retain_graph=True, materialize_grads=True)
    except RuntimeError as error:
        if "once_differentiable" not in str(error) and "not implemented" not in str(error):
            raise
        raise UnsupportedModel(
            f"an operation of the model cannot be differentiated twice ({error}), which products with the Hessian "
            f"need. {INSTEAD}"
        ) from error
    return torch.cat([part.flatten().double().cpu() for part in parts])
