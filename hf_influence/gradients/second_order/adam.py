"""The state of Adam, kept beside the rows: what turns a gradient into the step that training would take."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import StoreError, StoreMismatch, UnsupportedModel
from hf_influence.gradients.identity import adapter_identity
from hf_influence.store import GradientStore
from hf_influence.store.artifacts import write_artifact

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Parameters (lower case) that the Trainer of transformers puts into its second group, as those of `nn.LayerNorm`."""

Entry = tuple[dict[str, Any], dict[str, Any]]
"""What an optimizer holds of one parameter, and the settings of its group."""


def adam_state(model: nn.Module, path: str | Path, source: Any, *, point: int = 0) -> GradientStore:
    """Keep the moments of Adam or AdamW for each stored block, for the method `less`.

    Args:
        model: The model with the weights of that moment.
        path: The store with the rows.
        source: The optimizer itself (`trainer.optimizer` after training), or a checkpoint folder of the Trainer, whose
            `optimizer.pt` is read without running any code in it.
        point: The parameter point: 0 for the end of training, or that of the epoch or step after which the state is.

    Returns:
        The store.

    Raises:
        UnsupportedModel: The optimizer is not Adam (no `exp_avg_sq`), keeps it in eight bits, or has made no step.
        StoreMismatch: It does not hold the store's blocks.
        StoreError: The checkpoint cannot be read.
    """
    store = GradientStore.open(path)
    if isinstance(source, str | Path):
        entries = dict(_of_checkpoint(model, Path(source)))
    else:
        entries = dict(_of_optimizer(model, source))
    tensors: dict[str, Tensor] = {}
    details: dict[str, Any] = {"steps": {}, "betas": {}, "eps": {}}
    for block, shape in store.header.blocks.items():
        if block not in entries:
            raise StoreMismatch(
                f"the optimizer holds no state of the stored block {block} (it has {len(entries)} parameters, the "
                f"first is {next(iter(entries), None)}). Pass the optimizer of the run that trained this model."
            )
        state, group = entries[block]
        if not {"exp_avg", "exp_avg_sq", "step"} <= state.keys() or "betas" not in group:
            raise UnsupportedModel(
                f"the optimizer keeps {', '.join(state) or 'nothing'} of {block}, and Adam's step needs exp_avg, "
                "exp_avg_sq and step. Train with AdamW as it is in torch (optim='adamw_torch'; eight-bit and other "
                "optimizers keep something else), take at least one step, and pass the state again."
            )
        for kind in ("exp_avg", "exp_avg_sq"):
            if list(state[kind].shape) != shape:
                raise StoreMismatch(
                    f"the optimizer's {kind} of {block} has the shape {list(state[kind].shape)}, the block {shape}. "
                    "Pass the optimizer of the run that trained this model."
                )
            tensors[f"{kind}.{block}"] = state[kind].to(getattr(torch, store.header.dtype)).flatten()
        details["steps"][block] = float(state["step"])
        details["betas"][block] = [float(beta) for beta in group["betas"]]
        details["eps"][block] = float(group["eps"])
    write_artifact(store, "adam", tensors, details, adapter=adapter_identity(model), point=point)
    return store


def _of_optimizer(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Entry]]:
    names = {id(weight): name for name, weight in model.named_parameters()}
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if id(weight) in names:
                yield names[id(weight)], (dict(optimizer.state.get(weight, {})), group)


def _of_checkpoint(model: nn.Module, folder: Path) -> Iterator[tuple[str, Entry]]:
    """A checkpoint numbers the parameters: the decayed ones in the order of the model, then the others."""
    file = folder / "optimizer.pt"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise StoreError(
            f"{file} cannot be read ({error}). Pass a checkpoint folder of a Trainer that saved its optimizer "
            "(save_only_model=False), or the optimizer itself."
        ) from error
    normed = {
        f"{name}.{part}" if name else part
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for part, _ in module.named_parameters(recurse=False)
    }
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    decayed = [name for name in trainable if name not in normed and not UNDECAYED.search(name.lower())]
    groups = [decayed, [name for name in trainable if name not in decayed]]
    found = [len(group["params"]) for group in saved["param_groups"]]
    if [size for size in found if size] != [len(group) for group in groups if group]:
        raise StoreMismatch(
            f"{file} holds parameter groups of {found} tensors, and the Trainer would make groups of "
            f"{[len(group) for group in groups]} of this model, so it is not known which is which. Pass the model that "
            "was trained, its adapter trainable (is_trainable=True), or the optimizer itself."
        )
    held = (group for group in saved["param_groups"] if group["params"])
    for names, group in zip((names for names in groups if names), held, strict=True):
        for name, number in zip(names, group["params"], strict=True):
            yield name, (saved["state"].get(number, {}), group)
