"""A dataset as examples by position, and as batches with the padding on the right."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Container, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hf_influence.dataset.contents import column_codes
from hf_influence.errors import BadExample, BadSetting
from hf_influence.gradients.packing import Packing
from hf_influence.task import (
    IGNORED,
    LABELS,
    CausalLM,
    Classification,
    Seq2SeqLM,
    Task,
    labels_of,
    text_config,
    unwrapped,
)

SURVEYED = 1024
TRIED = 32
"""Examples of which the shortest and the longest are tried out."""
PACKED = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What a collator adds to tell packed examples apart."""
Collator = Callable[[list[dict[str, Any]]], Any]


class Examples:
    """A map-style dataset as this library uses it: examples by position, their lengths, their columns checked.

    Args:
        dataset: `datasets.Dataset`, or anything with `len()` and `[i]` that gives dictionaries.
        model: The columns that its forward method does not take are left out, as `Trainer` does.
        collate: Makes a batch of a list of examples; by default pads on the right.
        id_column: A column whose values name the examples; by default their positions do.
        remove_unused_columns: Keep all columns where the collator needs them.

    Attributes:
        arguments: What `forward_arguments(model)` gives.

    Raises:
        BadExample: Several datasets, an empty one, one without a length, or without columns that the model takes.
    """

    def __init__(
        self,
        dataset: Any,
        model: nn.Module,
        collate: Collator | None = None,
        id_column: str | None = None,
        remove_unused_columns: bool = True,
    ):
        if isinstance(dataset, Mapping):
            raise BadExample(
                f"the dataset is a {type(dataset).__name__} of {', '.join(map(str, dataset))}. Pass one split of it: "
                f"dataset[{next(iter(dataset), 'train')!r}]."
            )
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise BadExample(
                f"the dataset is a {type(dataset).__name__} without a length. Rows are kept by position: pass a "
                "map-style dataset (for an IterableDataset: Dataset.from_generator, or take(n) into a list)."
            )
        if len(dataset) == 0:
            raise BadExample("the dataset is empty: there is nothing to take gradients of.")
        first = dataset[0]
        if not isinstance(first, Mapping):
            raise BadExample(f"an example is a {type(first).__name__}; it must be a dictionary of columns.")
        self.ids = self._ids_of(dataset, id_column, first)
        self.id_column = id_column
        self._whole = dataset
        self.arguments = frozenset(forward_arguments(model))
        if remove_unused_columns:
            taken = [name for name in first if name in self.arguments or name in LABELS]
            if not taken:
                raise BadExample(
                    f"none of the columns {list(first)} is an argument of {type(model).__name__}.forward. Tokenise "
                    "first: dataset.map(lambda row: tokenizer(row['text']))."
                )
            self._columns: list[str] | None = taken
            transformed = getattr(dataset, "format", {}).get("type") == "custom"  # which may need the other columns
            if hasattr(dataset, "select_columns") and not transformed:
                dataset = dataset.select_columns(taken)
        else:
            self._columns = None
        self._dataset = dataset
        pad_token_id = getattr(text_config(model), "pad_token_id", None)
        self.pad = padding_with(pad_token_id if isinstance(pad_token_id, int) else 0)
        self._collate = collate or self.pad
        self._surveyed: tuple[str, list[int]] | None = None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        if hasattr(self._dataset, "__getitems__"):
            rows = self._dataset.__getitems__(list(positions))
        else:
            rows = [self._dataset[i] for i in positions]
        return rows if self._columns is None else [{name: row[name] for name in self._columns} for row in rows]

    def batch(self, positions: Sequence[int]) -> dict[str, Any]:
        """The collated batch of some examples, a row each.

        A collator that puts several examples into one row gets them one by one.

        Raises:
            BadExample: It has no labels.
            BadSetting: The collator makes more or less than one row of one example, or an example is packed.
        """
        batch = _not_empty(self.collated(positions))
        rows = len(labels_of(dict(batch)))
        if rows == len(positions):
            return _unpacked(batch)
        alone = [_not_empty(self.collated([position])) for position in positions]
        for one in alone:
            rows = len(labels_of(dict(one)))
            if rows != 1:
                raise BadSetting(
                    f"the data_collator made {rows} rows of one example. Every example needs a row of its own: use a "
                    "collator that pads."
                )
            _unpacked(one)
        features = [{name: one[name][0] for name in one if name not in PACKED} for one in alone]
        if any("attention_mask" in row for row in features):  # of an example without tokens, say
            features = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in features]
        return self.pad(features)

    def settled(self, task: Task) -> Task:
        """The task; of a classifier with the kind of labels that the first example has, where its model is silent."""
        return task.settled(labels_of(self.batch([0]))) if isinstance(task, Classification) else task

    def collated(self, positions: Sequence[int]) -> dict[str, Any]:
        """What the collator makes of some examples, be it a row each or not."""
        return dict(self._collate(self[positions]))

    def ends(self) -> tuple[int, int]:
        """Positions of the shortest and the longest of the first few examples; one and the same if all are as long."""
        lengths = [len(row.get("input_ids", ())) for row in self[range(min(TRIED, len(self)))]]
        return lengths.index(min(lengths)), lengths.index(max(lengths))

    def check_order(self) -> None:
        """Try out on a short and a long example, of the first few, whether the collator leaves a batch in its order.

        Raises:
            BadSetting: It does not.
        """
        if self._collate is self.pad:
            return
        ends = self.ends()
        alone = {position: _contents(self.collated([position])) for position in ends}
        for pair in (ends, ends[::-1]):
            together, (one, two) = _contents(self.collated(pair)), (alone[position] for position in pair)
            if len(one) == len(two) == 1 and one != two and together == two + one:
                raise BadSetting(
                    "the data_collator changes the order of the examples of a batch (it sorts them, it seems), so "
                    "that nobody knows which row is whose. Let it leave them in their order; "
                    "TrainingArguments(group_by_length=True) brings examples of a length together as well."
                )

    def survey(self) -> tuple[str, list[int]]:
        """One pass over the examples without the model: a hash of their tokens or pixels and labels, and their lengths.

        Other inputs do not count, and the length of an example without token ids is 1. Done once.
        """
        if self._surveyed is None:
            self._surveyed = self._survey()
        return self._surveyed

    def _survey(self) -> tuple[str, list[int]]:
        digest = hashlib.sha256()
        lengths = []
        for start in range(0, len(self), SURVEYED):
            for row in self[range(start, min(start + SURVEYED, len(self)))]:
                known = {name: row[name] for name in ("input_ids", *LABELS) if name in row}
                digest.update(json.dumps(known, default=_plain).encode())
                if "pixel_values" in row:
                    digest.update(torch.as_tensor(row["pixel_values"]).contiguous().numpy().tobytes())
                lengths.append(len(row["input_ids"]) if "input_ids" in row else 1)
        return digest.hexdigest()[:16], lengths

    @cached_property
    def contents(self) -> dict[str, list[Any]]:
        """What the dataset is known by when scores are applied to it; see `column_codes`."""
        return column_codes(self._whole)

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, where the dataset has them."""
        kinds = getattr(self._whole, "features", None) or {}
        return next((kinds[name].names for name in LABELS if hasattr(kinds.get(name), "names")), None)

    @staticmethod
    def _ids_of(dataset: Any, id_column: str | None, first: Mapping[str, Any]) -> list[Any] | None:
        if id_column is None:
            return None
        if id_column not in first:
            raise BadExample(f"the dataset has no id column {id_column!r}; its columns are {list(first)}.")
        stored = id_column in (getattr(dataset, "column_names", None) or ())
        ids = list(dataset.with_format(None)[id_column]) if stored else [row[id_column] for row in dataset]
        if not all(isinstance(value, (int, str)) for value in ids) or len(set(ids)) != len(ids):
            raise BadExample(f"the id column {id_column!r} must hold a different integer or string for each example.")
        return ids


def _not_empty(batch: dict[str, Any]) -> dict[str, Any]:
    """With one place of padding where no example has a token, as it is beside those that have some."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] or not len(ids):
        return batch
    wide = [name for name, value in batch.items() if isinstance(value, Tensor) and value.shape == ids.shape]
    fill = {name: IGNORED if name in LABELS else 0 for name in (*wide, "attention_mask")}
    return {**batch, **{name: torch.full((len(ids), 1), value, dtype=torch.long) for name, value in fill.items()}}


def _unpacked(batch: dict[str, Any]) -> dict[str, Any]:
    """The same.

    Raises:
        BadSetting: A row of it holds several examples.
    """
    places, mask = batch.get("position_ids"), batch.get("attention_mask")
    if isinstance(places, Tensor) and places.ndim == 2:
        packing = Packing.of(places, mask if isinstance(mask, Tensor) and mask.shape == places.shape else None)
        if packing is not None:
            raise BadSetting(
                f"the dataset holds packed rows: {len(packing.source)} examples in {len(places)} of them. A row of "
                "gradients is to be that of one example, so pass the examples as they were before packing: "
                "GradientCapture(path, train_dataset=…) with the dataset that the trainer was given, or "
                "collect(model, prepared(trainer, dataset), path)."
            )
    return batch


def forward_arguments(model: nn.Module) -> list[str]:
    """The names that the forward method of the model (below any PEFT wrapper) takes."""
    return list(inspect.signature(unwrapped(model).forward).parameters)


def padding_with(pad_token_id: int) -> Collator:
    """The collator where none is given: sequences padded on the right (labels with -100)."""

    def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        if "input_ids" in features[0] and "attention_mask" not in features[0]:
            features = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in features]
        batch = {}
        for name in features[0]:
            values = [torch.as_tensor(row[name]) for row in features]
            if values[0].ndim == 1:
                fill = IGNORED if name in LABELS else pad_token_id if name == "input_ids" else 0
                batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
            else:
                batch[name] = torch.stack(values)
        return batch

    return collate


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors there."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def by_token(batch: dict[str, Any], mask: Tensor) -> set[str]:
    """The names of what goes by input token: all that has the shape of the mask and is not a decoder's.

    Labels of sequences, or of a decoder, may have that shape by chance: keep them out of the batch.
    """
    return {
        name
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.shape == mask.shape and not name.startswith("decoder_")
    }


def inputs_of(
    model: nn.Module, batch: dict[str, Any], task: Task, arguments: Container[str] | None = None
) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """What the model's forward method is to be given of a batch, the labels, and the mask of the input.

    Padding goes to the right, so that an example sees the positions that it has alone.

    Args:
        model: The model.
        batch: A collated batch with labels, on the model's device.
        task: Its task.
        arguments: What `forward_arguments(model)` gives, where that is known.

    Raises:
        BadExample: No labels, or nothing that the model takes.
    """
    batch, per_token = dict(batch), isinstance(task, CausalLM)
    labels = None if per_token else labels_of(batch)  # labels of whole examples and decoders stay where they are
    batch = padding_to_the_right(batch)
    labels = labels_of(batch) if labels is None else labels
    arguments = forward_arguments(model) if arguments is None else arguments
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name in arguments}
    if not inputs:
        raise BadExample(
            f"the collated batch holds {', '.join(batch) or 'nothing'} beside the labels, and {type(model).__name__} "
            "takes none of it. Tokenise the dataset."
        )
    if "use_cache" in arguments:
        inputs["use_cache"] = False
    if isinstance(task, Seq2SeqLM) and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = decoder_inputs(model, labels)
    return inputs, labels, batch.get("attention_mask")


def padding_to_the_right(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Roll each example to the left edge, so that its positions are those it has alone, in any model."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask[:, 0].all()):
        return batch
    wide = [name for name, value in batch.items() if isinstance(value, Tensor) and value.shape[:2] == mask.shape]
    if left := [name for name in wide if batch[name].ndim > 2 and name not in LABELS]:
        raise BadSetting(
            f"the batch is padded on the left and has {left[0]!r} of shape {list(batch[left[0]].shape)}, of which it "
            "is not known whether it goes by token. Pad on the right: tokenizer.padding_side = 'right'."
        )
    lead = mask.to(torch.long).argmax(1)  # [b], tokens of padding on the left
    t = mask.shape[1]
    source = (torch.arange(t, device=mask.device) + lead[:, None]) % t  # [b, t]
    return {**batch, **{name: batch[name].gather(1, source) for name in by_token(batch, mask)}}


def alone(batch: dict[str, Any], labels_too: bool) -> dict[str, Any]:
    """A batch of one as the model sees the example alone, without padding, its labels under the name `labels`.

    Args:
        batch: The collated batch.
        labels_too: The labels go by token of the input.
    """
    mask = batch.get("attention_mask")
    labels = next(name for name in LABELS if isinstance(batch.get(name), Tensor))
    if isinstance(mask, Tensor) and mask.ndim == 2:
        cut = by_token(batch, mask) - (set() if labels_too else {labels})
        real = mask[0] != 0
        real[:1] |= ~real.any()  # of no tokens one place stays
        batch = {name: value[:, real] if name in cut else value for name, value in batch.items()}
    return {**{name: value for name, value in batch.items() if name not in LABELS}, "labels": batch[labels]}


def decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder of an encoder-decoder reads where it is to predict the labels: these, one place to the right."""
    base = unwrapped(model)
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        return base.prepare_decoder_input_ids_from_labels(labels)
    first = labels.new_full((len(labels), 1), base.config.decoder_start_token_id)
    return torch.cat((first, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, base.config.pad_token_id)), 1)


def _contents(batch: dict[str, Any]) -> list[Any]:
    """The tokens and labels of each row of a batch, padding left out."""
    ids, mask, labels = batch.get("input_ids"), batch.get("attention_mask"), labels_of(dict(batch))
    if not isinstance(ids, Tensor) or len(ids) != len(labels):
        return []
    real = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()
    rows = zip(ids, real, labels, strict=True)
    return [(row[at].tolist(), label[label != IGNORED].tolist()) for row, at, label in rows]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)
