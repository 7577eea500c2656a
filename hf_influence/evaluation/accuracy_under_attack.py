"""How much of what a model knows survives an adversary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.errors import BadExample, UnsupportedModel
from hf_influence.gradients.batches import Collator, Examples, inputs_of, on_device
from hf_influence.gradients.modes import evaluating
from hf_influence.gradients.own_loss import OwnTask
from hf_influence.gradients.own_loss import task_of as own_task
from hf_influence.gradients.sweep import BatchSize, check_batch_size, sweep
from hf_influence.gradients.targets.robustness import MovedQueries
from hf_influence.task import LanguageModel, task_of


def accuracy_under_attack(
    model: nn.Module,
    dataset: Any,
    attack: MovedQueries,
    *,
    data_collator: Collator | None = None,
    batch_size: BatchSize = "auto",
    remove_unused_columns: bool = True,
    task: OwnTask | None = None,
) -> float:
    """The share of examples that are predicted right after an adversary who sees the model has moved each of them.

        accuracy_under_attack(model, test, robustness(0.5, steps=3))

    What moves is the input where that is real numbers, else what the input embedding makes of the tokens; the labels
    stay. The attack is made anew for the model at hand, since one that was made for another model would flatter it.
    Higher is better; the accuracy without an attack is `losses(model, test)["correct"].mean()`. An attacker who reaches
    a share p of the examples, as in the paper, leaves (1 − p) of the one and p of the other on average. The model is in
    evaluation mode meanwhile and comes back as it was.

    Cost: a forward pass, and a forward and backward pass for each step of the attack.

    Args:
        model: A classifier, or a language model (then right tokens are counted, as a share of each example's).
        dataset: Test examples with labels, as in `collect`.
        attack: `robustness(epsilon, steps, direction=…)` or `evasion(gamma)`, the objects that are targets for
            `collect_target` as well; measure on other examples than those of the target.
        data_collator: As in `collect`, like the two that follow.
        batch_size: See there.
        remove_unused_columns: See there.
        task: See there: the loss that `robustness` moves the examples up. What is right does not depend on it.

    Returns:
        From 0 to 1.

    Raises:
        BadExample: An empty dataset, one without labels, or an answer that is not finite.
        BadSetting: A task that does not suit the model.
        UnsupportedModel: A model whose answers are not right or wrong, or without an input that can be moved.

    See also: hf_influence.robustness (the loss under the same attack, as a target).
    Source: Revisiting Inner Product (IP Ensemble), section 7.
    """
    check_batch_size(batch_size)
    attack = attack.with_task(own_task(model, task=task))
    examples = Examples(dataset, model, data_collator, None, remove_unused_columns)
    _, lengths = examples.survey()
    device = next(model.parameters()).device

    def correct(batch: dict[str, Any]) -> Tensor:
        with attack.moving(model, on_device(batch, device)) as moved:
            return _correct(model, moved)

    total = 0.0
    with evaluating(model), torch.no_grad():
        for positions, right in sweep(correct, examples, range(len(examples)), lengths, batch_size, device, "attack"):
            if bad := right.isnan().nonzero().flatten().tolist():
                raise BadExample(
                    f"under attack the model gives example {positions[bad[0]]} a loss that is not finite, so its "
                    "answer is neither right nor wrong. Look at the loss without an attack, losses(model, dataset); "
                    "where that is finite, choose a smaller epsilon or gamma."
                )
            total += float(right.double().sum())
    return total / len(examples)


def _correct(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """1 where an example is predicted right and 0 where not, `[b]`; of a language model the share of right tokens.

    NaN where its loss is not finite.
    """
    task = task_of(model)
    inputs, labels, mask = inputs_of(model, batch, task)
    targets = task.targets(labels, mask) if isinstance(task, LanguageModel) else labels
    outcome = task.outcome(model(**inputs).logits, targets)
    if "correct" not in outcome.stats:
        raise UnsupportedModel(
            f"{type(model).__name__} predicts numbers, which are neither right nor wrong, so it has no accuracy. Look "
            "at its loss under attack: collect_target(..., target=robustness(...)) stores it as the statistic 'value'."
        )
    return outcome.stats["correct"].where(outcome.loss.isfinite(), torch.nan)
