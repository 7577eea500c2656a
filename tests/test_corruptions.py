"""Planted mistakes: of the kind that was asked for, as many, always wrong, and known."""

import math
import re
from collections import Counter
from random import Random

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_influence.errors import BadExample, BadSetting
from hf_influence.evaluation import corrupt_answers, flipped_labels
from hf_influence.evaluation.benchmarks import math_problems, sentence_transformations
from hf_influence.evaluation.corruption_kinds import KINDS, LANGUAGES, REFUSALS, Answers


@pytest.fixture(scope="module")
def problems() -> Dataset:
    return math_problems(train=300, test=0, reasoning=True)["train"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_wrong_answers_and_leaves_the_rest_alone(problems, kind):
    made = corrupt_answers(problems, [kind], share=0.2, seed=3)
    assert Counter(made["kind"]) == {kind: 60, "clean": 240}
    assert made["right_answer"][:] == problems["answer"][:]
    for before, after in zip(problems, made, strict=True):
        assert after["is_wrong"] == (after["kind"] == kind) == (after["answer"] != before["answer"])
        assert after["text"] == after["prompt"] + after["answer"]
        assert (after["prompt"], after["task"]) == (before["prompt"], before["task"])


def wrong_rows(dataset: Dataset, kind: str, **settings) -> list[dict]:
    return [row for row in corrupt_answers(dataset, [kind], seed=1, **settings) if row["is_wrong"]]


def test_swapped_answers_come_from_the_task_or_from_another(problems):
    task_of = dict(zip(problems["answer"], problems["task"], strict=True))
    assert all(task_of[row["answer"]] == row["task"] for row in wrong_rows(problems, "swapped_within"))
    across = wrong_rows(problems, "swapped_across")
    assert all(task_of[row["answer"]] != row["task"] for row in across)
    assert len({task_of[row["answer"]] for row in across}) > 5


def test_what_is_right_for_the_prompt_is_not_planted():
    """Another row may have it as the answer to the same prompt."""
    right = Dataset.from_dict({"prompt": ["A prime:", "A prime:", "9 odd?"], "answer": ["2", "3", "yes"]})
    made = [corrupt_answers(right, ["swapped_within"], share=0.4, seed=seed, within=None) for seed in range(20)]
    wrong = {(row["prompt"], row["answer"]) for rows in made for row in rows if row["is_wrong"]}
    assert wrong == {("A prime:", "yes"), ("9 odd?", "2"), ("9 odd?", "3")}


def test_truncated_answers_are_the_first_words_at_most_half():
    rows = wrong_rows(sentence_transformations(train=200, test=0)["train"], "truncated")
    for row in rows:
        assert row["right_answer"].startswith(row["answer"])
        assert 1 <= len(row["answer"].split()) <= len(row["right_answer"].split()) / 2
        assert row["answer"].split() == row["right_answer"].split()[: len(row["answer"].split())]


def test_refusals_are_those_listed(problems):
    assert {row["answer"] for row in wrong_rows(problems, "refusal")} == set(REFUSALS)


def test_only_the_last_number_changes_and_it_keeps_its_length(problems):
    for row in wrong_rows(problems, "changed_number"):
        *same, last = re.findall(r"\d+|\D+", row["right_answer"])
        *start, new = re.findall(r"\d+|\D+", row["answer"])
        assert start == same
        assert new != last
        assert len(new) == len(last) == len(str(int(new)))
        assert sum(a != b for a, b in zip(new, last, strict=True)) == 1


@pytest.mark.parametrize(
    ("answer", "pattern"),
    [
        ("It costs $1,204.50 in all.", r"It costs \$\d,\d{3}\.\d\d in all\."),
        ("v2 needs 7 of them, says B12", r"v2 needs \d of them, says B12"),
        ("About 0", "About [1-9]"),
        ("From 30km on", r"From [1-9]\dkm on"),
    ],
)
def test_numbers_are_found_in_words(answer, pattern):
    for seed in range(40):
        changed = KINDS["changed_number"](Answers([answer], [None]), 0, Random(seed))
        assert re.fullmatch(pattern, changed), changed
        assert changed != answer


def test_another_language_has_about_the_length_of_the_right_answer():
    words = [1, 10, 30, 45]
    known = Answers([" ".join(["word"] * n) for n in words], [None] * 4)
    languages = set()
    for seed in range(20):
        replies = [KINDS["other_language"](known, i, Random(seed)) for i in range(4)]
        languages |= {name for name, sentences in LANGUAGES.items() for reply in replies if reply.startswith(sentences)}
        assert all(n <= len(reply.split()) < n + 10 for n, reply in zip(words, replies, strict=True))
    assert languages == set(LANGUAGES)


@pytest.mark.parametrize("kind", ["swapped_within", "swapped_across"])
def test_each_different_answer_is_as_likely(kind):
    known = Answers(["a", "b", "b", "c", "a"], ["x", "x", "x", "x", "y"])
    drawn = Counter(KINDS[kind](known, 0, Random(seed)) for seed in range(3000))
    if kind == "swapped_within":
        assert set(drawn) == {"b", "c"}
        assert drawn["b"] == pytest.approx(1500, abs=120)
    else:
        assert set(drawn) == {None}, "the only answer of the other task is its own"


def test_rows_where_a_kind_cannot_be_made_are_not_chosen():
    rows = Dataset.from_dict({"answer": ["no number", "one 1", "word", "2 3"], "task": ["a", "a", "b", "a"]})
    assert wrong_rows(rows, "changed_number", share=0.5)[0]["answer"].startswith("one")
    assert {row["right_answer"] for row in wrong_rows(rows, "swapped_within", share=0.75)} == {*rows["answer"]} - {
        "word"
    }
    assert "word" not in {row["right_answer"] for row in wrong_rows(rows, "truncated", share=0.75)}
    allowed = r"3 answers .* by 'changed_number', and only 2 of the 4 rows allow it"
    with pytest.raises(BadSetting, match=allowed + ".*choose another kind"):
        corrupt_answers(rows, ["changed_number"], share=0.75)
    with pytest.raises(BadSetting, match="only 0 of the 4"):
        corrupt_answers(rows, ["swapped_across"], share=0.5, within=None)


def test_kinds_share_the_rows_evenly_and_the_rarest_chooses_first():
    answers = ["word"] * 10 + [f"{i} apples" for i in range(2)]
    rows = Dataset.from_dict({"answer": answers, "task": ["a", "b"] * 6})
    made = corrupt_answers(rows, ["refusal", "changed_number", "other_language"], share=0.5, seed=5)
    assert Counter(made["kind"]) == {"refusal": 2, "changed_number": 2, "other_language": 2, "clean": 6}
    assert list(made["kind"][-2:]) == ["changed_number"] * 2


def test_all_kinds_at_once_and_odd_numbers(problems):
    counts = Counter(corrupt_answers(problems, share=0.29, seed=2)["kind"])
    assert counts.pop("clean") == 213
    assert set(counts) == set(KINDS)
    assert set(counts.values()) == {14, 15}


def test_seed_decides_and_the_input_is_left_alone(problems):
    before = problems.to_dict()
    first, again, other = (corrupt_answers(problems, seed=seed).to_dict() for seed in (0, 0, 1))
    assert first == again != other
    assert problems.to_dict() == before
    assert corrupt_answers(problems, share=0)["is_wrong"][:] == [False] * 300


def test_own_kinds_and_own_column_names():
    rows = Dataset.from_dict({"instruction": ["a", "b"], "output": ["x", "y"], "source": ["s", "s"]})

    def shouted(known, i, rng):
        return known.answers[i].upper()

    made = corrupt_answers(rows, [shouted], share=1, answer="output", within="source")
    assert (made["output"][:], made["kind"][:]) == (["X", "Y"], ["shouted"] * 2)
    with pytest.raises(BadSetting, match="only 0 of the 2"):  # what changes nothing is not wrong
        corrupt_answers(rows, [lambda known, i, rng: known.answers[i]], share=1, answer="output", within=None)


@pytest.mark.parametrize(("prompt", "answer"), [("text", "answer"), ("prompt", "text")])
def test_a_column_text_may_be_the_prompts_or_the_answers(prompt, answer):
    rows = Dataset.from_dict({"text": ["a 1", "b 2"], "answer": ["x 3", "y 4"]})
    made = corrupt_answers(rows, ["truncated"], 1, prompt=prompt, answer=answer, within=None)
    assert made[answer][:] == [text[:1] for text in rows[answer]]
    assert all(made[name][:] == rows[name][:] for name in rows.column_names if name != answer)


@pytest.mark.parametrize(
    ("columns", "settings", "error", "message"),
    [
        ({"answer": ["a"]}, {}, BadExample, r"no \['task'\].*within="),
        ({"answer": ["a"]}, {"share": 1.5, "within": None}, BadSetting, "share=1.5"),
        ({"answer": ["a"]}, {"kinds": ["rude"], "within": None}, BadSetting, "'rude' is no kind.*refusal"),
        ({"answer": ["a"]}, {"kinds": [], "within": None}, BadSetting, "kinds is empty"),
        ({"answer": ["a"]}, {"kinds": ["refusal"] * 2, "within": None}, BadSetting, "'refusal' more than once"),
        ({"answer": ["a"]}, {"kinds": [lambda *_: "b", lambda *_: "c"], "within": None}, BadSetting, "not lambda"),
        ({"answer": ["a", None]}, {"within": None}, BadExample, "row 1 has no text"),
        ({"answer": ["a"], "kind": ["b"]}, {"within": None}, BadExample, r"\['kind'\] already"),
        ({"answer": ["a"], "prompt": ["b"], "text": ["b a"]}, {"within": None}, BadExample, "'text' of row 0 is not"),
    ],
)
def test_what_does_not_fit_is_named(columns, settings, error, message):
    with pytest.raises(error, match=message):
        corrupt_answers(Dataset.from_dict(columns), **settings)


@pytest.mark.parametrize("labels", [[0, 1, 2] * 40, ["a", "b", "c"] * 40])
def test_flipped_labels_are_other_classes_drawn_evenly(labels):
    rows = Dataset.from_dict({"text": [str(i) for i in range(120)], "label": labels})
    flipped = flipped_labels(rows, 0.5, seed=1)
    assert flipped.column_names == ["text", "label", "is_wrong", "right_label"]
    assert flipped["right_label"][:] == labels
    assert sum(flipped["is_wrong"]) == 60
    assert [a != b for a, b in zip(flipped["label"], labels, strict=True)] == flipped["is_wrong"][:]
    moves = Counter((a, b) for a, b in zip(labels, flipped["label"], strict=True) if a != b)
    assert len(moves) == 6
    assert max(moves.values()) < 22
    assert (
        flipped.to_dict() == flipped_labels(rows, 0.5, seed=1).to_dict() != flipped_labels(rows, 0.5, seed=2).to_dict()
    )
    assert rows["label"][:] == labels


def test_class_labels_keep_their_names_and_may_flip_to_a_class_that_does_not_occur():
    features = Features({"label": ClassLabel(names=["a", "b"])})
    flipped = flipped_labels(Dataset.from_dict({"label": [0, 0]}, features=features), 1)
    assert flipped["label"][:] == [1, 1]
    assert flipped.features["label"] == flipped.features["right_label"] == features["label"]
    assert flipped.features["is_wrong"] == Value("bool")


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"labels": [0, 1]}, {}, "no 'label'.*label="),
        ({"label": [0, 1], "is_wrong": [True, False]}, {}, "flipped before"),
        ({"label": [0, None]}, {}, "row 1 has no label"),
        ({"label": [0.0, 1.0, math.nan]}, {}, r"row 2 has no label \(label=nan\)"),
        ({"label": [1, 1]}, {"share": 0.5}, "all 2 labels are 1"),
        ({"label": [[0, 1], [1]]}, {}, r"column 'label' holds \[0, 1\], .* a single label"),
    ],
)
def test_labels_that_cannot_be_flipped_are_named(columns, settings, message):
    with pytest.raises(BadExample, match=message):
        flipped_labels(Dataset.from_dict(columns), **settings)


def test_unlabelled_rows_are_not_taken_for_a_class():
    rows = Dataset.from_dict({"label": [0, -1]}, features=Features({"label": ClassLabel(names=["a", "b"])}))
    with pytest.raises(BadExample, match=r"row 1 has no label \(label=-1\)"):
        flipped_labels(rows)
