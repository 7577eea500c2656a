"""Wrong answers: plant mistakes in a data set, and remember where."""

from __future__ import annotations

from collections.abc import Hashable
from fractions import Fraction
from random import Random

from datasets import Dataset, Features, Value

from hf_influence.errors import BadExample, BadSetting


def swap_answers(dataset: Dataset, fraction: float, seed: int = 0, within: str | None = "task") -> Dataset:
    """A copy of `dataset` in which a fraction of the rows carries the answer of another row.

    The ⌊fraction · n⌋ rows are chosen at random (fraction as written: 0.29 of 100 rows is 29). Each gets the answer
    of one random other row whose answer differs; the giver keeps its own, so an answer may be given more than once.
    The column `is_wrong` says where; `text`, if present, is written again as prompt + answer.

    Use it to make a detection benchmark: `mislabel_detection(scores, swapped["is_wrong"])`. See also: corrupt_answers
    (several kinds of mistakes, and an error where a row allows none).

    Args:
        dataset: With a column `answer`; and `prompt`, if there is a column `text`.
        fraction: In [0, 1].
        seed: The same seed gives the same mistakes.
        within: Givers come from rows with the same value in this column, which makes the mistake hard to spot by
            its form; `None` takes any row.

    Raises:
        BadSetting: A fraction out of range, or a row for which no different answer exists.
        BadExample: A column is missing, or `is_wrong` is there already.

    >>> right = Dataset.from_dict({"prompt": ["1+1=", "2+2="], "answer": ["2", "4"]})
    >>> swap_answers(right, 0.5, within=None)["answer"][:]
    ['2', '2']
    """
    if not 0 <= fraction <= 1:
        raise BadSetting(f"fraction={fraction!r} is not a share of the rows; give a number from 0 to 1.")
    needed = {"answer"} | ({"prompt"} if "text" in dataset.column_names else set()) | ({within} if within else set())
    if missing := sorted(needed - set(dataset.column_names)):
        raise BadExample(
            f"the dataset has the columns {dataset.column_names} but no {missing}, which swapping answers needs. "
            "Rename its columns; within=None does without groups."
        )
    if "is_wrong" in dataset.column_names:
        raise BadExample("the dataset has a column 'is_wrong' already: its answers were swapped before. Swap once.")

    columns = dataset.with_format(None).to_dict()
    right = columns["answer"]
    groups: list[Hashable] = columns[within] if within else [None] * len(right)
    givers: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        givers.setdefault(group, []).append(i)

    rng = Random(seed)
    wrong = set(rng.sample(range(len(right)), int(Fraction(str(fraction)) * len(right))))
    given = list(right)
    for i in sorted(wrong):
        others = [right[k] for k in givers[groups[i]] if right[k] != right[i]]
        if not others:
            where = f"with {within}={groups[i]!r} " if within else ""
            raise BadSetting(
                f"all {len(givers[groups[i]])} rows {where}have the answer {right[i]!r}, so row {i} cannot get a wrong "
                "one. Use within=None, or more varied rows."
            )
        given[i] = rng.choice(others)
    columns |= {"answer": given, "is_wrong": [i in wrong for i in range(len(right))]}
    if "text" in columns:
        columns["text"] = [prompt + answer for prompt, answer in zip(columns["prompt"], given, strict=True)]
    return Dataset.from_dict(columns, features=Features({**dataset.features, "is_wrong": Value("bool")}))
