"""Decision: what happens to each row of a dataset, why, and how to do it again or take it back."""

from __future__ import annotations

import platform
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from torch import Tensor

from hf_influence.dataset.contents import row_codes
from hf_influence.dataset.matching import aligned
from hf_influence.dataset.wording import printable
from hf_influence.errors import BadExample, StoreError
from hf_influence.filter.actions import DONE, Written
from hf_influence.filter.advice import advice_of
from hf_influence.filter.card import section
from hf_influence.filter.carrying_out import replayed, undone
from hf_influence.filter.cutting import mean_place
from hf_influence.filter.group_sizes import group_sizes
from hf_influence.filter.on_disk import fields_of, text_of
from hf_influence.filter.streams import By, StreamRows
from hf_influence.filter.wording import number, quoted, settings_of
from hf_influence.saving import write_whole
from hf_influence.scores import Scores


class Removed(NamedTuple):
    """One example that was dropped: its id, its mean score, its rank (0 = the first to go)."""

    id: int | str
    score: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What happens to each row, and why; all lists are in the order of the dataset.

    >>> from hf_influence.filter import DatasetFilter
    >>> from hf_influence.scores import Scores
    >>> import torch
    >>> train = Dataset.from_dict({"text": ["good", "bad", "fine", "fair"]})
    >>> trim = DatasetFilter(drop=0.25)
    >>> _ = trim.apply(train, Scores(torch.tensor([[0.9], [-0.7], [0.4], [0.1]]), ids=[0, 1, 2, 3], method="ip"))
    >>> print(trim.report.explain(1))
    row 1 was dropped: its score -0.7 by ip ranks 0 of 4, the rule drop=0.25 drops 1 of the 4 rows
    >>> trim.report.undo(trim.report.replay(train), rest=train)["text"][:]
    ['good', 'bad', 'fine', 'fair']

    Attributes:
        rule: As it was set, e.g. `drop=0.05`.
        sources: Method and settings of each of the scores.
        ids: What the rows are called.
        id_column: The column that holds the ids; `None` where they are positions.
        actions: "keep", "drop", "relabel", "weight" or "separate".
        scores: Mean over the queries; with several scores the mean place in their rankings, from 0 to 1.
        ranks: Place in the order in which rows go: 0 is the first.
        from_highest: The highest scores go first.
        reasons: The texts that say how the rule falls.
        reason: Which of them goes with each row.
        estimates: Where a rule goes by how probable it is that a label is wrong, for each of the scores: how many it
            takes for wrong, and how well it tells them (see `estimates_of`).
        copies: Row -> the earlier row whose contents it has, where that is why it is dropped.
        groups: Per value of the first of the columns label, task and source that holds classes (see `group_sizes`):
            rows before and after.
        columns: The columns of the dataset; `None` for a stream.
        writes: The columns that are written.
        split_by: A column that is written, by whose values the rows are split into a DatasetDict.
        tokens: Of a stream without ids: the hash that was stored of the tokens and labels of each row.
        per_token: Whether the labels in that hash go by token.
        versions: Of this library, datasets and Python.
    """

    rule: str
    sources: tuple[dict[str, Any], ...]
    ids: Sequence[Any]
    id_column: str | None
    actions: list[str]
    scores: list[float]
    ranks: list[int]
    from_highest: bool = False
    reasons: tuple[str, ...] = ()
    reason: list[int]
    estimates: tuple[dict[str, Any], ...] = ()
    copies: dict[int, int] = field(default_factory=dict)
    groups: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    columns: tuple[str, ...] | None = None
    writes: tuple[Written, ...] = ()
    split_by: str | None = None
    tokens: list[int] | None = None
    per_token: bool = True
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    dataset: Dataset | None = field(default=None, repr=False, compare=False)
    """What was decided on, from which `contents` are computed when they are first asked for; not saved."""
    known_contents: list[str] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def keeping_all(
        cls,
        dataset: Dataset | IterableDataset,
        rankings: Sequence[Scores],
        by: By = None,
        *,
        known: tuple[list[Tensor], Sequence[Any]] | None = None,
    ) -> Decision:
        """The decision that every rule starts from: all rows stay as they are, ranked from the lowest score.

        Args:
            dataset: What was scored.
            rankings: One or several scores of every row.
            by: For a stream whose scores have no id column: the store that knows its rows.
            known: `aligned(dataset, rankings)`, where the rule needs that itself.

        Raises:
            BadExample: Not a dataset, no rows, or no such id column.
            BadSetting: Scores of another dataset, or a stream of which nothing says how its rows are known.
        """
        values, ids = aligned(dataset, rankings) if known is None else known  # each [n, q]
        mean = values[0].mean(1) if len(values) == 1 else mean_place(values)  # [n]
        table = dataset if isinstance(dataset, Dataset) else None
        tokens, per_token = None, True
        if table is None and rankings[0].id_column is None:
            tokens, per_token = StreamRows.of(by).stored(rankings[0])
        whole = cls(
            rule="keep all",
            sources=tuple({"method": scores.method, "settings": dict(scores.settings)} for scores in rankings),
            ids=list(ids),
            id_column=rankings[0].id_column,
            actions=["keep"] * len(ids),
            scores=mean.tolist(),
            ranks=mean.argsort(stable=True).argsort().tolist(),
            reasons=("every row is kept",),
            reason=[0] * len(ids),
            columns=None if table is None else tuple(table.column_names),
            tokens=tokens,
            per_token=per_token,
            dataset=table,
        )
        return whole.but()

    def but(self, **fields: Any) -> Decision:
        """The same decision with other values of some fields; of a dataset that is at hand, `groups` counted anew."""
        new = replace(self, **fields)
        if new.dataset is None:
            return new
        written = {column.name: column.new for column in new.writes}
        return replace(new, groups=group_sizes(new.dataset, new.kept, written))

    @property
    def before(self) -> int:
        """Rows of the dataset that went in."""
        return len(self.actions)

    @property
    def after(self) -> int:
        """Rows of the dataset that came out."""
        return len(self.kept)

    @property
    def method(self) -> str:
        """Of the scores; several joined by a plus."""
        return " + ".join(source["method"] for source in self.sources)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the method; of several none."""
        return self.sources[0]["settings"] if len(self.sources) == 1 else {}

    @cached_property
    def kept(self) -> list[int]:
        """The rows that are not dropped, ascending."""
        return [i for i, action in enumerate(self.actions) if action != "drop"]

    @cached_property
    def removed(self) -> tuple[Removed, ...]:
        """The dropped examples, the first to go first."""
        gone = [i for i, action in enumerate(self.actions) if action == "drop"]
        return tuple(
            Removed(self.ids[i], self.scores[i], self.ranks[i]) for i in sorted(gone, key=self.ranks.__getitem__)
        )

    @cached_property
    def contents(self) -> list[str] | None:
        """The code of each row's contents, by which a dataset is known again; `None` for a stream."""
        if self.known_contents is not None or self.dataset is None or self.columns is None:
            return self.known_contents
        return row_codes(self.dataset, self.columns)

    def explain(self, id: int | str) -> str:
        """What happened to the row of this id and why, in a sentence.

        Raises:
            BadExample: No such row.
        """
        i = self._places.get(id)
        if i is None:
            where = f"the values of the column {quoted(self.id_column)}" if self.id_column else "positions"
            first = quoted(self.ids[0]) if self.before else "none"
            raise BadExample(
                f"no row {quoted(id)} among the {self.before} that were decided on. Their ids are {where}; the first "
                f"is {first}."
            )
        rank = f"ranks {self.ranks[i]} of {self.before}{' from the highest' if self.from_highest else ''}"
        return (
            f"row {quoted(id)} {self._happened(i)}: its score {number(self.scores[i])} by {printable(self.method)} "
            f"{rank}, {self._why(i)}"
        )

    def to_dataset(self) -> Dataset:
        """A table with a line for each row: id, action, score, rank, rule, method, why; old and new values."""
        table: dict[str, Sequence[Any]] = {
            "id": list(self.ids),
            "action": self.actions,
            "score": self.scores,
            "rank": self.ranks,
            "rule": [self.rule] * self.before,
            "method": [self.method] * self.before,
            "why": [self._why(i) for i in range(self.before)],
        }
        for column in self.writes:
            table |= {f"{column.name}_before": column.old} if column.old is not None else {}
            table[f"{column.name}_after"] = column.new
        return Dataset.from_dict(table)

    def replay(self, dataset: Any, *, split: str = "train", by: By = None) -> Any:
        """Do the same to the same dataset again: bit-identical rows.

        Args:
            dataset: The one that was decided on, from wherever it was loaded; or a stream of its rows, which are then
                known by id, by their contents or, if the decision was made on a stream, by their tokens. Of a stream's
                rows with the same contents all stay if one of them does.
            split: Which of a `DatasetDict`.
            by: For a stream: how its rows are told apart; see `StreamRows`.

        Raises:
            BadExample: It is not that dataset; the message names the first row that differs.
        """
        return replayed(self, dataset, split, by)

    def undo(self, curated: Any, rest: Any = None, *, split: str = "train") -> Any:
        """The dataset as it was: old labels back, added columns gone, dropped rows in their places.

        Args:
            curated: What the decision made; columns that were added since are left out. Of a `DatasetDict` that was
                curated in one split the others stay as they are.
            rest: Any dataset that has the dropped rows, such as the original. Not needed where none was dropped.
            split: Which of a `DatasetDict`.

        Raises:
            BadExample: Something else than what the decision made, or dropped rows that are not there.
        """
        return undone(self, curated, rest, split)

    def card(self) -> str:
        """The section for a dataset card, in Markdown; `add_to_card` puts it there."""
        return section(self)

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file, which appears whole. `Decision.load` reads it.

        Contents of rows go in as hashes; ids, the values of `within` and of `groups`, old and new labels as they are.

        Raises:
            BadSetting: Settings of the scores that JSON cannot hold; nothing is written then.
            StoreError: The disk is full or not writable; a file that was there is still there.
        """
        write_whole(Path(path).expanduser(), text_of(self))

    @classmethod
    def load(cls, path: str | Path) -> Decision:
        """Read what `save` wrote, or `save_curated`: its folder will do.

        Raises:
            StoreError: No such file, not a decision, or one that was damaged or changed.
        """
        path = Path(path).expanduser()
        try:
            return cls(**fields_of(path / "decision.json" if path.is_dir() else path))
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"{path} does not hold a decision as it was saved ({type(error).__name__}: {printable(error)}). "
                "Decisions are written by `trim.report.save(path)`."
            ) from error

    def __str__(self) -> str:
        lines = [f"kept {self.after} of {self.before} rows by {self.method}({settings_of(self.settings)}), {self.rule}"]
        for action, done in DONE.items():
            if action not in ("keep", "drop") and action in self.actions:
                lines[0] += f"; {done}: {self.actions.count(action)}"
        if self.removed:
            worst = ", ".join(f"{printable(row.id)} ({number(row.score)})" for row in self.removed[:5])
            order = "first to go" if self.from_highest else "least worth keeping"
            lines.append(f"{order}: {worst}{', …' if len(self.removed) > 5 else ''}")
        hit_most = sorted(self.groups.items(), key=lambda item: item[1][1] - item[1][0])[:10]
        lines += [f"  {printable(group)}: {before} -> {after}" for group, (before, after) in hit_most]
        return "\n".join([*lines, *advice_of(self)])

    @cached_property
    def _places(self) -> dict[Any, int]:
        return {name: i for i, name in enumerate(self.ids)}

    def _happened(self, i: int) -> str:
        action = self.actions[i]
        if action in ("keep", "drop"):
            return "was kept" if action == "keep" else "was dropped"
        column = self.writes[0]
        if action == "relabel":
            assert column.old is not None
            return f"was relabelled from {printable(column.old[i])} to {printable(column.new[i])}"
        new = column.new[i]
        return f"got the weight {number(new)}" if action == "weight" else f"went to {quoted(new)}"

    def _why(self, i: int) -> str:
        if i in self.copies:
            return f"it has the contents of row {quoted(self.ids[self.copies[i]])}"
        return self.reasons[self.reason[i]]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("hf-influence", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a folder of sources
            found[name] = "not installed"
    return found
