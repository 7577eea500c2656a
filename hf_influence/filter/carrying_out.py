"""Carrying out a decision on a dataset, again or for the first time, and taking it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets

from hf_influence.dataset.contents import row_codes
from hf_influence.dataset.reading import of_split
from hf_influence.errors import BadExample
from hf_influence.filter.streams import By, StreamRows, carried_out_on_stream
from hf_influence.filter.wording import quoted

if TYPE_CHECKING:
    from hf_influence.filter.decision import Decision


def carried_out(decision: Decision, dataset: Any, by: By = None) -> Any:
    """The rows that stay, with the columns that are written, in a dataset that is taken for the right one."""
    if isinstance(dataset, IterableDataset):
        return carried_out_on_stream(decision, dataset, StreamRows.of(by))
    out = dataset.select(decision.kept)
    for column in decision.writes:
        new = [column.new[i] for i in decision.kept]
        out = with_column(out, column.name, new, column.feature)
    if decision.split_by is None:
        return out
    groups = out.with_format(None)[decision.split_by][:]
    rows: dict[str, list[int]] = {name: [] for name in sorted(set(groups))}
    for i, name in enumerate(groups):
        rows[name].append(i)
    return DatasetDict({name: out.select(at).remove_columns(decision.split_by) for name, at in rows.items()})


def replayed(decision: Decision, dataset: Any, split: str, by: By) -> Any:
    """See `Decision.replay`."""
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        if decision.split_by is not None:
            raise BadExample(
                "the groups become the splits of a DatasetDict, and this dataset has splits already. Give one of them, "
                f"dataset[{split!r}]."
            )
        return type(dataset)({**dataset, split: replayed(decision, of_split(dataset, split), split, by)})
    if isinstance(dataset, Dataset):
        _check_same(decision, dataset)
    elif not isinstance(dataset, IterableDataset):
        raise BadExample(f"{type(dataset).__name__} is not a datasets.Dataset, DatasetDict or IterableDataset.")
    return carried_out(decision, dataset, by)


def undone(decision: Decision, curated: Any, rest: Any, split: str) -> Any:
    """See `Decision.undo`."""
    rest = of_split(rest, split) if isinstance(rest, DatasetDict) else rest
    if isinstance(curated, DatasetDict) and decision.split_by is None:
        return DatasetDict({**curated, split: undone(decision, of_split(curated, split), rest, split)})
    if decision.contents is None or decision.columns is None:
        raise BadExample("the decision was made on a stream, which is still as it was: there is nothing to undo.")
    kept, columns = decision.kept, list(decision.columns)
    if isinstance(curated, DatasetDict):
        curated = _joined(decision, curated)
    if len(curated) != len(kept):
        raise BadExample(
            f"the curated dataset has {len(curated)} rows and the decision leaves {len(kept)}: it was changed since, "
            "or made by another decision. Undo what this one made."
        )
    _check_columns([column.name for column in decision.writes], curated)
    for column in decision.writes:
        if column.old is not None:
            curated = with_column(curated, column.name, [column.old[i] for i in kept], column.old_feature)
        elif column.name not in columns:
            curated = curated.remove_columns(column.name)
    _check_columns(columns, curated)
    curated = curated.select_columns(columns)
    for i, code in zip(kept, row_codes(curated, columns), strict=True):
        if code != decision.contents[i]:
            raise BadExample(
                f"row {quoted(decision.ids[i])} of the curated dataset is not what the decision left of it: it was "
                "changed or moved since, so the original cannot be made of it. Undo what this decision made."
            )
    gone = [i for i, action in enumerate(decision.actions) if action == "drop"]
    if not gone:
        return curated
    if rest is None:
        raise BadExample(
            f"{len(gone)} rows were dropped and are not in the curated dataset. Pass a dataset that has them: "
            "decision.undo(curated, rest=original)."
        )
    _check_columns(columns, rest)
    where = {code: at for at, code in enumerate(row_codes(rest, columns))}
    if missing := [i for i in gone if decision.contents[i] not in where]:
        raise BadExample(
            f"rest lacks {len(missing)} of the {len(gone)} dropped rows; the first is "
            f"{quoted(decision.ids[missing[0]])}. Pass a dataset that has them, such as the original."
        )
    back = rest.select([where[decision.contents[i]] for i in gone]).select_columns(columns).cast(curated.features)
    order = {i: at for at, i in enumerate([*kept, *gone])}
    whole = concatenate_datasets([curated.with_format(None), back.with_format(None)])
    return _formatted_like(curated, whole.select([order[i] for i in range(decision.before)]))


def with_column(dataset: Dataset, name: str, values: list[Any], feature: Any) -> Dataset:
    """A column added, or replaced in its place; the format of the dataset stays."""
    plain, order = dataset.with_format(None), dataset.column_names
    if name in order:  # it goes at the end, as there may be no other, and a dataset without columns has no rows
        plain = plain.rename_column(name, "_".join([*order, "before"]))
    else:
        order = [*order, name]
    return _formatted_like(dataset, plain.add_column(name, values, feature=feature).select_columns(order))


def _formatted_like(model: Dataset, dataset: Dataset) -> Dataset:
    """The dataset in the format of another; columns that only the first has are shown."""
    kind = model.format
    hidden = set(model.column_names) - set(kind["columns"])
    shown = [name for name in dataset.column_names if name not in hidden] if hidden else None
    return dataset.with_format(kind["type"], shown, kind["output_all_columns"], **kind["format_kwargs"])


def _joined(decision: Decision, groups: DatasetDict) -> Dataset:
    """The splits of a DatasetDict that was split by a column, as one dataset with that column."""
    column = next(column for column in decision.writes if column.name == decision.split_by)
    belongs = [column.new[i] for i in decision.kept]
    names = sorted(set(belongs))
    if sorted(groups) != names or any(len(groups[name]) != belongs.count(name) for name in names):
        raise BadExample(
            f"the splits {list(groups)} or their sizes are not those that the decision made ({names}): they were "
            "changed since. Undo what this decision made."
        )
    together = concatenate_datasets([groups[name] for name in names])
    order = sorted(range(len(belongs)), key=lambda i: belongs[i])  # stable: where each row of `together` belongs
    place = {i: at for at, i in enumerate(order)}
    return with_column(together.select([place[i] for i in range(len(belongs))]), column.name, belongs, None)


def _check_columns(columns: list[str], dataset: Dataset) -> None:
    if missing := [name for name in columns if name not in dataset.column_names]:
        raise BadExample(
            f"the dataset lacks the columns {missing}, which the decision knows (it has "
            f"{dataset.column_names}), so it is another one. Pass the one that was decided on."
        )


def _check_same(decision: Decision, dataset: Dataset) -> None:
    """BadExample unless the dataset is the one that was decided on."""
    if decision.contents is None or decision.columns is None:
        raise BadExample(
            "the decision was made on a stream, whose rows have no order. Replay it on a stream: "
            "decision.replay(dataset.to_iterable_dataset(), by=StreamRows(…))."
        )
    _check_columns(list(decision.columns), dataset)
    if len(dataset) != decision.before:
        raise BadExample(
            f"the dataset has {len(dataset)} rows and the decision is on {decision.before}: it is another one, or "
            "another version of it. Pass the one that was decided on."
        )
    for i, (code, known) in enumerate(zip(row_codes(dataset, decision.columns), decision.contents, strict=True)):
        if code != known:
            raise BadExample(
                f"row {i} of the dataset (id {quoted(decision.ids[i])} in the decision) has other contents than the "
                "row that was decided on: the dataset was changed or reordered, or is another one. Pass the one that "
                "was decided on."
            )
    for column in decision.writes:
        if column.old is None and column.name in dataset.column_names:
            raise BadExample(f"the dataset has a column {column.name!r} already. Rename or remove it.")
