"""The command line: what is wrong is said in a line, and what is asked for is done or refused."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, NamedSplit, load_from_disk
from stores import make_store
from typer.testing import CliRunner

from hf_influence import GradientStore, Scores, attribute, cli, methods
from hf_influence.errors import BadSetting
from hf_influence.filter import DatasetFilter, Decision, Relabel

N = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, its scores, and the dataset in several forms."""
    folder = tmp_path_factory.mktemp("place")
    generator = torch.Generator().manual_seed(0)
    train, query = torch.randn(N, 3, generator=generator), torch.randn(2, 3, generator=generator)
    store = make_store(folder / "store", {"a": train}, {"a": query}, stats={"loss": torch.arange(N) * 1.0})
    assert CliRunner().invoke(cli.app, ["attribute", str(store.path), "--output", str(folder / "s.st")]).exit_code == 0
    rows = Dataset.from_dict({"text": [f"row {i}" for i in range(N)]})
    rows.save_to_disk(folder / "disk")
    DatasetDict(train=rows, test=rows).save_to_disk(folder / "dict")
    rows.add_column("label", [0, 2, 1, 2]).save_to_disk(folder / "classes")
    phi = torch.rand(N, 3, generator=generator).softmax(1)
    stats = {"loss": torch.arange(N) * 1.0, "label": torch.tensor([0, 2, 1, 2]), "probabilities": phi}
    make_store(folder / "classified", {"a": train}, stats=stats)
    odds = torch.tensor([[3.0], [-1.0], [2.0], [-0.5]])
    Scores(odds, list(range(N)), "auto", report={"log_odds": {}}).save(folder / "odds.st")
    make_store(folder / "named", {"a": train}, stats=stats, ids=list("abcd"))
    (about,) = (folder / "named").rglob("train/rows.json")
    about.write_text(json.dumps({**json.loads(about.read_text()), "id_column": "name"}))
    turned = rows.add_column("label", [0, 2, 1, 2]).add_column("name", list("abdc"))
    turned.save_to_disk(folder / "turned")
    turned.to_csv(folder / "turned.tsv", sep="\t")
    rows.to_json(folder / "rows.jsonl")
    rows.to_json(folder / "rows.JSONL")
    (folder / "broken.json").write_text("{")
    (folder / "rows.txt").write_text("row 0\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes())[:-12])
    return folder


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the command says as it ends with an error, on one line."""
    monkeypatch.setattr(sys, "argv", ["hf-influence", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    before, error, text = capsys.readouterr().err.partition("error: ")  # before stands the progress of loading
    assert error
    assert "Traceback" not in before + text
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("filter dict s.st --drop 1 --split nope --output out", "has the splits ['train', 'test'] and no 'nope'"),
        ("filter disk s.st --drop 1 --split nope --output out", "without splits, so it has no 'nope'"),
        ("filter rows.jsonl s.st --drop 1 --split test --output out", "without splits, so it has no 'test'"),
        ("filter nope.parquet s.st --drop 1 --output out", "no dataset can be read from nope.parquet"),
        ("filter store s.st --drop 1 --output out", "store is a store or a file of scores, and no dataset"),
        (
            "filter s.st disk --drop 1 --output out",
            "s.st is a store or a file of scores, and no dataset. The dataset c",
        ),
        (
            "filter s.st rows.jsonl --output out",
            "The dataset comes first, then the scores: DATASET s.st",
        ),
        ("relabel odds.st classes --output out", "The dataset comes first, then the scores"),
        ("filter disk s.st --drop 10% --output out", "drop='10%' is a text. Give the share as a number: write 0.1."),
        (
            "filter disk s.st --keep 2.5% --output out",
            "keep='2.5%' is a text. Give the share as a number: write 0.025.",
        ),
        ("relabel classes odds.st --suspects 5% --output out", "Give the share as a number: write 0.05."),
        ("filter broken.json s.st --drop 1 --output out", "from broken.json (ArrowInvalid: JSON parse error"),
        ("filter cut.jsonl.gz s.st --drop 1 --output out", "from cut.jsonl.gz (EOFError: Compressed file ended"),
        ("filter empty.jsonl s.st --drop 1 --output out", "empty.jsonl holds no rows"),
        ("filter rows.txt s.st --drop 1 --output out", "in one of the formats .parquet, .arrow, .json, .jsonl, .nd"),
        ("filter disk nope.st --drop 1 --output out", "there is no file or folder nope.st. Name scores"),
        ("filter disk s.st --drop 1 --output disk", "is the dataset itself"),
        ("filter dict s.st --drop 1 --output ./dict/", "is the dataset itself"),
        ("filter dict s.st --drop 1 --output dict/train", "is the dataset itself, or in it"),
        (
            "filter disk s.st --drop 1 --output s.st",
            "s.st is a file, and the dataset, its decision and its card go",
        ),
        ("filter disk s.st --drop 1 --output s.st/x", "s.st is a file"),
        ("filter disk store --drop 1 --output store", "store is a gradient store, which"),
        ("filter disk s.st --drop 1 --keep 0.5 --output out", "drop=1 and keep=0.5: one of them says"),
        ("relabel classes odds.st --output out --how flip", "which rows. Say how many are suspicious: Relabel(susp"),
        ("relabel classes odds.st --output out --how flip", "or --suspects 0.05"),
        ("relabel classes odds.st --output out", "of more than two classes needs the model's probabilities. Pass the"),
        ("relabel classes odds.st --output out", "or --store runs/mine, which has them if it is of a classifier"),
        ("relabel classes odds.st --output out --store store", "needs the model's probabilities"),
        ("relabel classes odds.st --output out --store nope", "nope is not a gradient store"),
        ("relabel classes odds.st --output out --how flip --suspects 1", "how='flip' is for two classes"),
        ("attribute store --output disk", "--output disk is a folder"),
        ("attribute store --groups task", "--groups is a column of --data. Give both"),
        ("attribute store --data disk", "--groups is a column of --data. Give both"),
        ("attribute store --data disk --groups task", "--groups task is no column of disk, which has ['text']"),
        ("attribute s.st --data disk --groups text", "s.st is not a gradient store"),
        ("attribute store --output s.st/x", "could not write s.st/x"),
        ("attribute store --data disk --groups text --method ip", "method 'ip' has no setting 'groups'"),
        ("attribute named --data turned --groups label", "are in another order than those of named"),
        ("attribute store --set method=ip", "--set method=ip is no setting"),
        ("attribute store --set store=ip", "--set store=ip is no setting"),
        ("attribute store --method ip --set point=abc", "point must be a whole number"),
        ("attribute store --method ip --set query_split=5", "query_split must be text"),
        ("methods --markdown --json", "--markdown gives the whole table"),
        ("methods --markdown --store store", "--markdown gives the whole table"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "1000")
    before = sorted(place.rglob("*"))
    assert message in said(monkeypatch, capsys, *command.split())
    assert sorted(place.rglob("*")) == before, "nothing is left behind, and nothing is lost"


def test_names_of_files_may_be_in_capitals(place: Path, tmp_path: Path) -> None:
    given = ["filter", str(place / "rows.JSONL"), str(place / "s.st"), "--drop", "1", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 0, done.output
    assert len(load_from_disk(tmp_path / "out")) == N - 1


def test_the_file_that_is_named_is_read_and_no_other(place: Path, tmp_path: Path) -> None:
    """Also where its name looks like a pattern."""
    for name in ("rows[1]", "rows1", "rows?"):
        Dataset.from_dict({"text": [f"{name} {i}" for i in range(N)]}).to_parquet(tmp_path / f"{name}.parquet")
    for name in ("rows[1]", "rows?"):
        words = ["filter", str(tmp_path / f"{name}.parquet"), str(place / "s.st"), "--drop", "3"]
        done = CliRunner().invoke(cli.app, [*words, "--output", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        assert load_from_disk(tmp_path / name)["text"][0].startswith(name)


@pytest.mark.parametrize("named", ["scores", "store"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_ids_that_are_texts_stay_texts_where_they_look_like_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], suffix: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ids, odds = ["1e3", "001", "1", "1.0"], torch.tensor([[3.0], [-1.0], [2.0], [-0.5]])
    Scores(odds, ids, "mine", id_column="uid").save("scores")
    make_store(tmp_path / "store", {"a": torch.randn(N, 3)}, stats={"loss": -odds[:, 0]}, ids=ids)
    (about,) = (tmp_path / "store").rglob("train/rows.json")
    about.write_text(json.dumps({**json.loads(about.read_text()), "id_column": "uid"}))
    rows = Dataset.from_dict({"uid": ids[::-1], "label": [1, 2, 1, 2]})
    rows.to_csv(f"d.{suffix}", sep="," if suffix == "csv" else "\t")
    done = CliRunner().invoke(cli.app, ["filter", f"d.{suffix}", named, "--drop", "2", "--output", "out"])
    assert done.exit_code == 0, done.output
    assert load_from_disk("out").to_dict() == {"uid": ["1", "1e3"], "label": [2, 2]}
    words = ["--data", f"d.{suffix}", "--groups", "label"]
    assert "in another order than those of store" in said(monkeypatch, capsys, "attribute", "store", *words)


def test_by_default_what_is_doubtful_goes(place: Path, tmp_path: Path) -> None:
    given = ["filter", str(place / "disk"), str(place / "odds.st"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 0, done.output
    assert load_from_disk(tmp_path / "out")["text"][:] == ["row 0", "row 2"]
    assert "drop='doubtful'" in done.output


@pytest.mark.parametrize(("data", "split"), [("dict", "test"), ("dict", "train"), ("disk", "train")])
def test_a_split_is_filtered_where_there_is_one(place: Path, tmp_path: Path, data: str, split: str) -> None:
    given = ["filter", str(place / data), str(place / "s.st"), "--keep", "2", "--split", split]
    done = CliRunner().invoke(cli.app, [*given, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    whole, curated = load_from_disk(str(place / data)), load_from_disk(str(tmp_path / "out"))
    assert type(curated) is type(whole)
    sizes = {"train": N, "test": N} | {split: 2} if data == "dict" else 2
    assert (curated.num_rows if data == "dict" else len(curated)) == sizes


def test_the_other_splits_stay_when_one_is_relabelled(place: Path, tmp_path: Path) -> None:
    rows = load_from_disk(str(place / "classes"))
    DatasetDict(train=rows, validation=rows.select([1, 0])).save_to_disk(tmp_path / "splits")
    words = [str(tmp_path / "splits"), str(place / "odds.st"), "--store", str(place / "classified")]
    done = CliRunner().invoke(cli.app, ["relabel", *words, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    new = load_from_disk(str(tmp_path / "out"))
    assert new["validation"].to_dict() == rows.select([1, 0]).to_dict()
    assert len(new["train"]["label"][0]) == 3
    assert "to train on it: Trainer(…, compute_loss_func=soft_cross_entropy)" in done.output


def test_a_tilde_is_the_home_folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("disk", "classes", "store", "classified"):
        shutil.copytree(place / name, tmp_path / name)
    shutil.copy(place / "odds.st", tmp_path)
    for words in (
        "methods --store ~/store",
        "attribute ~/store --output=~/s.st",
        "attribute ~/classified --data=~/classes --groups label",
        "filter ~/disk ~/s.st --drop 1 --output=~/filtered",
        "relabel ~/classes ~/odds.st --store=~/classified --output=~/relabelled",
    ):
        done = CliRunner().invoke(cli.app, words.split())
        assert done.exit_code == 0, (words, done.output, done.exception)
    assert load_from_disk(str(tmp_path / "filtered")).num_rows == N - 1
    assert load_from_disk(str(tmp_path / "relabelled")).num_rows == N


def test_of_a_dataset_on_the_hub_all_splits_are_read(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = load_from_disk(str(place / "dict"))

    def load(name: str, split: str | None = None) -> Any:
        return whole if split is None else Dataset.from_dict(whole["train"].to_dict(), split=NamedSplit(split))

    monkeypatch.setattr("hf_influence.dataset.reading.load_dataset", load)
    for split, rows in (("test", {"train": N, "test": N - 1}), ("train[:4]", N - 1)):
        words = ["filter", "me/data", str(place / "s.st"), "--drop", "1", "--split", split]
        done = CliRunner().invoke(cli.app, [*words, "--output", str(tmp_path / split)])
        assert done.exit_code == 0, done.output
        assert load_from_disk(str(tmp_path / split)).num_rows == rows


@pytest.mark.parametrize("words", ["odds.st --store classified", "classified --how predicted --suspects 0.5"])
def test_of_more_than_two_classes_labels_are_given_by_the_probabilities_in_a_store(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(place)
    done = CliRunner().invoke(cli.app, ["relabel", "classes", *words.split(), "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    phi, data = GradientStore.open("classified").rows().stats["probabilities"], load_from_disk("classes")
    if "odds.st" in words:
        expected = Relabel(how="posterior", probabilities=phi).apply(data, Scores.load("odds.st"))
    else:
        rule = Relabel(suspects=DatasetFilter(drop=0.5), probabilities=phi)
        expected = rule.apply(data, attribute("classified"))
    assert load_from_disk(tmp_path / "out").to_dict() == expected.to_dict() != data.to_dict()


def test_each_example_is_compared_with_its_own_kind(place: Path, tmp_path: Path) -> None:
    words = ["--data", str(place / "turned.tsv"), "--groups", "label", "--output", str(tmp_path / "s.st")]
    result = CliRunner().invoke(cli.app, ["attribute", str(place / "classified"), *words])
    assert result.exit_code == 0, result.output
    assert torch.equal(
        Scores.load(tmp_path / "s.st").values, attribute(place / "classified", groups=[0, 2, 1, 2]).values
    )


def test_what_methods_lack_in_a_store_is_given_as_json(place: Path) -> None:
    lacks = json.loads(CliRunner().invoke(cli.app, ["methods", "--store", str(place / "store"), "--json"]).output)
    assert lacks["ip"] == []
    assert "points" in lacks["tracin"]


def test_ids_are_shown_without_control_characters(tmp_path: Path) -> None:
    ids = ["fine", "\x1b[2J\x1b]0;title\x07", "two\nlines  9.9"]
    store = make_store(tmp_path, {"a": torch.randn(3, 4)}, stats={"loss": torch.rand(3)}, ids=ids)
    output = CliRunner().invoke(cli.app, ["attribute", str(store.path), "--method", "loss"]).output
    assert all(line.isprintable() for line in output.splitlines())
    assert len(output.split("least worth keeping:\n")[1].splitlines()) == 3
    assert "two\\nlines" in output


def test_the_command_line_lists_every_method() -> None:
    listed = json.loads(CliRunner().invoke(cli.app, ["methods", "--json"]).output)
    assert list(listed) == list(methods())
    shown = CliRunner().invoke(cli.app, ["methods"], env={"COLUMNS": "200"}).output
    assert all(name in shown for name in methods())


def test_the_command_line_scores_a_store_and_curates_a_dataset(tmp_path: Path) -> None:
    train = {"a": torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.5], [0.5, 1.0]])}
    stats = {"loss": torch.tensor([0.1, 2.0, 0.2, 0.3])}
    store = str(make_store(tmp_path / "store", train, {"a": torch.tensor([[1.0, 0.0]])}, stats=stats).path)
    rows = Dataset.from_dict({"text": ["good", "bad", "fine", "fair"]})
    rows.to_json(tmp_path / "rows.jsonl")
    rows.save_to_disk(tmp_path / "rows")

    file = str(tmp_path / "scores.safetensors")
    done = CliRunner().invoke(cli.app, ["attribute", store, "--lowest", "1", "--output", file])
    assert done.exit_code == 0, done.output
    assert "4 examples by auto" in done.output
    assert "least worth keeping:\n  1  " in done.output
    done = CliRunner().invoke(cli.app, ["attribute", store, "--method", "vote", "--set", "k=1"])
    assert '"k": 1' in done.output

    for data, given, how in (("rows.jsonl", file, ["--drop", "1"]), ("rows", store, ["--keep", "0.75"])):
        output = tmp_path / f"curated-{data}"
        done = CliRunner().invoke(cli.app, ["filter", str(tmp_path / data), given, *how, "--output", str(output)])
        assert done.exit_code == 0, done.output
        assert "kept 3 of 4 rows by auto" in done.output
        assert load_from_disk(output)["text"][:] == ["good", "fine", "fair"]
        assert "1" in Decision.load(output / "decision.json").explain(1)
    rows.add_column("label", [0, 0, 1, 1]).save_to_disk(tmp_path / "classes")
    output = tmp_path / "relabelled"
    how = ["--how", "flip", "--suspects", "1"]
    done = CliRunner().invoke(cli.app, ["relabel", str(tmp_path / "classes"), file, *how, "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert load_from_disk(output)["label"][:] == [0, 1, 1, 1]
    for wrong in (["attribute", store, "--set", "k"], ["filter", str(tmp_path / "rows"), store, "--output", "x"]):
        assert isinstance(CliRunner().invoke(cli.app, wrong).exception, BadSetting)


def test_an_error_for_the_user_comes_without_a_traceback_and_markup_in_it_is_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise BadSetting("no [bold]such[/] thing")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "error: no [bold]such[/] thing" in capsys.readouterr().err
