"""Labels and tokens that the model does not have, wherever in a dataset they are, are found before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import Example, bert, labelled, llama, lora, prompts, tiny
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from watched import Recording, train

from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadExample
from hf_influence.gradients import collect
from hf_influence.gradients.columns import check_columns, vocabularies
from hf_influence.task import CausalLM, Classification, LanguageModel, Seq2SeqLM

PROMPTS, SENTENCES = prompts(10), labelled(lambda i: i % 2, 10)
MIDDLE = 6


def spoilt(rows: list[Example], **columns: Any) -> Dataset:
    """One in the middle, as long as another, has other values; each has a name."""
    names = [{**row, "name": f"row {i}"} for i, row in enumerate(rows)]
    return Dataset.from_list([{**row, **columns} if i == MIDDLE else row for i, row in enumerate(names)])


def classifier(classes: int = 2) -> nn.Module:
    return lora(bert(num_labels=classes), ["query"], dtype=torch.float32, modules_to_save=["classifier"])


N = len(PROMPTS[MIDDLE]["input_ids"])
CASES: dict[str, tuple[Callable[[], nn.Module], Dataset, str]] = {
    "class": (classifier, spoilt(SENTENCES, labels=2), "the label 2, and .* classes from 0 to 1.*num_labels"),
    "ignored": (
        classifier,
        spoilt(SENTENCES, labels=-100),
        r"the label -100.*filter\(lambda row: row\['labels'\] >= 0",
    ),
    "none": (classifier, spoilt(SENTENCES, labels=None), r"no label \(.*is not None"),
    "classifier's token": (classifier, spoilt(SENTENCES, input_ids=[4, 48]), "the token 48.* 0 to 47.*tokenizer"),
    "token": (lambda: tiny(torch.float32), spoilt(PROMPTS, input_ids=[-1] * N), "the token -1.* 0 to 47"),
    "label": (
        lambda: tiny(torch.float32),
        spoilt(PROMPTS, labels=[48] * N),
        "the label 48.* 0 to 47, and -100 for none",
    ),
}


@pytest.mark.parametrize("during", ["epochs", None])
@pytest.mark.parametrize("case", CASES)
def test_odd_queries_are_named_before_the_first_step(tmp_path: Path, case: str, during: Any) -> None:
    make, queries, message = CASES[case]
    seen: list[None] = []
    kind = type("Counting", (Recording,), {"training_step": lambda *_, **__: seen.append(None)})
    data = PROMPTS if ("label" in case and make is not classifier) or case == "token" else SENTENCES
    capture = GradientCapture(tmp_path / "rows", queries, during=during)
    with pytest.raises(BadExample, match=f"query_dataset: example {MIDDLE} has {message}"):
        train(make(), tmp_path, capture, data=data, kind=kind)
    assert not seen
    assert not capture.path.exists()


@pytest.mark.parametrize("case", CASES)
def test_odd_examples_are_named_by_their_ids(tmp_path: Path, case: str) -> None:
    make, data, message = CASES[case]
    with pytest.raises(BadExample, match=f"example 'row {MIDDLE}' has {message}"):
        collect(make(), data, tmp_path / "rows", id_column="name")


def test_text_for_a_label_says_how_to_make_numbers(tmp_path: Path) -> None:
    rows = Dataset.from_list(labelled(lambda i: ["spam", "ham"][i % 2], 4))
    with pytest.raises(BadExample, match=r"example 0 has the text 'spam' .*class_encode_column\('labels'\)"):
        collect(classifier(), rows, tmp_path / "rows")


@pytest.mark.parametrize("task", [CausalLM(), Seq2SeqLM()])
def test_a_set_without_any_label_is_refused(task: LanguageModel) -> None:
    model = tiny(torch.float32)
    first = [5] if isinstance(task, CausalLM) else [-100]  # which no token comes before
    rows = [{**row, "labels": first + [-100] * (len(row["labels"]) - 1)} for row in PROMPTS]
    with pytest.raises(BadExample, match=r"none of the 10 examples has a label to learn: all are -100\."):
        check_columns(Dataset.from_list(rows), None, model, task)
    check_columns(Dataset.from_list([*rows, PROMPTS[0]]), None, model, task)


@pytest.mark.parametrize(
    ("task", "label"),
    [
        (Classification(None, 1), 7),
        (Classification(None, 1), -2.5),
        (Classification("regression", 2), [7, 8]),
        (Classification("multi_label_classification", 2), [1.0, 0.0]),
        (Classification(None, 2), [0.2, 0.8]),
        (Classification("single_label_classification", 2), 1),
        (CausalLM(), 999),  # of the whole example, beside the labels that a collator makes
    ],
)
def test_labels_of_other_kinds_are_left_to_their_tasks(task: Any, label: Any) -> None:
    for dataset in (rows := labelled(lambda _: label, 4)), Dataset.from_list(rows):
        check_columns(dataset, None, classifier(), task)


class Lazy(TorchDataset[Any]):
    """Of which reading an example takes long."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, at: int) -> Any:
        raise AssertionError(at)


def test_what_takes_long_to_read_is_not_looked_through() -> None:
    transformed = spoilt(SENTENCES, labels=2).with_transform(lambda _: {}["read"])
    for dataset in (Lazy(), transformed):
        check_columns(dataset, None, classifier(), Classification())


def test_the_tokens_that_a_model_reads_and_writes() -> None:
    assert vocabularies(llama()) == vocabularies(tiny()) == (48, 48)
    assert vocabularies(lora(llama(), ["embed_tokens", "lm_head"])) == (48, 48)
    assert vocabularies(lora(llama(), ["q_proj"], modules_to_save=["lm_head"])) == (48, 48)
    assert vocabularies(classifier()) == (48, None)
    assert vocabularies(nn.Linear(2, 2)) == (None, None)
