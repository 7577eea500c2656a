"""Wrong answers of several kinds, planted in instruction data so that it is known where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

from datasets import Dataset, Features, Value

from hf_influence.dataset.groups import group_of
from hf_influence.errors import BadExample, BadSetting
from hf_influence.evaluation.corruption_kinds import KINDS, Answers, Kind
from hf_influence.evaluation.shares import share_of

CLEAN = "clean"
"""The kind of a row that was left alone."""
_ADDED = ("is_wrong", "kind", "right_answer")


def corrupt_answers(
    dataset: Dataset,
    kinds: Sequence[str | Kind] = tuple(KINDS),
    share: float = 0.2,
    *,
    seed: int = 0,
    prompt: str = "prompt",
    answer: str = "answer",
    within: str | None = "task",
) -> Dataset:
    """A copy of `dataset` in which a share of the rows has a wrong answer, as many of each kind.

    | kind             | the answer becomes                                     | cannot be made of          |
    |------------------|--------------------------------------------------------|----------------------------|
    | `swapped_within` | another answer of the same task                        | a task with one answer     |
    | `swapped_across` | an answer of another task                              | a dataset of one task      |
    | `truncated`      | its first words, at most half of them                  | one word                   |
    | `refusal`        | an English sentence that declines to answer            |                            |
    | `changed_number` | itself, with a digit of its last number changed        | an answer without a number |
    | `other_language` | stock sentences of like length, and no translation     |                            |

    ⌊share · n⌋ rows are chosen at random (share as written: 0.29 of 100 rows is 29) among those where the kind can be
    made; the numbers of any two kinds differ by at most one. Refusals, cuts and other languages can be told by their
    form and length alone, so look at each kind: `mislabel_detection(scores, data["is_wrong"], kinds=data["kind"])`.

    Args:
        dataset: With string columns of prompts and answers. A column `text` beside them must be prompt + answer and is
            written again.
        kinds: Names in the table, or functions `(answers, row, rng) -> wrong answer or None`, called by their name.
        share: In [0, 1].
        seed: The same seed makes the same mistakes.
        prompt: The column of prompts; needed only beside `text`.
        answer: The column of answers.
        within: The column of tasks or sources; `None` takes all rows for one task.

    Returns:
        The dataset with three more columns: `is_wrong`, `kind` ("clean" where it is not wrong), and `right_answer`.

    Raises:
        BadSetting: A share out of range, an unknown kind, two of one name, or too few rows where a kind can be made.
        BadExample: A column is missing, there already, or holds no text.

    See also: flipped_labels (for classification), mislabel_detection.

    >>> right = Dataset.from_dict({"prompt": ["1+1=", "2+2="], "answer": ["2", "4"], "task": ["sum", "sum"]})
    >>> corrupt_answers(right, ["swapped_within"], share=0.5)["answer"][:]
    ['2', '2']
    """
    named = list(map(_named, [kinds] if isinstance(kinds, str) else kinds))
    made = dict(named)
    wanted = int(share_of(share) * len(dataset))
    _check(dataset, prompt, answer, within)
    if not made:
        raise BadSetting("kinds is empty, so no answer can be made wrong. Leave it out for all kinds.")
    if len(made) < len(named):
        twice = next(name for name, count in Counter(name for name, _ in named).items() if count > 1)
        raise BadSetting(
            f"kinds has {twice!r} more than once, and the wrong answers are told apart by the names of their kinds. "
            "List each kind once, and give each function of your own a name: def, not lambda."
        )

    columns = dataset.with_format(None).to_dict()
    right: list[str] = columns[answer]
    known = Answers(right, list(map(group_of, columns[within])) if within else [None] * len(right))
    prompts = list(map(str, columns.get(prompt, range(len(right)))))
    fine: dict[str, set[str]] = {}  # the right answers to a prompt that comes several times
    for asked, text in zip(prompts, right, strict=True):
        fine.setdefault(asked, set()).add(text)
    wrong: dict[str, dict[int, str]] = {}  # kind -> row -> wrong answer
    for name, kind in made.items():
        drawn = ((i, kind(known, i, Random(f"{seed}/{name}/{i}"))) for i in range(len(right)))
        wrong[name] = {i: text for i, text in drawn if text is not None and text not in fine[prompts[i]]}

    chosen = _choose(wrong, wanted, len(right), Random(seed))
    given = [wrong[chosen[i]][i] if i in chosen else text for i, text in enumerate(right)]
    if _has_whole(dataset, prompt, answer):
        columns["text"] = [start + end for start, end in zip(columns[prompt], given, strict=True)]
    columns |= {
        answer: given,
        "is_wrong": [i in chosen for i in range(len(right))],
        "kind": [chosen.get(i, CLEAN) for i in range(len(right))],
        "right_answer": right,
    }
    added = dict(zip(_ADDED, (Value("bool"), Value("string"), dataset.features[answer]), strict=True))
    return Dataset.from_dict(columns, features=Features({**dataset.features, **added}))


def _choose(wrong: dict[str, dict[int, str]], wanted: int, n: int, rng: Random) -> dict[int, str]:
    """Row -> kind. The kind that fewest rows allow chooses first."""
    counts = {name: (wanted + len(wrong) - 1 - k) // len(wrong) for k, name in enumerate(wrong)}
    chosen: dict[int, str] = {}
    for name in sorted(wrong, key=lambda name: len(wrong[name])):
        free = [i for i in wrong[name] if i not in chosen]
        if len(free) < counts[name]:
            rest = [other for other in wrong if other != name]
            raise BadSetting(
                f"{counts[name]} answers are to become wrong by {name!r}, and only {len(wrong[name])} of the {n} rows "
                f"allow it ({len(wrong[name]) - len(free)} of them are taken by rarer kinds). Lower share, or "
                + (f"leave the kind out: kinds={rest}." if rest else "choose another kind.")
            )
        chosen |= dict.fromkeys(rng.sample(free, counts[name]), name)
    return chosen


def _named(kind: str | Kind) -> tuple[str, Kind]:
    if callable(kind):
        return getattr(kind, "__name__", repr(kind)), kind
    if kind not in KINDS:
        raise BadSetting(f"{kind!r} is no kind of wrong answer; choose among {', '.join(KINDS)}, or pass a function.")
    return kind, KINDS[kind]


def _has_whole(dataset: Dataset, prompt: str, answer: str) -> bool:
    """Whether a column `text` has prompt and answer together."""
    return "text" in dataset.column_names and "text" not in (prompt, answer)


def _check(dataset: Dataset, prompt: str, answer: str, within: str | None) -> None:
    whole = _has_whole(dataset, prompt, answer)
    needed = [answer, *([prompt] if whole else []), *([within] if within else [])]
    if missing := [column for column in needed if column not in dataset.column_names]:
        raise BadExample(
            f"the dataset has the columns {dataset.column_names} but no {missing}. Name its own: prompt=…, answer=…, "
            "within=… (the task or source; None takes all rows for one task)."
        )
    if taken := [column for column in _ADDED if column in dataset.column_names]:
        raise BadExample(f"the dataset has {taken} already: its answers were made wrong before. Do so once.")
    plain = dataset.with_format(None)
    for column in {answer, prompt} & set(needed):
        if (row := next((i for i, text in enumerate(plain[column]) if not isinstance(text, str)), None)) is not None:
            raise BadExample(f"row {row} has no text in its column {column!r}. Leave it out, or name another column.")
    if not whole:
        return
    parts = zip(plain["text"], plain[prompt], plain[answer], strict=True)
    if (row := next((i for i, (text, start, end) in enumerate(parts) if text != start + end), None)) is not None:
        raise BadExample(
            f"the 'text' of row {row} is not its {prompt} + {answer}, so it cannot be written again with the wrong "
            "answer. Remove the column and make it anew from the result."
        )
