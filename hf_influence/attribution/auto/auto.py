"""The default: a ranking by whatever the store holds that tells good examples from bad ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_influence.attribution.auto.share_wrong import Epoch
from hf_influence.attribution.auto.trust import log_odds, normal_scores
from hf_influence.attribution.auto.witnesses import end, has_classes, of_prompts, spoken_of, why_ranks, witnesses
from hf_influence.attribution.finite import check_finite
from hf_influence.attribution.given import fingerprint, one_for_each
from hf_influence.attribution.kernel_ridge import KernelRidge, KernelRidgeMean
from hf_influence.attribution.method import Method, class_of, make_method
from hf_influence.attribution.over_points import OverPoints, OverTraining
from hf_influence.attribution.selection import Selection
from hf_influence.dataset.groups import group_of
from hf_influence.errors import BadSetting, MissingRows
from hf_influence.scores import LOG_ODDS, RANKS_ONLY, ranks_within

Parts = Mapping[str, Mapping[str, Any]]
"""Method -> its settings."""

CLASSES: tuple[Parts, ...] = (
    {"loss_mean": {}, "kernel_ridge_mean": {}, "kernel_ridge": {}},
    {"loss_mean": {}, "kernel_ridge": {}},
    {"loss": {}, "kernel_ridge": {}},
    {"loss_mean": {}},
    {"loss": {}},
)
TEXTS: tuple[Parts, ...] = (
    {"loss_mean": {}, "vote_mean": {}},
    {"loss_mean": {}, "vote": {}},
    {"loss": {}, "vote": {}},
    {"loss_mean": {}},
    {"loss": {}},
)
"""For classes and for other answers: the first line whose methods all find what they need."""

OF_PROMPTS = "prompt_gain"
"""Beside these, for language models whose answers were also read after other prompts."""

AT_REST = 8
"""How much more the regression at the end counts than its mean over training, whose rows carry dropout."""

BY_HAND = "their parts were chosen by hand. Leave out parts=… for those that suit the store"
"""Why scores are ranks where parts were asked for."""

BITS = 16
"""Of a score that count in a rank, those that tell it from others."""


@dataclass(kw_only=True)
class Auto(OverTraining, name="auto"):
    """The mean rank over the parts that suit what the store holds, so that no one of them has to be right.

        score[i] = ln((1 − P_i) / P_i),   P_i the probability that the label is wrong: where queries tell it
                 = Φ⁻¹((rank of r[i] − ½) / n) − Φ⁻¹(1 / 4n),   Φ the normal distribution function: elsewhere
        r[i] = Σ_p w_p (rank_p(i) − ½) / n_p / Σ_p w_p,   over the parts p that score i, ranks from 1 to n_p

    With `groups` a rank is that among the n_p examples of the same group: one task is harder than another, and what is
    compared then is how an example stands in its own. The parts are

    | the store holds      | classification                                   | language models          |
    |----------------------|--------------------------------------------------|--------------------------|
    | training and queries | `loss_mean`, `kernel_ridge_mean`, `kernel_ridge` | `loss_mean`, `vote_mean` |
    | the end and queries  | `loss`, `kernel_ridge`                           | `loss`, `vote`           |
    | training             | `loss_mean`                                      | `loss_mean`              |
    | the end              | `loss`                                           | `loss`                   |

    and for language models `prompt_gain` beside them, where answers were read after other prompts as well
    (`GradientCapture` does so where the labels leave the prompts out): what tells an answer that does not belong to its
    prompt. It weighs as much as all others together.

    Answers that name classes ("positive", "spam") are taken for classification where the queries were collected under
    wrong names too, as `GradientCapture` does where each answer of the queries occurs five times or more on average.

    Regression goes by the same parts as classification, each counting as much, since nothing tells which to trust.

    The loss over training finds wrong examples before the model has memorised them, clean queries find them afterwards,
    and the two err in different places. The rows at the end count as one more point of training.

    **Weights** (classification). The queries say how far each part is to be trusted: w = (f (AUC − ½))⁴.

    - AUC: how well the part's scores tell the queries from the same queries under wrong labels. By `kernel_ridge` each
      query is left out of the regression in turn, and one standard error comes off, which is large for few queries. For
      losses it is that of the margins at the end; of two classes and over training, that of the queries' mean losses.
      Where wrong labels of one class are told clearly worse than all, the AUC is theirs: a model that leans to a class
      because wrong labels are of that class has low losses for these.
    - f: parts from the end alone count less where the model has memorised labels: f = min(1, o / e), o the share of
      negative scores among the examples, e the share to be expected by the queries, (1 − π) e₊ + π e₋ under right and
      wrong labels. Elsewhere f = 1.
    - `kernel_ridge` at the end weighs eight times that beside `kernel_ridge_mean`: the rows of training steps carry the
      dropout of their step, those at the end do not.
    - Where nothing is known, all parts weigh the same.

    With two classes a wrong label turns the sign of either score. With more, `GradientCapture` collects the queries
    under wrong labels as well (the split "query-mislabelled"); without them the sign is taken to turn as well. The two
    kernel methods do not rank a class that has less than a quarter of the queries that its share of the examples would
    give it: what raises one class lowers the others, so queries of other classes see all its labels as wrong.

    **Log-odds.** Where the queries tell wrong labels, the score is the log-odds that the label is right, as if right
    and wrong labels lay on two bell curves in the order of r, told apart with the larger AUC of both kinds of parts:

        ln((1 − p) / p) = d x + ln((1 − π) / π),   d = √2 Φ⁻¹(AUC)
        (1 − π) Φ(x − d/2) + π Φ(x + d/2) = (rank of r[i] − ½) / n

    So 0 is even odds, `DatasetFilter()` drops every row whose label is less than twice as likely to be right as wrong,
    and `Relabel(how="posterior")` gives labels for training on the probabilities. Elsewhere no probability is known,
    and no score is negative.

    **Noise rate.** π is an estimate of the share of wrong labels. At each point of training and at its end, the margins
    of the examples are compared with those of the queries under right and under wrong labels: how many are as far off
    as wrong labels are. That share falls from point to point as the model memorises labels, so a line is fitted to it
    and followed back to before the first visit. The same is done with the scores by `kernel_ridge`, from where the
    model has settled. The larger of the two is used, because both tend to underestimate. The prior expects some 8 %,
    mostly less; few examples or queries hardly move it. From the end alone the estimate is too low. It may be far off:
    who has looked at rows passes what was found (`share_wrong`).

    **Answers of language models.** The same holds where the answers of the queries were read after two other prompts as
    well: a wrong answer is then one after a prompt that is not its own, and AUC and π are by `prompt_gain`. π is how
    many answers lie below where right and wrong answers of the queries part best, raised with the number of times that
    training has seen them, as it memorises wrong answers too. Mistakes of other kinds, such as an answer that breaks
    off, are ranked, but do not count in π.

    The report has the parts with their weights, π, the AUC where the scores are log-odds, and how far the parts agree:
    for each the correlation of its ranks with the mean ranks of the others.

    Cost: that of the parts.
    Use when: always, unless you know better; with rows captured during training and clean queries it has most to go by.
    See also: the parts, each a method of its own.
    Source: a method of this library.
    """

    needs = ("loss",)
    at_end = frozenset(needs)  # or at the last point of training

    parts: Parts | Sequence[str] | None = None
    """Methods, or methods with their settings, `{"vote": {"k": 5}, "loss": {}}`; by default those of the table."""
    groups: Sequence[Any] | None = None
    """The task, source or class of each training example in dataset order, within which it is ranked."""
    share_wrong: float | None = None
    """π where you know better than the estimate, for instance from a hundred rows drawn at random and looked at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share_wrong is not None and not 0 < self.share_wrong < 1:
            raise BadSetting(f"method 'auto': share_wrong={self.share_wrong!r} must be a share, above 0 and below 1.")
        if self.parts is None:
            return
        if isinstance(self.parts, str) or not self.parts or "auto" in self.parts:
            raise BadSetting(f"method 'auto': parts={self.parts!r} must be other methods, at least one.")
        if self.share_wrong is not None:
            raise BadSetting(
                f"method 'auto': share_wrong={self.share_wrong} is for scores that are log-odds, which those of parts "
                f"of your own, {list(self.parts)}, are not. Leave out one of the two."
            )
        for name, settings in with_settings(self.parts).items():
            make_method(name, dict(settings))

    def select(self, rows: Selection, point: int | None) -> Selection:
        """The final rows and those of training, whichever there are."""
        self._refuse(point)
        if self.points is not None:
            return rows.over(self.points, queries=False)
        final = rows.train_split in rows.store.splits(0)
        held = [*([0] if final else []), *(self.chosen(rows) or rows.training_points())]
        return rows.over(held or [0], queries=False)

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, 1]`; see above."""
        groups = self._groups(rows)
        scores: dict[str, Tensor] = {}  # each [n_p]
        ranks: dict[str, Tensor] = {}  # each [n], NaN for what a part does not score
        epochs: Sequence[Epoch] = ()
        parts = self.resolved(rows)
        last = self._asked(rows, parts)
        spoken = torch.ones(len(rows.ids), dtype=torch.bool) if last is None else spoken_of(rows, last)  # [n]
        for name, settings in parts.items():
            method, own = self._looked_at(rows, name, settings)
            places = torch.searchsorted(rows.positions, own.positions)
            ranks[name] = torch.full((len(rows.ids),), torch.nan, dtype=torch.float64)
            found = method.score(own)
            scores[name] = _finite(name, found.double().mean(1), own)
            if isinstance(method, KernelRidge):
                scores[name], places = scores[name][spoken[places]], places[spoken[places]]
                epochs = method.epochs(spoken) if isinstance(method, KernelRidgeMean) else epochs
            within = [groups[at] for at in places.tolist()]
            ranks[name][places] = ranks_within(digits(scores[name], found.dtype), within)
        weights, share, auc = self._trust(rows, last, scores, epochs)
        total = sum(weights.values())
        self.report["parts"] = {name: round(weight / total, 4) for name, weight in weights.items()}
        self.report["estimated_share_wrong"] = None if share is None else round(share, 4)
        self.report["agreement"] = {name: agreement(name, ranks) for name in ranks if len(ranks) > 1}
        values = torch.stack(list(ranks.values()), 1)  # [n, parts]
        weight = torch.tensor(list(weights.values()), dtype=values.dtype) * ~values.isnan()
        if bool((weight.sum(1) == 0).any()):
            raise MissingRows(
                f"method 'auto': none of {list(ranks)} scores the example "
                f"{rows.ids[int((weight.sum(1) == 0).nonzero()[0])]!r}, which training did not see. Capture at the end "
                "as well (at_end=True), or leave parts out for those that suit the store."
            )
        ranking = (values.nan_to_num() * weight).sum(1) / weight.sum(1)
        if share is None or not auc > 0.5:
            self.report[RANKS_ONLY] = BY_HAND if self.parts is not None else why_ranks(rows, last)
            self._refuse_share()
            return normal_scores(ranking).to(rows.train.dtype)[:, None]
        self.report[LOG_ODDS] = {"auc": round(auc, 4)}
        return log_odds(ranking, auc, self.share_wrong or share).to(rows.train.dtype)[:, None]

    def _asked(self, rows: Selection, parts: Parts) -> Selection | None:
        """The end, where it has queries that say how far the parts are to be trusted."""
        last = rows.at(end(rows))
        witness = "kernel_ridge" if has_classes(rows) else OF_PROMPTS
        asked = self.parts is None and witness in parts and "queries" in last.words() and len(last.query) > 1
        return last if asked else None

    def _refuse_share(self) -> None:
        """Where it would go unheard."""
        if self.share_wrong is not None:
            raise BadSetting(
                f"method 'auto': share_wrong={self.share_wrong} is for scores that are log-odds. These rank the "
                f"examples and are none: {self.report[RANKS_ONLY]}. DatasetFilter(drop=share) drops as many of any "
                "scores."
            )

    def _looked_at(self, rows: Selection, name: str, settings: Mapping[str, Any]) -> tuple[Method, Selection]:
        """A part and what it looks at: the points, its members, or the end."""
        kind = class_of(name)
        if not issubclass(kind, OverPoints):
            method = make_method(name, dict(settings))
            return method, method.select(rows, end(rows))
        points = {}
        if issubclass(kind, OverTraining):  # the end as well, but where it was asked for a method by name
            asked = rows.points if self.points is not None else None
            points = {"points": rows.points if self.parts is None else of_training(rows) or asked}
        method = make_method(name, {**points, **settings})
        return method, method.select(rows, None)

    def _trust(
        self, rows: Selection, last: Selection | None, scores: Mapping[str, Tensor], epochs: Sequence[Epoch]
    ) -> tuple[dict[str, float], float | None, float]:
        """The weight of each part, the share of wrong labels, and the AUC at which they are told from right ones.

        As far as the queries tell; the share is `None` where they do not.
        """
        plain = dict.fromkeys(scores, 1.0)
        if OF_PROMPTS in scores and self.parts is None:
            plain[OF_PROMPTS] = max(1.0, len(scores) - 1.0)
        if last is None:
            return plain, None, 0.5
        if not has_classes(rows):
            witness = of_prompts(rows, last, scores[OF_PROMPTS])
            if witness is None:
                return plain, None, 0.5
            seen = witness.share()
            return plain, None if seen is None else seen.share, witness.auc
        found, known = witnesses(rows, last, scores["kernel_ridge"], epochs)
        best = max(found.values(), key=lambda one: (len(one.examples) > 0, one.auc))
        told = [one for one in (witness.share() for witness in found.values()) if one is not None]
        told = [one for one in told if one.sharp] or told
        share = max(one.share for one in told) if known and told else None  # either is rather too low
        if "margin" not in found:
            return plain, share, best.auc
        weights = {}
        for name in scores:
            at_end = not issubclass(class_of(name), OverTraining)
            ridge = name.startswith("kernel_ridge")
            witness = found["kernel_ridge"] if ridge else found.get(name, found["margin"])
            weights[name] = witness.trust(int(ridge), at_end, share)
        if "kernel_ridge_mean" in weights and end(rows) == 0:
            weights["kernel_ridge"] *= AT_REST
        return weights, share, best.auc

    def resolved(self, rows: Selection) -> Parts:
        """The parts that were asked for, or the first that the rows allow."""
        if self.parts is not None:
            return with_settings(self.parts)
        words = {part.points[0]: part.words() for part in rows.parts if part.points[0] == end(rows) or len(part.train)}

        def allowed(name: str) -> bool:
            needs = set(class_of(name).needs)
            if "points" not in needs:
                return needs <= words[end(rows)]
            return bool(of_training(rows)) and all(needs - {"points"} <= own for own in words.values())

        lines = CLASSES if has_classes(rows) else TEXTS
        parts = next((parts for parts in lines if all(map(allowed, parts))), lines[-1])
        return {**parts, OF_PROMPTS: {}} if lines is TEXTS and allowed(OF_PROMPTS) else parts

    def record(self, rows: Selection) -> dict[str, Any]:
        recorded = super(Auto, replace(self, groups=None)).record(rows)
        if self.groups is None:
            return recorded
        groups = self._groups(rows)
        return recorded | {"groups": f"{len(set(groups))} groups, {fingerprint(groups)}"}

    def _groups(self, rows: Selection) -> list[Any]:
        if self.groups is None:
            return [None] * len(rows.positions)
        given = one_for_each(self.groups, rows, self.name, "groups", "groups", "training example")
        return [group_of(value) for value in given]


def _finite(name: str, scores: Tensor, rows: Selection) -> Tensor:
    """The scores of a part, as ranks would hide what is no number.

    Raises:
        BadExample: A row is not finite; or else BadSetting.
    """
    if not bool(torch.isfinite(scores).all()):
        queries = [part.query for part in rows.parts] if "queries" in class_of(name).needs else []
        check_finite(scores, *(part.train for part in rows.parts), *queries)
        bad = rows.ids[int((~torch.isfinite(scores)).nonzero()[0])]
        raise BadSetting(
            f"method 'auto': its part {name!r} gives no number for {bad!r}, though its rows are finite. Look at its "
            "loss, or at the settings of that part, such as damping."
        )
    return scores


def with_settings(parts: Parts | Sequence[str]) -> Parts:
    """The parts, each with its settings."""
    return parts if isinstance(parts, Mapping) else {name: {} for name in parts}


def of_training(rows: Selection) -> list[int]:
    """The other points."""
    return [point for point in rows.points if point]


def digits(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values without their last digits, in which equal examples differ by rounding, `[n] -> [n]` in float64.

    That is `BITS` binary digits from the first on in which a value, or what tells the values apart, has any (their mean
    distance from their median), as far as the type has them.

    Args:
        values: In float64.
        dtype: In which they were computed.
    """
    if not len(values):
        return values
    precision = max(BITS, round(-math.log2(4 * torch.finfo(dtype).eps)))
    own = torch.frexp(values).exponent
    spread = torch.frexp((values - values.median()).abs().mean()).exponent
    last = torch.maximum(torch.minimum(own, spread) - BITS, own - precision)
    return torch.ldexp(torch.ldexp(values, -last).round(), last)


def agreement(name: str, ranks: Mapping[str, Tensor]) -> float | None:
    """The correlation of the ranks of a part with the mean ranks of the others; none where either is constant."""
    others = torch.stack([rank for other, rank in ranks.items() if other != name], 1).nanmean(1)
    both = torch.stack((ranks[name], others))
    both = both[:, ~both.isnan().any(0)]
    if both.shape[1] < 2 or bool((both.amax(1) == both.amin(1)).any()):
        return None
    return round(float(torch.corrcoef(both)[0, 1]), 4)
