"""Per-example gradients out of one batched backward pass.

    with per_sample_gradients(model) as rows:
        model(**batch).loss.backward()
        gradients = rows.take()          # parameter name -> [b, d]

A row here is the gradient of the batch's loss *through one example*; it is that example's own gradient as soon as the
loss is the sum of the examples' own losses, which is what `collect` sees to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import UnsupportedModel
from hf_influence.gradients.compress import Compressor
from hf_influence.gradients.packing import Packing
from hf_influence.gradients.rules import Entries, Keep, Projections, outer, outer_of_many
from hf_influence.gradients.taps import Modules, Tap, find_taps

HALF = (torch.float16, torch.bfloat16)


class RowCatcher:
    """Watches the tapped modules while a forward and a backward pass go by, and forms the rows.

    The rows of a call are formed from the input and the gradient of that very call; so a module that is used twice, or
    run again by gradient checkpointing, comes out right. Nothing of the model's computation changes.

    While the passes run, hooks only note what the rows need of both; these are formed when they are taken, at one go,
    since between the products of a backward pass a line of Python finds its code and data out of the caches, and other
    threads asleep. Of a few columns only those are noted, as they are at hand in the caches just then. What is noted
    whole is alive anyway when memory is at its peak, as the backward pass begins. Under gradient checkpointing it is
    not, and the rows are formed there and then.

    Attributes:
        rows_in_batch: Examples of the batch, to check by; `None` if not known.
        packing: Of a batch whose rows are not its examples.
        recomputed: The model uses gradient checkpointing, so what is noted of an input is not to be kept, either.
        float16: Some of the passes compute in it.
        scale: What the gradient of each example was multiplied by, `[b]`; the rows are without.
        reached: Names of the parameters that have had a gradient in some batch.
    """

    def __init__(self, taps: Sequence[Tap], compress: Compressor | None = None):
        self.shapes = {tap.parameter: tap.shape for tap in taps}
        self.reached: set[str] = set()
        self.rows_in_batch: int | None = None
        self.packing: Packing | None = None
        self.recomputed = False
        self.float16 = False
        self.scale: Tensor | None = None
        self._overflowed: Tensor | None = None
        self._rows: dict[str, Tensor] = {}
        self._noted: list[tuple[Tap, Tensor, Tensor]] = []
        self._later: list[tuple[str, tuple[Tensor, Tensor, Entries]]] = []
        self._handles: list[Any] = []
        self._called: set[int] = set()
        self._idle: dict[str, Tap] = {}
        self._asked: list[Any] = []
        self._by_module: dict[int, list[Tap]] = {}
        for tap in taps:
            self._by_module.setdefault(id(tap.module), []).append(tap)
        self._keep: dict[str, Keep] = {}
        self._places: dict[str, torch.device] = {}
        self._project: dict[str, Any] = {}
        self._width = prod if compress is None else compress.width
        if compress is not None:
            for name, shape in self.shapes.items():
                if (columns := compress.columns(name, shape)) is not None:
                    self._keep[name] = Entries.of(columns, shape)
                elif (sides := compress.sides(name, shape)) is not None:
                    self._keep[name] = Projections(*sides)
                else:
                    self._project[name] = compress.fit(name, shape)

    def attach(self) -> None:
        for taps in self._by_module.values():
            self._handles.append(taps[0].module.register_forward_hook(self._watch))

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.clear()

    def take(self) -> dict[str, Tensor]:
        """The rows of the batch that was just run backward, parameter name -> `[b, d]`, in the order of the model.

        Raises:
            UnsupportedModel: A tapped module took no part in it.
        """
        self._go_through()
        for (name, _), row in zip(self._later, outer_of_many([factors for _, factors in self._later]), strict=True):
            self._sum(name, row)
        self._later.clear()
        self.reached.update(self._rows)
        missing = [name for name in self.shapes if name not in self._rows]
        if odd := [name for name in missing if name not in self._idle]:
            self.refuse(odd, "" if self._rows else " Or the loss was not run backward: there are no gradients at all.")
        for name in missing:
            self._rows[name] = self._zeros(self._idle[name])
        rows = {name: self._rows[name] for name in self.shapes}
        self.clear()
        return rows

    def refuse(self, names: Sequence[str], more: str = "") -> None:
        """Say that no gradient comes to these parameters.

        Raises:
            UnsupportedModel: Always.
        """
        raise UnsupportedModel(
            f"no gradient reached {len(names)} parameter(s) in this batch (first: {names[0]}). Either the layer is not "
            "used by this model's forward pass, or its weights are used without calling it. Leave them out with "
            f"skip=[{names[0]!r}, …].{more}"
        )

    def uncalled(self) -> list[Tap]:
        """Those none of whose modules the batch has called so far, as with layers that are dropped at random."""
        if all(module in self._called for module in self._by_module):
            return []
        called = {tap.parameter for module in self._called for tap in self._by_module.get(module, ())}
        return [tap for taps in self._by_module.values() for tap in taps if tap.parameter not in called]

    def ask_uncalled(self) -> None:
        """Between the passes: look out whether the backward pass comes to weights whose modules were not called.

        If not, their gradient is 0 and so are the rows; if so, they are used without a call and have none.
        """
        for tap in self.uncalled():
            if tap.weight.requires_grad:
                self._idle[tap.parameter] = tap
                self._asked.append(tap.weight.register_hook(partial(self._not_idle, tap.parameter)))

    def _not_idle(self, name: str, gradient: Tensor) -> None:
        self._idle.pop(name, None)

    def _zeros(self, tap: Tap) -> Tensor:
        some = next(iter(self._rows.values()), None)
        n = self.rows_in_batch if some is None else len(some)
        exact = _exact(tap.weight.detach()[:0]).dtype if some is None else some.dtype
        return torch.zeros(n or 0, self._width(tap.shape), dtype=exact, device=tap.weight.device)

    def _go_through(self) -> None:
        """Add what was noted during the passes."""
        for call in self._noted:
            self._paired(*call)
        self._noted.clear()

    def clear(self) -> None:
        """Forget the rows of a batch that failed."""
        self._rows.clear()
        self._noted.clear()
        self._later.clear()
        self._called.clear()
        self._idle.clear()
        while self._asked:
            self._asked.pop().remove()
        self._overflowed = None

    def overflow(self) -> Tensor | None:
        """Whether the scale was too large for an example of the batch, `[b]`; `None` if there is none."""
        self._go_through()
        return self._overflowed

    def _watch(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._called.add(id(module))
        if not torch.is_grad_enabled():
            return
        kind = output.device.type
        self.float16 |= torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(self.watch(module, inputs[0], at_once=self.recomputed))

    def watch(self, module: nn.Module, x: Tensor, at_once: bool = True) -> Callable[[Tensor], None]:
        """Note one call of a module.

        Args:
            module: The module; nothing happens if no tap is on it.
            x: Its input, `[b, t, i]` (or `[b, i]`), or token ids `[b, t]`.
            at_once: Form the rows when the gradient arrives, not when they are taken.

        Returns:
            To be called with the gradient at its output, `[b, t, o]`: adds the rows of this call.
        """
        taps = self._by_module.get(id(module), ())
        self._called.add(id(module))
        x = x.detach()
        tokens = self._tokens(x) if x.is_floating_point() else self._tokens(x[..., None])[..., 0]
        noted = [tap.rule.of_input(tokens, self._kept_of(tap.parameter, x.device)) for tap in taps]
        kept: Any = _saved(noted) if self.recomputed else noted
        then = self._paired if at_once else self._note

        def back(g: Tensor) -> None:
            g = self._tokens(g.detach() if g.requires_grad else g)
            for tap, seen in zip(taps, kept if isinstance(kept, list) else kept.saved_tensors, strict=True):
                then(tap, seen, tap.rule.of_gradient(g, self._kept_of(tap.parameter, g.device)))

        return back

    def _note(self, tap: Tap, seen: Tensor, arrived: Tensor) -> None:
        self._noted.append((tap, seen, arrived))

    def _tokens(self, values: Tensor) -> Tensor:
        """`[b, d] -> [b, 1, d]`, `[b, …, d] -> [b, t, d]`; all that is seen with one example belongs to it."""
        if values.ndim == 3 and (self.rows_in_batch != 1 or len(values) == 1):
            return values
        if self.rows_in_batch == 1:
            return values.flatten(0, -2)[None]
        return values[:, None] if values.ndim == 2 else values.flatten(1, -2)

    def _check_apart(self, tap: Tap, g: Tensor) -> None:
        if self.packing is None:
            apart = self.rows_in_batch in (None, len(g))
        else:
            apart = g.shape[:2].numel() == self.packing.owner.numel()
        if not apart:
            raise UnsupportedModel(
                f"{tap.module_name} saw {len(g)} rows in a batch of {self.rows_in_batch} examples: it does not keep "
                "examples apart along the first dimension (the experts of a mixture, OPT's feed-forward layers and "
                "DeBERTa's relative positions do this), so its gradient cannot be told apart by example. Take one "
                "example at a time (batch_size=1; per_device_train_batch_size=1 in training), or leave it out with "
                f"skip=[{tap.parameter!r}, …]."
            )

    def _paired(self, tap: Tap, seen: Tensor, arrived: Tensor) -> None:
        self._check_apart(tap, arrived)
        if self.scale is not None:
            arrived = self._unscaled(arrived, self.scale.to(arrived.device))
        self._add(tap, *((seen, arrived) if tap.rule.input_left else (arrived, seen)))

    def _unscaled(self, arrived: Tensor, scale: Tensor) -> Tensor:
        lost = ~arrived.isfinite().flatten(1).all(1) & (scale > 1)
        self._overflowed = lost if self._overflowed is None else self._overflowed | lost.to(self._overflowed.device)
        return _exact(arrived) / scale[:, None, None]

    def _add(self, tap: Tap, left: Tensor, right: Tensor) -> None:
        left, right = _exact(left), _exact(right)
        if self.packing is not None:
            left, right = self.packing.unpack(left), self.packing.unpack(right)
        name = tap.parameter
        keep = self._keep.get(name)
        if isinstance(keep, Entries) and keep.at is not None and tap.rule.row is outer:
            self._later.append((name, (left, right, keep)))
            return
        row = tap.rule.row(left, right, keep)
        if name in self._project:
            row = self._project[name](row)
        self._sum(name, row)

    def _sum(self, name: str, row: Tensor) -> None:
        self._rows[name] = self._rows[name] + row if name in self._rows else row

    def _kept_of(self, name: str, device: torch.device) -> Keep | None:
        """What is kept of a parameter, moved to the device at the first call."""
        if name in self._keep and self._places.get(name) != device:
            self._keep[name], self._places[name] = self._keep[name].to(device), device
        return self._keep.get(name)


def _exact(values: Tensor) -> Tensor:
    """At least float32; token ids stay what they are."""
    return values.float() if values.dtype in HALF else values


class _Saved(torch.autograd.Function):
    """Lets autograd keep tensors as it keeps those of the model: gradient checkpointing drops and recomputes them."""

    @staticmethod
    def forward(ctx: Any, trigger: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return trigger.new_zeros(())


def _saved(tensors: list[Tensor]) -> Any:
    """What gives the tensors back as its `saved_tensors`, once, during the backward pass."""
    return _Saved.apply(torch.zeros((), requires_grad=True), *tensors).grad_fn


@contextmanager
def per_sample_gradients(
    model: nn.Module,
    *,
    modules: Modules = "lora",
    compress: Compressor | None = None,
    skip: Sequence[str] = (),
) -> Iterator[RowCatcher]:
    """Per-example gradients of every trainable parameter, from your own forward and backward passes.

    Args:
        model: The model, with the trainable parameters marked by `requires_grad`.
        modules: "lora" for a PEFT LoRA model, "trainable" for the trainable linear layers of any model.
        compress: `dropout(r)`, `gaussian(r)`, `sparse_jl(r)` or `logra(r_in, r_out)`; whole rows without.
        skip: Names of trainable parameters to leave out; `*` stands for anything.

    Yields:
        A catcher whose `take()` gives the rows after each backward pass. No hook outlives the block.

    Raises:
        UnsupportedModel: A trainable parameter that no rule covers; the message names it.
    """
    catcher = RowCatcher(find_taps(model, modules, skip), compress)
    catcher.recomputed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    def count(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = [named[name] for name in ("input_ids", "inputs_embeds", "pixel_values") if name in named]
        first = next((value for value in (*given, *args, *named.values()) if isinstance(value, Tensor)), None)
        catcher.rows_in_batch = None if first is None else len(first)

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        catcher.attach()
        yield catcher
    finally:
        handle.remove()
        catcher.detach()
