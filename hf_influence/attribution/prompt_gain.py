"""Whether an answer belongs to its prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.statistic import statistic


@dataclass(kw_only=True)
class PromptGain(Method, name="prompt_gain"):
    """By how much an answer is likelier after its own prompt than after those of others; 0 where its own is no help.

        score[i] = 1 − ℓ(a_i | x_i) / (1/k Σ_{j ∈ N_i} ℓ(a_i | x_j)),   N_i k others: like x_i, and at random, in turn

    The loss after other prompts is what the answer costs by itself, so that long, rare or badly written answers do not
    come lowest for that, as they do by `loss`; answers to another question, refusals and stock phrases do.

    Cost: k forward passes over the training examples, when they are collected.
    Use when: a language model was fine-tuned on prompts and answers, and some answers may not belong to their prompts.
    See also: Loss, LossMean.
    Source: a method of this library; Li et al., From Quantity to Quality, NAACL 2024, compare with no prompt at all.
    """

    needs = ("loss", "other_prompt_loss")

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, 1]`; MissingRows if the losses after other prompts were not collected."""
        train = rows.train
        own = statistic(train, "loss", f"method '{self.name}'")  # [n]
        others = statistic(train, "other_prompt_loss", f"method '{self.name}'")  # [n, k]
        return gain(own, others).to(train.dtype)[:, None]


def gain(loss: Tensor, others: Tensor) -> Tensor:
    """1 − loss / mean of the others, `[n]`; an answer that costs nothing after other prompts owes its own nothing.

    Args:
        loss: Of answers after a prompt, `[n]`.
        others: After other prompts, `[n, k]`, or `[n]` after one.
    """
    mean = others.mean(1) if others.ndim == 2 else others
    return torch.where(mean > 0, 1 - loss / mean, 0.0)
