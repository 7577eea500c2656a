"""The loss of every example of a batch alone, by plain autograd: a brick for targets of one's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_influence.errors import BadExample
from hf_influence.gradients.batches import forward_arguments, padding_to_the_right
from hf_influence.gradients.objective import own_losses
from hf_influence.task import (
    CausalLM,
    Classification,
    LanguageModel,
    Reduction,
    Seq2SeqLM,
    Task,
    labels_of,
    task_of,
    unwrapped,
)


def example_losses(model: nn.Module, batch: dict[str, Any], loss_reduction: Reduction = "mean") -> Tensor:
    """The loss of each example as if it were alone, in the model's autograd graph.

    Args:
        model: As in `collect`.
        batch: A collated batch with labels, on the model's device.
        loss_reduction: "mean" over an example's labelled tokens, or "sum".

    Returns:
        `[b]`, in float32 at least. The sum of their gradients is that of the rows of `collect`.
    """
    task = task_of(model, loss_reduction)
    inputs, labels, mask = inputs_of(model, batch, task)
    logits = model(**inputs).logits
    if isinstance(task, LanguageModel):
        return own_losses(task, logits, task.targets(labels, mask))
    return own_losses(task.settled(labels) if isinstance(task, Classification) else task, logits, labels)


def inputs_of(model: nn.Module, batch: dict[str, Any], task: Task) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """What the model's forward method is to be given of a batch, the labels, and the mask of the input.

    Padding goes to the right, so that an example sees the positions that it has alone.
    """
    batch, per_token = dict(batch), isinstance(task, CausalLM)
    labels = None if per_token else labels_of(batch)  # labels of whole examples and decoders stay where they are
    batch = padding_to_the_right(batch)
    labels = labels_of(batch) if labels is None else labels
    arguments = forward_arguments(model)
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name in arguments}
    if not inputs:
        raise BadExample(
            f"the collated batch holds {', '.join(batch) or 'nothing'} beside the labels, and {type(model).__name__} "
            "takes none of it. Tokenise the dataset."
        )
    if "use_cache" in arguments:
        inputs["use_cache"] = False
    if isinstance(task, Seq2SeqLM) and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = unwrapped(model).prepare_decoder_input_ids_from_labels(labels)
    return inputs, labels, batch.get("attention_mask")
