"""A training and a test set, balanced over tasks, in which no example occurs twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from random import Random
from typing import NamedTuple

from datasets import Dataset, DatasetDict, Features, Value

from hf_influence.errors import BadSetting

_FEATURES = Features({column: Value("string") for column in ("prompt", "answer", "task", "text")})
_PATIENCE = 10_000  # draws in a row that bring nothing new before we call a task used up


class Example(NamedTuple):
    """What a task draws; no two examples of a benchmark have the same `essence`."""

    prompt: str
    answer: str
    essence: str


def balanced_splits(
    tasks: Mapping[str, Callable[[Random], Example]], *, train: int, test: int, seed: int
) -> DatasetDict:
    """`DatasetDict` with `train` and `test`, columns prompt, answer, task and text (prompt + answer).

    Examples come in rounds, each task once a round in random order, so the counts of any two tasks of a split differ by
    at most one. The test set is drawn first: it stays the same whatever `train` is, and a smaller training set is
    the beginning of a larger one.

    Raises:
        BadSetting: A size that is no count, or more examples than the tasks have.
    """
    for name, size in {"train": train, "test": test}.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise BadSetting(f"{name}={size!r} is not a number of examples; give an int, 0 or more.")
    rng, seen = Random(seed), set[str]()
    splits = {name: list(islice(_rounds(tasks, rng, seen), size)) for name, size in (("test", test), ("train", train))}
    columns = {name: {c: [row[c] for row in splits[name]] for c in _FEATURES} for name in ("train", "test")}
    return DatasetDict({name: Dataset.from_dict(columns[name], features=_FEATURES) for name in columns})


def _rounds(tasks: Mapping[str, Callable[[Random], Example]], rng: Random, seen: set[str]) -> Iterator[dict[str, str]]:
    while True:
        for task in rng.sample(list(tasks), len(tasks)):
            prompt, answer, essence = _unseen(task, tasks[task], rng, seen)
            seen.add(essence)
            yield {"prompt": prompt, "answer": answer, "task": task, "text": prompt + answer}


def _unseen(task: str, draw: Callable[[Random], Example], rng: Random, seen: set[str]) -> Example:
    for _ in range(_PATIENCE):
        if (example := draw(rng)).essence not in seen:
            return example
    raise BadSetting(
        f"no new example of '{task}' after {len(seen)} examples in all; repeating one would let the test set leak into "
        "the training set. Ask for fewer examples."
    )
