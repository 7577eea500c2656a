"""Prompts and answers: where the one ends and the other begins in a tokenised example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

import torch

from hf_influence.errors import BadExample
from hf_influence.gradients.batches import PACKED, Examples, padding_to_the_right
from hf_influence.task import IGNORED, LABELS, CausalLM, Task, labels_of

OF_TEXT = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids"),
    *("decoder_input_ids", "decoder_attention_mask"),
    *(*LABELS, *PACKED),
}
"""What a model may take of an example that is text and no more."""

AT_ONCE = 256


class Parts(NamedTuple):
    """Tokens of an example: those before its first label, and from there on with their labels.

    Of an encoder-decoder the input, nothing, and the labels.
    """

    prompt: list[int]
    answer: list[int]
    labels: list[int]

    def row(self, causal: bool) -> dict[str, list[int]]:
        """The example that they make."""
        if not causal:
            return {"input_ids": self.prompt, "labels": self.labels}
        return {"input_ids": self.prompt + self.answer, "labels": [IGNORED] * len(self.prompt) + self.labels}


def parts_of(task: Task, examples: Examples, positions: Sequence[int]) -> list[Parts]:
    """The prompts and answers of some examples.

    Args:
        task: That of a language model.
        examples: The dataset.
        positions: Of the examples.

    Raises:
        BadExample: An example is more than text, or has no prompt, which takes two tokens before the first label.
    """
    found = list(_parts(isinstance(task, CausalLM), examples, examples.arguments - OF_TEXT, positions))
    if bare := [position for position, own in zip(positions, found, strict=True) if not own.prompt]:
        raise BadExample(
            f"the labels of example {bare[0]} begin with its first or second token, so it is not known what its prompt "
            "is. Mask the prompts (labels of -100), or leave other_prompts out."
        )
    return found


def _parts(causal: bool, examples: Examples, refused: Set[str], positions: Sequence[int]) -> Iterator[Parts]:
    for start in range(0, len(positions), AT_ONCE):
        batch = examples.batch(positions[start : start + AT_ONCE])
        foreign = sorted(name for name in batch if name in refused)
        if foreign or "input_ids" not in batch:
            raise BadExample(
                f"the model takes {foreign[0] if foreign else 'something other than input_ids'}, and only text can "
                "be given another prompt. Leave other_prompts out."
            )
        batch = padding_to_the_right(batch) if causal else batch
        ids, labels, mask = batch["input_ids"], labels_of(batch), batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        for own, real, target in zip(ids, mask != 0, labels, strict=True):
            if not causal:
                yield Parts(own[real].tolist(), [], target[target != IGNORED].tolist())
                continue
            own, target = own[real], target[real]
            at = int((target != IGNORED).to(torch.uint8).argmax()) if (target != IGNORED).any() else len(own)
            at = 0 if at == 1 else at  # some collators mask the first token, which nothing predicts
            yield Parts(own[:at].tolist(), own[at:].tolist(), target[at:].tolist())
