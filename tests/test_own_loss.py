"""Losses other than cross-entropy: rows are the gradient of that loss of one example, whenever they are taken."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Example, labelled, lora, prompts, tiny, worst_error
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening, T5Config, T5ForConditionalGeneration
from transformers.trainer_pt_utils import LabelSmoother
from watched import EXAMPLES, Micro, Recording, classifier, key, packed_llama, train

from hf_influence.attribution import attribute
from hf_influence.callbacks import GradientCapture
from hf_influence.errors import BadSetting, StoreMismatch, UnsupportedModel
from hf_influence.gradients import (
    collect,
    collect_ekfac,
    collect_hessian,
    collect_target,
    example_losses,
    label_smoothing,
    losses,
    own_loss,
    solve_queries,
    verify,
)
from hf_influence.gradients.plan import Plan
from hf_influence.gradients.second_order.hessian import Hessian
from hf_influence.store import GradientStore, Rows
from hf_influence.task import CausalLM, Classification, Outcome

CLASSES = labelled(lambda i: i % 3, 10)
WEIGHT = torch.tensor([0.5, 1.0, 3.0])
EPSILON = 0.1


def focal(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    loss = cross_entropy(logits, labels, reduction="none")
    return (1 - torch.exp(-loss)) ** gamma * loss


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, weight=WEIGHT.to(logits), reduction="none")


def by_rows(loss: Any, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A `compute_loss_func` that averages a loss over examples, or over the tokens of all of them."""
    z, y = outputs.logits, labels
    if z.ndim == 3:
        z, y = z[:, :-1][y[:, 1:] != -100], y[:, 1:][y[:, 1:] != -100]
    return loss(z, y).sum() / (num_items_in_batch if num_items_in_batch is not None else len(y))


class OwnLoss(Recording):
    """A Trainer with a `compute_loss_func`."""

    function: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, compute_loss_func=partial(by_rows, type(self).function), **kwargs)


def with_loss(function: Any) -> type[Recording]:
    return type("WithLoss", (OwnLoss,), {"function": staticmethod(function)})


def alone(model: nn.Module, micro: Micro | None, example: Example, function: Any) -> dict[str, Tensor]:
    """The gradient of the loss of one example in a batch of one, by plain autograd, in a model without dropout."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if micro is not None:
        with torch.no_grad():
            for name, value in micro.weights.items():
                weights[name].copy_(value)
    loss = loss_of(model.eval(), example, function)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def loss_of(model: nn.Module, example: Example, function: Any) -> Tensor:
    logits = model(torch.tensor([example["input_ids"]])).logits
    y = torch.tensor([example["labels"]])
    if logits.ndim == 3:
        logits, y = logits[0, :-1][y[0, 1:] != -100], y[0, 1:][y[0, 1:] != -100]
    loss: Tensor = function(logits, y.flatten()).mean()
    return loss


def assert_rows_of(run: Any, rows: Rows, data: list[Example], epoch: int, function: Any) -> None:
    of_key = {key(example): example for example in data}
    want = {}
    for micro in run.micros:
        for ids, mask in zip(micro.inputs["input_ids"], micro.inputs["attention_mask"], strict=True):
            name = tuple(ids[mask.bool()].tolist())
            if micro.epoch == epoch:
                want[name] = alone(run.model, micro, of_key[name], function)
    assert len(rows) == len(want) == len(data)
    assert worst_error(rows, [want[key(data[at])] for at in rows.positions.tolist()]) < 1e-5


def without_dropout(kind: str) -> tuple[Any, list[Example]]:
    if kind == "tokens":
        return tiny(torch.float32, lora_dropout=0.0), EXAMPLES
    model = classifier()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, CLASSES


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    """Label smoothing, written out."""
    log_p = z.log_softmax(1)
    return -(1 - EPSILON) * log_p.gather(1, y[:, None])[:, 0] - EPSILON * log_p.mean(1)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["tokens", "classes"])
def test_rows_under_label_smoothing_equal_autograd(tmp_path: Path, kind: str, accumulation: int) -> None:
    model, data = without_dropout(kind)
    capture = GradientCapture(tmp_path / "rows", data[:3], during="epochs", at_end=False, task=label_smoothing(EPSILON))
    options = {"label_smoothing_factor": EPSILON, "gradient_accumulation_steps": accumulation}
    run = train(model, tmp_path, capture, data=data, **options)
    assert run.label_smoother is not None
    store = GradientStore.open(capture.path)
    for epoch in (1, 2):
        assert_rows_of(run, store.rows("train", epoch), data, epoch, smoothed)
    query = store.rows("query", 1)
    first = next(micro for micro in run.micros if micro.epoch == 2)  # begins where the first epoch ends
    assert worst_error(query, [alone(run.model, first, example, smoothed) for example in data[:3]]) < 1e-5
    assert store.header.task["label_smoothing"] == EPSILON


@pytest.mark.parametrize("function", [focal, weighted])
def test_rows_under_a_loss_function_equal_autograd(tmp_path: Path, function: Any) -> None:
    model, data = without_dropout("classes")
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False, task=own_loss(function))
    run = train(model, tmp_path, capture, data=data, kind=with_loss(function), gradient_accumulation_steps=2)
    assert_rows_of(run, GradientStore.open(capture.path).rows("train", 2), data, 2, function)


def test_rows_of_tokens_under_a_loss_function_equal_autograd(tmp_path: Path) -> None:
    model, data = without_dropout("tokens")
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False, task=own_loss(focal, gamma=1.0))
    run = train(model, tmp_path, capture, data=data, kind=with_loss(partial(focal, gamma=1.0)))
    assert_rows_of(run, GradientStore.open(capture.path).rows("train", 2), data, 2, partial(focal, gamma=1.0))


def test_packed_examples_have_the_rows_of_padded_ones(tmp_path: Path) -> None:
    stores = []
    for collate in (None, DataCollatorWithFlattening()):
        capture = GradientCapture(
            tmp_path / str(collate is None), during="epochs", epochs=[1], at_end=False, task=label_smoothing(EPSILON)
        )
        options: dict[str, Any] = {"label_smoothing_factor": EPSILON, "learning_rate": 0.0}
        train(packed_llama(lora_dropout=0.0), tmp_path, capture, collate=collate, **options)
        stores.append(GradientStore.open(capture.path).rows("train", 1))
    for name in stores[0].blocks:
        torch.testing.assert_close(stores[1].block(name), stores[0].block(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_collected_rows_equal_autograd(tmp_path: Path, reduction: Any) -> None:
    model, data = tiny(), prompts(5)
    store = collect(model, data, tmp_path, task=own_loss(focal), loss_reduction=reduction)
    rows = store.rows()
    want = [alone(model, None, example, focal) for example in data]
    if reduction == "sum":
        tokens = [sum(label != -100 for label in example["labels"][1:]) for example in data]
        want = [{name: g * n for name, g in row.items()} for row, n in zip(want, tokens, strict=True)]
    assert worst_error(rows, want) < 1e-6  # the norms of the model are computed in float32
    with pytest.raises(StoreMismatch, match="loss = focal; now: loss = None"):
        collect(model, data, tmp_path, "query", loss_reduction=reduction)


def by_class(logits: Tensor, labels: Tensor, weight: Any) -> Tensor:
    return cross_entropy(logits, labels, weight=torch.as_tensor(weight).to(logits), reduction="none")


@pytest.mark.parametrize("weight", [(0.5, 1.0, 3.0), WEIGHT], ids=["tuple", "tensor"])
def test_settings_of_a_loss_are_those_that_the_store_gives_back(tmp_path: Path, weight: Any) -> None:
    model, data = without_dropout("classes")
    task = own_loss(by_class, weight=weight)
    for split in ("train", "query"):
        store = collect(model, data, tmp_path, split, task=task)
    assert store.header.task["weight"] == [0.5, 1.0, 3.0]
    assert worst_error(store.rows(), [alone(model, None, example, weighted) for example in data]) < 1e-5
    with pytest.raises(BadSetting, match=r"cannot be written as JSON"):
        own_loss(by_class, weight=model)


@dataclass(frozen=True)
class Margin(Classification):
    """A task of a user: the hinge of the label's logit over the best other one, squared."""

    def outcome(self, logits: Tensor, labels: Tensor) -> Outcome:
        z = logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = hinge(z, labels)
            gradient = torch.autograd.grad(loss.sum(), z)[0]
        return Outcome(loss.detach(), gradient, {"n_tokens": torch.ones_like(labels)})


class Spanned(Margin):
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "span": (0, 5)}


def hinge(z: Tensor, y: Tensor) -> Tensor:
    others = z.scatter(1, y[:, None], -torch.inf).amax(1)
    return (5 - z.gather(1, y[:, None])[:, 0] + others).clamp(min=0) ** 2


def test_a_task_of_the_user_is_what_rows_are_measured_against(tmp_path: Path) -> None:
    model, data = without_dropout("classes")
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False, task=Margin(None, 3))
    run = train(model, tmp_path, capture, data=data, kind=with_loss(hinge))
    assert_rows_of(run, GradientStore.open(capture.path).rows("train", 2), data, 2, hinge)


def test_settings_of_a_task_of_the_user_are_those_that_the_store_gives_back(tmp_path: Path) -> None:
    model, data = without_dropout("classes")
    for split in ("train", "query"):
        store = collect(model, data, tmp_path, split, task=Spanned(None, 3))
    assert store.header.task["span"] == [0, 5]


@pytest.mark.parametrize("kind", ["tokens", "classes"])
def test_another_loss_than_that_of_training_is_refused(tmp_path: Path, kind: str) -> None:
    model, data = without_dropout(kind)
    capture = GradientCapture(tmp_path / "rows", during="epochs", at_end=False, task=label_smoothing(0.5))
    with pytest.raises(UnsupportedModel, match=r"(?s)the loss of the task .*'label_smoothing': 0.5.*own_loss\(funct"):
        train(model, tmp_path, capture, data=data, label_smoothing_factor=EPSILON)


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels)


def test_what_is_no_loss_of_this_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"own_loss\(.*function of logits and labels that has a name"):
        own_loss(lambda z, y: z.sum(1))
    with pytest.raises(BadSetting, match=r"label_smoothing\(1.5\)"):
        label_smoothing(1.5)
    with pytest.raises(BadSetting, match=r"summed gave a result of shape .*one number for each row"):
        collect(tiny(), EXAMPLES, tmp_path, task=own_loss(summed))
    with pytest.raises(BadSetting, match=r"task=Margin for PeftModel.*CausalLM"):
        collect(tiny(), EXAMPLES, tmp_path, task=Margin())
    with pytest.raises(BadSetting, match=r"task=Margin for PeftModel.*CausalLM"):
        losses(tiny(), EXAMPLES, task=Margin())
    with pytest.raises(BadSetting, match=r"task=CausalLM for PeftModel.*Classification"):
        collect(classifier(), CLASSES, tmp_path, task=CausalLM())


def test_smoothing_is_that_of_the_trainer() -> None:
    z, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 3, 2, 1])
    outcome = label_smoothing(EPSILON)(Classification("single_label_classification", 5))
    assert isinstance(outcome, Classification)
    loss = outcome.outcome(z, y).loss
    torch.testing.assert_close(loss, smoothed(z, y))
    torch.testing.assert_close(loss.mean(), LabelSmoother(EPSILON)({"logits": z}, y))


OWN: dict[str, tuple[Any, Any, Any]] = {  # kind of labels -> how rows are captured, what the store has to be told, loss
    "tokens": (own_loss(focal), own_loss(focal), focal),
    "classes": (label_smoothing(EPSILON), None, smoothed),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", OWN)
def test_rows_of_a_loss_of_ones_own_are_verified(tmp_path: Path, kind: str, reduction: Any) -> None:
    task, told, _ = OWN[kind]
    model, data = without_dropout(kind)
    store = collect(model, data, tmp_path, task=task, loss_reduction=reduction)
    assert verify(model, data, store, task=told) < 1e-5
    plain = collect(model, data, tmp_path / "plain", loss_reduction=reduction)
    with pytest.raises(StoreMismatch, match=r"another task \(stored: loss = None"):
        verify(model, data, plain, task=task)


@pytest.mark.parametrize("kind", OWN)
def test_the_hessian_is_that_of_the_own_loss(tmp_path: Path, kind: str) -> None:
    task, told, function = OWN[kind]
    model, data = without_dropout(kind)
    model.double()
    store = collect(model, data[:4], tmp_path, task=task)
    names = list(store.blocks)[:1]
    weights = [dict(model.named_parameters())[name] for name in names]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = sum(loss_of(model, example, function) for example in data[:4]) / 4
        slope = torch.autograd.grad(loss, weights, create_graph=True)[0].flatten()
        first = torch.autograd.grad(slope[0], weights)[0].flatten()
    plan = Plan.again(store, model, data[:4], 0, task=told)
    with Hessian(model, plan, store.header) as hessian:
        unit = torch.zeros(1, hessian.size, dtype=hessian.dtype)
        unit[0, 0] = 1
        product = hessian.split(hessian(unit))[names[0]][0]
    assert first.norm() > 0
    torch.testing.assert_close(product, first, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", OWN)
def test_what_is_collected_beside_such_rows_knows_the_loss(tmp_path: Path, kind: str) -> None:
    task, told, _ = OWN[kind]
    model, data = without_dropout(kind)
    store = collect(model, data, tmp_path, task=task)
    collect(model, data[:2], tmp_path, "query", task=task)
    collect_ekfac(model, data, store.path, task=told)
    collect_hessian(model, data, store.path, top=2, iterations=8, task=told)
    solve_queries(model, data, store.path, damping=10.0, task=told)
    collect_target(model, data, store.path, target=lambda m, b: example_losses(m, b).sum(), split="sum", task=told)
    for method, split in (("ekfac", "query"), ("arnoldi", "query"), ("ip", "query-cg"), ("ip", "sum")):
        assert attribute(store, method, query_split=split).values.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", OWN)
def test_losses_under_a_loss_of_ones_own_are_those_of_the_function(kind: str, reduction: Any) -> None:
    task, _, function = OWN[kind]
    model, data = without_dropout(kind)
    found = losses(model, data, batch_size=3, loss_reduction=reduction, task=task)
    with torch.no_grad():
        want = torch.stack([loss_of(model.eval(), example, function) for example in data])
    if reduction == "sum" and kind == "tokens":
        want = want * found["n_tokens"]
    torch.testing.assert_close(found["loss"], want)
    plain = losses(model, data, loss_reduction=reduction)
    assert not torch.allclose(plain["loss"], want, rtol=0.01)
    torch.testing.assert_close(found["margin"], plain["margin"])


def test_rows_of_an_encoder_decoder_under_label_smoothing_are_verified(tmp_path: Path) -> None:
    config = T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = lora(T5ForConditionalGeneration(config), ["q", "v"])
    data = [{"input_ids": [5, 6, 7], "labels": [8, 9]}, {"input_ids": [4, 9], "labels": [7, 6, 5, 4]}]
    store = collect(model, data, tmp_path, task=label_smoothing(EPSILON))
    assert verify(model, data, store) < 1e-5


def test_a_loss_that_the_store_does_not_keep_has_to_be_given_again(tmp_path: Path) -> None:
    model, data = without_dropout("tokens")
    store = collect(model, data, tmp_path / "function", task=own_loss(focal))
    with pytest.raises(BadSetting, match=r"(?s)loss function 'focal'.*task=own_loss\(focal, …\)"):
        verify(model, data, store)
    model, data = without_dropout("classes")
    store = collect(model, data, tmp_path / "task", task=Margin(None, 3))
    with pytest.raises(UnsupportedModel, match=r"(?s)Margin is a task of your own.*task=own_loss\(function\)"):
        verify(model, data, store, task=Margin(None, 3))
