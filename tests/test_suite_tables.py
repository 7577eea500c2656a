"""What the suites make of finished runs: exact on figures that are made up, with no model."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from models import of_characters
from stores import make_store

from hf_influence.errors import BadExample, BadSetting, StoreMismatch
from hf_influence.evaluation import Runs, Table, retraining_gain
from hf_influence.pretrained import load_classifier, load_language_model
from hf_influence.scores import Scores


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    return importlib.import_module


def test_several_tables_are_filled_from_one_series(suite, tmp_path, capsys):
    series = suite("series")
    args = series.parser("").parse_args(["--json", str(tmp_path / "t.json"), "--markdown", str(tmp_path / "t.md")])
    runs = Runs()
    for seed, auc in enumerate((0.5, 0.7)):
        runs.do({"seed": seed}, lambda auc=auc: {"one": {"ip": {"auc": auc}}, "other": {"loss": {"auc": 1 - auc}}})
    tables = {name: Table(title="T.", metrics=["auc"], baselines=()) for name in ("one", "other")}
    series.finish_each(tables, lambda run: ((name, "toy", rows) for name, rows in run.result.items()), runs, args)
    text = (tmp_path / "t.md").read_text()
    one, other = text.split("## other")
    assert "| `ip` | 0.600 ± 0.141 |" in one
    assert "| `loss` | 0.400 ± 0.141 |" in other
    assert capsys.readouterr().out.strip() == text.strip()
    assert set(json.loads((tmp_path / "t.json").read_text())) == {"one", "other"}


def test_what_is_kept_on_the_way_has_a_folder_for_each_key_and_settings(suite, tmp_path):
    where = suite("series").on_the_way
    runs, others = Runs(tmp_path, {"rows": 1}), Runs(tmp_path, {"rows": 2})
    assert where(runs, set="a", seed=0) == where(Runs(tmp_path, {"rows": 1}), set="a", seed=0)
    assert len({where(runs, set="a", seed=0), where(runs, set="a", seed=1), where(others, set="a", seed=0)}) == 3
    assert where(Runs(), set="a") is None


def test_training_again_is_one_where_nothing_is_drawn_anew_and_falls_with_the_noise(suite):
    again = suite("datamodeling").training_again
    losses = torch.randn(40, 5, dtype=torch.float64)
    assert again(torch.stack([losses, losses]))["training again"]["lds"] == pytest.approx(1)
    noise = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert 0.2 < again(losses + noise)["training again"]["lds"] < 0.8
    assert "left out" in again(losses[None])["training again"]


def test_a_removal_is_held_against_random_drops_and_each_of_these_against_the_others(suite):
    point = {"fraction": 0.1, "lowest": 0.5, "highest": 0.9, "random": [0.6, 0.8]}
    run = SimpleNamespace(key={"set": "toy"}, result={"ip": [point]})
    table = Table(title="T.", metrics=["without lowest", "without highest"], baselines=())
    for column, rows in suite("removal").columns(run):
        assert column == "toy, 10%"
        table.add(column, rows)
    cells = {row: found["columns"]["toy, 10%"] for row, found in table.json([])["rows"].items()}
    assert cells["ip"]["without lowest"]["values"] == pytest.approx([0.2])
    assert cells["ip"]["without highest"]["values"] == pytest.approx([-0.2])
    assert cells["random"]["without lowest"]["values"] == pytest.approx([0.2, -0.2])


def test_kinds_of_wrong_answers_get_a_column_each_and_ranks_within_tasks(suite):
    answers = suite("wrong_answers")
    train = {
        "is_wrong": [True, False, True, False, False],
        "kind": ["refusal", "clean", "truncated", "clean", "clean"],
        "task": ["a", "a", "b", "b", "b"],
    }
    scores = Scores(torch.tensor([[1.0], [2.0], [9.0], [10.0], [11.0]]), list(range(5)), "ip")
    found = answers.figures(train, "ip", scores)
    assert found["auc"] == pytest.approx(5 / 6)
    assert found["kinds"] == {
        "refusal": {"auc": 1.0, "within": pytest.approx(2.5 / 3)},
        "truncated": {"auc": pytest.approx(2 / 3), "within": 1.0},
    }
    left = {"left out": "no rows"}
    run = SimpleNamespace(key={"set": "s", "kind": answers.ALL}, result={"methods": {"ip": found, "gex": left}})
    assert [column for _, column, _ in answers.columns(run)] == [answers.ALL, "truncated", "refusal"]
    apart = SimpleNamespace(key={"set": "s", "kind": "refusal"}, result={"methods": {"ip": found}})
    assert [column for _, column, _ in answers.columns(apart)] == ["refusal"]
    assert list(answers.columns(SimpleNamespace(key=apart.key, result=left))) == []


def test_groups_are_held_against_the_sources(suite):
    source = ["a"] * 20 + ["b"] * 20
    draw = torch.Generator().manual_seed(0)
    values = 0.1 * torch.randn(40, 1, generator=draw) + torch.tensor([0.0] * 20 + [5.0] * 20)[:, None]
    train = Dataset.from_dict({"task": source})
    query = Dataset.from_dict({"task": ["a", "b"]})
    figures = suite("separation").figures
    assert figures(train, query, "self_ip", Scores(values, list(range(40)), "self_ip")) == {"rand": 1.0, "found": 2}
    with_queries = Scores(torch.cat([-values, values], 1), list(range(40)), "ip", query_ids=[0, 1])
    assert "rand" not in (found := figures(train, query, "ip", with_queries))
    assert found["auc_mean"] == pytest.approx(0.5)  # by size, both columns put b first


def test_a_share_of_the_gap_is_told_only_where_there_is_one(suite):
    retraining = suite("retraining")
    clear = retraining_gain({"noisy": [0.70, 0.71], "clean": [0.80, 0.81], "drop ip": [0.75, 0.76]})
    assert retraining.gap(clear) == "Gap between noisy and clean: 0.100 ± 0.000 (95 %)."
    run = SimpleNamespace(key={"set": "s"}, result={"noisy": {"accuracy": 0.7}, "drop ip": {"accuracy": 0.75}})
    ((_, _, rows),) = retraining.columns({"s": clear}, run)
    assert rows["drop ip"]["share"] == pytest.approx(0.5)
    assert rows["noisy"]["share"] is None
    one_seed = retraining_gain({"noisy": [0.7], "clean": [0.8], "drop ip": [0.75]})
    assert "no shares of it" in retraining.gap(one_seed)


@pytest.mark.parametrize("ways", [["clean"], ["doubtful", "drop il"], ["relabel loss"]])
def test_ways_that_make_no_table_are_refused_before_the_first_training(suite, monkeypatch, capsys, ways):
    retraining = suite("retraining")
    monkeypatch.setattr(retraining, "each", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(sys, "argv", ["retraining.py", "--methods", "ip", "loss", "--ways", *ways])
    with pytest.raises(SystemExit):
        retraining.main()
    assert "name ways beside clean, of 'doubtful', 'posterior', 'relabel ip'" in capsys.readouterr().err


def test_what_is_clean_is_trained_on_whatever_the_ways(suite, monkeypatch):
    retraining = suite("retraining")
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1], "right_label": [0, 1]})
    monkeypatch.setattr(retraining.Parts, "of", lambda *_: retraining.Parts(rows, rows, rows))
    monkeypatch.setattr(retraining, "fine_tune", lambda *_, **__: None)
    monkeypatch.setattr(retraining, "losses", lambda *_: {"correct": torch.ones(2)})
    named = ("clean", "doubtful", "drop ip")
    monkeypatch.setattr(retraining, "curated", lambda *_: ((way, rows) for way in named))
    for ways, found in ((None, named), (["drop ip"], ("clean", "drop ip"))):
        args = SimpleNamespace(model=None, ways=ways, epochs=1, rows=2, batch_size=2)
        assert tuple(retraining.run("toy", 0, args, Runs())) == ("noisy", *found)


def test_each_remedy_is_for_any_number_of_classes(suite, tmp_path):
    labels, phi = torch.tensor([0, 1, 2, 0]), torch.tensor([[0.5, 0.2, 0.3]] * 4)
    store = make_store(tmp_path, {"a": torch.ones(4, 2)}, stats={"label": labels, "probabilities": phi})
    train = Dataset.from_dict({"text": list("abcd"), "label": labels.tolist()})
    scores = Scores(torch.tensor([[-9.0], [-8.0], [1.0], [2.0]]), list(range(4)), "ip")
    found = suite("robustness").cured(train, scores, store.path, 0.5)
    assert found["trim"]["text"][:] == ["c", "d"]
    assert found["relabel"]["label"][:] == [2, 0, 2, 0]
    assert sum(found["reweight"]["weight"]) == pytest.approx(4)


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"instruction": "Translate.", "input": "Hund", "output": "dog", "source": "words"}, "words"),
        ({"instruction": "Translate.\nHund", "input": "", "output": "dog"}, ""),
        ({"prompt": "Translate.\nHund\n", "text": "Translate.\nHund\ndog", "task": "words"}, "words"),
        ({"prompt": "Translate.\nHund\n", "completion": "dog"}, ""),
        ({"prompt": "Translate.\nHund\n", "answer": "dog", "text": "Translate.\nHund\ndog"}, ""),
    ],
)
def test_a_row_of_any_of_these_columns_becomes_a_prompt_and_an_answer(suite, tmp_path, row, task):
    _, tokenizer = load_language_model()
    prompts, args = suite("prompts"), SimpleNamespace(data=tmp_path, rows=1, queries=1, max_tokens=20)
    (tmp_path / "mine").mkdir()
    for split in ("train", "validation"):
        Dataset.from_list([row]).to_parquet(tmp_path / "mine" / f"{split}.parquet")
    data = prompts.load("mine", args, tokenizer, 0)
    assert list(data) == ["train", "test"]
    assert data["train"][:] == data["test"][:]
    assert data["test"][0] == {
        "prompt": "Translate.\nHund\n",
        "answer": "dog",
        "task": task,
        "text": "Translate.\nHund\ndog",
    }


def test_what_is_no_prompt_and_answer_is_refused(suite, tmp_path):
    (tmp_path / "mine").mkdir()
    Dataset.from_dict({"prompt": ["a"], "label": [0]}).to_parquet(tmp_path / "mine" / "train.parquet")
    args = SimpleNamespace(data=tmp_path, rows=1, queries=1, max_tokens=20)
    with pytest.raises(BadExample, match=r"mine/train has the columns \['prompt', 'label'\]"):
        suite("prompts").load("mine", args, None, 0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2=", "text": "<user>2+2=<assistant>4"},
        {"prompt": "2+2=", "answer": None},
        {"prompt": "2+2=", "answer": None, "text": None},
    ],
)
def test_an_answer_that_cannot_be_read_off_is_refused(suite, row):
    with pytest.raises(BadExample, match=r"does not begin with its prompt '2\+2='"):
        suite("prompts")._example(row)


def test_labelled_texts_may_be_one_or_two_and_come_from_the_first_split_that_has_labels(suite, tmp_path):
    glue, folder = suite("glue"), tmp_path / "mine"
    folder.mkdir()
    rows = {"idx": [0, 1, 2], "premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": [2, 0, 1]}
    for split, columns in {"test": rows | {"label": [-1] * 3}, "validation": rows, "train": rows}.items():
        Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    pairs = glue.load("mine", glue.KEPT, tmp_path)
    assert pairs.to_dict() == {"text": ["a", "b", "c"], "text_pair": ["d", "e", "f"], "label": [2, 0, 1]}
    assert glue.texts(pairs) == ["a d", "b e", "c f"]
    _, tokenizer = load_classifier()
    both = tokenizer(["a", "b", "c"], ["d", "e", "f"])
    assert glue.tokens(pairs, tokenizer).to_dict() == {**both, "labels": [2, 0, 1]}
    Dataset.from_dict({"review": ["a", "b"], "label": [0, 1]}).to_parquet(folder / "test.parquet")
    assert glue.load("mine", glue.KEPT, tmp_path).to_dict() == {"text": ["a", "b"], "label": [0, 1]}
    with pytest.raises(BadSetting, match="no labelled dev in"):
        glue.load("mine", ["dev"], tmp_path)
    for odd in ({"label": [0]}, {"text": ["a"]}, {"text": ["a"], "label": ["b"]}):
        Dataset.from_dict(odd).to_parquet(folder / "test.parquet")
        with pytest.raises(BadExample, match="one text or two"):
            glue.load("mine", glue.KEPT, tmp_path)


def test_a_store_that_was_filled_to_its_end_is_scored_again_without_training(suite, tmp_path, monkeypatch):
    mislabel, series = suite("mislabel"), suite("series")
    rows = Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1], "is_wrong": [True, False]})
    monkeypatch.setattr(mislabel.Parts, "of", lambda *_: mislabel.Parts(rows, rows, rows.select([])))
    monkeypatch.setattr(mislabel, "every_method", lambda store, *_: {"ip": {"auc": float(len(list(store.iterdir())))}})
    trained, stop = [], [True]

    def fill(store, **_):
        trained.append(store)
        if stop.pop():
            raise KeyboardInterrupt
        return {"training": 2.0}

    monkeypatch.setattr(mislabel, "fill", fill)

    def once(without="cg", methods=None, stores=tmp_path):
        args = series.parser("").parse_args([])
        vars(args).update(stores=stores, data=None, rows=2, without=[without], methods=methods)
        return mislabel.run(8, 0, "sst2", args, series.runs_of(args, *([] if methods else ["methods"])))

    with pytest.raises(KeyboardInterrupt):
        once()
    stop.extend([False, False])
    assert once() == once(without="tda") == {"methods": {"ip": {"auc": 1.0}}, "seconds": {"training": 2.0}}
    assert trained == [tmp_path / "sst2-8-0"] * 2, "the half that was interrupted, and once to the end"
    some = tmp_path / "some"
    assert once(methods=["ip"], stores=some) == once(methods=["loss", "ip"], stores=some)
    assert trained[2:] == [some / "sst2-8-0"], "once for any list of methods"
    with pytest.raises(StoreMismatch, match="methods"):
        once(methods=["ip"])


def test_the_suites_train_the_model_that_is_named(suite, tmp_path):
    folder = of_characters(tmp_path)
    _, tokenizer = load_classifier(folder)
    assert tokenizer("ab")["input_ids"] == [97, 98]
    plain = {"input_ids": [[97, 98], [99]], "attention_mask": [[1, 1], [1]]}
    for name, labels in (("glue", [0, 1]), ("prompts", plain["input_ids"])):
        module = suite(name)
        given = ["--model", str(folder), "--epochs", "1", "--batch-size", "2"]
        args = module.options("").parse_args(given)
        model = module.fine_tune(Dataset.from_dict(plain | {"labels": labels}), args, 0)
        assert model.config.hidden_size == 16
        assert model.active_peft_config.target_modules == {"q_proj", "v_proj"}
        args.made = True
        assert module.trained_how(args).startswith(f"{folder.name} + LoRA r=8")
        series = suite("series")
        assert series.runs_of(args).settings["model"] == str(folder)
        assert "model" not in series.runs_of(module.options("").parse_args([])).settings


def test_all_clean_rows_may_be_queries(suite, monkeypatch):
    glue = suite("glue")
    rows = Dataset.from_dict({"text": list("abcde"), "label": [0, 1, 0, 1, 0]})
    monkeypatch.setattr(glue, "load", lambda *_: rows)
    args = SimpleNamespace(data=None, rows=5, share=0.2, queries=5, held_out=0)
    parts = glue.Parts.of("sst2", args, 0)
    assert (len(parts.train), len(parts.query), len(parts.held_out)) == (5, 5, 0)
    args.queries, args.held_out = 2, 9
    assert len(glue.Parts.of("sst2", args, 0).held_out) == 3, "as many as the queries leave"
    args.rows = 1
    parts = glue.Parts.of("sst2", args, 0)
    assert len(parts.held_out) == 3 + 4, "and as the training set has left"
    assert not set(parts.held_out[3:]["text"]) & set(parts.train["text"])
    args.held_out = 5
    assert parts.held_out[:5] == glue.Parts.of("sst2", args, 0).held_out[:]
    args.rows, args.held_out = 5, 9
    args.queries = 5
    with pytest.raises(BadSetting, match="leave no held-out row"):
        glue.Parts.of("sst2", args, 0)


def test_the_model_has_as_many_classes_as_the_set_also_where_the_last_was_dropped(suite, tmp_path, monkeypatch):
    glue, folder = suite("glue"), of_characters(tmp_path)
    rows = Dataset.from_dict({"text": list("abcdef"), "label": [0, 1, 2] * 2})
    monkeypatch.setattr(glue, "load", lambda *_: rows)
    args = glue.options("", epochs=1, batch_size=2).parse_args(["--model", str(folder)])
    args.rows, args.queries, args.held_out, args.share = 6, 3, 3, 0.0
    train = glue.Parts.of("toy", args, 0).train
    _, tokenizer = load_classifier(folder)
    left = glue.tokens(train.filter(lambda row: row["label"] < 2), tokenizer)
    assert glue.fine_tune(left, args, 0).config.num_labels == 3


def test_what_is_made_of_scores_that_are_no_log_odds_is_left_out(suite):
    train = Dataset.from_dict({"text": ["a", "b"], "is_wrong": [True, False]})
    assert suite("other_noise").made_of(Scores(torch.tensor([[0.5], [1.0]]), [0, 1], "auto"), train) == {}


def test_other_noise_is_of_the_kind_that_it_says(suite, monkeypatch):
    noise = suite("other_noise")
    rows = Dataset.from_dict({"text": [str(i) for i in range(8000)], "label": [i % 2 for i in range(8000)]})
    monkeypatch.setattr(noise, "load", lambda *_: rows)
    for kind in noise.KINDS.values():
        right = noise.right_rows(kind, None, 0)
        assert len(set(right["text"])) == kind.rows + kind.queries, "no query is trained on"
        assert set(right["label"]) == set(range(kind.classes))
        if kind.positive is not None:
            assert sum(right["label"]) == round(kind.positive * len(right))
        train = right.select(range(kind.rows))
        told = noise.turned(train, kind, 0)
        wrong = {i for i, (a, b) in enumerate(zip(train["label"], told["label"], strict=True)) if a != b}
        assert wrong == {i for i, is_wrong in enumerate(told["is_wrong"]) if is_wrong}
        assert len(wrong) == round(kind.share * kind.rows)
        assert set(told["label"]) == set(range(kind.classes))
        by = {(told["label"][i] - train["label"][i]) % kind.classes for i in wrong}
        if wrong:
            assert by == ({1} if kind.neighbours else set(range(1, kind.classes)))
        if kind.of is not None:
            assert {train["label"][i] for i in wrong} == {kind.of}


def test_other_noise_of_answers_is_of_the_kind_that_it_says(suite, monkeypatch):
    noise = suite("other_noise_answers")
    rows = Dataset.from_dict({"text": [f"{i} " for i in range(500)], "label": [i % 2 for i in range(500)]})
    monkeypatch.setattr(noise, "load", lambda *_: rows)
    for kind in noise.KINDS.values():
        train, query = noise.right_rows(kind, None, 0)
        assert (len(train), len(query)) == (kind.rows, kind.queries)
        assert not set(train["prompt"]) & set(query["prompt"])
        assert set(train["answer"]) == set(noise.NAMES) or not kind.labels
        assert all(row["text"] == row["prompt"] + row["answer"] for row in train)


def test_answers_trained_again_are_told_by_loss_and_by_whole_answers(suite):
    again = suite("retraining_answers")
    losses = {"drop random": [2.0, 2.1], "clean": [1.0, 1.1], "drop auto": [1.2, 1.3]}
    whole = {"drop random": [0.1, 0.1], "clean": [0.3, 0.3], "drop auto": [0.2, 0.2]}
    gains = {
        "toy": {
            "loss": retraining_gain(losses, bottom=again.BOTTOM, higher_is_better=False),
            "whole answers": retraining_gain(whole, bottom=again.BOTTOM),
        }
    }
    run = SimpleNamespace(key={"set": "toy"}, result={way: {"loss": own[0]} for way, own in losses.items()})
    ((name, _, rows),) = again.columns(gains, run)
    assert name == "toy"
    assert rows["drop auto"]["share, loss"] == pytest.approx(0.8)
    assert rows["drop auto"]["share, whole answers"] == pytest.approx(0.5)
    assert rows["clean"]["share, loss"] is None


def test_retrainings_that_were_interrupted_go_on(suite, tmp_path):
    series = suite("series")
    rows = Dataset.from_dict({"label": [0, 1, 1]})
    trained, stop = [], ["soft"]

    def first(store):
        trained.append("first")
        return "all", {"accuracy": 0.5}, iter([("clean", rows.select([0])), ("soft", rows)])

    def again(way, curated):
        trained.append(way)
        if way in stop:
            stop.clear()
            raise KeyboardInterrupt
        return {"accuracy": len(curated) / 10}

    with pytest.raises(KeyboardInterrupt):
        series.train_again(Runs(tmp_path), first, again, set="toy")
    found = series.train_again(Runs(tmp_path), first, again, set="toy")
    assert found == {"all": {"accuracy": 0.5}, "clean": {"accuracy": 0.1}, "soft": {"accuracy": 0.3}}
    assert trained == ["first", "clean", "soft", "soft"], "what was finished is not trained again"
    trained.clear()
    assert series.train_again(Runs(), first, again, set="toy")["all"] == {"accuracy": 0.5}
    assert trained == ["first", "clean", "soft"]
