"""Answers after the prompts of other examples: what the model makes of an answer that its prompt does not help with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import Any

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from hf_influence.errors import BadExample, BadSetting
from hf_influence.gradients.answers import AT_ONCE, Parts, parts_of
from hf_influence.gradients.batches import Examples
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.gradients.sweep import BatchSize, sweep
from hf_influence.task import CausalLM, LanguageModel, Task

STATISTIC = "other_prompt_loss"
DEFAULT = 2
"""Prompts for each answer: one that is like its own and one at random."""

POOL = 2048


class OtherPrompts:
    """Examples as they are but for the prompt, which is that of another one.

    The prompt is all before the first labelled token, two tokens at least, or the input of an encoder. An example gets
    prompts of at most 2,048 examples evenly spaced in the dataset, in turn the one that is most like its own, by the
    cosine of the tf-idf of their tokens, and one at random: what is alike shows an answer to another prompt of the same
    task, what is not shows an answer that any prompt would do for. Prompts and answers equal to its own do not count. A
    prompt with which the example would be longer than the longest of the dataset loses its first tokens.

    Args:
        task: That of a language model.
        examples: The dataset.
        k: How many prompts for each; the same once more where there are not so many.
        todo: Positions of the examples that they are wanted for; by default all.

    Raises:
        BadSetting: The task is not that of a language model, or k is no number.
        BadExample: An example has no prompt or is more than text, or there is no other prompt.
    """

    def __init__(self, task: Task, examples: Examples, k: int, todo: Sequence[int] | None = None):
        if not isinstance(task, LanguageModel) or not isinstance(k, int) or k < 1:
            raise BadSetting(
                f"other_prompts={k!r} for the task {task.name}: it is a number of prompts, at least 1, and examples "
                "have prompts and answers where the model is a language model. Leave it out elsewhere."
            )
        self._examples, self._causal = examples, isinstance(task, CausalLM)
        self._longest = max(examples.survey()[1])
        self._parts = partial(parts_of, task, examples)
        self._pool = self._parts(range(0, len(examples), -(-len(examples) // POOL)))
        self._others: dict[int, list[int]] = {}  # position -> places in the pool
        self.k, self.turn = k, 0
        tfidf = TfidfVectorizer(analyzer=list).fit([parts.prompt for parts in self._pool])
        pool = tfidf.transform([parts.prompt for parts in self._pool])  # [p, v]
        todo = range(len(examples)) if todo is None else todo
        for start in range(0, len(todo), AT_ONCE):
            positions = list(todo[start : start + AT_ONCE])
            own = self._parts(positions)
            likeness = torch.from_numpy((tfidf.transform([parts.prompt for parts in own]) @ pool.T).toarray())  # [b, p]
            for position, parts, order in zip(
                positions, own, likeness.argsort(dim=1, descending=True, stable=True).tolist(), strict=True
            ):
                self._others[position] = self._chosen(position, parts, order, k)

    def __len__(self) -> int:
        return len(self._examples)

    def batch(self, positions: Sequence[int]) -> dict[str, Any]:
        """The collated batch of some examples, each with its prompt number `turn`."""
        rows = []
        for position, parts in zip(positions, self._parts(positions), strict=True):
            prompt = self._pool[self._others[position][self.turn]].prompt
            prompt = prompt[-max(1, self._longest - len(parts.answer)) :] if self._causal else prompt
            rows.append(parts._replace(prompt=prompt).row(self._causal))
        return self._examples.pad(rows)

    def _chosen(self, position: int, own: Parts, order: Sequence[int], k: int) -> list[int]:
        pool = self._pool
        others = [at for at in order if pool[at].prompt != own.prompt and pool[at].labels != own.labels]
        if not others:
            raise BadExample(
                f"example {position} has no other prompt to be compared with: all {len(self._pool)} that were looked "
                "at have the same tokens or the same answer. Leave other_prompts out."
            )
        draw = Random(position)
        found: list[int] = []
        while len(found) < k:
            left = [at for at in others if at not in found] or others
            found.append(draw.choice(left) if len(found) % 2 else left[0])
        return found


def other_prompt_losses(
    model: nn.Module,
    task: Task,
    examples: Examples,
    todo: Sequence[int],
    k: int | None,
    batch_size: BatchSize,
    split: str,
    quiet: bool = False,
) -> Tensor | None:
    """The loss of each answer after `k` prompts of other examples, in evaluation mode, by forward passes alone.

    Returns:
        `[n, k]`, NaN for examples that are not in `todo`. With `k=None` two prompts, and `None` where not all examples
        have one.

    Raises:
        BadSetting, BadExample: See `OtherPrompts`; BadExample also where a loss is not finite.
    """
    try:
        others = OtherPrompts(task, examples, DEFAULT if k is None else k)
    except (BadSetting, BadExample):
        if k is None:
            return None
        raise
    lengths, found = examples.survey()[1], torch.full((len(examples), others.k), torch.nan)
    title = None if quiet else f"losses of {split} after other prompts"
    with FixedWeights(model, task, RowCatcher([])) as resting:
        for turn in range(others.k):
            others.turn = turn
            for at, stats in sweep(resting.judge, others, todo, lengths, batch_size, resting.device, title):
                found[at, turn] = losses = stats["loss"].to("cpu", found.dtype)
                if not losses.isfinite().all():
                    raise BadExample(
                        f"the answer of example {at[int((~losses.isfinite()).nonzero()[0])]} of {split} has no finite "
                        "loss after the prompt of another one. Look at prompts of unheard-of tokens or lengths and "
                        "leave them out, compute in a wider dtype, or leave other_prompts=0."
                    )
    return found
