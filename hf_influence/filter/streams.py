"""A decision carried out on a stream: each row is known again as it comes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Features, IterableDataset

from hf_influence.dataset.contents import row_code
from hf_influence.dataset.wording import printable
from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter.rankings import statistic_in
from hf_influence.filter.wording import quoted
from hf_influence.gradients.batches import Collator, padding_with
from hf_influence.gradients.during_training.training import MAIN_INPUTS, Batch
from hf_influence.scores import Scores
from hf_influence.store import GradientStore
from hf_influence.task import CausalLM

if TYPE_CHECKING:
    from hf_influence.filter.decision import Decision

UNSCORED = ("refuse", "keep", "drop")


@dataclass(frozen=True, kw_only=True)
class StreamRows:
    """How the rows of a stream are told apart, where the scores have no id column.

    The rows of a store carry a hash of the tokens and labels that the model was given. The same hash is taken of each
    row of the stream, behind the same collator, so that order, shards and workers do not matter. Rows with the same
    contents are one, as they are to the store.

        trim.apply(stream, scores, by=StreamRows(store="runs/stream", data_collator=collator))

    Raises:
        BadSetting: An unknown `unscored`.
    """

    store: str | Path | GradientStore | None = None
    """The store that was scored; it knows the hashes. To replay a decision it is not needed."""
    data_collator: Collator | None = None
    """As in `Trainer`; by default the row's own `input_ids`, `labels`, ... are taken."""
    columns: Sequence[str] | None = None
    """The columns that the collator is given; by default those of numbers."""
    prepare: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None
    """Makes what the collator is given of a row of the stream, e.g. tokenises it; the stream keeps its own columns."""
    unscored: str = "refuse"
    """What to do with a row that has no score, as training did not get to it: "refuse", "keep" or "drop"."""

    def __post_init__(self) -> None:
        if self.unscored not in UNSCORED:
            raise BadSetting(f"unscored={self.unscored!r}: choose one of {', '.join(map(repr, UNSCORED))}.")

    @classmethod
    def of(cls, by: By) -> StreamRows:
        """Itself; of a store, or the path of one, the rows as it knows them; of `None` rows without a store."""
        return by if isinstance(by, StreamRows) else cls(store=by)

    def code(self, row: Mapping[str, Any], per_token: bool) -> int:
        """The hash of what the model is given of a row.

        Raises:
            BadExample: It is not tokenised, or the collator makes no example of it, or more than one.
        """
        seen = dict(row if self.prepare is None else self.prepare(dict(row)))
        chosen = [name for name, value in seen.items() if _numbers(value)] if self.columns is None else self.columns
        if absent := [name for name in chosen if name not in seen]:
            raise BadExample(f"a row of the stream lacks the columns {absent} (it has {list(seen)}).")
        try:
            batch = dict((self.data_collator or padding_with(0))([{name: seen[name] for name in chosen}]))
            codes = Batch.of(batch, per_token).code.tolist()
        except Exception as error:
            if not set(MAIN_INPUTS).isdisjoint(chosen):
                raise
            raise BadExample(
                f"no example of the model can be made of a row of the stream, of whose columns {list(seen)} the "
                f"collator is given {list(chosen)} ({type(error).__name__}: {printable(error)}). Its rows are known by "
                "their tokens: filter the tokenised stream that was trained on (trainer.train_dataset of an "
                "SFTTrainer, which trains on what comes of it as well), or tokenise each row, by=StreamRows(prepare=…, "
                "…)."
            ) from error
        if len(codes) != 1:
            raise BadExample(
                f"the data_collator made {len(codes)} examples of one row. Pass rows and a collator as they are "
                "before packing."
            )
        return codes[0]

    def stored(self, scores: Scores) -> tuple[list[int], bool]:
        """The hash of each scored example, in the order of the scores, and whether its labels go by token.

        Raises:
            BadSetting: No store, or one that does not hold them.
        """
        codes = self._stored(scores, "hash")
        return codes, self.opened().header.task.get("name") == CausalLM.name

    def labels(self, scores: Scores) -> list[int]:
        """The class number of each scored example, in the order of the scores; errors as in `stored`."""
        if self.store is None:
            raise BadSetting(
                "the labels of a stream are not known before its end, and the decision is made before. Say where they "
                "are stored: by='runs/…', the store that was scored, or make a Dataset of it (Dataset.from_generator)."
            )
        return self._stored(scores, "label")

    def _stored(self, scores: Scores, statistic: str) -> list[int]:
        store = self.opened()
        found = statistic_in(store, scores, statistic, scores.ids)
        if found is None:
            raise BadSetting(
                f"{store.path} does not have the statistic {statistic!r} of all {len(scores)} scored examples, from "
                "which alone it is known of a stream. Pass the store that was scored, or make a Dataset of the stream "
                "(Dataset.from_generator)."
            )
        return found.tolist()

    def opened(self) -> GradientStore:
        """The store."""
        if self.store is None:
            raise BadSetting(
                "the scores name the rows of a stream by numbers in the order of training, and the stream does not "
                "carry those. Say where they are known: by='runs/…', the store that was scored, of the stream that was "
                "trained on (trainer.train_dataset of an SFTTrainer); by=StreamRows(store='runs/…', "
                "data_collator=…) where the collator changes tokens or labels; or capture with id_column=…."
            )
        return GradientStore.open(self.store)


By = StreamRows | str | Path | GradientStore | None
"""How the rows of a stream are told apart; a store alone where its rows were captured as they come."""


def carried_out_on_stream(decision: Decision, stream: IterableDataset, by: StreamRows) -> IterableDataset:
    """The rows that stay, with the columns that are written, decided one by one as they come.

    Raises:
        BadSetting: Rows without a score are to be kept, and the decision writes a column for which they have no value.
        BadExample: No id column.
    """
    if decision.split_by is not None:
        raise BadSetting("a stream cannot be split into groups before its end. Give Separate a column=… instead.")
    changed = [column for column in decision.writes if column.old is None or column.feature != column.old_feature]
    if changed and by.unscored == "keep":
        raise BadSetting(
            f"unscored='keep': a row without a score has no value for the column {changed[0].name!r}. Pass "
            "unscored='drop'."
        )
    if decision.id_column is not None and decision.id_column not in (stream.column_names or [decision.id_column]):
        raise BadExample(
            f"no column {decision.id_column!r} among {stream.column_names}, which the scores name their examples by."
        )
    for column in decision.writes:
        if column.old is None and column.name in (stream.column_names or ()):
            raise BadExample(f"the stream has a column {column.name!r} already. Rename or remove it.")
    find = partial(_find, key=_key_of(decision, by), where=_places(decision), unscored=by.unscored)
    out = stream
    if "drop" in decision.actions or by.unscored != "keep":
        gone = {i for i, action in enumerate(decision.actions) if action == "drop"}
        out = out.filter(partial(_stays, find=find, gone=gone, unscored=by.unscored))
    if decision.writes:
        new = {column.name: column.new for column in decision.writes}
        features = None
        if stream.features is not None:
            kinds = {column.name: column.feature for column in decision.writes}
            features = Features({**stream.features, **kinds})
        out = out.map(partial(_written, find=find, new=new), features=features)
    return out


def _places(decision: Decision) -> dict[Hashable, int]:
    """What a row is known by -> which row of the decision it is; of equal ones the first that stays."""
    keys: Sequence[Any] | None = decision.ids
    if decision.id_column is None:
        keys = decision.contents if decision.tokens is None else decision.tokens
    if keys is None:
        raise BadSetting("the decision does not say by what its rows are known again. Make it anew.")
    where: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        if key not in where or (decision.actions[where[key]] == "drop" and decision.actions[i] != "drop"):
            where[key] = i
    return where


def _key_of(decision: Decision, by: StreamRows) -> Callable[[Mapping[str, Any]], Hashable]:
    if decision.id_column is not None:
        return partial(_id_of, column=decision.id_column)
    if decision.tokens is not None:
        return partial(by.code, per_token=decision.per_token)
    return partial(row_code, columns=decision.columns or ())


def _id_of(row: Mapping[str, Any], column: str) -> Hashable:
    if column not in row:
        raise BadExample(f"a row of the stream has no column {column!r}, which the scores name their examples by.")
    return row[column].item() if hasattr(row[column], "item") else row[column]


def _find(
    row: Mapping[str, Any], key: Callable[[Mapping[str, Any]], Hashable], where: dict[Hashable, int], unscored: str
) -> int | None:
    known = key(row)
    if known not in where and unscored == "refuse":
        raise BadExample(
            f"the stream has a row (known as {quoted(known)}) without a score: training did not get to it, or it is "
            "not what was scored (another tokenisation, collator or label). If it was not reached, say what becomes of "
            "such rows: by=StreamRows(unscored='keep' or 'drop', …)."
        )
    return where.get(known)


def _stays(
    row: Mapping[str, Any], find: Callable[[Mapping[str, Any]], int | None], gone: set[int], unscored: str
) -> bool:
    at = find(row)
    return unscored == "keep" if at is None else at not in gone


def _written(
    row: Mapping[str, Any], find: Callable[[Mapping[str, Any]], int | None], new: dict[str, list[Any]]
) -> dict[str, Any]:
    at = find(row)
    return {} if at is None else {name: values[at] for name, values in new.items()}


def _numbers(value: Any) -> bool:
    """Whether a value is a number or made of numbers."""
    if isinstance(value, (list, tuple)):
        return all(_numbers(entry) for entry in value[:1])
    return isinstance(value, (bool, int, float)) or hasattr(value, "dtype")
