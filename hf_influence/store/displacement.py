"""How far a parameter point lies from the one it was made from: θ_m − θ*, a tensor for each parameter that moved."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from hf_influence.errors import MissingRows
from hf_influence.saving import save_tensors
from hf_influence.store.files import open_shard


class Displacement:
    """The file beside the rows of a point; read one parameter at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / "displacement.safetensors"

    def save(self, difference: dict[str, Tensor]) -> None:
        """Keep what is not zero, `{parameter: its shape}`; the file appears whole.

        Raises:
            StoreError: It does not fit onto the disk.
        """
        save_tensors(self.file, {name: value for name, value in difference.items() if value.any()})

    def moved(self) -> list[str]:
        """The parameters that moved.

        Raises:
            MissingRows: The point has no such file.
        """
        if not self.file.is_file():
            raise MissingRows(
                f"{self.folder} does not say how far its weights lie from those it was made from, and the method "
                "multiplies gradients by that. Points that parameter_dropout or continued_sgd made and collect_at "
                "visited have it; run collect_at with them again."
            )
        return list(open_shard(self.file).keys())

    def of(self, parameter: str) -> Tensor | None:
        """The flattened difference of one parameter, `[d]`; `None` where it did not move."""
        return open_shard(self.file).get_tensor(parameter).flatten() if parameter in self.moved() else None
