"""Math problems: ten kinds of arithmetic word problems, answered with or without the reasoning in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import NamedTuple

from datasets import DatasetDict

from hf_influence.evaluation.benchmarks.balanced_splits import Example, balanced_splits


class Problem(NamedTuple):
    """One word problem; `reason` is the calculation, as a Python expression, `solution` what it comes to."""

    question: str
    reason: str
    solution: int


Number = Callable[[int, int], int]
"""`number(low, high)`: a random integer, both ends included."""


def pizza(number: Number) -> Problem:
    nina, omar, left = number(2, 30), number(2, 30), number(1, 40)
    whole = nina + omar + left
    return Problem(
        f"Of {whole} pizza slices, Nina eats {nina} and Omar {omar}. How many remain?",
        f"{whole}-({nina}+{omar})",
        left,
    )


def chaperones(number: Number) -> Problem:
    pupils, adults, groups = number(4, 40), number(1, 9), number(2, 40)
    return Problem(
        f"A trip needs {adults} adults per {pupils} pupils. How many adults for {pupils * groups} pupils?",
        f"({adults}*{pupils * groups})//{pupils}",
        groups * adults,
    )


def purchase(number: Number) -> Problem:
    sharks, dolphins, bought = number(2, 99), number(2, 99), number(2, 99)
    return Problem(
        f"A sea park has {sharks} sharks and {dolphins} dolphins and buys {bought} sharks. How many sharks now?",
        f"{sharks}+{bought}",
        sharks + bought,
    )


def game(number: Number) -> Problem:
    points = [number(5, 60) for _ in range(4)]
    listed = ", ".join(map(str, points[:3]))
    return Problem(
        f"Leo scores {listed} and {points[3]} points in four games. What is his total?",
        "+".join(map(str, points)),
        sum(points),
    )


def reading(number: Number) -> Problem:
    hours, days = number(1, 9), number(2, 999)
    return Problem(
        f"Ada reads {hours} hours a day. How many hours is that in {days} days?",
        f"{hours}*{days}",
        hours * days,
    )


def discount(number: Number) -> Problem:
    price, off = number(50, 499), number(2, 49)
    return Problem(
        f"A ${price} shirt is reduced by ${off}. What does it cost now?",
        f"{price}-{off}",
        price - off,
    )


def area(number: Number) -> Problem:
    length, width = number(2, 120), number(2, 99)
    return Problem(
        f"A garden is {length} m long and {width} m wide. What is its area?",
        f"{length}*{width}",
        length * width,
    )


def savings(number: Number) -> Problem:
    amount, weeks = number(3, 250), number(2, 60)
    return Problem(
        f"Ivo puts aside ${amount} a week. How much does he have after {weeks} weeks?",
        f"{amount}*{weeks}",
        amount * weeks,
    )


def cupcakes(number: Number) -> Problem:
    box, baked = number(3, 24), number(30, 999)
    return Problem(
        f"A baker packs {box} cupcakes to a box. How many boxes can {baked} cupcakes fill?",
        f"{baked}//{box}",
        baked // box,
    )


def interest(number: Number) -> Problem:
    hundreds, percent, years = number(1, 90), number(1, 12), number(2, 20)
    return Problem(
        f"Mei invests ${hundreds * 100} at {percent}% a year. How much simple interest in {years} years?",
        f"({hundreds * 100}*{percent}*{years})//100",
        hundreds * percent * years,
    )


_PROBLEMS = (pizza, chaperones, purchase, game, reading, discount, area, savings, cupcakes, interest)


def math_problems(*, train: int = 900, test: int = 100, reasoning: bool = False, seed: int = 0) -> DatasetDict:
    """Word problems of ten kinds with their answers; with `reasoning`, the answer names its calculation first.

    >>> print(math_problems(train=10, test=10, reasoning=True)["test"][0]["text"])
    A garden is 76 m long and 29 m wide. What is its area?
    Reason: 76*29. Answer: 2204

    Without `reasoning` the same seed gives the same problems, answered by the number alone. Numbers are positive
    integers, chosen so that every division is exact but that of the cupcakes, where full boxes are counted. No
    problem occurs twice. The least varied kind, `reading`, has 8,982 problems, so some 80,000 examples exist.

    See also: sentence_transformations, corrupt_answers (to plant wrong answers), class_detection.
    Source: the ten kinds are those of Kwon et al., DataInf, ICLR 2024, appendix; the wording is our own.

    Raises:
        BadSetting: A size that is no count, or more examples than there are problems.
    """
    tasks = {kind.__name__: partial(_draw, kind, reasoning) for kind in _PROBLEMS}
    return balanced_splits(tasks, train=train, test=test, seed=seed)


def _draw(kind: Callable[[Number], Problem], reasoning: bool, rng: Random) -> Example:
    question, reason, solution = kind(rng.randint)
    answer = f"Reason: {reason}. Answer: {solution}" if reasoning else str(solution)
    return Example(f"{question}\n", answer, essence=question)
