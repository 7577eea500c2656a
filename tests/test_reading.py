"""Datasets are read as they were written, whatever the file."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk

from hf_influence.dataset.reading import read_dataset


@pytest.mark.parametrize("name", ["d.ndjson", "d.jsonl.gz", "d.csv.gz", "D.TSV.GZ", "d.arrow"])
def test_a_file_is_read_by_its_suffix_packed_or_not(tmp_path: Path, name: str) -> None:
    Dataset.from_dict({"text": [f"row {i}" for i in range(4)], "label": [0, 2, 1, 2]}).save_to_disk(tmp_path / "disk")
    rows = load_from_disk(str(tmp_path / "disk"))
    if "csv" in name or "TSV" in name:
        rows.to_csv(tmp_path / "plain", sep="," if "csv" in name else "\t")
    elif "json" in name:
        rows.to_json(tmp_path / "plain")
    else:
        shutil.copy(next((tmp_path / "disk").glob("*.arrow")), tmp_path / "plain")
    content = (tmp_path / "plain").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert read_dataset(str(tmp_path / name), "train").to_dict() == rows.to_dict()


def cells(file: Path, text: str, texts: str | None = None) -> dict[str, list[Any]]:
    file.write_text(text, encoding="utf-8")
    return dict(read_dataset(str(file), "train", texts).to_dict())


@pytest.mark.parametrize(("suffix", "between"), [("csv", ","), ("tsv", "\t")])
def test_answers_that_look_like_nothing_stay(tmp_path: Path, suffix: str, between: str) -> None:
    answers = ["None", "NA", "null", "nan", "N/A", "yes"]
    rows = [["answer", "share"], *([answer, "0.5"] for answer in answers), ["", ""]]
    text = "".join(between.join(row) + "\n" for row in rows)
    assert cells(tmp_path / f"a.{suffix}", text) == {"answer": [*answers, None], "share": [0.5] * 6 + [None]}
    for column, share in (("answer", 0.5), ("share", "0.5")):
        kept = cells(tmp_path / f"a.{suffix}", text, column)
        assert kept == {"answer": [*answers, None], "share": [share] * 6 + [None]}


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        (['"never closed', "next", 'said" he', "last"], None),
        (['"No" he said', '"all of it"'], None),
        (['"he said ""no"""', 'he said "no"', '"a\tb"', '"two\nlines"'], ['he said "no"'] * 2 + ["a\tb", "two\nlines"]),
        (['"a, b"', ""], ["a, b", None]),
    ],
)
def test_quotation_marks_of_a_tsv_file_are_characters_where_they_quote_no_cell(
    tmp_path: Path, lines: list[str], texts: list[str] | None
) -> None:
    text = "text\tlabel\n" + "".join(f"{line}\t{i}\n" for i, line in enumerate(lines)) + "\n"
    assert cells(tmp_path / "a.tsv", text) == {"text": texts or lines, "label": list(range(len(lines)))}
