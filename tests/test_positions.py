"""Examples that look alike: the rows of one never go to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import bert, lora, padding
from torch import Tensor, nn
from watched import Recording, train

from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadSetting
from hf_influence.gradients.batches import Examples, padding_with
from hf_influence.gradients.during_training.positions import Positions
from hf_influence.store import GradientStore

IDS = [5, 6, 7, 8]
TYPES = [
    {"input_ids": IDS, "token_type_ids": types, "labels": 1} for types in ([0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1])
]


class Reading(nn.Module):
    """Takes what a model may take."""

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        decoder_input_ids: Any = None,
        labels: Any = None,
    ) -> None:
        """Nothing is computed."""


def text(ids: list[int], mask: list[int], **more: Any) -> dict[str, Any]:
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": [token if real else -100 for token, real in zip(ids, mask, strict=True)],
        **more,
    }


UNLIKE: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "positions": ("position_ids", [text(IDS, [1] * 4, position_ids=places) for places in ([0, 1, 2, 3], [0, 1, 5, 6])]),
    "masked between": ("attention_mask", [text(IDS, [1] * 4), text([5, 6, 9, 7, 8], [1, 1, 0, 1, 1])]),
    "decoder": ("decoder_input_ids", [text(IDS, [1] * 4, decoder_input_ids=ids) for ids in ([2, 3], [2, 4])]),
}
LIKE: dict[str, list[dict[str, Any]]] = {
    "padded": [text(IDS, [1] * 4), text([*IDS, 1, 1], [1, 1, 1, 1, 0, 0]), text([1, *IDS], [0, 1, 1, 1, 1])],
    "positions": [text(IDS, [1] * 4, position_ids=[0, 1, 2, 3])] * 2,
    "padded positions": [
        text(IDS, [1] * 4, position_ids=[0, 1, 2, 3]),
        text([*IDS, 1], [1, 1, 1, 1, 0], position_ids=[0, 1, 2, 3, 0]),
    ],
}


def positions(rows: list[dict[str, Any]]) -> Positions:
    return Positions(Examples(rows, Reading(), padding_with(1)), per_token=True)


@pytest.mark.parametrize("case", UNLIKE)
def test_examples_of_equal_tokens_that_differ_to_the_model_are_refused(case: str) -> None:
    name, rows = UNLIKE[case]
    with pytest.raises(BadSetting, match=rf"examples 0 and 1 have the same tokens and labels and differ in '{name}'"):
        positions(rows)


@pytest.mark.parametrize("case", LIKE)
def test_examples_that_differ_in_padding_alone_are_equal(case: str) -> None:
    assert positions(LIKE[case]).duplicates == len(LIKE[case]) - 1


def holding(*values: Any) -> list[dict[str, Any]]:
    """A collator keeps what is no tensor as it is."""
    return [text(IDS, [1] * 4, position_ids=value) for value in values]


def kept(features: list[dict[str, Any]]) -> dict[str, Any]:
    plain = [{name: value for name, value in row.items() if name != "position_ids"} for row in features]
    return {**padding_with(1)(plain), "position_ids": [row["position_ids"] for row in features]}


TWO = [torch.arange(2), torch.arange(3)]
VALUES: dict[str, tuple[Any, Any, Any]] = {
    "arrays": (np.arange(4), np.arange(4), np.arange(4) + 1),
    "tensors in a list": (TWO, [part.clone() for part in TWO], [part + 1 for part in TWO]),
    "fewer tensors": (TWO, TWO, TWO[:1]),
    "tensors by name": ({"a": TWO[0]}, {"a": TWO[0].clone()}, {"a": TWO[1]}),
}


@pytest.mark.parametrize("case", VALUES)
def test_inputs_are_compared_by_value_whatever_holds_them(case: str) -> None:
    first, same, other = VALUES[case]
    assert Positions(Examples(holding(first, same), Reading(), kept), per_token=True).duplicates == 1
    with pytest.raises(BadSetting, match="examples 0 and 1 have the same tokens and labels and differ in 'position_"):
        Positions(Examples(holding(first, other), Reading(), kept), per_token=True)


def typed(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator that keeps token types and ids."""
    kept = {name: torch.tensor([row[name] for row in features]) for name in ("token_type_ids", "number")}
    return {**padding()(features), **kept}


def reading_types() -> Any:
    torch.manual_seed(0)
    model = lora(bert(type_vocab_size=3), ["query", "value"], dtype=torch.float32, lora_dropout=0.0)
    nn.init.normal_(model.get_base_model().bert.embeddings.token_type_embeddings.weight)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def test_token_types_are_not_mixed_up(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    with pytest.raises(BadSetting, match="examples 0 and 1 have the same tokens and labels and differ in 'token_type"):
        train(reading_types(), tmp_path, capture, data=TYPES, collate=padding_with(1), kind=Recording)
    named = Dataset.from_list([{**row, "number": 10 - i} for i, row in enumerate(TYPES)])
    capture = GradientCapture(tmp_path / "named", during="epochs", id_column="number")
    model = reading_types()
    options: dict[str, Any] = {"remove_unused_columns": False, "learning_rate": 0.0, "num_train_epochs": 3}
    train(model, tmp_path, capture, data=named, collate=typed, per_device_train_batch_size=1, **options)
    store = GradientStore.open(capture.path)
    want = store.rows("train", 0)
    for epoch in (1, 2, 3):
        rows = store.rows("train", epoch)
        assert rows.ids == want.ids == [10, 9, 8]
        for block in rows.blocks:
            torch.testing.assert_close(rows.block(block), want.block(block), rtol=1e-4, atol=1e-6)
    some = torch.cat([want.block(block) for block in want.blocks], 1)
    assert (some[0] - some[1]).norm() > 0.1 * some[0].norm(), "they are different examples"
