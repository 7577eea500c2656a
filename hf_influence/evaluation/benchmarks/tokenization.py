"""Tokens and labels of prompt-and-answer examples, labelled where the gradient is to come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from datasets import Dataset

from hf_influence.errors import BadExample, BadSetting
from hf_influence.task import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["text", "prompt", "answer"]


def tokenize(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, gradient: Part = "text", max_length: int | None = None
) -> Dataset:
    """`dataset` with input_ids, attention_mask and labels for a causal language model; other columns stay.

    input_ids = [bos] prompt answer eos, where bos is there if the tokenizer itself puts it. Prompt and answer are
    tokenised apart, so that the border between them falls between two tokens. labels = input_ids on the part that
    `gradient` names and −100 elsewhere; eos belongs to the answer, bos to the prompt.

    The part matters for what the scores mean: prompts name their task, so their gradients tell tasks apart almost
    perfectly; whether an answer is right shows in the gradient of the answer only.

    Args:
        dataset: With string columns `prompt` and `answer`.
        tokenizer: Of the model; must have an `eos_token`.
        gradient: `"text"` (all of it), `"prompt"` or `"answer"`.
        max_length: Cut longer examples at the end, eos included; `None` keeps them whole.

    Raises:
        BadSetting: An unknown `gradient`, a `max_length` below 2, a tokenizer without eos.
        BadExample: Missing or taken columns, no rows, or a row whose loss would have no labelled token. (The first
            token has no loss: nothing predicts it.)
    """
    if gradient not in get_args(Part):
        raise BadSetting(f"gradient={gradient!r} is no part of an example; choose one of {list(get_args(Part))}.")
    if max_length is not None and max_length < 2:
        raise BadSetting(f"max_length={max_length} leaves no token to predict; give at least 2, or None for no limit.")
    if tokenizer.eos_token_id is None:
        raise BadSetting(
            f"{type(tokenizer).__name__} has no eos_token, which marks where an answer ends. If the model is a "
            "language model, set it to the token that it stops at, e.g. tokenizer.eos_token = tokenizer.sep_token."
        )
    new = ("input_ids", "attention_mask", "labels")
    if missing := [column for column in ("prompt", "answer") if column not in dataset.column_names]:
        raise BadExample(f"the dataset has the columns {dataset.column_names} but no {missing}. Rename its columns.")
    if taken := [column for column in new if column in dataset.column_names]:
        raise BadExample(f"the dataset has {taken} already; it seems to be tokenized. Remove them, or use it as it is.")
    if len(dataset) == 0:
        raise BadExample("the dataset has no rows, so there is nothing to tokenize. Check how it was filtered.")

    plain = dataset.with_format(None)
    prompts = tokenizer(list(plain["prompt"]), add_special_tokens=False)["input_ids"]
    answers = tokenizer(list(plain["answer"]), add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []

    columns: dict[str, list[list[int]]] = {column: [] for column in new}
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        head, tail = [*bos, *prompt], [*answer, tokenizer.eos_token_id]
        ids = [*head, *tail][:max_length]
        first, last = {"text": (0, len(ids)), "prompt": (0, len(head)), "answer": (len(head), len(ids))}[gradient]
        labels = [token if first <= t < last else IGNORED for t, token in enumerate(ids)]
        if all(label == IGNORED for label in labels[1:]):
            raise BadExample(
                f"row {i} has no labelled token in its {gradient} ({len(head)} prompt and {len(tail)} answer tokens, "
                f"max_length={max_length}), so it has no gradient. Raise max_length, or leave the row out."
            )
        for column, value in zip(new, (ids, [1] * len(ids), labels), strict=True):
            columns[column].append(value)
    for column in new:
        dataset = dataset.add_column(column, columns[column])
    return dataset
