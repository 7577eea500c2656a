"""Relabel: rows get the label they should have had, as far as it is known, instead of being dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import ClassLabel, Dataset, IterableDataset, Value
from datasets import List as ListOf
from torch import Tensor

from hf_influence.dataset.wording import printable
from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter.actions import Written
from hf_influence.filter.dataset_filter import DatasetFilter
from hf_influence.filter.decision import Decision
from hf_influence.filter.rankings import Given, StoreOrPath, estimates_of, rankings_of, statistic_in, store_of, wrong_of
from hf_influence.filter.rule import Rule
from hf_influence.filter.streams import By, StreamRows
from hf_influence.filter.wording import quoted
from hf_influence.scores import Scores

HOW = ("predicted", "flip", "soft", "posterior")


@dataclass(kw_only=True)
class Relabel(Rule):
    """New labels for the rows that a filter would drop, or for all; every row stays, in its place.

    With φ the probabilities that the model gives the K classes of a row, which the store has, m its label, p the
    probability that m is wrong (`scores.probability_wrong()`):

        "predicted"   argmax_{k ≠ m} φ_k
        "flip"        1 − m, for two classes, which may be two texts ("positive" and "negative"); needs no probabilities
        "soft"        ỹ_k = ln(1 − φ_m) / ((K − 1) ln φ_k) for k ≠ m, ỹ_m = 0: a vector in place of the label
        "posterior"   ỹ_m = 1 − p, ỹ_k = p φ_k / (1 − φ_m) for k ≠ m: a vector; needs scores by "auto" with queries, and
                      φ for more than two classes only, where ỹ_{1−m} = p

    `Relabel(how="posterior")` is the one to train on: each row counts as far as its label can be believed, no row is
    lost, and what is between right and wrong is not memorised. A plain Trainer takes vectors for several labels
    at once: give it their loss, `Trainer(…, compute_loss_func=soft_cross_entropy)` of `hf_influence.callbacks`. Soft
    labels of two classes are flipped ones; rows that keep their label among vectors get a one-hot one.

    The other splits of a `DatasetDict` keep their labels, so that metrics read them as before. The hub takes splits
    with labels of the same kind: after "soft" and "posterior" push that split alone, `new["train"].push_to_hub(…)`. A
    stream is relabelled as its rows come; `by` must name the store then, which knows their labels.

    Look at `suggest(...)` first: it gives the rows, with old and new label, for a person to decide.

    >>> train = Dataset.from_dict({"text": ["fine", "awful"], "label": [1, 1]})
    >>> scores = Scores(torch.tensor([[1.0], [-1.0]]), ids=[0, 1], method="ip")
    >>> Relabel(suspects=DatasetFilter(drop=1), how="flip").apply(train, scores)["label"][:]
    [1, 0]

    Source: GEX, section 5.2, eq. 16; Kong et al., Resolving Training Biases via Influence-based Data Relabeling, 2022;
    "posterior" is of this library.

    Raises:
        BadSetting: An unknown `how`, or no suspects where it needs them; when it is applied, probabilities that are
            missing or do not fit, a store of other labels, or "posterior" by scores that are no log-odds.
        BadExample: When it is applied: no column of class numbers, or of two names, or of names beside tokens that
            were made of them.
        StoreError: When it is applied: a path that is none of a store.
    """

    suspects: DatasetFilter | None = None
    """Says which rows are suspicious: those that it would drop. Without it, for "posterior" alone, every row is."""
    how: str = "predicted"
    label: str = "label"
    """The column of class numbers; for "flip" it may name the classes, as the answers of a language model do, where
    they are not tokenised yet."""
    probabilities: StoreOrPath | Tensor | Sequence[Sequence[float]] | None = field(
        default=None, repr=False, compare=False
    )
    """Of the classes, for "predicted" and "soft", and for "posterior" of more than two classes: the store that was
    scored, which has those of a classifier, or its path, or numbers of yours, `[n, K]` in the order of the dataset, of
    a stream in that of the scores. By default those of the store that is given in place of scores, or for a stream."""

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise BadSetting(f"how={self.how!r} is no way to relabel. Choose one of {', '.join(map(repr, HOW))}.")
        if self.suspects is None and self.how != "posterior":
            raise BadSetting(
                f"how={self.how!r} needs to know which rows. Say how many are suspicious: "
                "Relabel(suspects=DatasetFilter(drop=0.05), …), or --suspects 0.05."
            )

    def suggest(self, dataset: Dataset, scores: Given) -> Dataset:
        """The suspicious rows, worst first, with the columns `row`, `score`, `label_before` and `label_after` added.

        Arguments and errors as in `apply`.
        """
        if not isinstance(dataset, Dataset):
            raise BadExample(f"suggestions are rows of a datasets.Dataset, not of {type(dataset).__name__}.")
        decision = self.decide(dataset, scores)
        rows, (column,) = _suspects(decision), decision.writes
        assert column.old is not None
        chosen = dataset.select(rows)
        added = {
            "row": rows,
            "score": [decision.scores[row] for row in rows],
            "label_before": [column.old[row] for row in rows],
            "label_after": [column.new[row] for row in rows],
        }
        for name, values in added.items():
            if name in chosen.column_names:
                raise BadExample(f"the dataset has a column {name!r} already. Rename or remove it.")
            chosen = chosen.add_column(name, values)
        return chosen

    def decide(self, dataset: Dataset | IterableDataset, scores: Given, by: By = None) -> Decision:
        """What `apply` would do with each row; arguments and errors as there."""
        rankings, by = rankings_of(scores), StreamRows.of(by)
        if self.suspects is None:
            decision = Decision.keeping_all(dataset, rankings, by)
        else:
            decision = self.suspects.decide(dataset, rankings, by)
        labels, names = self._labels(dataset, rankings[0], by)
        rows = [i for i, action in enumerate(decision.actions) if action == "drop" or self.suspects is None]
        feature = (dataset.features or {}).get(self.label)
        given: Any = self.probabilities
        places = (store_of(scores), by.store) if given is None else (given,)
        store = next((place for place in places if isinstance(place, StoreOrPath)), None)
        if store is not None and self.how != "flip":
            given = self._stored(store, rankings[0], decision.ids, labels)
        if self.how == "posterior":
            new = self._believed(rows, labels, feature, given, wrong_of(rankings, decision.ids))
            kind: Any = ListOf(Value("float64"))
        else:
            new, kind = self._new(rows, labels, feature, given)
        as_given: Callable[[int], Any] = bool if feature == Value("bool") else names.__getitem__ if names else int
        old = list(map(as_given, labels))
        if kind == feature:
            classes = ["false", "true"] if as_given is bool else getattr(feature, "names", [])
            if classes and max(new, default=0) >= len(classes):
                raise BadSetting(
                    f"the column {self.label!r} is of the classes {printable(', '.join(classes))}, and the "
                    "probabilities are of more. Pass one column for each, in this order."
                )
            new = list(map(as_given, new))
        actions = ["keep"] * len(labels)
        for row in rows:
            actions[row] = "relabel"
        if self.suspects is None:
            rule = f"relabel how={self.how!r}"
            reasons: tuple[str, ...] = (f"the rule {rule} gives each class the probability that it is right",)
        else:
            rule = f"relabel how={self.how!r} of {decision.rule}"
            instead = f", and such rows get another label (how={self.how!r}) instead"
            reasons = tuple(reason + instead for reason in decision.reasons)
        return decision.but(
            estimates=estimates_of(rankings) if self.how == "posterior" else decision.estimates,
            rule=rule,
            actions=actions,
            reasons=reasons,
            reason=[0] * len(labels) if self.suspects is None else decision.reason,
            writes=(Written(name=self.label, new=new, feature=kind, old=old, old_feature=feature),),
        )

    def _labels(
        self, dataset: Dataset | IterableDataset, scores: Scores, by: StreamRows
    ) -> tuple[list[int], list[str] | None]:
        """The class number of each row, and the names of the classes where the column has these.

        Those of a stream come from the store.
        """
        if self.label not in (dataset.column_names or [self.label]):
            raise BadExample(f"no column {self.label!r} among {dataset.column_names}. Name it: Relabel(label='…', …).")
        if isinstance(dataset, Dataset):
            labels = dataset.with_format(None)[self.label][:]
        elif (dataset.features or {}).get(self.label) in (Value("string"), Value("large_string")):
            raise BadExample(
                f"the column {self.label!r} of the stream holds names, and which class has which is not known before "
                "its end. Make a Dataset of it (Dataset.from_generator)."
            )
        else:
            labels = by.labels(scores)
        names = sorted({label for label in labels if isinstance(label, str)})
        if self.how == "flip" and len(names) == 2 and all(isinstance(label, str) for label in labels):
            if "input_ids" in dataset.column_names:
                raise BadExample(
                    f"the column {self.label!r} holds names, and the tokens beside it (input_ids) would still be those "
                    "of the old names, so training would go on as before. Relabel the rows without tokens, "
                    "dataset.remove_columns([…]), and tokenise what comes of it."
                )
            return [names.index(label) for label in labels], names
        odd = [label for label in labels if not isinstance(label, int) or label < 0]
        if odd:
            raise BadExample(
                f"the column {self.label!r} holds {printable(repr(odd[0]))}, which is no class number, so there is no "
                "other class to give. Relabelling is for one class a row: numbers from 0 (dataset.class_encode_column "
                "makes them of names), or two names with how='flip'."
            )
        return list(map(int, labels)), None

    def _new(self, rows: list[int], labels: list[int], feature: Any, given: Any) -> tuple[list[Any], Any]:
        """The labels of all rows after relabelling some, and the type of the column."""
        new: list[Any] = list(labels)
        if self.how == "flip":
            if not _two(labels, feature):
                raise BadSetting("how='flip' is for two classes. Choose how='posterior', 'predicted' or 'soft'.")
            for row in rows:
                new[row] = 1 - labels[row]
            return new, feature
        phi = self._phi(given, labels)
        if self.how == "soft":
            new = torch.eye(phi.shape[1], dtype=torch.float64)[torch.tensor(labels)].tolist()
            feature = ListOf(Value("float64"))
        give = self._soft if self.how == "soft" else self._predicted
        for row in rows:
            new[row] = give(phi[row], labels[row])
        return new, feature

    def _believed(self, rows: list[int], labels: list[int], feature: Any, given: Any, wrong: Tensor) -> list[Any]:
        """The probabilities of all classes for some rows, one-hot for the others."""
        if given is None and _two(labels, feature):
            phi = torch.full((len(labels), 2), 0.5, dtype=torch.float64)  # all of p goes to the one other class
        else:
            phi = self._phi(given, labels)
        own = torch.eye(phi.shape[1], dtype=torch.float64)[labels]  # [n, K]
        others = phi.clamp(min=torch.finfo(torch.float64).tiny) * (1 - own)
        believed = own * (1 - wrong)[:, None] + others / others.sum(1, keepdim=True) * wrong[:, None]
        own[rows] = believed[rows]
        return own.tolist()

    def _stored(self, store: StoreOrPath, scores: Scores, ids: Sequence[Any], labels: list[int]) -> Tensor | None:
        """The probabilities that a store has of the rows `ids`, `[n, K]`; `None` unless it has those of all."""
        known = statistic_in(store, scores, "label", ids)
        if known is not None and known.tolist() != labels:
            at = next(i for i, label in enumerate(labels) if known[i] != label)
            raise BadSetting(
                f"row {quoted(ids[at])} has the label {labels[at]} in the dataset and {int(known[at])} in the store, "
                "whose probabilities are of other rows or classes then. Pass the store and the dataset that was scored."
            )
        return statistic_in(store, scores, "probabilities", ids)

    def _phi(self, given: Any, labels: list[int]) -> Tensor:
        """The probabilities that are given, `[n, K]` in float64, if they fit."""
        if given is None:
            of = " of more than two classes" if self.how == "posterior" else ""
            raise BadSetting(
                f"how={self.how!r}{of} needs the model's probabilities. Pass the store that was scored, "
                "Relabel(probabilities='runs/mine', …) or --store runs/mine, which has them if it is of a classifier "
                "with one label a row; or numbers of yours, [n, K] in dataset order."
            )
        phi = torch.as_tensor(given).double()
        if phi.ndim != 2 or len(phi) != len(labels) or phi.shape[1] <= max(labels):
            raise BadSetting(
                f"probabilities of shape {list(phi.shape)} for {len(labels)} rows with labels up to {max(labels)}: "
                "give one row an example and one column a class."
            )
        if not bool((phi >= 0).all()) or not bool(((phi.sum(1) - 1).abs() <= 1e-3).all()):
            raise BadSetting(
                "the probabilities are negative or NaN or do not add up to 1 in some row. Logits? Apply softmax."
            )
        return phi

    @staticmethod
    def _predicted(phi: Tensor, label: int) -> int:
        return int(phi.index_fill(0, torch.tensor(label), -1).argmax())

    @staticmethod
    def _soft(phi: Tensor, label: int) -> list[float]:
        tiny = torch.finfo(torch.float64).tiny
        phi = phi.clone()
        phi[label].clamp_(min=tiny)  # φ_m = 0 beside φ_k = 1 would be 0 / 0
        others = (phi * (1 - torch.eye(len(phi), dtype=phi.dtype))).sum(1)  # 1 − φ, without rounding to 0
        log = torch.where(phi > 0.5, torch.log1p(-others), phi.clamp(min=tiny).log())
        rest = torch.log1p(-phi[label]) if phi[label] < 0.5 else others[label].clamp(min=tiny).log()
        soft = (rest / ((len(phi) - 1) * log)).nan_to_num(0)
        soft[label] = 0
        if len(phi) == 2:
            soft[1 - label] = 1  # its limit, free of rounding
        return [float(value) for value in soft]


def _two(labels: list[int], feature: Any) -> bool:
    """Whether there are no more classes, as far as the dataset says."""
    return max(labels, default=0) < 2 and (not isinstance(feature, ClassLabel) or feature.num_classes == 2)


def _suspects(decision: Decision) -> list[int]:
    """The rows that get another label, worst first."""
    rows = [i for i, action in enumerate(decision.actions) if action == "relabel"]
    return sorted(rows, key=decision.ranks.__getitem__)
