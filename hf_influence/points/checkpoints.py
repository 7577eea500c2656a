"""The weights of a training run at its checkpoints, as the Trainer left them on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from hf_influence.errors import BadSetting, StoreError, StoreMismatch
from hf_influence.gradients.lora import lora_layers, saved_names
from hf_influence.points.point import Point, trainable
from hf_influence.store.files import open_shard, read_json

ADAPTER, WHOLE, INDEX = "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"
Folder = str | Path


@dataclass(frozen=True)
class Checkpoint(Point):
    """A checkpoint of a Trainer.

    Attributes:
        folder: Where it lies.
        step: The step after which it was saved.
        learning_rate: Of the last step up to then whose rate the Trainer logged; `None` if of none.
    """

    kind = "checkpoint"

    folder: Path
    step: int | None
    learning_rate: float | None

    def details(self) -> dict[str, Any]:
        """Folder, step and learning rate."""
        folder = "/".join(self.folder.resolve().parts[-2:])
        return {"folder": folder, "step": self.step, "learning_rate": self.learning_rate}

    def values(self, model: nn.Module) -> Mapping[str, Tensor]:
        """What the checkpoint holds of the trainable parameters.

        Raises:
            StoreMismatch: It holds parts of another adapter.
        """
        wanted = trainable(model)
        adapter = (self.folder / ADAPTER).is_file() and bool(lora_layers(model))
        names = saved_names(model) if adapter else {name: name for name in wanted}
        found: dict[str, Tensor] = {}
        for file in _files(self.folder, adapter):
            with safe_open(file, "pt") as shard:
                for key in shard.keys():  # noqa: SIM118  (not a dict: it cannot be iterated)
                    if names.get(key) in wanted:
                        found[names[key]] = shard.get_tensor(key)
                    elif adapter and key not in names and "lora_" in key:
                        raise StoreMismatch(
                            f"{file} holds {key}, and the model has no such part of an adapter. Give the model the "
                            "adapter that was trained: the same target modules and settings."
                        )
        return found


def checkpoints(folders: Folder | Sequence[Folder]) -> list[Point]:
    """The checkpoints of a training run, for `tracin`.

    Args:
        folders: The Trainer's output folder, for all its `checkpoint-*`, or one or more checkpoints or such folders.
            A checkpoint holds an adapter of PEFT or, for `modules="trainable"`, a whole model, as safetensors.

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
    return [_read(folder) for one in given for folder in _checkpoints_in(Path(one))]


def _checkpoints_in(folder: Path) -> list[Path]:
    inside = [one for one in folder.glob("checkpoint-*") if one.name.partition("-")[2].isdigit()]
    if not inside and any((folder / name).is_file() for name in (ADAPTER, WHOLE, INDEX)):
        return [folder]
    if not inside:
        raise BadSetting(
            f"{folder} is no checkpoint ({ADAPTER} or {WHOLE}) and has no folders checkpoint-* in it. Name the "
            "Trainer's output_dir, and train with save_strategy='epoch' or 'steps'."
        )
    return sorted(inside, key=lambda one: int(one.name.partition("-")[2]))


def _read(folder: Path) -> Checkpoint:
    next(iter(_files(folder, (folder / ADAPTER).is_file())))
    state = read_json(folder / "trainer_state.json") if (folder / "trainer_state.json").is_file() else {}
    step = state.get("global_step")
    logged = [log for log in state.get("log_history", ()) if "learning_rate" in log and log["step"] <= (step or 0)]
    return Checkpoint(folder, step, max(logged, key=lambda log: log["step"])["learning_rate"] if logged else None)


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
