"""The geometric ensemble: where a few hundred more steps of SGD lead from the final weights."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_influence.errors import BadSetting, StoreMismatch
from hf_influence.gradients.batches import Collator, Examples, on_device
from hf_influence.gradients.example_losses import losses_by
from hf_influence.gradients.identity import adapter_identity
from hf_influence.gradients.own_loss import OwnTask, task_of
from hf_influence.gradients.processes import first_process_first
from hf_influence.points.point import Point, moving, set_values, trainable, trainable_values
from hf_influence.saving import as_kept, save_tensors, write_json
from hf_influence.store.files import read_json
from hf_influence.task import Reduction, Task


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the members of one ensemble are made; written beside them."""

    steps: int
    learning_rate: float
    momentum: float
    batch_size: int
    begin: str
    task: Mapping[str, Any]
    seed: int
    dataset: str
    start: str


@dataclass(frozen=True)
class ContinuedSgd(Point):
    """The end of one member's cycle of SGD, kept on the disk."""

    kind = "continued_sgd"

    file: Path
    member: int
    settings: Settings

    def details(self) -> dict[str, Any]:
        """The member, and how it was made."""
        made = {key: value for key, value in asdict(self.settings).items() if key != "start"}
        return {"member": self.member, **made}

    def start(self, present: str) -> str | None:
        """The final weights, from which the ensemble was made."""
        return self.settings.start

    def values(self, model: nn.Module) -> Mapping[str, Tensor]:
        """What the file holds."""
        return load_file(self.file)


def continued_sgd(
    model: nn.Module,
    dataset: Any,
    n: int = 32,
    *,
    steps: int = 800,
    learning_rate: float = 0.05,
    momentum: float = 0.9,
    batch_size: int = 16,
    seed: int = 0,
    folder: str | Path,
    begin: Literal["final", "previous"] = "final",
    data_collator: Collator | None = None,
    loss_reduction: Reduction = "mean",
    task: OwnTask | None = None,
    remove_unused_columns: bool = True,
) -> list[Point]:
    """Members for `gex`: from the final weights, `steps` of SGD on the training loss each, their states on the disk.

        θ ← θ* (or the end of the member before);   then at each step t   θ ← θ − η_t (∇L_batch(θ) + momentum part),
        η_t = learning_rate (1 + cos(π t / steps)) / 2,   L_batch the mean of the examples' own losses

    Runs in training mode (with the model's dropout), all trainable parameters alike, without weight decay or clipping.
    The model comes back as it was, and so does the state of torch's random numbers. Every member has a cycle of its
    own from its own random numbers, so members that are there already are kept: stopped half way, or with a larger
    `n`, the same call goes on.

    Cost: `n · steps` training steps; the size of the trainable parameters on the disk for each member.

    Args:
        model: As in `collect`, with the weights after training.
        dataset: The training examples.
        n: Number of members; 32 in the paper, where 8 do nearly as well.
        steps: Of each member.
        learning_rate: At the beginning of each cycle; it falls to 0 along a cosine.
        momentum: Of SGD; 0 for none.
        batch_size: Examples a step.
        seed: Of the order of the examples and of dropout.
        folder: Where the states are kept.
        begin: "final" starts every member at the final weights, "previous" at the end of the member before.
        data_collator: As in `collect`, like all that follow.
        loss_reduction: See there.
        task: See there: of a model that was trained by a loss of your own, that loss.
        remove_unused_columns: See there.

    Raises:
        BadSetting: A setting that cannot work, or training diverged.
        StoreMismatch: The folder holds members that were made otherwise.
        StoreError: A member does not fit onto the disk; those before it are kept.

    Source: GEX: A flexible method for approximating influence via Geometric Ensemble, alg. 2 and app. E.
    """
    for name, value in (("n", n), ("steps", steps), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise BadSetting(f"continued_sgd({name}={value!r}): pass a whole number, at least 1.")
    if not learning_rate > 0 or not 0 <= momentum < 1:
        raise BadSetting(
            f"continued_sgd(learning_rate={learning_rate!r}, momentum={momentum!r}): the rate must be above 0, "
            "momentum at least 0 and below 1."
        )
    if begin not in ("final", "previous"):
        raise BadSetting(f"continued_sgd(begin={begin!r}): choose 'final' or 'previous'.")
    examples = Examples(dataset, model, data_collator, None, remove_unused_columns)
    own = examples.settled(task_of(model, loss_reduction, task))
    settings = Settings(
        steps=steps,
        learning_rate=float(learning_rate),
        momentum=float(momentum),
        batch_size=batch_size,
        begin=begin,
        task=as_kept(own.settings()),
        seed=seed,
        dataset=examples.survey()[0],
        start=adapter_identity(model),
    )
    members = [ContinuedSgd(Path(folder) / f"member-{m:03d}.safetensors", m, settings) for m in range(n)]
    with first_process_first():
        _claim(Path(folder), settings)
        for member in members:
            if not member.file.is_file():
                with _coming_back(model):
                    if begin == "previous" and member.member > 0:
                        set_values(model, members[member.member - 1].values(model))
                    _descend(model, examples, own, member)
                    copies = {name: value.detach().cpu().clone() for name, value in moving(model).items()}
                    save_tensors(member.file, copies)  # of which none shares memory with another
    return list(members)


def _claim(folder: Path, settings: Settings) -> None:
    """The folder is for members that are made like this, and for no others."""
    file = folder / "members.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(settings))
        return
    stored = read_json(file)
    for key, now in asdict(settings).items():
        if stored.get(key) != now:
            raise StoreMismatch(
                f"{folder} holds members with {key} = {stored.get(key)!r}, now {now!r}. Members of one ensemble must "
                "be made alike: choose another folder, or delete this one."
            )


def _descend(model: nn.Module, examples: Examples, task: Task, member: ContinuedSgd) -> None:
    """One cycle of SGD, in place."""
    how = member.settings
    weights = list(trainable(model).values())
    # in half precision most steps would be too small to change a weight: what they add up to is kept beside it
    exact = [weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    optimizer = torch.optim.SGD(exact, lr=how.learning_rate, momentum=how.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    device = weights[0].device
    draw = random.Random(f"{how.seed}/{member.member}")
    torch.manual_seed(draw.getrandbits(63))
    batches = _batches(len(examples), how.batch_size, draw)
    for step in tqdm(range(how.steps), desc=f"member {member.member}", unit="step"):
        loss = losses_by(task, model, on_device(examples.batch(next(batches)), device)).mean()
        if not loss.isfinite():
            raise BadSetting(
                f"member {member.member} has the loss {loss.item()} at step {step}: SGD diverged, or the model had no "
                f"finite loss before. Lower learning_rate={how.learning_rate}."
            )
        loss.backward()
        for weight, value in zip(weights, exact, strict=True):
            value.grad, weight.grad = None if weight.grad is None else weight.grad.to(value), None
        optimizer.step()
        for weight, value in zip(weights, exact, strict=True):
            weight.data.copy_(value)
        schedule.step()


def _batches(n: int, size: int, draw: random.Random) -> Iterator[list[int]]:
    """Positions in random order without end, one round over all examples after the other."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += draw.sample(range(n), n)
        batch, waiting = waiting[:size], waiting[size:]
        yield batch


@contextmanager
def _coming_back(model: nn.Module) -> Iterator[None]:
    """Training mode; afterwards values, buffers, gradients, modes and random numbers are what they were."""
    values, buffers = trainable_values(model), {name: value.clone() for name, value in model.named_buffers()}
    gradients = [(weight, weight.grad) for weight in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    with torch.random.fork_rng([device.index for device in devices]):
        try:
            model.train()
            for weight, _ in gradients:
                weight.grad = None
            yield
        finally:
            set_values(model, values)
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
            for weight, gradient in gradients:
                weight.grad = gradient
            for module, mode in modes:
                module.training = mode
