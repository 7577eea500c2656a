"""What a report ends with: how far to trust its estimate, and how to train on what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_influence.dataset.wording import printable

if TYPE_CHECKING:
    from hf_influence.filter.decision import Decision


def advice_of(decision: Decision) -> list[str]:
    """A line for each estimate that was gone by, and one for a column that a plain Trainer drops or takes amiss."""
    lines = [_on(estimate) for estimate in decision.estimates]
    for column in decision.writes:
        if "weight" in decision.actions:
            named = "" if column.name == "weight" else f", weight_column={printable(repr(column.name))}"
            trainer = f"WeightedTrainer(…{named}) of hf_influence.callbacks"
            lines.append(f"to train on it: {trainer}; a plain Trainer drops the weights")
        elif column.new and isinstance(column.new[0], list):
            lines.append(
                "to train on it: Trainer(…, compute_loss_func=soft_cross_entropy) of hf_influence.callbacks; a plain "
                "Trainer takes the probabilities for several labels an example"
            )
    return lines


def percent(share: float) -> str:
    """`3.2 %`, `20 %`."""
    return f"{100 * share:.1f}".rstrip("0").rstrip(".") + " %"


def _on(estimate: dict[str, Any]) -> str:
    method, share = printable(estimate["method"]), percent(estimate["wrong"])
    apart = f"(right and wrong ones among the queries are told apart with AUC {estimate['auc']:.2f})"
    if estimate["told"]:
        return f"{method} was told that {share} are wrong {apart}"
    return (
        f"{method} estimates {share} to be wrong {apart}; with few rows or queries it may be several times as many: "
        "look at scores.lowest(20), then attribute(store, share_wrong=…)"
    )
