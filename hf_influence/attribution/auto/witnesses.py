"""What clean queries bear witness to: how far scores can be trusted, and how many labels or answers are wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_influence.attribution.auto.share_wrong import (
    Epoch,
    Estimate,
    Sighting,
    Suspicion,
    estimate,
    sighting,
    sighting_in,
    sighting_in_first,
)
from hf_influence.attribution.auto.trust import auc_of, cautious, divide, freshness, trust_of
from hf_influence.attribution.kernel_ridge import KernelRidge, same_queries
from hf_influence.attribution.prompt_gain import gain
from hf_influence.attribution.selection import Selection
from hf_influence.attribution.statistic import statistic
from hf_influence.errors import BadSetting
from hf_influence.gradients.mislabelled import SPLIT
from hf_influence.gradients.other_prompts import STATISTIC
from hf_influence.store import Rows
from hf_influence.task import two_classes

HEARD = 0.25
"""Of the queries that a class should have by its share of the examples; with fewer, its labels look wrong to others."""

FAR_APART = 0.25
"""Share of the queries that would have to be of other classes, beyond what chance does."""

MOST_SEEN = 0.1
"""Share of the queries that may be training examples: short ones may be equal by chance."""

ANSWERS = 1 / 3
"""How far an answer is memorised each time that training sees it, over how far a label is."""


@dataclass(frozen=True)
class Witness:
    """Scores of one kind: of the queries with their own labels and with wrong ones, and of the examples.

    Attributes:
        right: Of the queries at the end, `[q]`.
        wrong: The same under wrong labels, `[q]` or several times as many.
        examples: Of the examples at the end, `[n]`; `[0]` where they have none.
        epochs: The same over training.
        visits: How often training had seen each example at the end, as far as the points of training tell; `None` where
            the end is the last of these.
        given: The wrong labels, a class for each of `wrong`; `None` if not known.
    """

    right: Tensor
    wrong: Tensor
    examples: Tensor
    epochs: Sequence[Epoch] = ()
    visits: float | None = 0.0
    given: Tensor | None = None

    @property
    def auc(self) -> float:
        """How well the scores tell right labels from wrong ones, a little less where there are few queries."""
        return cautious(auc_of(self.right, self.wrong), len(self.right))

    def trust(self, errors: float, at_end: bool, share: float | None) -> float:
        """The weight of a part that goes by these scores, at the end alone or over training.

        Args:
            errors: How many standard errors come off.
            at_end: At the end alone.
            share: Of wrong labels, as far as it is known.
        """
        fresh = freshness(self.examples, self.right, self.wrong, share or 0.0) if at_end else 1.0
        return trust_of(self.right, self.wrong, self.given, errors, fresh)

    def at_end(self) -> Sighting | None:
        """The share of wrong labels as it shows at the end."""
        suspicion = Suspicion.of(self.right, self.wrong)
        return sighting(suspicion(self.examples), suspicion(self.right), suspicion(self.wrong), self.visits or 0)

    @property
    def beyond(self) -> float:
        """How far wrong labels are more suspicious than if they turned the sign; see `sighting_in`."""
        suspicion = Suspicion.of(self.right, -self.right)
        wrong, mirrored = (float(suspicion(one).mean()) for one in (self.wrong, -self.right))
        return (wrong - mirrored) / (1 - mirrored if wrong > mirrored else mirrored)

    def over_training(self) -> list[Sighting | None]:
        """The share of wrong labels as it shows in each epoch."""
        if not self.epochs:
            return []
        (first, *others), beyond = self.epochs, self.beyond
        seen = [sighting_in_first(first, others[0] if others else None, beyond)]
        return seen + [sighting_in(one, beyond) for one in others]

    def sightings(self) -> list[Sighting]:
        """All that is seen of the share of wrong labels."""
        if not len(self.right):
            return []
        seen = self.over_training() + ([] if self.visits is None else [self.at_end()])
        return [one for one in seen if one is not None]

    def share(self) -> Estimate | None:
        """The share of wrong labels, `None` where nothing is seen of it."""
        return estimate(self.sightings())


class OfDirections(Witness):
    """Scores by the directions of gradients, which say less while these change, and are memorised more slowly.

    So the share is not looked for before the model has settled.
    """

    def over_training(self) -> list[Sighting | None]:
        beyond = self.beyond
        return [sighting_in(one, beyond) for one in self.epochs[1:] if one.settled]

    def sightings(self) -> list[Sighting]:
        seen = super().sightings()
        first = min((one.visits for one in seen), default=0.0)
        return [one._replace(visits=one.visits - first) for one in seen]


class OfPrompts(Witness):
    """Scores whose zero is where right and wrong ones part."""

    def at_end(self) -> Sighting | None:
        return sighting(self.examples < 0, self.right < 0, self.wrong < 0, self.visits or 0)


def witnesses(
    rows: Selection, last: Selection, ridge: Tensor, epochs: Sequence[Epoch] = ()
) -> tuple[dict[str, Witness], bool]:
    """What the queries say of scores by "kernel_ridge" and, where they have margins, by "margin".

    Also by "loss_mean", of two classes, where there are points of training.

    Args:
        rows: All points.
        last: The one at the end.
        ridge: The scores of the examples that queries speak of, by kernel ridge regression at the end, `[m]`.
        epochs: The same over training.

    Returns:
        The witnesses, and whether wrong labels are known: if not, they are taken to turn the signs, which they do for
        two classes.
    """
    query, other = last.query, _under_wrong_labels(last)
    fitted = KernelRidge().fit(query)
    turned = -fitted.left_out if other is None else fitted.turned(other)

    def visits(epochs: Sequence[Epoch], n: int) -> float | None:
        """How often they have seen each of `n` examples, `None` where the last of them is the end."""
        return None if last.points[0] and epochs else sum(len(one.examples) for one in epochs) / max(1, n)

    given = _wrong_labels(last, other)
    found: dict[str, Witness] = {
        "kernel_ridge": OfDirections(fitted.left_out, turned, ridge, epochs, visits(epochs, len(ridge)), given)
    }
    if "margin" in query.stats:
        margins = _margin(query)
        wrong = -margins if other is None else _margin(other)
        examples = _margin(last.train) if "margin" in last.train.stats else margins[:0]
        epochs = _margins(rows) if len(examples) else []
        found["margin"] = Witness(margins, wrong, examples, epochs, visits(epochs, len(rows.ids)), given)
        over = [_margin(same) for part in rows.parts if (same := same_queries(_queries(part), query)) is not None]
        if other is None and len(over) > 1:
            found["loss_mean"] = Witness(*_mean_losses(torch.stack(over)), examples[:0], given=given)
    return found, other is not None or two_classes(last.store.header.task)


def spoken_of(rows: Selection, last: Selection) -> Tensor:
    """Whether there are queries enough of the class of each example for agreement with them to mean anything, `[n]`.

    What raises one class lowers the others. So all labels of a class that has no queries, or far fewer than its share
    of the examples, look wrong to the queries of the others. Warns of these, and of queries that bear witness poorly.

    Raises:
        BadSetting: All are of one class, and the examples of several: whatever is of another looks wrong.
    """
    _check_unseen(last)
    if (found := _by_class(rows, last)) is None:
        return torch.ones(len(rows.ids), dtype=torch.bool)
    labels, ours, theirs = found
    if int((theirs > 0).sum()) == 1 < int((ours > 0).sum()):
        raise BadSetting(
            f"all {len(last.query)} queries are of the class {int(theirs.argmax())}, and the examples of "
            f"{int((ours > 0).sum())}, so right labels of the other classes would look wrong. Take queries of all "
            "classes, drawn at random (clean.shuffle(seed=0).select(range(100))); or choose a method by name."
        )
    apart = float((ours / ours.sum() - theirs / theirs.sum()).abs().sum()) / 2
    if apart - math.sqrt(len(ours) / len(last.query)) / 2 > FAR_APART:
        warnings.warn(
            "the classes of the queries are in other proportions than those of the examples (a share of "
            f"{apart:.2f} is in other classes), so right labels of classes that are rare among the queries may "
            "look wrong. Draw the queries at random from data like those of training.",
            stacklevel=4,
        )
    few = theirs < HEARD * len(last.query) * ours / ours.sum()
    unheard = few[labels]
    if unheard.any():
        named = (few & (ours > 0)).nonzero().flatten().tolist()
        warnings.warn(
            f"none or hardly any of the {len(last.query)} queries are of the classes {named}. Whether labels are of "
            f"these, gradients of queries cannot say, so {int(unheard.sum())} examples are ranked by their losses "
            "alone. Draw the queries at random from data like those of training, or take more.",
            stacklevel=4,
        )
    return ~unheard


def _by_class(rows: Selection, last: Selection) -> tuple[Tensor, Tensor, Tensor] | None:
    """The class of each example `[n]`, and how many examples and queries each class has, `[c]`, if they are of any."""
    queries = last.query.stats.get("label")
    labels = torch.zeros(len(rows.ids), dtype=torch.long)
    for part in rows.parts:
        if not len(part.train):
            continue
        own = part.train.stats.get("label", torch.zeros(0, 0))
        if queries is None or own.ndim != 1:
            return None
        labels[rows.places(part)] = own.long()
    if queries is None or not len(labels):
        return None
    classes = int(torch.cat((labels, queries.long())).max()) + 1
    ours, theirs = (torch.bincount(one.long(), minlength=classes).double() for one in (labels, queries))
    return labels, ours, theirs


def _check_unseen(last: Selection) -> None:
    """Warn of queries that are training examples as well."""
    train, query = last.train.stats, last.query.stats
    if "hash" in train and "hash" in query:
        seen = int(torch.isin(query["hash"], train["hash"]).sum())
        if seen > MOST_SEEN * len(last.query):
            warnings.warn(
                f"{seen} of the {len(last.query)} queries are training examples as well, whose labels the model has "
                "seen: they are taken to be right, and fewer others look wrong than are. Take queries that it has not "
                "been trained on.",
                stacklevel=5,
            )


def of_prompts(rows: Selection, last: Selection, scores: Tensor) -> Witness | None:
    """What the queries say of scores by "prompt_gain"; `None` where they were not read after two other prompts.

    Under a wrong label an answer stands after a prompt that is not its own: after each of the other prompts, compared
    with the rest of them. Zero is where the two part best.

    Args:
        rows: All points.
        last: The one at the end.
        scores: Of the examples, `[n]`.
    """
    query = last.query
    if STATISTIC not in query.stats or query.stats[STATISTIC].ndim != 2 or query.stats[STATISTIC].shape[1] < 2:
        return None
    loss, others = (statistic(query, name, "method 'auto'").double() for name in ("loss", STATISTIC))
    rest = (others.sum(1, keepdim=True) - others) / (others.shape[1] - 1)  # [q, k], the mean of the others of each
    right, wrong = gain(loss, others), gain(others.flatten(), rest.flatten())
    zero = divide(right, wrong)
    visits = ANSWERS * sum(rows.share_in(part) for part in rows.parts if part.points[0])
    return OfPrompts(right - zero, wrong - zero, scores - zero, visits=visits)


def end(rows: Selection) -> int:
    """The point that a method at one point looks at: the final weights, or the last of training."""
    return 0 if 0 in rows.points else rows.points[-1]


def has_classes(rows: Selection) -> bool:
    """Whether the examples are of classes: those of a classifier, or answers that name some."""
    return rows.store.header.task.get("name") == "classification" or have_wrong_labels(rows.at(end(rows)))


def why_ranks(rows: Selection, last: Selection | None) -> str:
    """Why the queries do not make scores log-odds, and what would.

    Args:
        rows: All that was scored.
        last: The end, where it has queries that were asked.
    """
    final, path = rows.at(end(rows)), str(rows.store.path)
    words, at_rest = final.words(), not end(rows)
    if "rows" not in words:
        return f"{path} has no gradients of the end of training. Collect them, with those of clean queries"
    if "queries" not in words or len(final.query) < 2:
        if not at_rest and rows.query_split in rows.store.splits_anywhere():
            return (
                f"{path} has no rows at the final weights: training has not ended, or at_end=False. Let it end, or "
                "collect(model, dataset, …) there"
            )
        return (
            f"{path} has no clean queries at the end of training to tell right from wrong by: "
            "GradientCapture(path, query_dataset=clean)"
        )
    others = None if last is None else last.query.stats.get(STATISTIC)  # [q, k]
    if not has_classes(rows) and (others is None or others.shape[1] < 2):
        return (
            "the answers of examples or queries were not read after two other prompts. That is done at the end "
            "where the labels leave the prompts out: in TRL with the columns prompt and completion (of messages "
            "prompt=messages[:-1], completion=messages[-1:]) or assistant_only_loss=True; collect(…) takes "
            "other_prompts=2"
        )
    return "the queries do not tell right from wrong (of several labels an example, and of regression, they never do)"


def have_wrong_labels(last: Selection) -> bool:
    """Whether the queries were collected under wrong labels."""
    return SPLIT.format(last.query_split) in last.store.splits(last.points[0])


def _under_wrong_labels(last: Selection) -> Rows | None:
    """The queries under wrong labels, where they were collected."""
    return replace(last, query_split=SPLIT.format(last.query_split)).query if have_wrong_labels(last) else None


def _wrong_labels(last: Selection, other: Rows | None) -> Tensor | None:
    """The labels of the queries under wrong ones, `[q]`; `None` if not known."""
    if other is not None:
        return other.stats.get("label")
    labels = last.query.stats.get("label")
    return 1 - labels if labels is not None and two_classes(last.store.header.task) else None


def _margin(rows: Rows) -> Tensor:
    """`[n]`; BadExample if one is not finite."""
    return statistic(rows, "margin", "method 'auto'")


def _queries(part: Selection) -> Rows | None:
    return part.query if "queries" in part.words() else None


def _mean_losses(margins: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the mean loss over training, ln σ(±m), of queries of two classes under right and under wrong labels, `[q]`.

    Args:
        margins: At each point, `[c, q]`.
    """
    right, wrong = (torch.nn.functional.logsigmoid(sign * margins.double()).mean(0) for sign in (1, -1))
    return right, wrong


def _margins(rows: Selection) -> list[Epoch]:
    """At the points of training that have queries."""
    epochs: list[Epoch] = []
    earlier: Rows | None = None
    visits = 0.0
    for part in rows.parts:
        if not part.points[0] or not len(part.train) or "queries" not in part.words():
            continue
        train, query = part.train, part.query
        same = same_queries(earlier, query)
        before = None if same is None else _margin(same)
        epochs.append(Epoch.of(_margin(train), train.stats.get("step"), _margin(query), before, visits))
        earlier = query
        visits += rows.share_in(part)
    return epochs
