"""Held-out losses by models of the other folds, and several rankings as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import own_loss, padding, prompts, tiny
from scipy.stats import rankdata
from torch import Tensor, nn

from hf_influence import Scores, combined
from hf_influence.errors import BadExample, BadSetting, StoreMismatch
from hf_influence.evaluation import out_of_fold
from hf_influence.gradients import label_smoothing, losses
from hf_influence.gradients import own_loss as loss_of
from hf_influence.task import CausalLM, Task

EXAMPLES = prompts(9)
DATA = Dataset.from_list([*EXAMPLES, EXAMPLES[2]])


class Fits:
    """Trains a tiny model for a step on each row, and notes what it was given."""

    def __init__(self) -> None:
        self.given: list[list[Any]] = []
        self.models: list[nn.Module] = []

    def __call__(self, rows: Dataset) -> nn.Module:
        torch.manual_seed(0)
        model = tiny(torch.float32)
        optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.5)
        for row in rows:
            optimizer.zero_grad()
            own_loss(model, {name: row[name] for name in DATA.column_names}).backward()
            optimizer.step()
        self.given.append(rows["input_ids"][:])
        self.models.append(model.eval())
        return model


def test_each_example_is_judged_by_the_model_that_has_not_seen_it() -> None:
    fits = Fits()
    scores = out_of_fold(DATA, fits, folds=3, data_collator=padding())
    assert scores.ids == list(range(10))
    assert len(fits.given) == 3
    judges = []
    for i, row in enumerate(DATA):
        unseen = [k for k, given in enumerate(fits.given) if row["input_ids"] not in given]
        assert len(unseen) == 1, "copies are in one fold"
        judges += unseen
        with torch.no_grad():
            assert scores.values[i, 0].item() == pytest.approx(-own_loss(fits.models[unseen[0]], row).item(), rel=1e-5)
    assert sorted(judges.count(k) for k in range(3)) in ([3, 3, 4], [3, 3, 4])
    assert judges[2] == judges[9]


def test_it_goes_on_after_an_interruption(tmp_path: Path) -> None:
    class Stops(Fits):
        def __call__(self, rows: Dataset) -> nn.Module:
            if len(self.given) == 2:
                raise KeyboardInterrupt
            return super().__call__(rows)

    with pytest.raises(KeyboardInterrupt):
        out_of_fold(DATA, Stops(), folds=3, data_collator=padding(), folder=tmp_path)
    fits = Fits()
    scores = out_of_fold(DATA, fits, folds=3, data_collator=padding(), folder=tmp_path)
    assert len(fits.given) == 1
    torch.testing.assert_close(scores.values, out_of_fold(DATA, Fits(), folds=3, data_collator=padding()).values)
    with pytest.raises(StoreMismatch):
        out_of_fold(DATA, fits, folds=3, seed=1, data_collator=padding(), folder=tmp_path)


def test_ids_do_not_part_copies_and_the_kept_losses_are_of_one_kind(tmp_path: Path) -> None:
    named = DATA.add_column("name", [f"row-{i}" for i in range(10)])
    fits = Fits()
    scores = out_of_fold(named, fits, folds=3, id_column="name", data_collator=padding(), folder=tmp_path)
    assert scores.ids == named["name"][:]
    copy = DATA[2]["input_ids"]
    assert copy == DATA[9]["input_ids"]
    assert sorted(given.count(copy) for given in fits.given) == [0, 2, 2]
    with pytest.raises(StoreMismatch):
        out_of_fold(
            named, fits, folds=3, id_column="name", data_collator=padding(), folder=tmp_path, loss_reduction="sum"
        )
    with pytest.raises(StoreMismatch, match="fold_of_rows"):  # without the column copies are told apart by their names
        out_of_fold(named, fits, folds=3, data_collator=padding(), folder=tmp_path)


def per_token(logits: Tensor, labels: Tensor, power: float) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none") ** power


def by_name(own: Task) -> Task:
    return own


@pytest.mark.parametrize(
    ("task", "known"),
    [
        (loss_of(per_token, power=2.0), {"loss": "per_token", "power": 2.0}),
        (label_smoothing(0.1), {"loss": "smoothed_cross_entropy", "label_smoothing": 0.1}),
        (CausalLM("sum"), {"name": "causal_lm", "loss_reduction": "sum"}),
        (by_name, {"name": "by_name"}),
    ],
    ids=["own_loss", "label_smoothing", "Task", "function"],
)
def test_the_loss_is_that_of_the_task_and_kept_losses_are_of_one(tmp_path: Path, task: Any, known: Any) -> None:
    fits = Fits()
    scores = out_of_fold(DATA, fits, folds=3, data_collator=padding(), folder=tmp_path, task=task)
    for model, given in zip(fits.models, fits.given, strict=True):
        held = [i for i, row in enumerate(DATA) if row["input_ids"] not in given]
        want = losses(model, DATA.select(held), data_collator=padding(), task=task)["loss"]
        torch.testing.assert_close(scores.values[held, 0], -want)
    assert scores.settings["task"] == known
    with pytest.raises(StoreMismatch, match="made with task="):
        out_of_fold(DATA, fits, folds=3, data_collator=padding(), folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"id_column": "idx"}, BadExample, "no column 'idx' among .*input_ids"),
        ({"id_column": "source"}, BadExample, "'source' must hold a different integer or string"),
        ({"id_column": "labels"}, BadExample, "'labels' must hold a different integer or string"),
        ({"data_colator": padding()}, TypeError, "data_colator"),
    ],
)
def test_what_cannot_work_is_told_before_the_first_training(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    fits = Fits()
    with pytest.raises(error, match=message):
        out_of_fold(DATA.add_column("source", ["a"] * 10), fits, folds=3, **options)
    assert fits.given == []


@pytest.mark.parametrize("folds", [1, 10])
def test_folds_that_cannot_be_made_are_refused(folds: int) -> None:
    with pytest.raises(BadSetting, match="make 2 to 9"):
        out_of_fold(DATA, Fits(), folds=folds)


def test_combined_is_the_mean_rank_whatever_the_order_of_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 3, generator=generator), torch.randn(7, 1, generator=generator)
    order = torch.randperm(7, generator=generator)
    one = Scores(a, list(range(7)), "ip", query_ids=[0, 1, 2])
    two = Scores(b[order], order.tolist(), "loss")
    place = [torch.from_numpy((rankdata(values) - 0.5) / 7) for values in (a.mean(1).numpy(), b[:, 0].numpy())]
    found = combined(one, two)
    torch.testing.assert_close(found.values[:, 0], (place[0] + place[1]) / 2)
    rho = torch.corrcoef(torch.stack(place))[0, 1].item()
    assert found.report["agreement"] == {"0 ip": pytest.approx(rho, abs=1e-4), "1 loss": pytest.approx(rho, abs=1e-4)}
    within = combined(one, groups=[0, 0, 0, 1, 1, 1, 1]).values[:, 0]
    assert sorted(within[:3].tolist()) == pytest.approx([1 / 6, 3 / 6, 5 / 6])


def test_what_tells_scores_apart_counts_however_far_from_zero_they_are() -> None:
    numbers = torch.rand(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for far in (1000 + numbers, 1 - 1e-7 * numbers, torch.cat((1000 + numbers, torch.zeros(1, 1)))):
        values = combined(Scores(far, list(range(len(far))), "mine")).values[:, 0]
        assert (values[far[:, 0].argsort()].diff() >= 0).all()
        assert len(values.unique()) > 0.97 * len(far)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_are_equal_but_for_rounding_rank_alike(dtype: torch.dtype) -> None:
    noise = 1 + torch.finfo(dtype).eps * torch.tensor([0, 1, -1, 1])
    values = torch.tensor([0.3, 0.3, 0.3, -7e-4]) * noise
    for shift in (0.0, 3.0):
        ranks = combined(Scores((values.to(dtype) + shift)[:, None], list("abcd"), "mine")).values[:, 0]
        assert ranks.tolist() == pytest.approx([0.625, 0.625, 0.625, 0.125])
    assert len(combined(Scores(noise[:3, None], list("abc"), "mine")).values.unique()) == 1


def test_what_cannot_be_combined_is_refused() -> None:
    one = Scores(torch.rand(3, 1), [0, 1, 2], "ip")
    with pytest.raises(BadSetting, match="no scores"):
        combined()
    with pytest.raises(BadSetting, match="different examples"):
        combined(one, Scores(torch.rand(3, 1), [0, 1, 3], "loss"))
    with pytest.raises(BadSetting, match="2 groups for 3"):
        combined(one, groups=[0, 1])
