"""Relabel: suspicious rows get the label they should have had, instead of being dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Value
from datasets import List as ListOf
from torch import Tensor

from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter.dataset_filter import DatasetFilter
from hf_influence.filter.matching import rows_named
from hf_influence.scores import Scores

HOW = ("predicted", "flip", "soft")


@dataclass(kw_only=True)
class Relabel:
    """New labels for the rows that a filter would drop; every row stays, in its place.

    With φ the probabilities that the model gives the K classes of a row, m its label:

        "predicted"   argmax_{k ≠ m} φ_k
        "flip"        1 − m, for two classes; needs no probabilities
        "soft"        ỹ_k = ln(1 − φ_m) / ((K − 1) ln φ_k) for k ≠ m, ỹ_m = 0: a vector in place of the label

    Soft labels of two classes are flipped ones. The rows that keep their label get a one-hot vector then; train on
    them with a cross-entropy that takes vectors (`torch.nn.functional.cross_entropy` does).

    Look at `suggest(...)` first: it gives the rows, with old and new label, for a person to decide.

    >>> train = Dataset.from_dict({"text": ["fine", "awful"], "label": [1, 1]})
    >>> scores = Scores(torch.tensor([[1.0], [-1.0]]), ids=[0, 1], method="ip")
    >>> Relabel(suspects=DatasetFilter(drop=1), how="flip").apply(train, scores)["label"][:]
    [1, 0]

    Source: GEX, section 5.2, eq. 16; Kong et al., Resolving Training Biases via Influence-based Data Relabeling, 2022.

    Raises:
        BadSetting: An unknown `how`.
    """

    suspects: DatasetFilter
    """Says which rows are suspicious: those that it would drop."""
    how: str = "predicted"
    label: str = "label"
    """The column of class numbers."""
    changed: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)
    """Rows that the last `apply` relabelled, worst first."""

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise BadSetting(f"how={self.how!r} is no way to relabel. Choose one of {', '.join(map(repr, HOW))}.")

    def suggest(self, dataset: Dataset, scores: Scores | Sequence[Scores], probabilities: Any = None) -> Dataset:
        """The suspicious rows, worst first, with the columns `row`, `score`, `label_before` and `label_after` added.

        Args:
            dataset: What was scored.
            scores: As for the filter.
            probabilities: Of the classes, `[n, K]` in dataset order; "flip" does without. They are the statistic
                "probabilities" of the training rows: `GradientStore.open(path).rows("train").stats["probabilities"]`.

        Raises:
            BadExample: No column of class numbers.
            BadSetting: Probabilities that are missing or do not fit.
        """
        rows, before, after, score = self._judge(dataset, scores, probabilities)
        chosen = dataset.select(rows)
        new = after if self.how == "soft" else [int(value) for value in after]
        added = {"row": rows, "score": score, "label_before": [before[row] for row in rows], "label_after": new}
        for column, values in added.items():
            if column in chosen.column_names:
                raise BadExample(f"the dataset has a column {column!r} already. Rename or remove it.")
            chosen = chosen.add_column(column, values)
        return chosen

    def apply(self, dataset: Dataset, scores: Scores | Sequence[Scores], probabilities: Any = None) -> Dataset:
        """The dataset with the new labels; arguments and errors as in `suggest`."""
        rows, labels, after, _ = self._judge(dataset, scores, probabilities)
        features = dataset.features.copy()
        new: list[Any] = list(labels)
        if self.how == "soft":
            classes = len(after[0]) if after else torch.as_tensor(probabilities).shape[1]
            new = torch.eye(classes, dtype=torch.float64)[torch.tensor(labels)].tolist()
            features[self.label] = ListOf(Value("float64"))
        for row, label in zip(rows, after, strict=True):
            new[row] = label
        self.changed = tuple(rows)
        order = dataset.column_names
        kind = dataset.format["type"]
        changed = dataset.with_format(None).remove_columns(self.label).add_column(self.label, new)
        return changed.select_columns(order).cast(features).with_format(kind)

    def _judge(
        self, dataset: Dataset, scores: Scores | Sequence[Scores], probabilities: Any
    ) -> tuple[list[int], list[int], list[Any], list[float]]:
        """Suspicious rows, all labels, the new labels of those rows, and their scores."""
        if self.label not in dataset.column_names:
            raise BadExample(f"no column {self.label!r} among {dataset.column_names}. Name it: Relabel(label='…', …).")
        labels = dataset.with_format(None)[self.label][:]
        if not all(isinstance(label, int) and label >= 0 for label in labels):
            raise BadExample(
                f"the column {self.label!r} holds {next(x for x in labels if not isinstance(x, int) or x < 0)!r}, "
                "which is no class number, so there is no other class to give. Relabelling is for one class a row."
            )
        self.suspects.apply(dataset, scores)
        assert self.suspects.report is not None
        removed = self.suspects.report.removed
        id_column = scores.id_column if isinstance(scores, Scores) else scores[0].id_column
        where = rows_named(dataset, [item.id for item in removed], id_column)
        if self.how == "flip":
            kind = dataset.features[self.label]
            if max(labels) > 1 or (isinstance(kind, ClassLabel) and kind.num_classes != 2):
                raise BadSetting("how='flip' is for two classes. Pass probabilities and how='predicted' or 'soft'.")
            return where, labels, [1 - labels[row] for row in where], [item.score for item in removed]
        phi = self._probabilities(probabilities, labels)
        give = self._soft if self.how == "soft" else self._predicted
        return where, labels, [give(phi[row], labels[row]) for row in where], [item.score for item in removed]

    def _probabilities(self, probabilities: Any, labels: list[int]) -> Tensor:
        if probabilities is None:
            raise BadSetting(
                f"how={self.how!r} needs the model's probabilities [n, K] in dataset order. They are a statistic of "
                "the training rows: GradientStore.open(path).rows('train').stats['probabilities']."
            )
        phi = torch.as_tensor(probabilities).double()
        if phi.ndim != 2 or len(phi) != len(labels) or phi.shape[1] <= max(labels):
            raise BadSetting(
                f"probabilities of shape {list(phi.shape)} for {len(labels)} rows with labels up to {max(labels)}: "
                "give one row an example and one column a class."
            )
        if bool((phi < 0).any()) or bool(((phi.sum(1) - 1).abs() > 1e-3).any()):
            raise BadSetting("the probabilities are negative or do not add up to 1 in some row. Logits? Apply softmax.")
        return phi

    @staticmethod
    def _predicted(phi: Tensor, label: int) -> int:
        return int(phi.index_fill(0, torch.tensor(label), -1).argmax())

    @staticmethod
    def _soft(phi: Tensor, label: int) -> list[float]:
        tiny = torch.finfo(torch.float64).tiny
        rest = 1 - phi[label]
        soft = (rest.clamp(min=tiny).log() / ((len(phi) - 1) * phi.clamp(min=tiny).log())).nan_to_num(0)
        soft[label] = 0
        if len(phi) == 2:
            soft[1 - label] = 1  # its limit, free of rounding
        return [float(value) for value in soft]
