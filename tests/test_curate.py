"""Curation while training: what is dropped is gone, and all else is as ever."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from models import padding, state_of, tiny
from torch import Tensor
from torch.utils.data import SequentialSampler
from trainers import EXAMPLES, QUERIES, trainer, weights
from transformers import Trainer

from hf_influence import DatasetFilter, attribute
from hf_influence.callbacks import (
    CurateEachEpoch,
    GradientCapture,
)
from hf_influence.callbacks.draws import Draws, drawn
from hf_influence.errors import BadExample, BadSetting
from hf_influence.filter import Prune, Relabel, Reweight, discovery
from hf_influence.filter.thresholds import doubtful
from hf_influence.store import GradientStore


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
from test_curate import curated
from trainers import weights
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
    "number": (lambda c: CurateEachEpoch(c, DatasetFilter(drop=1), "loss", epochs=2), r"such as epochs=\[1, 3\]"),
    "no epochs": (lambda c: CurateEachEpoch(c, DatasetFilter(drop=1), "loss", epochs=[]), "counted from 1"),
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


@pytest.mark.parametrize(("rule", "method"), [(Prune(), "auto"), (DatasetFilter(drop=discovery(0.1)), "vote")])
def test_what_scores_by_queries_will_not_let_a_rule_do_is_refused_at_once(
    tmp_path: Path, rule: Any, method: str
) -> None:
    capture = GradientCapture(tmp_path / "rows", [QUERIES[i % len(QUERIES)] for i in range(9)], during="epochs")
    run = trainer(tmp_path, [capture, CurateEachEpoch(capture, rule, method)], kind=Trainer)
    with pytest.raises(BadSetting, match=r"without queries|at least 8"):
        run.train()
    assert run.state.global_step == 0


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


def test_a_first_decision_after_the_last_epoch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"after epoch 4, and training has 4"):
        curated(tmp_path, after=4)


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
