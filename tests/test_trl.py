"""TRL's SFTTrainer: rows of the original examples, whatever it makes of them; packed examples that see each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import VOCABULARY, Example, autograd_row, llama, lora, prompts, tiny, worst_error
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from watched import EXAMPLES, train

from hf_influence import DatasetFilter, attribute, collect
from hf_influence.callbacks import GradientCapture, WeightedTrainer, curate_and_retrain, prepared
from hf_influence.errors import BadExample, BadSetting, UnsupportedModel
from hf_influence.gradients.packing import Packing, kept_apart
from hf_influence.store import GradientStore, Rows

trl = pytest.importorskip("trl")

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "user", "assistant"]
WORDS = [*SPECIAL, *(f"w{i}" for i in range(VOCABULARY - len(SPECIAL)))]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} "
    "</s>{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)


def tokenizer() -> Any:
    """One token a word."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


def text(ids: list[int]) -> str:
    return " ".join(WORDS[6 + i % 40] for i in ids)


def texts(n: int = 9, seed: int = 0) -> Dataset:
    return Dataset.from_list([{"text": text(row["input_ids"])} for row in prompts(n, seed)])


def completions() -> Dataset:
    rows = [row["input_ids"] for row in prompts(9)]
    return Dataset.from_list([{"prompt": text(ids[:2]) + " ", "completion": text(ids[2:])} for ids in rows])


def conversations() -> Dataset:
    turns = [[text(row["input_ids"][i::3]) for i in range(3)] for row in prompts(9)]
    talk = [
        [
            {"role": role, "content": said}
            for role, said in zip(("user", "assistant", "user", "assistant"), [*turn, turn[0]], strict=True)
        ]
        for turn in turns
    ]
    return Dataset.from_list([{"messages": messages} for messages in talk])


class Recording(trl.SFTTrainer):  # type: ignore[misc,name-defined]
    """Remembers the weights that every step started from."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        weights = {name: w.detach().clone() for name, w in self.model.named_parameters() if w.requires_grad}
        self.seen.append((self.state.global_step + 1, weights))
        return super().training_step(model, inputs, *args, **kwargs)


def trainer_of(
    folder: Path,
    data: Dataset,
    *callbacks: GradientCapture,
    kind: type[Recording] = Recording,
    model: Any = None,
    **options: Any,
) -> Any:
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "max_length": None,
        **options,
    }
    args = trl.SFTConfig(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    model = tiny(torch.float32, lora_dropout=0.0) if model is None else model
    run = kind(model, args, train_dataset=data, processing_class=tokenizer(), callbacks=list(callbacks))
    run.seen = []
    return run


def expected(run: Any, rows: Rows, examples: list[Example]) -> list[dict[str, Tensor]]:
    """The gradient of each row's example alone, at the weights of the row's step."""
    at = dict(reversed(run.seen))
    own = {name: weight for name, weight in run.model.named_parameters() if weight.requires_grad}
    run.model.activation_checkpointing_disable()
    after = {name: weight.detach().clone() for name, weight in own.items()}
    want = []
    for position, step in zip(rows.positions.tolist(), rows.stats["step"].tolist(), strict=True):
        _load(own, at[step])
        want.append(autograd_row(run.model, examples[position]))
    _load(own, after)
    return want


def _load(weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            weights[name].copy_(value)


def examples_in(dataset: Dataset) -> list[Example]:
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in dataset]


@dataclass
class Setting:
    """One row of the matrix."""

    data: Dataset = field(default_factory=texts)
    options: dict[str, Any] = field(default_factory=dict)
    given: bool = False
    """Whether the callback is given the dataset that the trainer is given."""


def packing(strategy: str, max_length: int, **options: Any) -> dict[str, Any]:
    return {"packing": True, "packing_strategy": strategy, "max_length": max_length, **options}


MATRIX = {
    "text": Setting(),
    "checkpointing": Setting(options={"activation_checkpointing": True}),
    "cut": Setting(options={"max_length": 6}),
    "completions": Setting(completions()),
    "completions, the end kept": Setting(completions(), {"max_length": 6, "truncation_mode": "keep_end"}, given=True),
    "assistant": Setting(conversations(), {"assistant_only_loss": True}),
    "padding-free": Setting(options={"padding_free": True}),
    "padding-free assistant": Setting(conversations(), {"padding_free": True, "assistant_only_loss": True}, given=True),
    "bfd": Setting(options=packing("bfd", 16), given=True),
    "bfd, cut and shuffled": Setting(completions(), packing("bfd", 8, shuffle_dataset=True), given=True),
    "bfd, checkpointing": Setting(options=packing("bfd", 16, activation_checkpointing=True), given=True),
    "bfd, pieces": Setting(options=packing("bfd_split", 8), given=True),
    "wrapped": Setting(options=packing("wrapped", 10)),
}


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MATRIX)
def test_every_row_equals_autograd(tmp_path: Path, name: str) -> None:
    s = MATRIX[name]
    capture = GradientCapture(tmp_path / "rows", during="epochs", train_dataset=s.data if s.given else None)
    run = trainer_of(tmp_path, s.data, capture, **s.options)
    run.train()
    examples = examples_in(prepared(run, s.data) if s.given else run.train_dataset)
    if name not in ("bfd, pieces", "wrapped"):
        assert len(examples) == len(s.data)
    store = GradientStore.open(capture.path)
    assert store.points() == [0, 1, 2]
    for epoch in (1, 2):
        rows = store.rows("train", epoch)
        assert sorted(rows.positions.tolist()) == list(range(len(examples)))
        assert worst_error(rows, expected(run, rows, examples)) <= 1e-5
    end = store.rows("train", 0)
    assert worst_error(end, [autograd_row(run.model, examples[i]) for i in end.positions.tolist()]) <= 1e-5
    assert ("other_prompt_loss" in end.stats) == all(row["labels"][1] == -100 for row in examples)


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, packing("bfd", 16)], ids=["padded", "flat", "packed"])
@pytest.mark.parametrize("tokenised", [False, True], ids=["raw", "tokenised"])
def test_queries_are_prepared_as_the_trainer_prepares(tmp_path: Path, options: dict[str, Any], tokenised: bool) -> None:
    queries = texts(3, seed=1)
    if tokenised:
        queries = prepared(trainer_of(tmp_path, texts()), queries)
    capture = GradientCapture(tmp_path / "rows", queries, train_dataset=texts())
    run = trainer_of(tmp_path, texts(), capture, **options)
    run.train()
    store = GradientStore.open(capture.path)
    for split, data in (("train", texts()), ("query", texts(3, seed=1))):
        examples = examples_in(prepared(run, data))
        assert worst_error(store.rows(split), [autograd_row(run.model, row) for row in examples]) <= 1e-5
    offline = collect(run.model, prepared(run, texts()), tmp_path / "offline", data_collator=run.data_collator)
    want, got = store.rows("train"), offline.rows("train")
    assert all(torch.equal(got.block(name), want.block(name)) for name in want.blocks)


@pytest.mark.parametrize("options", [{}, {"padding_free": True}], ids=["padded", "flat"])
def test_completions_that_name_classes_are_collected_under_the_names_of_others(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    names = WORDS[6:8]
    asked = [text(row["input_ids"]) + " " for row in prompts(10)]
    right, wrong = (
        Dataset.from_list([{"prompt": prompt, "completion": names[(i + k) % 2]} for i, prompt in enumerate(asked)])
        for k in range(2)
    )
    capture = GradientCapture(tmp_path / "rows", right, train_dataset=right)
    run = trainer_of(tmp_path, right, capture, **options)
    run.train()
    store = GradientStore.open(capture.path)
    for split, data in (("query", right), ("query-mislabelled", wrong)):
        examples = examples_in(prepared(run, data))
        assert worst_error(store.rows(split), [autograd_row(run.model, row) for row in examples]) <= 1e-5


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    "queries", [texts(3, seed=1), completions().select(range(3)), None], ids=["text", "same", "none"]
)
def test_queries_that_are_learnt_with_their_prompts_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, queries: Dataset | None, given: bool
) -> None:
    capture = GradientCapture(tmp_path / "rows", queries, train_dataset=completions() if given else None)
    trainer_of(tmp_path, completions(), capture, max_steps=1).train()
    assert ("labels of the training examples leave tokens out" in caplog.text) == (
        queries is not None and "text" in queries.column_names
    )


def test_prepared_keeps_the_order_and_names_the_source(tmp_path: Path) -> None:
    data = completions()
    ids = [tokenizer()(row["prompt"] + row["completion"] + "</s>")["input_ids"] for row in data]
    run = trainer_of(tmp_path, data, **packing("bfd", 3, shuffle_dataset=True))
    rows = prepared(run, data)
    assert rows["input_ids"] == [row[:3] for row in ids]
    assert rows["labels"] == [[-100, -100, row[2]] for row in ids]
    assert prepared(run, rows)["input_ids"] == rows["input_ids"]
    run = trainer_of(tmp_path, data, **packing("bfd_split", 8))
    pieces = prepared(run, data)
    assert pieces["piece_of"] == [i for i, row in enumerate(ids) for _ in range(0, len(row), 8)]
    assert list(chain(*pieces["input_ids"])) == list(chain(*ids))
    assert prepared(run, pieces)["piece_of"] == pieces["piece_of"]


def test_packed_rows_are_not_taken_for_examples(tmp_path: Path) -> None:
    for during in (None, "epochs"):
        run = trainer_of(tmp_path, texts(), GradientCapture(tmp_path / "rows", during=during), **packing("bfd", 24))
        with pytest.raises(BadSetting, match=r"packed rows.* train_dataset"):
            run.train()
    with pytest.raises(BadSetting, match="packed already"):
        prepared(run, run.train_dataset)


def test_wrapped_packing_has_no_rows_of_examples(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs", train_dataset=texts())
    run = trainer_of(tmp_path, texts(), capture, **packing("wrapped", 10))
    with pytest.raises(BadSetting, match=r"see each other.*bfd"):
        run.train()


def test_a_loss_of_another_kind_is_refused(tmp_path: Path) -> None:
    run = trainer_of(tmp_path, texts(), GradientCapture(tmp_path / "rows", during="epochs"), loss_type="dft")
    with pytest.raises(UnsupportedModel, match="not the mean or sum"):
        run.train()


@pytest.mark.parametrize("during", ["epochs", None])
@pytest.mark.parametrize("setting", ["padding_free=True", "packing_strategy='bfd'"])
def test_padding_behind_examples_that_are_laid_end_to_end_is_refused(tmp_path: Path, setting: str, during: Any) -> None:
    data = texts()
    options = {"padding_free": True} if "free" in setting else packing("bfd", 16)
    capture = GradientCapture(tmp_path / "rows", during=during, train_dataset=data)
    with pytest.raises(BadSetting, match=rf"pad_to_multiple_of=8 with {setting}: .* Leave pad_to_multiple_of out"):
        trainer_of(tmp_path, data, capture, pad_to_multiple_of=8, **options).train()
    assert not capture.path.exists()


def test_an_output_embedding_that_the_loss_does_not_call_is_refused(tmp_path: Path) -> None:
    def whole_head() -> Any:
        torch.manual_seed(0)
        return lora(llama(), ["q_proj"], dtype=torch.float32, lora_dropout=0.0, modules_to_save=["lm_head"])

    run = trainer_of(tmp_path, texts(), GradientCapture(tmp_path / "during", during="epochs"), model=whole_head())
    with pytest.raises(BadSetting, match=r"the weight of \S*lm_head\S* without calling it.*skip=.*during=None"):
        run.train()
    assert not run.seen
    head = "base_model.model.lm_head.modules_to_save.default.weight"
    for name, settings in {"without": {"during": "epochs", "skip": [head]}, "end": {}}.items():
        capture = GradientCapture(tmp_path / name, **settings)
        trainer_of(tmp_path, texts(), capture, model=whole_head(), num_train_epochs=1).train()
        rows = GradientStore.open(capture.path).rows("train", 1 if settings else 0)
        assert len(rows) == 9
        assert (head in rows.blocks) == (name == "end")


def flat_llama(attention: str) -> Any:
    torch.manual_seed(0)
    return lora(llama(attn_implementation=attention), ["q_proj", "v_proj"], dtype=torch.float32)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_examples_that_see_each_other_are_refused(tmp_path: Path, attention: str) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs")
    model = flat_llama(attention)
    with pytest.raises(UnsupportedModel, match=r"see each other.*use_cache=False"):
        train(model, tmp_path, capture, collate=DataCollatorWithFlattening(), use_cache=True)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    capture = GradientCapture(tmp_path / "rows", during="epochs", overwrite=True)
    train(flat_llama(attention), tmp_path, capture, use_cache=True)  # padded, they do not


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_trying_out_leaves_training_alone(tmp_path: Path, attention: str) -> None:
    weights = []
    for callbacks in ([], [GradientCapture(tmp_path / "rows", during="epochs", at_end=False)]):
        model = flat_llama(attention)
        train(model, tmp_path, *callbacks, collate=DataCollatorWithFlattening())
        weights.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert len(GradientStore.open(tmp_path / "rows").rows("train", 1)) == len(EXAMPLES)


def test_what_cannot_be_tried_out_is_refused() -> None:
    packing = Packing.of(torch.tensor([[0, 1, 2, 0, 1]]))
    assert packing is not None
    with pytest.raises(UnsupportedModel, match="cannot be tried out"), kept_apart(flat_llama("eager"), packing):
        pass


def test_a_loss_of_the_experts_is_refused(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        output_router_logits=True,
        pad_token_id=1,
    )
    model = lora(MixtralForCausalLM(config), ["q_proj"], dtype=torch.float32)
    with pytest.raises(UnsupportedModel, match="output_router_logits"):
        train(model, tmp_path, GradientCapture(tmp_path / "rows", during="epochs"))


def test_rows_that_the_trainer_has_shuffled_are_refused(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows")
    with pytest.raises(BadSetting, match=r"shuffle_dataset=True.*train_dataset="):
        trainer_of(tmp_path, texts(), capture, shuffle_dataset=True).train()
    data = texts()
    given = GradientCapture(tmp_path / "given", train_dataset=data)
    run = trainer_of(tmp_path, data, given, shuffle_dataset=True)
    run.train()
    rows = GradientStore.open(given.path).rows("train")
    assert rows.stats["length"].tolist() == [len(row["input_ids"]) for row in prepared(run, data)]


def test_ids_of_examples_that_are_cut_to_pieces_are_refused(tmp_path: Path) -> None:
    data = texts().add_column("name", [f"row-{i}" for i in range(9)])
    capture = GradientCapture(tmp_path / "rows", train_dataset=data, id_column="name")
    with pytest.raises(BadSetting, match=r"several pieces have one id.*piece_of"):
        trainer_of(tmp_path, data, capture, **packing("bfd_split", 8)).train()


def test_a_round_on_pieces_of_examples_is_refused_before_training(tmp_path: Path) -> None:
    runs: list[Any] = []

    def make(data: Dataset, callbacks: list[Any]) -> Any:
        runs.append(trainer_of(tmp_path, data, *callbacks, **packing("bfd_split", 8)))
        return runs[-1]

    with pytest.raises(BadSetting, match=r"bfd_split.* trains on pieces"):
        curate_and_retrain(make, texts(), DatasetFilter(drop=2), tmp_path / "rounds", "loss")
    assert runs[0].state.global_step == 0


def test_a_capture_prepares_its_datasets_for_each_trainer(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", texts(3, seed=1), train_dataset=texts(), overwrite=True)
    for length in (4, 6):
        trainer_of(tmp_path, texts(), capture, max_length=length).train()
        store = GradientStore.open(capture.path)
        assert store.rows("train").stats["length"].max() == store.rows("query").stats["length"].max() == length


def test_what_is_logged_leaves_the_metrics_of_the_trainer_alone(tmp_path: Path) -> None:
    logs = []
    for callbacks in ([], [GradientCapture(tmp_path / "rows", during="epochs", at_end=False)]):
        run = trainer_of(tmp_path, texts(), *callbacks, logging_strategy="steps", logging_steps=2)
        run.train()
        logs.append([log for log in run.state.log_history if "loss" in log])
    assert logs[0]
    assert "mean_token_accuracy" in logs[0][0]
    assert logs[1] == logs[0]


@pytest.mark.parametrize("packing", [False, True])
def test_scores_of_conversations_know_the_dataset_as_it_was_given(tmp_path: Path, packing: bool) -> None:
    talk = conversations()
    capture = GradientCapture(tmp_path / "rows", train_dataset=talk if packing else None)
    settings: dict[str, Any] = {"packing": True, "max_length": 40} if packing else {}
    trainer_of(tmp_path, talk, capture, assistant_only_loss=True, **settings).train()
    scores = attribute(tmp_path / "rows", "loss")
    assert {"messages", "input_ids"} <= set(scores.contents or ())
    assert DatasetFilter(drop=1).apply(talk, scores).num_rows == len(talk) - 1
    with pytest.raises(BadSetting, match=r"'messages' holds .* in another order"):
        DatasetFilter(drop=1).apply(talk.shuffle(seed=0), scores)


@pytest.mark.parametrize("data", [texts(12), completions()], ids=["text", "completions"])
def test_texts_that_the_trainer_has_ended_are_known_without_their_end(tmp_path: Path, data: Dataset) -> None:
    run = trainer_of(tmp_path, data, GradientCapture(tmp_path / "rows"), num_train_epochs=1)
    run.train()
    column = data.column_names[-1]
    assert run.train_dataset[0][column] == data[0][column] + "</s>"
    scores = attribute(tmp_path / "rows", "loss")
    half = data.map(lambda row, i: {column: row[column] + "</s>" * (i % 2)}, with_indices=True)
    for known in (data, half, run.train_dataset):
        assert DatasetFilter(drop=1).apply(known, scores).num_rows == len(data) - 1
    with pytest.raises(BadSetting, match=r"holds .* in another order"):
        DatasetFilter(drop=1).apply(data.shuffle(seed=0), scores)
    with pytest.raises(BadSetting, match=r"of other rows"):
        DatasetFilter(drop=1).apply(texts(len(data), seed=5) if column == "text" else other_answers(data), scores)


def other_answers(data: Dataset) -> Dataset:
    return data.map(lambda row: {"prompt": row["completion"], "completion": row["prompt"] + row["completion"]})


class Weighing(WeightedTrainer, Recording):
    """Of instructions with weights."""


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
def test_instructions_count_as_their_weights_say(tmp_path: Path) -> None:
    def trained(data: Dataset, kind: type[Recording] = Weighing, *callbacks: Any) -> dict[str, Tensor]:
        run = trainer_of(tmp_path, data, *callbacks, kind=kind, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
        run.train()
        return {name: weight.detach().clone() for name, weight in run.model.named_parameters() if weight.requires_grad}

    data, weight = texts(), [0.0, 2.0, 0.5] * 3
    plain, ones = trained(data, Recording), trained(data.add_column("weight", [1.0] * 9))
    torch.testing.assert_close(ones, plain, rtol=1e-4, atol=1e-5)
    spoiled = [
        {"text": " ".join("w0" for _ in row["text"].split()) if not w else row["text"], "weight": w}
        for row, w in zip(data, weight, strict=True)
    ]
    capture = GradientCapture(tmp_path / "rows", texts(3, seed=1), during="epochs")
    weighed = trained(data.add_column("weight", weight), Weighing, capture)
    torch.testing.assert_close(trained(Dataset.from_list(spoiled)), weighed, rtol=1e-4, atol=1e-5)
    assert any((weighed[name] - plain[name]).abs().max() > 1e-3 for name in plain)
    assert GradientStore.open(capture.path).rows("train", 2).ids == [i for i, w in enumerate(weight) if w]


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
def test_packed_instructions_have_no_weights(tmp_path: Path) -> None:
    data = texts().add_column("weight", [1.0] * 9)
    with pytest.raises(BadSetting, match="packing=True: a row that is trained on holds several examples"):
        trainer_of(tmp_path, data, kind=Weighing, **packing("bfd", 16)).train()
    flat: dict[str, Any] = {"kind": Weighing, "padding_free": True}
    with pytest.raises(BadExample, match="packs several examples into a row"):
        trainer_of(tmp_path, data, **flat).train()
