"""Curation while training and from round to round: what is dropped is gone, and all else is as ever."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from models import Example, bert, labelled, lora, padding, prompts, state_of, tiny
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_influence import DatasetFilter, attribute
from hf_influence.callbacks import (
    CurateEachEpoch,
    GradientCapture,
    WeightedTrainer,
    curate_and_retrain,
    soft_cross_entropy,
)
from hf_influence.callbacks.draws import Draws, drawn
from hf_influence.errors import BadExample, BadSetting, StoreMismatch
from hf_influence.filter import Decision, Prune, Relabel, Reweight
from hf_influence.filter.thresholds import doubtful
from hf_influence.filter.whole import decide_on_scored, on_whole
from hf_influence.scores import Scores
from hf_influence.store import GradientStore

EXAMPLES = prompts(12, seed=3)
PLACE = {tuple(row["input_ids"]): at for at, row in enumerate(EXAMPLES)}
QUERIES = Dataset.from_list(prompts(3, seed=1))


class Recording(Trainer):
    """Notes which examples every batch held."""

    batches: list[list[int]]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        self.batches.append([PLACE[tuple(ids[real].tolist())] for ids, real in rows])
        return super().training_step(model, inputs, *args, **kwargs)


def trainer(
    folder: Path,
    callbacks: list[TrainerCallback],
    data: Any = None,
    kind: type[Trainer] = Recording,
    collate: Any = None,
    dropout: float = 0.1,
    **options: Any,
) -> Any:
    settings = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        **options,
    }
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    data = Dataset.from_list(EXAMPLES) if data is None else data
    run = kind(
        tiny(torch.float32, lora_dropout=dropout),
        args,
        data_collator=collate or padding(),
        train_dataset=data,
        callbacks=callbacks,
    )
    run.batches = []
    return run


def curated(
    folder: Path, rule: Any = None, method: str = "loss_mean", resume: str | None = None, **settings: Any
) -> tuple[Any, CurateEachEpoch]:
    """A finished run of four epochs of three steps."""
    own = {name: settings.pop(name) for name in ("after", "epochs") if name in settings}
    capture = GradientCapture(folder / "rows", QUERIES, during="epochs", at_end=False)
    curate = CurateEachEpoch(capture, rule or DatasetFilter(drop=3), method, **own)
    run = trainer(folder, [capture, curate], **settings)
    run.train(resume_from_checkpoint=resume)
    return run, curate


def epochs_of(run: Any, batches: int = 6) -> list[list[int]]:
    """The examples of each epoch, in the order in which the model was given them."""
    return [
        [at for batch in run.batches[start : start + batches] for at in batch]
        for start in range(0, len(run.batches), batches)
    ]


def weights(run: Any) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in run.model.named_parameters() if w.requires_grad}


def losses(run: Any) -> list[dict[str, float]]:
    return [
        {k: log[k] for k in ("step", "loss", "learning_rate", "epoch")}
        for log in run.state.log_history
        if "loss" in log
    ]


# ------------------------------------------------------------------------------------------------ drawing


def test_an_index_comes_as_often_as_its_weight_says() -> None:
    weight = torch.tensor([2.5, 0.0, 1.0, 0.25, 0.25, 3.0, 0.0, 1.0], dtype=torch.float64)
    total = Counter[int]()
    for k in range(400):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(k)).tolist()
        counts = Counter(drawn(order, weight[order], k / 400))
        assert counts.total() == 8
        assert all(int(w) <= counts[i] <= -int(-w // 1) for i, w in enumerate(weight.tolist()))
        total += counts
    for i, w in enumerate(weight.tolist()):
        assert total[i] / 400 == pytest.approx(w, abs=0.08)


def test_equal_weights_leave_the_order_alone_and_repeats_lie_apart() -> None:
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    assert drawn(order, torch.full((50,), 0.3, dtype=torch.float64), 0.7) == order
    half = torch.tensor([1.0, 0.0] * 25, dtype=torch.float64)
    twice = drawn(order, half[order], 0.3)
    assert twice[:25] == twice[25:] == [i for i in order if i % 2 == 0]
    with pytest.raises(BadSetting, match="nothing to train on"):
        drawn(order, torch.zeros(50, dtype=torch.float64), 0.0)


def test_an_order_that_never_changes_still_takes_turns() -> None:
    draws = Draws(SequentialSampler(range(10)), seed=0)
    twice = set()
    for epoch in range(30):
        draws.weigh([0.0] + [1.0] * 9, epoch)
        counts = Counter(draws)
        assert list(Counter(draws)) == list(counts)
        assert min(counts.values()) == 1
        twice |= {i for i, c in counts.items() if c == 2}
    assert twice == set(range(1, 10))


# ------------------------------------------------------------------------------------------------ while training


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_dropped_examples_are_in_no_later_batch(tmp_path: Path, strategy: str) -> None:
    run, curate = curated(tmp_path, after=2, train_sampling_strategy=strategy)
    assert sorted(curate.decisions) == [2, 3]
    for number, seen in enumerate(epochs_of(run), 1):
        kept = curate.decisions[number - 1].kept if number > 2 else range(12)
        assert len(kept) == (9 if number > 2 else 12)
        assert set(seen) == set(kept)
        assert len(seen) == 12  # an epoch keeps its steps
        assert max(Counter(seen).values()) == (2 if number > 2 else 1)
    store = GradientStore.open(curate.capture.path)
    assert store.rows("train", 3).ids == curate.decisions[2].kept
    assert store.points() == [1, 2, 3, 4]


def test_scores_are_those_of_the_rows_up_to_then(tmp_path: Path) -> None:
    _, curate = curated(tmp_path)
    for epoch in (1, 2, 3):
        scores = attribute(curate.capture.path, "loss_mean", points=list(range(1, epoch + 1)))
        want = DatasetFilter(drop=3).decide(Dataset.from_list(EXAMPLES), scores)
        assert curate.decisions[epoch].actions == want.actions
        assert curate.decisions[epoch].scores == want.scores


def test_what_was_left_out_keeps_its_last_score_and_may_come_back(tmp_path: Path) -> None:
    run, curate = curated(tmp_path, method="cosine", num_train_epochs=8, learning_rate=0.1)
    last: dict[int, float] = {}
    for epoch in range(1, 8):
        new = attribute(curate.capture.path, "cosine", point=epoch)
        last |= dict(zip(new.ids, new.mean().double().tolist(), strict=True))
        assert curate.decisions[epoch].scores == pytest.approx([last[i] for i in range(12)], abs=1e-6)
    logs = [log for log in run.state.log_history if "curate/kept" in log]
    assert [(log["curate/kept"], log["curate/dropped"]) for log in logs] == [(9, 3)] * 7
    assert [log["epoch"] for log in logs] == list(range(1, 8))
    returned = [
        len(set(curate.decisions[e].kept) - set(curate.decisions[e - 1].kept)) if e > 1 else 0 for e in range(1, 8)
    ]
    assert [log["curate/returned"] for log in logs] == returned
    assert sum(returned) > 0


def test_weights_are_how_often_an_example_comes(tmp_path: Path) -> None:
    run, curate = curated(tmp_path, Reweight(temperature=0.5), "self_tracin")
    for number, seen in enumerate(epochs_of(run), 1):
        if number > 1:
            weight = curate.decisions[number - 1].writes[0].new
            assert max(weight) > 1.5
            counts = Counter(seen)
            assert counts.total() == 12
            assert all(int(w) <= counts[i] <= int(w) + 1 for i, w in enumerate(weight))
    assert len({tuple(sorted(seen)) for seen in epochs_of(run)}) > 1


def test_training_is_that_of_a_plain_loop_over_the_same_examples(tmp_path: Path) -> None:
    """Bit for bit, and before the first decision that of the Trainer without the callback."""
    run, _ = curated(tmp_path / "one", max_grad_norm=0.0, optim="sgd", dropout=0.0)
    plain = trainer(tmp_path / "two", [], max_grad_norm=0.0, optim="sgd", dropout=0.0)
    plain.train()
    assert run.batches[:6] == plain.batches[:6]
    assert run.batches[6:] != plain.batches[6:]
    assert losses(run)[:3] == losses(plain)[:3]
    for name in ("step", "learning_rate", "epoch"):  # the schedule is that of the plain run
        assert [log[name] for log in losses(run)] == [log[name] for log in losses(plain)]

    model = tiny(torch.float32, lora_dropout=0.0).train()
    parameters = [w for w in model.parameters() if w.requires_grad]
    rates = [log["learning_rate"] for log in losses(plain)]
    for step, rate in enumerate(rates):
        micros = [padding()([EXAMPLES[at] for at in batch]) for batch in run.batches[2 * step : 2 * step + 2]]
        tokens = sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in micros)
        for micro in micros:
            model(**micro, num_items_in_batch=torch.tensor(tokens)).loss.backward()
        with torch.no_grad():
            for weight in parameters:
                weight.add_(weight.grad, alpha=-rate)
                weight.grad = None
    own = {name: w for name, w in model.named_parameters() if w.requires_grad}
    torch.testing.assert_close(weights(run), {k: v.detach() for k, v in own.items()}, rtol=0, atol=0)


def test_a_rule_that_drops_nothing_changes_nothing(tmp_path: Path) -> None:
    run, _ = curated(tmp_path / "one", DatasetFilter(drop=0))
    plain = trainer(tmp_path / "two", [])
    plain.train()
    assert run.batches == plain.batches
    torch.testing.assert_close(weights(run), weights(plain), rtol=0, atol=0)
    assert losses(run) == losses(plain)
    assert state_of(run.model)["hooks"] == state_of(plain.model)["hooks"]


@pytest.mark.parametrize("step", [6, 8], ids=["between epochs", "within an epoch"])
def test_a_resumed_run_goes_on_with_the_same_decisions(tmp_path: Path, step: int) -> None:
    whole, first = curated(tmp_path, save_strategy="steps", save_steps=2)
    before = {epoch: first._file(epoch).read_text() for epoch in first.decisions}
    run, curate = curated(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), save_strategy="steps", save_steps=2)
    assert run.batches == whole.batches[2 * step :]
    torch.testing.assert_close(weights(run), weights(whole), rtol=0, atol=0)
    assert {epoch: curate._file(epoch).read_text() for epoch in curate.decisions} == before


def test_a_resumed_run_reads_earlier_decisions_and_forgets_later_ones(tmp_path: Path) -> None:
    _, first = curated(tmp_path, save_strategy="steps", save_steps=8)
    run, curate = curated(tmp_path, DatasetFilter(drop=5), resume=str(tmp_path / "checkpoint-8"), save_strategy="no")
    assert [decision.after for decision in curate.decisions.values()] == [9, 9, 7]  # the rule has changed since
    assert curate.decisions[2].actions == first.decisions[2].actions
    assert set(epochs_of(run, 2)[0]) <= set(first.decisions[2].kept)
    assert set(run.batches[-1]) <= set(curate.decisions[3].kept)


def test_chosen_epochs_alone_decide_and_the_capture_may_skip_some(tmp_path: Path) -> None:
    run, curate = curated(tmp_path / "one", epochs=[2])
    assert sorted(curate.decisions) == [2]
    assert set(epochs_of(run)[2]) == set(epochs_of(run)[3]) == set(curate.decisions[2].kept)
    capture = GradientCapture(tmp_path / "two", QUERIES, during="epochs", every=2, at_end=False)
    curate = CurateEachEpoch(capture, DatasetFilter(drop=3), "vote", k=2)
    run = trainer(tmp_path, [curate, capture])  # in whatever order
    run.train()
    assert sorted(curate.decisions) == [1, 3]
    assert set(epochs_of(run)[1]) == set(epochs_of(run)[2]) == set(curate.decisions[1].kept)


def test_examples_without_a_score_stay(tmp_path: Path) -> None:
    run, curate = curated(
        tmp_path, DatasetFilter(drop=4), num_train_epochs=2, dataloader_drop_last=True, per_device_train_batch_size=5
    )
    seen = {at for batch in run.batches[:2] for at in batch}
    missed = sorted(set(range(12)) - seen)
    decision = curate.decisions[1]
    assert len(missed) == 2
    assert decision.after == 8
    assert set(missed) < set(decision.kept)
    assert "has no score yet" in decision.explain(missed[0])
    assert [decision.ranks[at] for at in missed] == [10, 11]


def test_workers_that_live_on_get_the_new_indices(tmp_path: Path) -> None:
    run, curate = curated(
        tmp_path,
        num_train_epochs=2,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        dataloader_multiprocessing_context="fork",
    )
    assert set(epochs_of(run)[1]) == set(curate.decisions[1].kept)


def test_an_id_column_and_labels_of_the_whole_set(tmp_path: Path) -> None:
    data = Dataset.from_list([{**row, "name": f"row-{at}", "source": "ab"[at % 2]} for at, row in enumerate(EXAMPLES)])
    capture = GradientCapture(tmp_path / "rows", QUERIES, during="epochs", at_end=False, id_column="name")
    rule = DatasetFilter(drop=2, within="source")
    curate = CurateEachEpoch(capture, rule, "outlier_classwise", labels=[at % 2 for at in range(12)])
    run = trainer(tmp_path, [capture, curate], data, num_train_epochs=3)
    run.train()
    decision = curate.decisions[2]
    assert decision.ids[3] == "row-3"
    assert [sum(1 for at in decision.kept if at % 2 == part) for part in (0, 1)] == [4, 4]
    assert set(epochs_of(run)[2]) == set(decision.kept)
    assert decision.replay(data)["name"] == [f"row-{at}" for at in decision.kept]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_curate import curated, weights
folder = Path(sys.argv[1])
run, curate = curated(folder, per_device_train_batch_size=1, num_train_epochs=2)
torch.save({{"batches": run.batches, "decisions": {{e: d.kept for e, d in curate.decisions.items()}},
            "weights": weights(run)}}, folder / f"{{run.args.process_index}}.pt")
torch.distributed.destroy_process_group()  # or its threads may outlive the interpreter
"""


def test_two_processes_leave_out_the_same_examples(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["decisions"] == two["decisions"]
    torch.testing.assert_close(one["weights"], two["weights"], rtol=0, atol=0)
    for number in range(2):
        mine, other = (
            Counter(at for batch in part["batches"][6 * number : 6 * number + 6] for at in batch) for part in (one, two)
        )
        together = mine + other
        assert together.total() == 12
        assert set(together) == (set(one["decisions"][number]) if number else set(range(12)))
        assert max(together.values()) == (2 if number else 1)


REFUSED: dict[str, tuple[Any, str]] = {
    "no rows": (lambda c: CurateEachEpoch(GradientCapture("x"), DatasetFilter(drop=1), "loss"), 'during="epochs"'),
    "no rule": (lambda c: CurateEachEpoch(c, 0.1, "loss"), "does not decide"),
    "columns": (lambda c: CurateEachEpoch(c, DatasetFilter(drop=1, columns=True), "loss"), "columns=False"),
    "unknown": (lambda c: CurateEachEpoch(c, DatasetFilter(drop=1), "los"), "did you mean 'loss'"),
    "members": (lambda c: CurateEachEpoch(c, DatasetFilter(drop=1), "self_gex"), "an ensemble"),
    "texts": (lambda c: CurateEachEpoch(c, DatasetFilter(drop=1), "bm25", texts=["a"]), "before you train"),
    "queries": (lambda c: CurateEachEpoch(c, DatasetFilter(drop=1), "ip"), "query_dataset"),
    "points": (lambda c: CurateEachEpoch(c, DatasetFilter(drop=1), "aum", points=[1]), "Leave points"),
    "after": (lambda c: CurateEachEpoch(c, DatasetFilter(drop=1), "loss", after=0), "counted from 1"),
    "both": (lambda c: CurateEachEpoch(c, DatasetFilter(drop=1), "loss", after=2, epochs=[3]), "not both"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_when_it_is_made(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(BadSetting, match=message):
        make(GradientCapture(tmp_path, during="epochs"))


class OwnBatches(Trainer):
    """Batches that are not made of the indices of a sampler."""

    def get_train_dataloader(self) -> Any:
        batches = [[0, 1], [2, 3]]
        return torch.utils.data.DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)


def stream() -> IterableDataset:
    return Dataset.from_list(EXAMPLES).to_iterable_dataset()


AT_START: dict[str, tuple[dict[str, Any], dict[str, Any], Any, type[Exception], str]] = {
    "stream": ({"data": stream()}, {"max_steps": 2}, DatasetFilter(drop=1), BadSetting, "a stream has none"),
    "own batches": ({"kind": OwnBatches}, {}, DatasetFilter(drop=1), BadSetting, "made by a list"),
    "rebalanced": (
        {},
        {"train_sampling_strategy": "batch_rebalance"},
        DatasetFilter(drop=1),
        BadSetting,
        "BatchRebalanceSampler",
    ),
    "too many": ({}, {}, DatasetFilter(drop=12), BadSetting, "leaves none"),
    "no gaps": ({}, {}, DatasetFilter(drop="otsu"), BadSetting, "a ranking on a scale"),
    "no column": ({}, {}, DatasetFilter(drop=1, within="task"), BadExample, "no column of the dataset"),
    "relabel": ({}, {}, Relabel(suspects=DatasetFilter(drop=2), how="flip", label="kind"), BadSetting, "relabel rows"),
}


def test_probabilities_that_may_never_be_known_are_refused_at_once(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", QUERIES, during="epochs")
    for rule in (Reweight(how="posterior"), DatasetFilter(drop="doubtful"), DatasetFilter(drop=doubtful)):
        with pytest.raises(BadSetting, match="not known before an epoch"):
            CurateEachEpoch(capture, rule)


@pytest.mark.parametrize("case", AT_START)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path: Path, case: str) -> None:
    given, options, rule, error, message = AT_START[case]
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    if case == "relabel":
        given = {"data": Dataset.from_list([{**row, "kind": at % 2} for at, row in enumerate(EXAMPLES)])}
    curate = CurateEachEpoch(capture, rule, "auto" if case == "no gaps" else "loss")
    run = trainer(tmp_path, [capture, curate], **{"kind": Trainer, **given}, **options)
    with pytest.raises(error, match=message):
        run.train()
    assert run.state.global_step == 0


def test_the_capture_must_be_there_and_of_the_same_examples(tmp_path: Path) -> None:
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    with pytest.raises(BadSetting, match="not among the Trainer's callbacks"):
        trainer(tmp_path, [CurateEachEpoch(capture, DatasetFilter(drop=1), "loss")]).train()
    own = GradientCapture(tmp_path / "own", during="epochs", at_end=False, train_dataset=Dataset.from_list(EXAMPLES))
    with pytest.raises(BadSetting, match="a train_dataset of its own"):
        trainer(tmp_path, [own, CurateEachEpoch(own, DatasetFilter(drop=1), "loss")]).train()


@pytest.mark.parametrize("padding_free", [False, True])
def test_examples_of_an_sft_trainer_are_left_out(tmp_path: Path, padding_free: bool) -> None:
    pytest.importorskip("trl")
    from test_trl import completions, trainer_of

    given: list[dict[str, Tensor]] = []
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    curate = CurateEachEpoch(capture, DatasetFilter(drop=4), "loss")
    run = trainer_of(tmp_path, completions(), capture, curate, padding_free=padding_free)
    plain = run.training_step
    run.training_step = lambda model, inputs, *args: (given.append(inputs), plain(model, inputs, *args))[1]
    run.train()
    kept = curate.decisions[1].kept
    real = sum(int((inputs["labels"] != -100).sum()) for inputs in given[5:])
    counts = Counter(GradientStore.open(capture.path).rows("train", 2).ids)
    assert sorted(counts) == kept
    tokens = [sum(label != -100 for label in labels) for labels in run.train_dataset["labels"][:]]
    once = sum(tokens[at] for at in kept)
    assert once + 4 * min(tokens) <= real <= once + 4 * max(tokens[at] for at in kept)  # nine draws of five examples


def test_examples_of_packed_rows_cannot_be_left_out(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from test_trl import completions, trainer_of

    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False)
    curate = CurateEachEpoch(capture, DatasetFilter(drop=1), "loss")
    run = trainer_of(tmp_path, completions(), curate, capture, packing=True, max_length=32)
    with pytest.raises(BadSetting, match="a row that is trained on holds several examples"):
        run.train()


# ------------------------------------------------------------------------------------------------ decisions on parts


def test_a_decision_on_a_part_becomes_one_on_the_whole(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": list("abcdef"), "source": list("xxyyxy")})
    scores = Scores(torch.tensor([[0.5], [0.1], [0.9]]), ids=[1, 4, 5], method="ip")
    decision = decide_on_scored(DatasetFilter(drop=1), data, scores)
    assert decision.actions == ["keep"] * 4 + ["drop", "keep"]
    assert [decision.ranks[i] for i in (4, 1, 5, 0, 2, 3)] == list(range(6))
    assert decision.groups == {"x": (3, 2), "y": (3, 3)}
    assert decision.replay(data)["text"][:] == list("abcdf")
    later = DatasetFilter(drop=2).decide(
        data.select(decision.kept), Scores(torch.arange(5.0)[:, None], ids=[0, 1, 2, 3, 4], method="ip")
    )
    both = on_whole(later, data, decision.kept, decision)
    assert both.replay(data)["text"][:] == list("cdf")
    assert [row.id for row in both.removed] == [4, 0, 1]
    assert "drop=1" in both.explain(4)
    assert "drop=2" in both.explain(0)
    assert sorted(both.ranks) == list(range(6))
    assert both.explain(0).endswith("ranks 1 of 6, the rule drop=2 drops 2 of the 5 rows")
    named = Scores(torch.tensor([[0.5], [0.1]]), ids=["c", "a"], method="ip", id_column="text")
    assert decide_on_scored(DatasetFilter(drop=1), data, named).replay(data)["text"][:] == list("bcdef")
    doubled = Dataset.from_dict({"text": list("pqdrds")})
    few = Scores(torch.zeros(4, 1), ids=[2, 3, 4, 5], method="self_ip")
    pruned = decide_on_scored(Prune(), doubled, few)
    pruned.save(tmp_path / "pruned.json")
    for one in (pruned, Decision.load(tmp_path / "pruned.json")):
        assert one.explain(4).endswith("it has the contents of row 2")
    weighted = decide_on_scored(Reweight(), data, scores)
    assert weighted.writes[0].new[0] == 1.0
    assert len(weighted.replay(data)["weight"]) == 6


# ------------------------------------------------------------------------------------------------ rounds


class Makes:
    """Makes Trainers, and remembers them."""

    def __init__(self, folder: Path, kind: type[Trainer] = Recording, **options: Any):
        self.folder, self.kind, self.options = folder, kind, options
        self.made: list[Any] = []

    def __call__(self, data: Dataset, callbacks: list[TrainerCallback]) -> Any:
        self.made.append(trainer(self.folder, callbacks, data, self.kind, num_train_epochs=1, **self.options))
        return self.made[-1]


def test_one_round_is_train_score_drop_and_train_anew(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    make = Makes(tmp_path)
    done = curate_and_retrain(make, data, DatasetFilter(drop=0.25), tmp_path / "r", "datainf", query_dataset=QUERIES)

    capture = GradientCapture(tmp_path / "by-hand", QUERIES)
    trainer(tmp_path, [capture], num_train_epochs=1).train()
    by_hand = DatasetFilter(drop=0.25).apply(data, attribute(capture.path, "datainf"))
    last = trainer(tmp_path, [], by_hand, num_train_epochs=1)
    last.train()

    assert done.dataset.to_list() == by_hand.to_list()
    torch.testing.assert_close(weights(done.trainer), weights(last), rtol=0, atol=0)
    assert done.trainer is make.made[-1]
    assert len(make.made) == 2


def test_ids_stay_those_of_the_original_dataset(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    make = Makes(tmp_path)
    done = curate_and_retrain(make, data, DatasetFilter(drop=2), tmp_path / "r", "loss", rounds=3)
    assert [len(run.train_dataset) for run in make.made] == [12, 10, 8, 6]
    for run, decision in zip(make.made[1:], done.decisions, strict=True):
        assert {at for batch in run.batches for at in batch} == set(decision.kept)
        assert decision.replay(data).to_list() == run.train_dataset.to_list()
    assert [len(set(decision.ids)) for decision in done.decisions] == [12] * 3
    gone = [row.id for row in done.decisions[-1].removed]
    assert gone[:4] == [row.id for row in done.decisions[1].removed]
    assert sorted(gone + done.decisions[-1].kept) == list(range(12))
    assert done.dataset.to_list() == [EXAMPLES[at] for at in done.decisions[-1].kept]
    loaded = Decision.load(tmp_path / "r/round-03/decision.json")
    assert loaded.replay(data).to_list() == done.dataset.to_list()


def with_weights(features: list[Example]) -> dict[str, Tensor]:
    batch = padding()(features)
    if "weight" in features[0]:
        batch["weight"] = torch.tensor([row["weight"] for row in features])
    return batch


def told_by_a_token(n: int, seed: int) -> list[Example]:
    """Sequences of class 1 that begin with token 5, and of class 0 that begin with token 6."""
    rows = labelled(lambda i: i % 2, n, seed)
    return [{**row, "input_ids": [5 if row["labels"] else 6] * 6 + row["input_ids"][:1]} for row in rows]


def test_one_round_may_relabel_and_train_on_what_is_believed(tmp_path: Path) -> None:
    right, clean = told_by_a_token(40, 0), Dataset.from_list(told_by_a_token(12, 1))
    wrong = [{**row, "labels": 1 - row["labels"]} for row in right[:6]]
    data = Dataset.from_list([*wrong, *right[6:]])
    made: list[Any] = []

    def make(rows: Dataset, callbacks: list[TrainerCallback]) -> Any:
        torch.manual_seed(0)
        model = lora(bert(), ["query", "value"], dtype=torch.float32, modules_to_save=["classifier"])
        settings: dict[str, Any] = {"num_train_epochs": 8, "learning_rate": 3e-2, "save_strategy": "no"}
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
        loss: Any = {"compute_loss_func": soft_cross_entropy}
        made.append(Trainer(model, args, padding(), rows, callbacks=callbacks, **loss))
        return made[-1]

    capture = {"during": "epochs"}
    rule = Relabel(how="posterior", label="labels")
    done = curate_and_retrain(make, data, rule, tmp_path / "r", query_dataset=clean, capture=capture)
    scores = Scores.load(tmp_path / "r/round-01/scores.safetensors")
    assert done.dataset["labels"][:] == rule.apply(data, scores)["labels"][:] == made[1].train_dataset["labels"][:]
    assert sorted(scores.lowest(6)) == list(range(6))
    believed = scores.probability_wrong()
    assert believed[:6].mean() > 0.15
    assert believed[:6].min() > 0.03 > believed[6:].mean()
    with pytest.raises(BadSetting, match="wants to relabel rows"):
        curate_and_retrain(make, data, rule, tmp_path / "two", query_dataset=clean, capture=capture, rounds=2)


def test_a_round_scored_with_other_settings_is_refused(tmp_path: Path) -> None:
    data, groups = Dataset.from_list(EXAMPLES), [0, 1] * 6
    rule, folder = DatasetFilter(drop=2), tmp_path / "r"
    curate_and_retrain(Makes(tmp_path), data, rule, folder, groups=groups)
    assert len(curate_and_retrain(Makes(tmp_path), data, rule, folder, groups=tuple(groups)).dataset) == 10
    for other in ({}, {"groups": groups[::-1]}):
        with pytest.raises(StoreMismatch, match=r"was scored by auto with .*groups"):
            curate_and_retrain(Makes(tmp_path), data, rule, folder, **other)
    parts = ({"vote": {"k": k}, "loss": {}} for k in (1, 2))
    folder = tmp_path / "parts"
    curate_and_retrain(Makes(tmp_path), data, rule, folder, query_dataset=QUERIES, parts=next(parts))
    with pytest.raises(StoreMismatch, match=r"was scored by auto with .*parts"):
        curate_and_retrain(Makes(tmp_path), data, rule, folder, query_dataset=QUERIES, parts=next(parts))


def test_rows_that_a_round_has_not_scored_stay(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    make = Makes(tmp_path, per_device_train_batch_size=5, dataloader_drop_last=True)
    capture = {"during": "epochs", "at_end": False}
    done = curate_and_retrain(make, data, DatasetFilter(drop=3), tmp_path / "r", "loss_mean", capture=capture)
    missed = sorted(set(range(12)) - {at for batch in make.made[0].batches for at in batch})
    assert len(missed) == 2
    assert set(missed) < set(done.decisions[0].kept)
    assert "has no score yet" in done.decisions[0].explain(missed[0])
    assert len(done.dataset) == 9


def test_weights_are_made_anew_each_round(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    made: list[Any] = []

    def make(rows: Dataset, callbacks: list[TrainerCallback]) -> Any:
        kind = WeightedTrainer if "weight" in rows.column_names else Trainer
        made.append(trainer(tmp_path, callbacks, rows, kind, with_weights, num_train_epochs=1))
        return made[-1]

    done = curate_and_retrain(make, data, Reweight(), tmp_path / "r", "loss", rounds=2)
    assert [type(run) for run in made] == [Trainer, WeightedTrainer, WeightedTrainer]
    first, second = (run.train_dataset["weight"][:] for run in made[1:])
    assert first != second
    assert second == done.decisions[1].writes[0].new == done.dataset["weight"][:]


def test_an_interrupted_call_goes_on_after_its_last_finished_round(tmp_path: Path) -> None:
    data = Dataset.from_list(EXAMPLES)
    whole = curate_and_retrain(Makes(tmp_path), data, DatasetFilter(drop=2), tmp_path / "a", "loss", rounds=2)

    class Stops(Makes):
        def __call__(self, rows: Dataset, callbacks: list[TrainerCallback]) -> Any:
            if len(self.made) == 1:
                raise KeyboardInterrupt
            return super().__call__(rows, callbacks)

    with pytest.raises(KeyboardInterrupt):
        curate_and_retrain(Stops(tmp_path), data, DatasetFilter(drop=2), tmp_path / "b", "loss", rounds=2)
    make = Makes(tmp_path)
    done = curate_and_retrain(make, data, DatasetFilter(drop=2), tmp_path / "b", "loss", rounds=2)
    assert [len(run.train_dataset) for run in make.made] == [10, 8]
    assert done.dataset.to_list() == whole.dataset.to_list()
    torch.testing.assert_close(weights(done.trainer), weights(whole.trainer), rtol=0, atol=0)

    with pytest.raises(StoreMismatch, match="with another outcome"):
        curate_and_retrain(make, data, DatasetFilter(drop=3), tmp_path / "b", "loss", rounds=2)
    with pytest.raises(StoreMismatch, match=r"was scored by loss.*'method': 'margin'"):
        curate_and_retrain(make, data, DatasetFilter(drop=2), tmp_path / "b", "margin", rounds=2)
    other = Dataset.from_list(prompts(12, seed=9))
    with pytest.raises(StoreMismatch, match="other contents"):
        curate_and_retrain(make, other, DatasetFilter(drop=2), tmp_path / "b", "loss", rounds=2)


def test_rounds_that_cannot_work_are_refused(tmp_path: Path) -> None:
    data, rule = Dataset.from_list(EXAMPLES), DatasetFilter(drop=2)
    with pytest.raises(BadSetting, match="at least 1"):
        curate_and_retrain(Makes(tmp_path), data, rule, tmp_path, "loss", rounds=0)
    with pytest.raises(BadSetting, match="which each round sets"):
        curate_and_retrain(Makes(tmp_path), data, rule, tmp_path, "loss", capture={"path": "x"})
    with pytest.raises(BadExample, match="is not a datasets"):
        curate_and_retrain(Makes(tmp_path), EXAMPLES, rule, tmp_path, "loss")
    with pytest.raises(BadSetting, match="without these callbacks"):
        curate_and_retrain(lambda rows, _: Makes(tmp_path)(rows, []), data, rule, tmp_path / "a", "loss")
    model = tiny(torch.float32)

    def same_model(rows: Dataset, callbacks: list[TrainerCallback]) -> Any:
        run = trainer(tmp_path, callbacks, rows, num_train_epochs=1)
        run.model = run.model_wrapped = model
        return run

    with pytest.raises(BadSetting, match="trained before"):
        curate_and_retrain(same_model, data, rule, tmp_path / "b", "loss")
    kinds = data.add_column("kind", [0, 1] * 6)
    with pytest.raises(BadSetting, match="relabel rows"):
        curate_and_retrain(
            Makes(tmp_path),
            kinds,
            Relabel(suspects=DatasetFilter(drop=2), how="flip", label="kind"),
            tmp_path / "c",
            "loss",
            rounds=2,
        )
    with pytest.raises(BadSetting, match="without queries"):
        curate_and_retrain(Makes(tmp_path), data, Prune(), tmp_path / "d", "ip", query_dataset=QUERIES)
