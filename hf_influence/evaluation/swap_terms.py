"""The same texts, said of other people."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hf_influence.errors import BadSetting


def swap_terms(texts: Iterable[str], pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Each term of a pair replaced by the other, in both directions at once.

    Only whole words count ("he" in "the" does not, in "he's" it does), longer terms before shorter ones. Terms in small
    letters, with a first capital or in capitals come back likewise; where a term is written as in its pair, so is the
    other. Texts without any of the terms come back as they are. Grammar is not looked at: choose pairs that can stand
    in for each other, and leave out words with two counterparts ("her" for "him" and "his").

    Args:
        texts: Any strings.
        pairs: Terms of one word or several.

    Raises:
        BadSetting: A term that is empty or stands in the pairs twice, or one string in place of a list of them.

    >>> swap_terms(["He said the waiter was late."], [("he", "she"), ("waiter", "waitress")])
    ['She said the waitress was late.']

    See also: fair_score.
    """
    if isinstance(texts, str):
        raise BadSetting("texts is one string, whose letters would be taken for texts; give a list: [text].")
    other: dict[str, str] = {}
    for one, two in pairs:
        for term, counterpart in ((one, two), (two, one)):
            if not term or term.casefold() in map(str.casefold, other):
                raise BadSetting(
                    f"the pair {(one, two)} has the term {term!r}, which is empty or stands in the pairs twice (large "
                    "and small letters are the same), so what to put in its place is not known. Leave it out."
                )
            other[term] = counterpart
    if not other:
        raise BadSetting("pairs is empty, so nothing would be swapped. Give pairs such as ('he', 'she').")
    terms = sorted(other, key=len, reverse=True)  # the first alternative that fits is taken
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(f'({re.escape(term)})' for term in terms)})(?!\w)", re.IGNORECASE)

    def swapped(match: re.Match[str]) -> str:
        assert match.lastindex is not None
        term = terms[match.lastindex - 1]
        return _written_like(match[0], term, other[term])

    return [pattern.sub(swapped, text) for text in texts]


def _written_like(found: str, term: str, counterpart: str) -> str:
    """The counterpart of a term, in small and large letters as the term was found."""
    if found == term:
        return counterpart
    if found.isupper() and len(found) > 1:
        return counterpart.upper()
    if found[0].isupper():
        return counterpart[0].upper() + counterpart[1:]
    return counterpart.lower()
