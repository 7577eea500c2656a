"""Ways to make an answer wrong: each a function of the answers, the row and a random generator."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random


@dataclass(frozen=True)
class Answers:
    """The right answers of a dataset, and the task (or source) of each."""

    answers: Sequence[str]
    tasks: Sequence[Hashable]

    @cached_property
    def distinct(self) -> dict[Hashable, list[str]]:
        """Task -> its different answers, in the order in which they occur."""
        found: dict[Hashable, dict[str, None]] = {}
        for answer, task in zip(self.answers, self.tasks, strict=True):
            found.setdefault(task, {})[answer] = None
        return {task: list(answers) for task, answers in found.items()}


Kind = Callable[[Answers, int, Random], str | None]
"""The wrong answer for a row, or `None` where this kind of mistake cannot be made."""


def swapped_within(known: Answers, i: int, rng: Random) -> str | None:
    """Another answer of the same task: right in form, wrong for this prompt."""
    return _another(known.distinct[known.tasks[i]], known.answers[i], rng)


def swapped_across(known: Answers, i: int, rng: Random) -> str | None:
    """An answer of another task, each task with the same chance."""
    own = known.answers[i]
    others = [task for task, answers in known.distinct.items() if task != known.tasks[i] and answers != [own]]
    return _another(known.distinct[rng.choice(others)], own, rng) if others else None


def truncated(known: Answers, i: int, rng: Random) -> str | None:
    """The first words of the answer, at most half of them; an answer of one word cannot be cut."""
    words = list(re.finditer(r"\S+", known.answers[i]))
    return known.answers[i][: words[rng.randint(1, len(words) // 2) - 1].end()] if len(words) > 1 else None


def refusal(known: Answers, i: int, rng: Random) -> str | None:
    """One of six English sentences that decline to answer."""
    return _another(REFUSALS, known.answers[i], rng)


def changed_number(known: Answers, i: int, rng: Random) -> str | None:
    """One digit of the last number is another: there the result of a calculation stands.

    The number keeps its length and does not begin with a 0 that was not there. Digits inside a word (v2) do not count.
    """
    answer = known.answers[i]
    numbers = list(re.finditer(r"(?<!\w)[0-9]+(?:[.,][0-9]+)*", answer))
    if not numbers:
        return None
    number = numbers[-1]
    at = rng.choice([number.start() + k for k, char in enumerate(number[0]) if char.isdigit()])
    leading = at == number.start() and number[0][1:2].isdigit()
    digit = rng.choice([d for d in "0123456789" if d != answer[at] and not (leading and d == "0")])
    return answer[:at] + digit + answer[at + 1 :]


def other_language(known: Answers, i: int, rng: Random) -> str | None:
    """Stock sentences in German, French, Spanish or Italian, about as many words as the right answer has.

    No translation: what they say has nothing to do with the prompt, as nothing here can translate. So it is a reply in
    the wrong language and beside the point, both at once. Meant for answers in English.
    """
    sentences = rng.sample(language := rng.choice(list(LANGUAGES.values())), len(language))
    words = len(known.answers[i].split())
    reply = sentences.pop()
    while sentences and len(reply.split()) < words:
        reply += " " + sentences.pop()
    return reply


def _another(answers: Sequence[str], own: str, rng: Random) -> str | None:
    """One of different answers that is not `own`, each with the same chance."""
    at = rng.randrange(len(answers))
    if answers[at] == own:
        if len(answers) == 1:
            return None
        at = (at + rng.randrange(1, len(answers))) % len(answers)
    return answers[at]


REFUSALS = (
    "I am sorry, but I cannot help with that.",
    "Unfortunately I am not able to answer this question.",
    "I would rather not respond to this request.",
    "As an assistant, I have to decline this request.",
    "This is something that I cannot do for you.",
    "I do not have an answer to that, sorry.",
)
LANGUAGES = {
    "German": (
        "Das lässt sich so einfach nicht sagen.",
        "Man muss dabei vieles bedenken.",
        "Zuerst sollte man sich einen Überblick verschaffen.",
        "Danach geht alles viel leichter.",
        "Am Ende kommt es auf die Einzelheiten an.",
        "Oft hilft es, eine Nacht darüber zu schlafen.",
        "Wer Zeit hat, kann es auch langsam angehen.",
        "Mehr gibt es dazu im Augenblick nicht zu sagen.",
    ),
    "French": (
        "Ce n'est pas si facile à dire.",
        "Il faut penser à beaucoup de choses.",
        "On commence par regarder l'ensemble.",
        "Ensuite, tout devient plus simple.",
        "À la fin, ce sont les détails qui comptent.",
        "La nuit porte souvent conseil.",
        "Ceux qui ont le temps peuvent aller lentement.",
        "Il n'y a rien à ajouter pour le moment.",
    ),
    "Spanish": (
        "No es tan fácil de decir.",
        "Hay que pensar en muchas cosas.",
        "Primero conviene mirar el conjunto.",
        "Después todo resulta más sencillo.",
        "Al final lo que cuenta son los detalles.",
        "A menudo ayuda dejarlo para mañana.",
        "Quien tenga tiempo puede ir despacio.",
        "Por ahora no hay nada más que añadir.",
    ),
    "Italian": (
        "Non è così facile da dire.",
        "Bisogna pensare a molte cose.",
        "Per prima cosa conviene guardare l'insieme.",
        "Dopo tutto diventa più semplice.",
        "Alla fine contano i dettagli.",
        "Spesso aiuta dormirci sopra.",
        "Chi ha tempo può andare piano.",
        "Per il momento non c'è altro da aggiungere.",
    ),
}
KINDS: dict[str, Kind] = {
    kind.__name__: kind for kind in (swapped_within, swapped_across, truncated, refusal, changed_number, other_language)
}
