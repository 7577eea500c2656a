"""The examples behind the dataset that TRL's SFTTrainer makes of them: tokenised as it does, and not yet packed."""

from __future__ import annotations

from copy import copy
from typing import Any

from datasets import Dataset

from hf_influence.dataset.contents import column_codes
from hf_influence.errors import BadSetting


def prepared(trainer: Any, dataset: Any) -> Any:
    """A dataset as `trainer` trains on it, but with one row for each example.

        trainer = SFTTrainer(model, SFTConfig(packing=True, ...), train_dataset=raw, ...)
        collect(trainer.model, prepared(trainer, raw), path, data_collator=trainer.data_collator)

    Tokenised, labelled (`completion_only_loss`, `assistant_only_loss`) and cut to `max_length` by the trainer's own
    rules; neither packed nor shuffled, and no example left out: row i comes from row i. `GradientCapture` does this
    with its `train_dataset` and `query_dataset`. What becomes of an example that is longer than `max_length`:

    - padding, `padding_free` and `packing_strategy="bfd"` keep its beginning (padding: its end with
      `truncation_mode="keep_end"`);
    - "bfd_split" cuts it into pieces that are trained on apart from each other, in steps of their own. So each piece is
      an example here, and a column `piece_of` has the row of `dataset` that it comes from;
    - "wrapped" cuts the whole text every `max_length` tokens, wherever that is; here the examples are whole.

    Args:
        trainer: An `SFTTrainer` of TRL. With any other trainer the dataset comes back as it is.
        dataset: Text, prompts and completions, conversations, or tokenised examples.

    Raises:
        BadSetting: The dataset is packed already.
    """
    supervised = hasattr(trainer.args, "packing_strategy")
    if not supervised or not isinstance(dataset, Dataset) or getattr(trainer, "_skip_prepare_dataset", False):
        return dataset
    if "seq_lengths" in dataset.column_names:
        raise BadSetting(
            "the dataset is packed already (it has a column 'seq_lengths'), and where its examples come from is lost. "
            "Pass the one that the trainer was given."
        )
    args = copy(trainer.args)
    args.max_length, args.shuffle_dataset = None, False
    formatting = getattr(trainer, "_formatting_func", None)
    rows = trainer._prepare_dataset(dataset, trainer.processing_class, args, False, formatting, "captured")
    return _cut(rows, trainer.args)


def known_by(trainer: Any, dataset: Any) -> dict[str, list[Any]]:
    """What the training set is known by when scores are applied to it, as by `column_codes`.

    An SFTTrainer ends its texts with the end-of-sequence token where they do not. Of such a column that token is the
    last entry, so that the texts are known with and without it.
    """
    codes = column_codes(dataset)
    ending = getattr(getattr(trainer, "processing_class", None), "eos_token", None)
    if not ending or not hasattr(trainer.args, "dataset_text_field"):
        return codes
    for name in {trainer.args.dataset_text_field, "completion"} & codes.keys():
        texts = dataset.with_format(None)[name][:]
        if all(isinstance(text, str) and text.endswith(ending) for text in texts):
            codes[name].append(ending)
    return codes


def check_packing(trainer: Any, train_dataset: Any) -> None:
    """Refuse a packing in which the examples cannot be told apart.

    Raises:
        BadSetting: Says why, and what to do.
    """
    args = trainer.args
    if train_dataset is not None and getattr(args, "packing", False) and args.packing_strategy == "wrapped":
        raise BadSetting(
            'packing_strategy="wrapped" cuts examples in the middle and lets all that share a row see each other, so '
            "what flows back through an example's tokens is partly the loss of the examples after it, and the "
            'gradient of one example does not exist in such a step. Use packing_strategy="bfd", or leave '
            "train_dataset out for rows of the packed rows, or capture at the end alone (during=None)."
        )


def check_flat(trainer: Any) -> None:
    """Refuse padding behind examples that are laid end to end.

    Raises:
        BadSetting: Names the setting.
    """
    multiple = getattr(trainer.args, "pad_to_multiple_of", None)
    if multiple and getattr(trainer, "padding_free", False):
        setting = f"packing_strategy={trainer.args.packing_strategy!r}" if trainer.args.packing else "padding_free=True"
        raise BadSetting(
            f"pad_to_multiple_of={multiple} with {setting}: the padding behind the examples has position_ids of 0 and "
            "no attention_mask, so each place of it looks like an example of one token. Leave pad_to_multiple_of out: "
            "a batch without padding has nothing to bring to one length."
        )


def _cut(dataset: Dataset, args: Any) -> Dataset:
    """To at most `max_length` tokens."""
    length, strategy = args.max_length, args.packing_strategy if args.packing else None
    if length is None or strategy == "wrapped":
        return dataset
    if strategy == "bfd_split":
        return (
            dataset
            if "piece_of" in dataset.column_names
            else dataset.map(
                _pieces,
                batched=True,
                with_indices=True,
                remove_columns=dataset.column_names,
                fn_kwargs={"length": length},
            )
        )
    part = slice(-length, None) if strategy is None and args.truncation_mode == "keep_end" else slice(length)
    return dataset.map(lambda row: {name: row[name][part] for name in ("input_ids", "labels")})


def _pieces(rows: dict[str, list[list[int]]], at: list[int], length: int) -> dict[str, list[Any]]:
    cuts = [(row, start) for row, ids in enumerate(rows["input_ids"]) for start in range(0, len(ids), length)]
    tokens = {
        name: [rows[name][row][start : start + length] for row, start in cuts] for name in ("input_ids", "labels")
    }
    return {**tokens, "piece_of": [at[row] for row, _ in cuts]}


def in_pieces(trainer: Any) -> bool:
    """Whether the trainer cuts long examples into pieces that are trained on as examples of their own."""
    return getattr(trainer.args, "packing", False) and trainer.args.packing_strategy == "bfd_split"


def check_ids(trainer: Any, id_column: str | None) -> None:
    """Refuse an id column where the examples are pieces of those that it names.

    Raises:
        BadSetting: Says so.
    """
    if id_column is not None and in_pieces(trainer):
        raise BadSetting(
            f'id_column={id_column!r} with packing_strategy="bfd_split": a row of gradients is that of a piece, and '
            'several pieces have one id. Use packing_strategy="bfd", or leave id_column out: `prepared` says in its '
            "column `piece_of` which row each piece is of."
        )
