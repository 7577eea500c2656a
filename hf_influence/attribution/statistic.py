"""What was noted about the examples while their rows were captured."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_influence.errors import BadExample, MissingRows
from hf_influence.store import Rows

_HOW = {
    "features": "Collect with features=True.",
    "other_prompt_loss": "Collect with other_prompts=1, examples whose labels leave the prompt out (-100).",
    "probabilities": "It is collected where every example has one label of several classes; collect again if it has.",
}


def statistic(rows: Rows, name: str, needed_by: str) -> Tensor:
    """One number of each example in dataset order, `[n]`; several, `[n, c]`, of what has several in `Rows.stats`.

    Args:
        rows: Rows of some split.
        name: Of the statistic.
        needed_by: Who asks, for the message.

    Raises:
        MissingRows: It was not collected.
        BadExample: It is not finite.
    """
    stats = rows.stats
    if len(rows) and name not in stats:
        raise MissingRows(
            f"{rows.folder} does not hold the statistic {name!r} that {needed_by} needs (it has: "
            f"{', '.join(sorted(stats)) or 'none'}). {_HOW.get(name, 'It is collected where the task has it.')}"
        )
    values = stats.get(name, torch.zeros(0))
    finite = torch.isfinite(values)
    finite = finite.flatten(1).all(1) if values.ndim > 1 else finite
    if not bool(finite.all()):
        raise BadExample(
            f"the statistic {name!r} of example {rows.ids[int((~finite).nonzero()[0])]!r} in {rows.folder} is not "
            f"finite, and {needed_by} would rank it all the same. Look at the example, and collect again without it."
        )
    return values
