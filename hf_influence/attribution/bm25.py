"""Likeness of words: what a comparison with queries is worth without any model."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_influence.attribution.extras import package
from hf_influence.attribution.given import fingerprint, one_for_each
from hf_influence.attribution.method import Method
from hf_influence.attribution.selection import Selection
from hf_influence.errors import BadSetting
from hf_influence.store import Rows


@dataclass(kw_only=True)
class BM25(Method, name="bm25"):
    """How well the words of the example match those of the query, rare words more than common ones.

        score[i, q] = Σ_{t ∈ words of q} ln(1 + (n − n_t + ½) / (n_t + ½)) · f_it / (f_it + k₁ (1 − b + b l_i / l̄))

    n_t examples hold the word t, f_it times in i, whose number of words is l_i, l̄ on average. Words are runs of
    letters, digits and underscores, in lower case.

    Cost: O(words); no rows, the texts are passed. Needs the package bm25s.
    Use when: to see what gradients find beyond shared words.
    See also: Cosine (of gradients), Length.
    Source: Robertson & Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009 (as in Lucene).
    """

    needs = ("queries", "texts")

    texts: Sequence[str] | None = None
    """The text of each training example in dataset order; always needed, as stores do not hold texts."""
    query_texts: Sequence[str] | None = None
    """The text of each query in dataset order; always needed."""
    k1: float = field(default=1.5, metadata={"above": 0})
    """How much more a word counts that comes again."""
    b: float = field(default=0.75, metadata={"above": 0, "below": 1})
    """How much long examples pay for their length."""

    def score(self, rows: Selection) -> Tensor:
        """Scores `[n, q]`.

        Raises:
            BadSetting: No texts were passed, or not one for each example.
            MissingPackage: bm25s is not installed.
        """
        query, train = rows.query, rows.train
        questions = [_words(text) for text in self._given(query, "query_texts", "query")]
        documents = [_words(text) for text in self._given(train, "texts", "training example")]
        bm25s = package("bm25s", self.name)
        out = torch.zeros(len(train), len(query), dtype=train.dtype)
        if not any(documents):
            return out
        index = bm25s.BM25(k1=self.k1, b=self.b, method="lucene", dtype="float64")
        index.index(documents, show_progress=False)
        for column, words in enumerate(questions):
            if words:
                out[:, column] = torch.from_numpy(index.get_scores(words))
        return out

    def record(self, rows: Selection) -> dict[str, Any]:
        """The settings, with fingerprints in place of the texts."""
        given = {name: list(getattr(self, name)) for name in ("texts", "query_texts")}
        settings = asdict(replace(self, texts=None, query_texts=None))
        return settings | {name: f"{len(texts)} texts, {fingerprint(texts)}" for name, texts in given.items()}

    def _given(self, rows: Rows, setting: str, whose: str) -> list[str]:
        texts = getattr(self, setting)
        if texts is None:
            raise BadSetting(
                f"method '{self.name}' compares texts, and stores do not hold them. Pass {setting}=[...], one for each "
                f"{whose} in dataset order, such as dataset['text']."
            )
        given = one_for_each(texts, rows, self.name, setting, "texts", whose)
        if odd := [place for place, text in enumerate(given) if not isinstance(text, str)]:
            raise BadSetting(
                f"method '{self.name}': {setting} is to be texts, and that of {whose} {odd[0]} is "
                f"{reprlib.repr(given[odd[0]])}. Pass its text; an empty one where there is none."
            )
        return given


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
