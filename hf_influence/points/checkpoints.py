"""The weights of a training run at its checkpoints, as the Trainer left them on the disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hf_influence.errors import BadSetting, StoreError, StoreMismatch
from hf_influence.gradients.identity import SAMPLED
from hf_influence.gradients.lora import active_adapter, lora_layers, saved_names
from hf_influence.points.point import Point, moving, trainable
from hf_influence.store.files import open_shard, read_json

ADAPTER, WHOLE, INDEX = "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"
STATE = "trainer_state.json"
Folder = str | Path


@dataclass(frozen=True)
class Checkpoint(Point):
    """A checkpoint of a Trainer.

    Attributes:
        folder: Where it lies.
        step: The step after which it was saved.
        learning_rate: Of the last step up to then whose rate the Trainer logged; `None` if of none.
        name: The end of the folder's path, by which a store knows it.
    """

    kind = "checkpoint"

    folder: Path
    step: int | None
    learning_rate: float | None
    name: str

    def details(self) -> dict[str, Any]:
        """Name of the folder, step and learning rate."""
        return {"folder": self.name, "step": self.step, "learning_rate": self.learning_rate}

    def values(self, model: nn.Module) -> Mapping[str, Tensor]:
        """What the checkpoint holds of the trainable parameters, and if it is a whole model, of the buffers.

        Raises:
            StoreMismatch: It holds parts of another adapter, or several adapters of which none is the active one; or a
                whole model that has other frozen weights.
        """
        adapter = self._adapter_of(model)
        wanted = moving(model) if adapter is None else trainable(model)
        names = {name: [name] for name in wanted} if adapter is None else saved_names(model)
        frozen = {name: weight for name, weight in model.named_parameters() if adapter is None and name not in wanted}
        found: dict[str, Tensor] = {}
        for file in _files(adapter or self.folder, adapter is not None):
            with safe_open(file, "pt") as shard:
                for key in shard.keys():  # noqa: SIM118  (not a dict: it cannot be iterated)
                    if kept := wanted.keys() & names.get(key, ()):
                        found |= dict.fromkeys(kept, shard.get_tensor(key))
                    elif key in frozen and not _alike(frozen[key], shard.get_tensor(key)):
                        raise StoreMismatch(
                            f"{file} holds other values of {key} than the model, where it is frozen and would stay as "
                            "it is. Load the model that was trained, with the same parameters trainable; rows of some "
                            "of them can be left out with skip=[…]."
                        )
                    elif adapter is not None and key not in names and "lora_" in key:
                        raise StoreMismatch(
                            f"{file} holds {key}, and the model has no such part of an adapter. Give the model the "
                            "adapter that was trained: the same target modules and settings."
                        )
        return found

    def _adapter_of(self, model: nn.Module) -> Path | None:
        """The folder of the model's active adapter, or of the only one, whatever its name; `None` without any."""
        saved = _adapters_in(self.folder) if lora_layers(model) else {}
        if len(saved) < 2:
            return next(iter(saved.values()), None)
        if (active := active_adapter(model)) not in saved:
            raise StoreMismatch(
                f"{self.folder} holds the adapters {', '.join(saved)}, and the model's active one is {active}. Call "
                "model.set_adapter(…), or load the adapter that was trained under its name: "
                "PeftModel.from_pretrained(…, adapter_name=…)."
            )
        return saved[active]


def checkpoints(folders: Folder | Sequence[Folder]) -> list[Point]:
    """The checkpoints of a training run, for `tracin`.

    Args:
        folders: The Trainer's output folder, for all its `checkpoint-*`, or one or more checkpoints or such folders.
            A checkpoint holds an adapter of PEFT or, for `modules="trainable"`, a whole model, as safetensors. Runs
            whose folders have the same last two names are told apart if they are given together.

    Returns:
        In the order of the folders, those of one run by their step. Step and learning rate come from
        trainer_state.json: the rate is that of the last step, up to the checkpoint, that the Trainer logged, so train
        with logging_steps=1 to have it exactly.

    Raises:
        BadSetting: A folder without checkpoints.
    """
    given = [folders] if isinstance(folders, (str, Path)) else list(folders)
    if not given:
        raise BadSetting("checkpoints([]): name the Trainer's output folder, or its checkpoint-* folders.")
    owners: dict[Any, Path] = {}
    found = [_read(folder, owners) for one in given for folder in _checkpoints_in(Path(one))]
    if unknown := [point.name for point in found if point.step and point.learning_rate is None]:
        warnings.warn(
            f"the Trainer had logged no learning rate up to {unknown[0]}, so methods that weigh points by it, such as "
            "tracin, need weighted=False. Train with logging_steps=1 to have all rates.",
            stacklevel=2,
        )
    return [*found]


def _checkpoints_in(folder: Path) -> list[Path]:
    inside = [one for one in folder.glob("checkpoint-*") if one.name.partition("-")[2].isdigit()]
    named = (folder / STATE).is_file() and bool(_adapters_in(folder))
    if not inside and (named or any((folder / name).is_file() for name in (ADAPTER, WHOLE, INDEX))):
        return [folder]
    if not inside:
        raise BadSetting(
            f"{folder} is no checkpoint ({ADAPTER} or {WHOLE}) and has no folders checkpoint-* in it. Name the "
            "Trainer's output_dir, and train with save_strategy='epoch' or 'steps'."
        )
    return sorted(inside, key=lambda one: int(one.name.partition("-")[2]))


def _adapters_in(folder: Path) -> dict[str, Path]:
    """The adapters of a checkpoint, name -> folder; PEFT puts the one called "default" into the folder itself."""
    inside = {file.parent.name: file.parent for file in sorted(folder.glob(f"*/{ADAPTER}"))}
    return {"default": folder, **inside} if (folder / ADAPTER).is_file() else inside


def _alike(weight: Tensor, saved: Tensor) -> bool:
    """Whether a frozen weight is that of the checkpoint in the narrower of their dtypes, by some of its values."""
    step = max(1, saved.numel() // SAMPLED)
    a, b = weight.flatten()[::step].cpu(), saved.flatten()[::step]
    return weight.shape == saved.shape and (torch.equal(a, b.to(a)) or torch.equal(a.to(b), b))


def _read(folder: Path, owners: dict[Any, Path]) -> Checkpoint:
    """The checkpoint under the last two names of its path, and as many more as tell it from those read before it."""
    adapters = _adapters_in(folder)
    for place in adapters.values() or [folder]:
        next(iter(_files(place, bool(adapters))))
    state = read_json(folder / STATE) if (folder / STATE).is_file() else {}
    step = state.get("global_step")
    logged = [log for log in state.get("log_history", ()) if "learning_rate" in log and log["step"] <= (step or 0)]
    rate = max(logged, key=lambda log: log["step"])["learning_rate"] if logged else None
    path = folder.resolve()
    ends = ("/".join(path.parts[-k:]) for k in range(2, len(path.parts) + 1))
    name = next(end for end in ends if owners.setdefault((end, step, rate), path) == path)
    return Checkpoint(folder, step, rate, name)


def _files(folder: Path, adapter: bool) -> Iterator[Path]:
    """The files of one checkpoint, opened once to see that they are whole."""
    if not adapter and (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    else:
        names = [ADAPTER if adapter else WHOLE]
    for name in names:
        if not (folder / name).is_file():
            raise StoreError(
                f"{folder} has no {name}: it was not written to its end, or not as safetensors. Leave the checkpoint "
                "out, or save it again with safe_serialization=True."
            )
        open_shard(folder / name)
        yield folder / name
