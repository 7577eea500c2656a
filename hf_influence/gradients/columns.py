"""What the columns of a dataset tell before the first batch: labels and tokens that the model does not have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from hf_influence.errors import BadExample
from hf_influence.task import IGNORED, LABELS, CausalLM, Classification, LanguageModel, Task, text_config, unwrapped

SINGLE = (None, "single_label_classification")


def check_columns(dataset: Any, ids: list[Any] | None, model: nn.Module, task: Task) -> None:
    """Whether the model has all the labels and tokens, as far as stored columns tell.

    What a transform or the collator makes is known when it is made.

    Args:
        dataset: Lists and `datasets.Dataset` are looked through; others may take long to read.
        ids: The names of its examples; by default their positions.
        model: The model.
        task: Its task.

    Raises:
        BadExample: Names the first example with others, or says that none has a label.
    """
    tokens, answers = vocabularies(model)
    seen = unlabelled = 0
    for row in stored(dataset, ("input_ids", *LABELS)):
        name = next((name for name in LABELS if name in row), None)
        wrong = _odd_tokens(row.get("input_ids", ()), tokens, "token")
        if name is not None and isinstance(task, Classification):
            wrong = wrong or _odd_class(row[name], task, name)
        elif name is not None and isinstance(task, LanguageModel) and np.ndim(row[name]) == 1:
            wrong = wrong or _odd_tokens(row[name], answers, "label", IGNORED)
            unlabelled += bool((np.asarray(row[name])[isinstance(task, CausalLM) :] == IGNORED).all())
        if wrong:
            raise BadExample(f"example {seen if ids is None else ids[seen]!r} {wrong}")
        seen += 1
    if seen and unlabelled == seen:
        raise BadExample(
            f"none of the {seen} examples has a label to learn: all are {IGNORED}. Prompts that fill the whole length "
            "after truncation, or a template that does not find the answers, are usual causes."
        )


def stored(dataset: Any, names: Iterable[str]) -> Iterable[Mapping[str, Any]]:
    """The rows of a dataset with these columns alone, where they can be read as they are; none where not."""
    if isinstance(dataset, list | tuple):
        return dataset
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return ()
    there = [name for name in names if name in dataset.column_names]
    return dataset.with_format("numpy").select_columns(there) if there else ()


def vocabularies(model: nn.Module) -> tuple[int | None, int | None]:
    """How many tokens the model reads and how many it writes, at most; `None` where its layers do not say."""
    least = getattr(text_config(model), "vocab_size", None) or 0

    def size(end: str, of: str) -> int | None:
        layer = None
        with suppress(AttributeError, NotImplementedError):
            layer = getattr(unwrapped(model), end)()
        layer = getattr(layer, "base_layer", getattr(layer, "original_module", layer))  # below PEFT
        found = getattr(layer, of, None)
        return None if found is None else max(found, least)

    return size("get_input_embeddings", "num_embeddings"), size("get_output_embeddings", "out_features")


def _odd_tokens(values: Any, size: int | None, what: str, besides: int | None = None) -> str:
    """What is wrong with these tokens, if anything is."""
    values = np.asarray(values)
    if size is None or values.dtype.kind not in "iu":
        return ""
    odd = values[(values < 0) | (values >= size)]
    odd = odd if besides is None else odd[odd != besides]
    if not odd.size:
        return ""
    none = "" if besides is None else f", and {besides} for none"
    return (
        f"has the {what} {odd[0]}, and the model has those from 0 to {size - 1}{none}. Tokenise with the tokenizer of "
        "the model, or let the model have as many: model.resize_token_embeddings(len(tokenizer))."
    )


def _odd_class(label: Any, task: Classification, name: str) -> str:
    """What is wrong with the label of an example of a classifier, if anything is."""
    if isinstance(label, str):
        return f"has the text {str(label)!r} for a label. Make numbers of them: dataset.class_encode_column({name!r})."
    value = np.asarray(label)
    if value.dtype.kind == "O" or (value.dtype.kind == "f" and np.isnan(value).any()):
        return f"has no label ({label}). Leave it out: dataset.filter(lambda row: row[{name!r}] is not None)."
    if value.size != 1 or value.dtype.kind not in "iu" or task.problem not in SINGLE or task.classes == 1:
        return ""
    if 0 <= (given := int(value.flat[0])) < task.classes:
        return ""
    return (
        f"has the label {given}, and the model has the classes from 0 to {task.classes - 1}. Look at num_labels of the "
        f"model; what has no label is left out by dataset.filter(lambda row: row[{name!r}] >= 0)."
    )
