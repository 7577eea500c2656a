"""Figures over seeds as a table: mean ± spread, in Markdown and JSON, with where they come from."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_influence.evaluation.biases import MOSTLY
from hf_influence.evaluation.provenance import described, provenance

BASELINES = ("random", "loss", "length", "bm25")
"""What a method has to beat before its figure says anything."""
_SIGNED = ("length_rho", "duplicates_rho")


@dataclass(kw_only=True)
class Table:
    """A row a method, a column a set (or rank, or part); in each cell the mean over the runs and their spread.

    The spread is the sample standard deviation over the runs; a single run has none, and the cell says so by leaving it
    out. The baselines always have a row: where they were not measured it says that, instead of missing quietly.

    >>> table = Table(title="AUC", metrics=["auc"], baselines=["random"])
    >>> for auc in (0.7, 0.8):
    ...     table.add("sst2", {"cosine": {"auc": auc}, "random": {"auc": 0.5}})
    >>> print(table.markdown(about=[]))
    AUC
    <BLANKLINE>
    auc: mean ± standard deviation over 2 runs.
    <BLANKLINE>
    | method | sst2 |
    |---|---|
    | `cosine` | 0.750 ± 0.071 |
    | `random` | 0.500 ± 0.000 |
    <BLANKLINE>
    """

    title: str
    metrics: Sequence[str]
    """The figures in a cell; rows are sorted by the mean of the first over the columns, those that lack one last."""
    beside: Sequence[str] = ()
    """Figures that get a column of their own at the right, the mean over all runs: seconds, the rank correlation with
    length."""
    baselines: Sequence[str] = BASELINES
    """Rows that must be there. Leave out "bm25" where the queries are no text."""
    higher_is_better: bool = True

    _cells: dict[str, dict[str, list[Mapping[str, float | None]]]] = field(default_factory=dict, init=False, repr=False)
    _columns: dict[str, None] = field(default_factory=dict, init=False, repr=False)
    _left_out: dict[str, dict[str, str]] = field(default_factory=dict, init=False, repr=False)

    def add(self, column: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """What one run found for one column: method -> metric -> value.

        A method with a text under "left out" was not measured, for that reason.
        """
        self._columns[column] = None
        for row, found in rows.items():
            if "left out" in found:
                self._left_out.setdefault(row, {})[column] = str(found["left out"])
            else:
                self._cells.setdefault(row, {}).setdefault(column, []).append(found)

    def json(self, about: Iterable[Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Everything that `markdown` shows, the single values too, as plain values.

        Args:
            about: Where the runs come from, one `provenance()` each; by default this process.
        """
        return {
            "title": self.title,
            "about": _distinct(about),
            "rows": {
                row: {
                    "columns": {c: {m: self._spread(row, [c], m) for m in self.metrics} for c in self._cells[row]},
                    "beside": {m: self._spread(row, self._columns, m) for m in self.beside},
                }
                for row in self._order()
            },
            "not measured": {row: self._left_out.get(row, {}) for row in [*self._absent(), *self._partly()]},
        }

    def markdown(self, about: Iterable[Mapping[str, Any]] | None = None) -> str:
        """The table, best mean first, with a line of its own for what was not measured and for scores that are length.

        Args:
            about: As in `json`.
        """
        counts = sorted({len(found) for cells in self._cells.values() for found in cells.values()})
        runs = (
            "1 run (no spread)"
            if counts == [1]
            else f"{' to '.join(map(str, dict.fromkeys(counts[:1] + counts[-1:])))} runs"
        )
        what = f"{' / '.join(self.metrics)}: mean ± standard deviation over {runs}"
        what += f"; {', '.join(self.beside)}: mean over all of them." if self.beside else "."
        lines = [self.title, "", what, "", *(line for one in _distinct(about) for line in (described(one), ""))]
        lines.append("| " + " | ".join(["method", *self._columns, *self.beside]) + " |")
        lines.append("|" + "---|" * (1 + len(self._columns) + len(self.beside)))
        for row in self._order():
            cells = [self._cell(row, column) for column in self._columns]
            cells += [_number(self._spread(row, self._columns, m)["mean"], m) for m in self.beside]
            lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
        empty = [""] * (len(self._columns) + len(self.beside) - 1)
        lines += [
            f"| `{row}` | " + " | ".join(["not measured", *empty]) + " |"
            for row in self._absent()
            if row in self.baselines
        ]
        return "\n".join([*lines, "", *self._mostly(), *self._notes()]).rstrip("\n") + "\n"

    def _notes(self) -> list[str]:
        """What was left out, and why: once where a row has nothing, or else column by column."""
        wholly = {row: dict.fromkeys(self._left_out[row].values()) for row in self._absent() if row in self._left_out}
        notes = [f"Not measured: `{row}` ({'; '.join(reasons)})." for row, reasons in wholly.items()]
        for row in self._partly():
            notes += [f"Left out in a run: `{row}`, {column} ({why})." for column, why in self._left_out[row].items()]
        return notes

    def _mostly(self) -> list[str]:
        means = {(row, m): self._spread(row, self._columns, m)["mean"] for row in self._order() for m in self.beside}
        return [
            f"`{row}` ranks mostly by {metric.removesuffix('_rho')} (Spearman {rho:.2f}): read its figures beside "
            "those of that alone."
            for (row, metric), rho in means.items()
            if metric in _SIGNED and rho is not None and abs(rho) >= MOSTLY and row != metric.removesuffix("_rho")
        ]

    def _spread(self, row: str, columns: Iterable[str], metric: str) -> dict[str, Any]:
        found = [one for column in columns for one in self._cells[row].get(column, ())]
        values = [float(value) for one in found if (value := one.get(metric)) is not None]
        return {
            "mean": statistics.fmean(values) if values else None,
            "spread": statistics.stdev(values) if len(values) > 1 else None,
            "values": values,
        }

    def _cell(self, row: str, column: str) -> str:
        if column not in self._cells[row]:
            return ""
        figures = [self._spread(row, [column], metric) for metric in self.metrics]
        return " / ".join(
            _number(one["mean"], m) + (f" ± {one['spread']:.3f}" if one["spread"] is not None else "")
            for one, m in zip(figures, self.metrics, strict=True)
        )

    def _order(self) -> list[str]:
        def place(row: str) -> tuple[int, float]:
            means = [self._spread(row, [column], self.metrics[0])["mean"] for column in self._columns]
            found = [mean for mean in means if mean is not None]
            mean = statistics.fmean(found) if found else 0.0
            return len(means) - len(found), -mean if self.higher_is_better else mean

        return sorted(self._cells, key=place)

    def _absent(self) -> list[str]:
        return [row for row in dict.fromkeys([*self.baselines, *self._left_out]) if row not in self._cells]

    def _partly(self) -> list[str]:
        return [row for row in self._left_out if row in self._cells]


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    return f"{value:+.2f}" if metric in _SIGNED else f"{value:.2f}" if metric == "seconds" else f"{value:.3f}"


def _distinct(about: Iterable[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Each command, day, machine and set of versions once."""
    abouts = [provenance()] if about is None else [dict(one) for one in about]
    return [one for i, one in enumerate(abouts) if one not in abouts[:i]]
