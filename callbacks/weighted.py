"""Training in which every example counts as much as its weight says, or is believed as far as its label is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from hf_influence.errors import BadExample, BadSetting
from hf_influence.gradients.batches import decoder_inputs
from hf_influence.gradients.objective import own_losses
from hf_influence.task import IGNORED, Classification, LanguageModel, Seq2SeqLM, labels_of, task_of

By = Literal["loss", "sampling"]


class WeightedTrainer(Trainer):
    """A Trainer for a dataset with a column of weights, such as `Reweight` makes; all else is as ever.

        weighted = Reweight().apply(train, scores)
        WeightedTrainer(model=model, args=args, train_dataset=weighted, data_collator=collator).train()

    With `by="loss"` the loss of example i counts w_i times: with weights of 1 the loss is the plain Trainer's,

        L = Σ_i w_i Σ_t ℓ_it / number of labelled tokens (of examples, for a classifier) of the optimiser step

    A collator that knows no weights, as that of TRL's SFTTrainer, may drop them: they go past it. So this weighs
    instructions, at the cost of another forward pass a step; not with packing, and by="sampling" with `padding_free`:

        class WeightedSFTTrainer(WeightedTrainer, SFTTrainer): pass

    With `by="sampling"` the loss is plain, and examples are drawn with replacement in proportion to their weights, as
    many an epoch as there are. In evaluation all examples count alike.

    Labels of a classifier may be vectors of class probabilities, as `Relabel(how="posterior")` makes them.

    Args:
        weight_column: The column of weights, each at least 0.
        by: "loss" or "sampling".

    Raises:
        BadSetting: Another loss function of your own or label smoothing, an unknown `by`; when training starts:
            by="sampling" of a stream, or packing.
        BadExample: When training starts: no such column, a weight below 0, or a collator that packs with by="loss";
            in training: labels of several classes, of a model that does not know that an example may have them.
    """

    data_collator: Any

    def __init__(self, *args: Any, weight_column: str = "weight", by: By = "loss", **kwargs: Any):
        if by not in ("loss", "sampling"):
            raise BadSetting(f"by={by!r}: choose 'loss' or 'sampling'.")
        if kwargs.get("compute_loss_func") is not None:
            raise BadSetting("WeightedTrainer has a loss function of its own: leave out compute_loss_func.")
        self.weight_column = weight_column
        self.by = by
        self._weights: Tensor | None = None
        super().__init__(*args, compute_loss_func=self._loss, **kwargs)
        if self.args.label_smoothing_factor > 0:
            raise BadSetting(
                f"label_smoothing_factor={self.args.label_smoothing_factor} changes the loss, and WeightedTrainer has "
                "one of its own. Leave it at 0."
            )
        self._task = task_of(self.model, "sum")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.by == "loss" and self.weight_column not in self._signature_columns:
            self._signature_columns.append(self.weight_column)

    def get_train_dataloader(self) -> Any:
        """As ever, once the weights have been looked at; those of a stream are seen as they come."""
        columns = getattr(self.train_dataset, "column_names", None)
        listed = isinstance(self.train_dataset, Dataset)
        if self.by == "sampling" and not listed:
            raise BadSetting(
                f"by='sampling' draws rows by number, and a {type(self.train_dataset).__name__} is no datasets.Dataset "
                "that has them. Use by='loss', or make a Dataset of it (Dataset.from_generator)."
            )
        if getattr(self.args, "packing", False):
            raise BadSetting(
                "packing=True: a row that is trained on holds several examples, and they have no weight together. Set "
                "packing=False."
            )
        if columns is not None and self.weight_column not in columns:
            raise BadExample(
                f"the training set has no column {self.weight_column!r} (it has {columns}). Make one: "
                "Reweight().apply(dataset, scores), or name yours with weight_column=…."
            )
        if listed:
            weights = self._column()
            if not bool((weights >= 0).all()) or not bool(torch.isfinite(weights).all()) or weights.sum() == 0:
                raise BadExample(
                    f"the column {self.weight_column!r} must hold finite weights of at least 0, not all of them 0 "
                    f"(the smallest is {float(weights.min()):g})."
                )
        collate = self.data_collator
        if self.by == "loss":
            self.data_collator = _Carrying(collate, self.weight_column)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.by == "loss":
            return super()._get_train_sampler(train_dataset)
        return InProportion(
            self._column().double(), self.args.seed if self.args.data_seed is None else self.args.data_seed
        )

    def _column(self) -> Tensor:
        """The weight of each row, `[n]`; NaN where there is none."""
        column = self.train_dataset.with_format(None)[self.weight_column][:]
        return torch.tensor([math.nan if weight is None else weight for weight in column])

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The weighted loss in training, the plain one in evaluation and where weights say how often a row comes."""
        weights = inputs.pop(self.weight_column, None)
        count = model.training and self.by == "loss"
        if weights is None and count:
            raise BadExample(
                f"the batch has no {self.weight_column!r}: the collator has dropped it, or packs several examples into "
                "a row. Let it pass, or use by='sampling'."
            )
        self._weights = weights if count else None
        if isinstance(self._task, Seq2SeqLM) and "labels" in inputs and "decoder_input_ids" not in inputs:
            # the Trainer takes the labels away, of which the model would make them
            inputs = {**inputs, "decoder_input_ids": decoder_inputs(self.model, inputs["labels"])}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = _logits(outputs)
        task, count = self._task, torch.tensor(len(labels), device=logits.device)
        if isinstance(task, LanguageModel):
            targets = task.targets(labels, None)  # [b, t]
            each, count = own_losses(task, logits, targets), (targets != IGNORED).sum()
        else:
            each = _of_classes(task, logits, labels)
            num_items_in_batch = _examples(num_items_in_batch, labels)
        if self._weights is not None:
            each = each * self._weights.to(each)
        total: Tensor = each.sum() / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return total


@dataclass(frozen=True)
class _Carrying:
    """A collator, and the weights of the rows beside the batch that it makes of them, if it has dropped them."""

    collate: Callable[[list[Any]], Any]
    column: str

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(rows)
        given = self.column in batch or any(self.column not in row for row in rows)
        if not given and len(labels_of(dict(batch))) == len(rows):  # or it packs them
            batch[self.column] = torch.tensor([float(row[self.column]) for row in rows])
        return batch


class InProportion(Sampler[int]):
    """Row numbers drawn with replacement in proportion to weights `[n]`, n an epoch, others in each epoch."""

    def __init__(self, weights: Tensor, seed: int):
        self.weights, self.seed, self.epoch = weights, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The Trainer does so before each, also where it goes on in the middle of one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(Random(f"{self.seed} {self.epoch}").getrandbits(63))
        self.epoch += 1
        return iter(torch.multinomial(self.weights, len(self), replacement=True, generator=generator).tolist())


def soft_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The loss for labels that are vectors of class probabilities, for `Trainer(compute_loss_func=…)`.

        ℓ = −Σ_k ỹ_k ln softmax(z)_k,   the mean over the examples of the optimiser step

        soft = Relabel(how="posterior").apply(train, scores)
        Trainer(model=model, args=args, train_dataset=soft, compute_loss_func=soft_cross_entropy).train()

    Labels that are numbers of classes, of an evaluation set say, give the plain loss.
    """
    logits = _logits(outputs)
    target = labels.to(logits) if _vectors(labels) else labels.reshape(-1)
    count = _examples(num_items_in_batch, labels)
    return F.cross_entropy(logits, target, reduction="sum") / (len(labels) if count is None else count)


def _logits(outputs: Any) -> Tensor:
    """Of a model that was not given the labels, as the Trainer keeps them for its loss function."""
    logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return logits


def _examples(num_items_in_batch: Tensor | int | None, labels: Tensor) -> Tensor | int | None:
    """How many examples there are, where the Trainer counts every entry of their labels."""
    if num_items_in_batch is None or not _vectors(labels):
        return num_items_in_batch
    return num_items_in_batch // labels.shape[1]


def _vectors(labels: Tensor) -> bool:
    """Whether they are vectors with an entry for each class, and not numbers of classes, `[b]` or `[b, 1]`."""
    return labels.ndim == 2 and labels.shape[1] > 1


def _of_classes(task: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each example, `[b]`."""
    assert isinstance(task, Classification)
    if _vectors(labels) and task.classes > 1 and task.problem in (None, "single_label_classification"):
        several = ((labels == 0) | (labels == 1)).all(1) & (labels.sum(1) != 1)
        if bool(several.any()):
            raise BadExample(
                f"the label {labels[several][0].tolist()} is of none or several classes, and a model of one class "
                'would not learn that. Tell it: model.config.problem_type = "multi_label_classification".'
            )
        return F.cross_entropy(logits, labels.to(logits), reduction="none")
    return own_losses(task.settled(labels), logits, labels)
