"""Decisions: what happened to each row and why, saved, done again, taken back, and told in a dataset card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, load_dataset, load_from_disk
from huggingface_hub import DatasetCard
from stores import make_store

from hf_influence.dataset.contents import row_code, row_codes
from hf_influence.errors import BadExample, BadSetting, StoreError
from hf_influence.filter import DatasetFilter, Decision, Prune, Relabel, Reweight, Separate, add_to_card, save_curated
from hf_influence.filter.card import END, START, with_section
from hf_influence.scores import Scores

N = 8
VALUES = [0.5, -1.0, 0.25, 2.0, -3.0, 0.25, 1.0, -0.5]
ORDER = sorted(range(N), key=lambda i: (VALUES[i], i))  # worst first
TURN = [{"role": Value("string"), "content": Value("large_string")}]
HOSTILE = "'| <script>alert(1)</script> `x`\n---\n" + END + "\n# [a](https://b.c) \x1b[31m\u202e www.d.e was kept: \\"


def scores_of(values: list[float], ids: list[Any] | None = None, id_column: str | None = None, **more: Any) -> Scores:
    settings = more.pop("settings", {"damping": 0.1})
    return Scores(
        torch.tensor(values)[:, None], ids or list(range(len(values))), "self_ip", settings, **more, id_column=id_column
    )


def plain() -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"]), "x": Value("float32")})
    columns = {
        "text": [f"row {i}" for i in range(N)],
        "label": [i % 2 for i in range(N)],
        "x": [i / 10 for i in range(N)],
    }
    return Dataset.from_dict(columns, features=features)


def conversations() -> Dataset:
    """As for chat training: turns with fields that not every turn has, and a class."""
    turn = {**TURN[0], "name": Value("string")}
    features = Features({"messages": [turn], "label": ClassLabel(names=["bad", "good"])})
    question, answer = {"role": "user", "name": None}, {"role": "assistant", "name": "bot"}
    turns = [[{**question, "content": f"q{i}"}, {**answer, "content": "a" * i}][: 1 + i % 2] for i in range(N)]
    return Dataset.from_dict({"messages": turns, "label": [i % 2 for i in range(N)]}, features=features)


def completions() -> Dataset:
    features = Features(
        {"prompt": TURN, "completion": List(TURN[0]), "label": Value("int64"), "tags": List(Value("string"))}
    )
    rows = {
        "prompt": [[{"role": "user", "content": f"é\u2028{i}"}] for i in range(N)],
        "completion": [[{"role": "assistant", "content": str(i)}] for i in range(N)],
        "label": [i % 2 for i in range(N)],
        "tags": [[None, "b"][: i % 3] for i in range(N)],
    }
    return Dataset.from_dict(rows, features=features)


KINDS = {"plain": plain, "conversations": conversations, "completions": completions}
REMEDIES: dict[str, Any] = {
    "filter": lambda: DatasetFilter(drop=3, columns=True),
    "flip": lambda: Relabel(suspects=DatasetFilter(drop=3), how="flip"),
    "reweight": lambda: Reweight(),
    "prune": lambda: Prune(drop=3),
    "separate": lambda: Separate(how="otsu"),
    "column": lambda: Separate(how="otsu", column="source"),
}


def read(file: Path) -> Dataset:
    return load_dataset(file.suffix[1:], data_files=str(file), split="train", cache_dir=str(file.parent / "cache"))


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, DatasetDict):
        assert list(one) == list(other)
        for name in one:
            same(one[name], other[name])
        return
    assert one.features == other.features
    assert one.column_names == other.column_names
    assert one.with_format(None)[:] == other.with_format(None)[:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_saved_decision_does_the_same_again_and_is_taken_back(tmp_path: Path, kind: str, remedy: str) -> None:
    data, chosen = KINDS[kind](), REMEDIES[remedy]()
    before = data.to_dict()
    curated = chosen.apply(data, scores_of(VALUES))
    chosen.report.save(tmp_path / "new" / "decision.json")
    decision = Decision.load(tmp_path / "new" / "decision.json")
    assert decision == chosen.report
    assert str(decision) == str(chosen.report)
    assert [decision.explain(i) for i in range(N)] == [chosen.report.explain(i) for i in range(N)]
    same(decision.replay(data), curated)
    same(decision.undo(curated, rest=data), data)
    data.save_to_disk(str(tmp_path / "data"))
    data.to_parquet(tmp_path / "data.parquet")
    for again in (load_from_disk(str(tmp_path / "data")), read(tmp_path / "data.parquet")):
        same(decision.replay(again), curated)
        same(decision.undo(curated, rest=again), data)
    assert data.to_dict() == before
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("kind", KINDS)
def test_contents_are_known_whatever_the_format(tmp_path: Path, kind: str) -> None:
    data = KINDS[kind]()
    codes = row_codes(data, data.column_names)
    assert len(set(codes)) == N
    data.to_json(tmp_path / "data.json")
    as_json = read(tmp_path / "data.json")
    turned = data.select(range(N - 1, -1, -1))
    for other in (data.with_format("numpy"), data.select_columns(data.column_names[::-1]), as_json.cast(data.features)):
        assert row_codes(other, data.column_names) == codes
    one, other = {"m": {"x": 1, "y": None}, "z": 2}, {"z": 2, "m": {"y": None, "x": 1}}
    assert row_code(one, ["m", "z"]) == row_code(other, ["z", "m"]) == row_code({"m": {"x": 1}, "z": 2}, ["m", "z"])
    swapped = {"m": {"y": 3, "x": 1}}
    assert row_code(swapped, ["m"]) == row_code({"m": {"x": 1, "y": 3}}, ["m"])
    assert row_codes(turned, data.column_names) == codes[::-1]
    changed = data.map(lambda row, i: {"label": 1 - row["label"]} if i == 2 else row, with_indices=True)
    assert row_codes(changed, data.column_names)[:2] == codes[:2]
    assert row_codes(changed, data.column_names)[2] not in codes


def test_images_are_known_by_their_bytes_and_no_other_objects_are() -> None:
    kind = Features({"image": {"bytes": Value("binary"), "path": Value("string")}})  # as images and sounds are stored
    one, other = ({"bytes": b"\x89PNG one", "path": "a.png"}, {"bytes": b"\x89PNG two", "path": "a.png"})
    data = Dataset.from_list([{"image": one}, {"image": other}, {"image": {**one, "path": None}}], features=kind)
    a, b, copy = row_codes(data, ["image"])
    assert a == copy != b
    assert row_code(data[0], ["image"]) == a
    with pytest.raises(BadExample, match=r"object, which is no plain data.*decode\(False\)"):
        row_code({"image": object()}, ["image"])


def test_every_row_is_explained() -> None:
    data = plain()
    trim = DatasetFilter(drop=0.25)
    trim.apply(data, scores_of(VALUES))
    report = trim.report
    assert report is not None
    assert report.explain(4) == (
        "row 4 was dropped: its score -3 by self_ip ranks 0 of 8, the rule drop=0.25 drops 2 of the 8 rows"
    )
    assert report.explain(3) == (
        "row 3 was kept: its score 2 by self_ip ranks 7 of 8, the rule drop=0.25 drops 2 of the 8 rows"
    )
    table = report.to_dataset()
    assert table["id"][:] == list(range(N))
    assert [row["id"] for row in table if row["action"] == "drop"] == sorted(ORDER[:2])
    assert [table["rank"][i] for i in ORDER] == list(range(N))
    assert table["score"][:] == VALUES
    assert set(table["rule"]) == {"drop=0.25"}
    assert set(table["method"]) == {"self_ip"}
    with pytest.raises(BadExample, match=r"no row 99 among the 8.*positions"):
        report.explain(99)


def test_the_explanation_names_the_group_the_vote_the_label_and_the_weight() -> None:
    data = plain()
    trim = DatasetFilter(drop=1, within="label")
    trim.apply(data, scores_of(VALUES))
    assert "the rule drop=1, within='label' drops 1 of the 4 rows whose 'label' is 0" in trim.report.explain(0)
    trim = DatasetFilter(drop=2, agree=1)
    trim.apply(data, [scores_of(VALUES), scores_of([-v for v in VALUES])])
    assert trim.report.explain(4).endswith("1 of 2 rankings would drop it, the rule drop=2, agree=1 asks for 1")
    flip = Relabel(suspects=DatasetFilter(drop=1), how="flip")
    flip.apply(data, scores_of(VALUES))
    assert flip.report.explain(4).startswith("row 4 was relabelled from 0 to 1: its score -3 ")
    assert flip.report.explain(3).startswith("row 3 was kept: ")
    assert flip.report.groups == {"bad": (4, 3), "good": (4, 5)}
    weigh = Reweight(how="ranks")
    weigh.apply(data, scores_of(VALUES))
    assert weigh.report.explain(3).startswith("row 3 got the weight 1.78: its score 2 ")
    assert weigh.report.to_dataset()["weight_after"][3] == pytest.approx(16 / 9)
    parts = Separate(how="otsu", column="source")
    parts.apply(data, scores_of(VALUES))
    assert parts.report.explain(4).startswith("row 4 went to 'group_0': its score -3 ")


def test_soft_labels_are_taken_back_with_their_feature(tmp_path: Path) -> None:
    soft = Relabel(suspects=DatasetFilter(drop=2), how="soft", probabilities=torch.full((N, 2), 0.5))
    data = plain()
    curated = soft.apply(data, scores_of(VALUES))
    soft.report.save(tmp_path / "d.json")
    decision = Decision.load(tmp_path / "d.json")
    same(decision.replay(data), curated)
    same(decision.undo(curated), data)


def test_what_is_not_the_dataset_is_refused() -> None:
    data = plain()
    trim = DatasetFilter(drop=2)
    curated = trim.apply(data, scores_of(VALUES))
    report = trim.report
    assert report is not None
    changed = data.map(lambda row, i: {"text": "other"} if i == 5 else row, with_indices=True)
    for other, message in (
        (changed, "row 5 of the dataset"),
        (data.select(range(N - 1, -1, -1)), "row 0 .*reordered"),
        (data.select(range(N - 1)), "has 7 rows and the decision is on 8"),
        (data.remove_columns("x"), r"lacks the columns \['x'\]"),
        ([1], "list is not a datasets.Dataset"),
        (DatasetDict({"test": data}), "no 'train'"),
    ):
        with pytest.raises(BadExample, match=message):
            report.replay(other)
    for made, rest, message in (
        (curated, None, "Pass a dataset that has them"),
        (curated, curated, "lacks 2 of the 2 dropped rows; the first is 1"),
        (curated.select(range(3)), data, "3 rows and the decision leaves 6"),
        (curated.select(range(5, -1, -1)), data, "row 0 of the curated dataset is not what"),
    ):
        with pytest.raises(BadExample, match=message):
            report.undo(made, rest)
    weigh = Reweight()
    weigh.apply(data, scores_of(VALUES))
    with pytest.raises(BadExample, match="'weight' already"):
        weigh.report.replay(data.add_column("weight", [1.0] * N))


def test_dropped_rows_alone_are_enough_to_undo_and_columns_added_since_are_left_out() -> None:
    data = plain().with_format("numpy", columns=["label", "x"])
    trim = DatasetFilter(drop=3)
    curated = trim.apply(data, scores_of(VALUES))
    rest = plain().select([row.id for row in trim.report.removed])
    back = trim.report.undo(curated.add_column("later", [1] * 5), rest)
    same(back, plain())
    assert back.format["type"] == "numpy"
    assert trim.report.undo(curated, rest).format == data.format


def test_a_decision_is_replayed_on_the_split_it_was_made_on() -> None:
    splits = DatasetDict({"train": plain(), "test": plain()})
    trim = DatasetFilter(drop=3)
    curated = trim.apply(splits, scores_of(VALUES))
    same(trim.report.replay(splits), curated)


def test_a_file_that_is_no_decision_is_refused(tmp_path: Path) -> None:
    trim = DatasetFilter(drop=2)
    trim.apply(plain(), scores_of(VALUES))
    path = tmp_path / "decision.json"
    trim.report.save(path)
    saved = json.loads(path.read_text())
    assert saved["counts"] == {"keep": 6, "drop": 2}
    assert set(saved["versions"]) == {"python", "hf-influence", "datasets"}
    for change in (
        {"schema": 2},
        {"ids": [0]},
        {"contents": ["0" * 16] * N},
        {"actions": ["burn"] * N},
        {"reason": [7] * N},
        {"more": 1},
    ):
        path.write_text(json.dumps({**saved, **change}))
        with pytest.raises(StoreError, match=r"decision\.json"):
            Decision.load(path)
    path.write_text("{")
    with pytest.raises(StoreError, match="does not hold a decision"):
        Decision.load(path)
    for nothing in (tmp_path / "none.json", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(StoreError, match="does not hold a decision"):
            Decision.load(nothing)


def hostile() -> tuple[Dataset, Decision]:
    ids = [f"{HOSTILE}{i}" for i in range(4)]
    data = Dataset.from_dict({HOSTILE: ids, "label": [HOSTILE, "b", "b", "b"]})
    settings = {HOSTILE: HOSTILE, "damping": 0.1}
    trim = DatasetFilter(drop=1)
    trim.apply(data, scores_of([-1.0, 0.0, 1.0, 2.0], ids, HOSTILE, settings=settings))
    assert trim.report is not None
    return data, trim.report


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    data, decision = hostile()
    for text in (decision.explain(data[HOSTILE][0]), *str(decision).splitlines()):
        assert text.isprintable()
    assert decision.explain(data[HOSTILE][0]).count(" was dropped: its score -1 ") == 1
    assert len(str(decision).splitlines()) == 4
    decision.save(tmp_path / "d.json")
    same(Decision.load(tmp_path / "d.json").replay(data), data.select([1, 2, 3]))
    card = decision.card()
    assert (card.count(START), card.count(END)) == (1, 1)
    assert "<script" not in card
    assert "](" not in card.replace("\\]\\(", "")
    assert "https://" not in card
    assert "www." not in card
    assert "\n---\n" not in card
    for line in card.splitlines():
        assert line.isprintable()
        if line.startswith("|"):
            assert line.replace("\\\\", "").replace("\\|", "").count("|") in (3, 4)


HEAD = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files: x.parquet\n---\n# Mine\n\ntext\n"


@pytest.mark.parametrize("head", ["", "# Mine\n", HEAD, HEAD.replace("\n", "\r\n")])
def test_a_card_has_one_section_and_keeps_all_else(tmp_path: Path, head: str) -> None:
    file = tmp_path / "README.md"
    if head:
        file.write_bytes(head.encode())
    for decision in (hostile()[1], hostile()[1]):
        assert add_to_card(tmp_path, decision) == tmp_path
    first = file.read_bytes().decode()
    assert first.startswith(head.rstrip())
    assert first.count(START) == first.count(END) == 1
    trim = DatasetFilter(drop=2)
    trim.apply(plain(), scores_of(VALUES))
    file.write_bytes((first + "\nafter\n").encode())
    add_to_card(str(file), trim.report)
    text = file.read_bytes().decode()
    assert text.startswith(head.rstrip())
    assert text.replace("\r\n", "\n").endswith(f"{trim.report.card()}\n\nafter\n")
    assert "\r" not in head or "\n" not in text.removesuffix("\nafter\n").replace("\r\n", "")
    card = DatasetCard.load(file)
    assert card.data.to_dict().get("license") == ("mit" if head.startswith("---") else None)
    loaded = DatasetCard(head or "# x")
    assert add_to_card(add_to_card(loaded, trim.report), trim.report) is loaded
    assert str(loaded).count(START) == 1
    assert "6 of 8 rows were kept" in loaded.text
    assert "| self\\_ip, damping | 0.1 |" in loaded.text
    assert "| good | 4 | 3 |" in loaded.text


def test_an_unfinished_section_of_somebody_else_is_no_section() -> None:
    text = with_section(f"# x\n{START}\nunfinished", "new")
    assert text == f"# x\n{START}\nunfinished\n\nnew\n"
    text = with_section(text.replace("new", f"{START}\nold\n{END}"), "new")
    assert text == f"# x\n{START}\nunfinished\n\nnew\n"


def test_a_curated_folder_has_data_decision_and_card(tmp_path: Path) -> None:
    data = conversations()
    flip = Relabel(suspects=DatasetFilter(drop=2), how="flip")
    curated = flip.apply(data, scores_of(VALUES))
    for _ in range(2):
        save_curated(curated, flip.report, tmp_path / "out")
    same(load_from_disk(str(tmp_path / "out")), curated)
    decision = Decision.load(tmp_path / "out" / "decision.json")
    assert Decision.load(tmp_path / "out") == Decision.load(str(tmp_path / "out")) == decision
    same(decision.undo(load_from_disk(str(tmp_path / "out"))), data)
    assert (tmp_path / "out" / "README.md").read_text().count(START) == 1
    parts = Separate(how="otsu")
    for made, report in ((parts.apply(data, scores_of(VALUES)), parts.report), (curated, flip.report)):
        save_curated(made, report, tmp_path / "out")  # over a dataset of the other kind
        assert type(load_from_disk(str(tmp_path / "out"))) is type(made)
    with pytest.raises(BadExample, match="IterableDataset cannot be saved"):
        save_curated(data.to_iterable_dataset(), decision, tmp_path / "no")  # type: ignore[arg-type]


@pytest.mark.parametrize("splits", [False, True])
def test_a_dataset_with_a_transform_is_saved_as_it_is_stored(tmp_path: Path, splits: bool) -> None:
    data = plain().with_transform(lambda batch: {"upper": [text.upper() for text in batch["text"]]})
    trim = DatasetFilter(drop=2)
    curated = trim.apply(DatasetDict(train=data, test=data) if splits else data, scores_of(VALUES))
    save_curated(curated, trim.report, tmp_path / "out")
    loaded = load_from_disk(str(tmp_path / "out"))
    same(loaded, curated.with_format(None))
    same(
        Decision.load(tmp_path / "out").replay(DatasetDict(train=plain(), test=plain()) if splits else plain()), loaded
    )
    assert (curated["train"] if splits else curated)[0] == {"upper": "ROW 0"}, "the transform stays where it was"


def test_what_cannot_be_kept_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    trim = DatasetFilter(drop=2)
    curated = trim.apply(plain(), scores_of(VALUES))
    for other, kind in ((trim, "DatasetFilter"), (DatasetFilter(drop=1).report, "NoneType"), ("out", "str")):
        with pytest.raises(BadSetting, match=rf"{kind} is no decision.*trim\.report"):
            save_curated(curated, other, tmp_path / "out")
    store = make_store(tmp_path / "store", {"a": torch.ones(2, 2)}).path
    before = sorted(store.rglob("*"))
    with pytest.raises(BadSetting, match="is a gradient store"):
        save_curated(curated, trim.report, store)
    assert sorted(store.rglob("*")) == before
    assert list(tmp_path.iterdir()) == [store]


def test_suggestions_keep_nested_columns() -> None:
    data = conversations()
    review = Relabel(suspects=DatasetFilter(drop=2), how="flip").suggest(data, scores_of(VALUES))
    assert review["row"][:] == ORDER[:2]
    assert review.features["messages"] == data.features["messages"]
    assert review["messages"][:] == data.select(ORDER[:2])["messages"][:]


def test_groups_of_a_dataset_dict_that_was_changed_are_not_taken_back() -> None:
    split = Separate(how="otsu")
    parts = split.apply(plain(), scores_of(VALUES))
    parts["group_0"] = parts["group_0"].select([0])
    with pytest.raises(BadExample, match="sizes are not those"):
        split.report.undo(parts)
