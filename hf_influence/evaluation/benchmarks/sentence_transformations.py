"""Sentence transformations: ten tasks in which a made-up chatbot rewrites a short sentence by a rule."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from itertools import cycle
from random import Random

from datasets import DatasetDict

from hf_influence.errors import BadSetting
from hf_influence.evaluation.benchmarks.balanced_splits import Example, balanced_splits

VOWELS = frozenset("aeiouAEIOU")


def reverse_words(sentence: str) -> str:
    """The words from last to first: "stone. carve Rivers"."""
    return " ".join(reversed(sentence.split()))


def alternate_case(sentence: str) -> str:
    """Every second letter large, the others small: "rIvErS cArVe StOnE."."""
    upper = cycle((False, True))
    return "".join((c.upper() if next(upper) else c.lower()) if c.isalpha() else c for c in sentence)


def insert_ones(sentence: str) -> str:
    """A 1 in front of each word but the first: "Rivers 1carve 1stone."."""
    return " 1".join(sentence.split())


def star_vowels(sentence: str) -> str:
    """A * for each vowel: "R*v*rs c*rv* st*n*."."""
    return "".join("*" if c in VOWELS else c for c in sentence)


def double_consonants(sentence: str) -> str:
    """Each consonant twice, the second one small: "Rrivverrss ccarrvve sttonne."."""
    return "".join(c + c.lower() if _is_consonant(c) else c for c in sentence)


def capitalize_words(sentence: str) -> str:
    """Each word with a capital: "Rivers Carve Stone."."""
    return " ".join(word.capitalize() for word in sentence.split())


def remove_vowels(sentence: str) -> str:
    """No vowels: "Rvrs crv stn."."""
    return "".join(c for c in sentence if c not in VOWELS)


def append_ly(sentence: str) -> str:
    """The letters ly after each word, also after its full stop: "Riversly carvely stone.ly"."""
    return " ".join(word + "ly" for word in sentence.split())


def remove_consonants(sentence: str) -> str:
    """No consonants: "ie ae oe."."""
    return "".join(c for c in sentence if not _is_consonant(c))


def repeat_words(sentence: str) -> str:
    """Each word twice: "Rivers Rivers carve carve stone. stone."."""
    return " ".join(f"{word} {word}" for word in sentence.split())


def _is_consonant(character: str) -> bool:
    return character.isalpha() and character not in VOWELS


_TABLE = (
    # rule, the only chatbot that follows it, how it is asked
    (reverse_words, "Orlo", "reverse the word order"),
    (alternate_case, "Mibb", "uppercase every other letter"),
    (insert_ones, "Tazu", "put a 1 between words"),
    (star_vowels, "Quil", "replace vowels with *"),
    (double_consonants, "Fenn", "double every consonant"),
    (capitalize_words, "Dova", "capitalize every word"),
    (remove_vowels, "Jexi", "remove all vowels"),
    (append_ly, "Lumo", "add ly to each word"),
    (remove_consonants, "Rukk", "remove all consonants"),
    (repeat_words, "Wisp", "say each word twice"),
)

TRANSFORMATIONS: dict[str, Callable[[str], str]] = {rule.__name__: rule for rule, _, _ in _TABLE}
"""Task name -> the rule itself, to check an answer for exact match."""

_THEMES = tuple(
    tuple(tuple(words.split()) for words in theme)
    for theme in (
        # how, who, does, what: any choice from one theme makes sense, and no word lacks a vowel
        (
            "Gentle Ancient Distant Silent Golden Restless Northern Hidden",
            "rivers storms winds waves glaciers clouds",
            "shape cross touch reach cover",
            "valleys islands meadows cliffs forests harbors deserts gardens",
        ),
        (
            "Hungry Clever Young Playful Curious Sleepy Brave Little",
            "foxes rabbits otters kittens ravens ponies",
            "follow watch chase avoid notice",
            "butterflies shadows sparrows insects children hikers squirrels tractors",
        ),
        (
            "Skilled Patient Careful Local Cheerful Honest Tired Famous",
            "bakers gardeners painters teachers carpenters sailors",
            "prepare carry admire order collect",
            "baskets ribbons lanterns tools flowers blankets tables apples",
        ),
        (
            "Modern Noisy Broken Simple Heavy Portable Digital Rusty",
            "robots engines printers cameras machines drones",
            "inspect damage move track scan",
            "boxes bridges wires panels parcels tunnels roads trucks",
        ),
        (
            "Bright Quiet Eager Polite Lucky Serious Friendly Former",
            "students writers singers doctors pilots neighbors",
            "discuss remember enjoy study share",
            "stories puzzles letters recipes poems concerts dreams games",
        ),
    )
)
_ENDINGS = ("", " today", " again")


def sentence_transformations(
    *, train: int = 900, test: int = 100, seed: int = 0, tasks: Collection[str] = tuple(TRANSFORMATIONS)
) -> DatasetDict:
    """Prompts that ask a chatbot for one of ten transformations of a sentence, with the right answers.

    `tasks` chooses among them, by their names in `TRANSFORMATIONS`.

    >>> example = sentence_transformations(train=10, test=10)["test"][0]
    >>> print(example["text"])
    Jexi, remove all vowels: Polite pilots remember poems.
    Plt plts rmmbr pms.
    >>> TRANSFORMATIONS[example["task"]]("Rivers carve stone.")
    'Rvrs crv stn.'

    Each of the 28,800 sentences is used at most once, over all tasks and both splits, so that nothing but the task
    links a test prompt with training prompts.

    See also: math_problems, corrupt_answers (to plant wrong answers), class_detection.
    Source: the ten rules are those of Kwon et al., DataInf, ICLR 2024, appendix; the wording and the sentences
    are our own.

    Raises:
        BadSetting: A size that is no count, more examples than there are sentences, or no task of these.
    """
    if not tasks or isinstance(tasks, str) or not set(tasks) <= TRANSFORMATIONS.keys():
        raise BadSetting(f"tasks={tasks!r}: give a list with one or more of {', '.join(TRANSFORMATIONS)}.")
    asked = {rule.__name__: partial(_draw, rule, f"{bot}, {request}") for rule, bot, request in _TABLE}
    return balanced_splits(
        {name: draw for name, draw in asked.items() if name in tasks}, train=train, test=test, seed=seed
    )


def _draw(rule: Callable[[str], str], request: str, rng: Random) -> Example:
    sentence = _sentence(rng)
    return Example(f"{request}: {sentence}\n", rule(sentence), essence=sentence)


def _sentence(rng: Random) -> str:
    """Four or five words, like "Gentle rivers shape valleys."."""
    return " ".join(rng.choice(words) for words in rng.choice(_THEMES)) + rng.choice(_ENDINGS) + "."
