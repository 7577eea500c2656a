"""A target other than the mean loss: its row against plain autograd, finite differences and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import (
    BertForSequenceClassification,
    Example,
    all_rows,
    bert,
    labelled,
    lora,
    own_loss,
    padding,
    prompts,
    tiny,
)
from test_families import FAMILIES, Family
from torch import Tensor, nn
from worlds import examples, network, tensors

from hf_influence import GradientStore, attribute, collect, collect_target, dropout, evasion, fairness, robustness
from hf_influence.errors import BadExample, BadSetting, StoreError, StoreMismatch, UnsupportedModel
from hf_influence.evaluation import accuracy_under_attack
from hf_influence.gradients import example_losses, label_smoothing
from hf_influence.gradients import own_loss as loss_of

N = 8
Row = dict[str, Tensor]


def classifier() -> Any:
    torch.manual_seed(0)
    return lora(bert(num_labels=2), ["query", "value"], modules_to_save=["classifier"]).eval()


def people(n: int = N) -> list[Example]:
    """Sequences of people of two groups, unlike in number."""
    return [
        {**row, "sex": "f" if i % 3 else "m", "age": i % 3 // 2} for i, row in enumerate(labelled(lambda i: i % 2, n))
    ]


def row_of(store: GradientStore, split: str) -> Row:
    return {name: rows[0] for name, rows in all_rows(store.rows(split)).items()}


def gradient(model: nn.Module, value: Tensor) -> Row:
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(value, list(weights.values()))
    return {name: g.flatten() for name, g in zip(weights, found, strict=True)}


def slope(model: nn.Module, row: Row, f: Callable[[], Tensor], step: float = 1e-6) -> tuple[float, float]:
    """How fast f rises along a row, by central differences and by the row itself."""
    values = []
    for times in (1, -2, 1):  # up, down, and back
        move(model, row, times * step)
        values.append(f().item())
    return (values[0] - values[1]) / (2 * step), sum(float(g.square().sum()) for g in row.values())


def move(model: nn.Module, row: Row, step: float) -> None:
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, g in row.items():
            weights[name] += step * g.view_as(weights[name])


def alone(example: Example) -> Example:
    return {name: example[name] for name in ("input_ids", "labels")}


def by_softmax(logits: Tensor) -> Tensor:
    return logits.softmax(1)


def gap(
    model: nn.Module,
    data: list[Example],
    column: str,
    groups: tuple[Any, Any],
    probabilities: Callable[[Tensor], Tensor] = by_softmax,
) -> Tensor:
    """|E[ŷ | one group] − E[ŷ | the other]|, one query at a time."""
    means = []
    for group in groups:
        members = [torch.tensor([row["input_ids"]]) for row in data if row[column] == group]
        means.append(torch.stack([probabilities(model(ids).logits)[0, 1] for ids in members]).mean())
    return (means[0] - means[1]).abs()


@pytest.mark.parametrize(("column", "groups"), [("sex", ("f", "m")), ("sex", ("m", "f")), ("age", (0, 1))])
@pytest.mark.parametrize("batch_size", [3, "auto"])
def test_fairness_is_the_gradient_of_the_gap(
    tmp_path: Path, column: str, groups: tuple[Any, Any], batch_size: Any
) -> None:
    model, data = classifier(), people()
    collect(model, data, tmp_path)
    target = fairness(column, groups=groups)
    store = collect_target(model, data, tmp_path, target=target, split="fairness", batch_size=batch_size)
    rows, value = store.rows("fairness"), gap(model, data, column, groups)
    torch.testing.assert_close(row_of(store, "fairness"), gradient(model, value), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(rows.stats["value"][0], value.detach(), rtol=1e-8, atol=1e-12)
    assert rows.ids == [str(target)]
    measured, own = slope(model, row_of(store, "fairness"), lambda: gap(model, data, column, groups))
    assert measured == pytest.approx(own, rel=1e-4)
    assert attribute(store, "ip", query_split="fairness").query_ids == rows.ids


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_where_an_example_has_several_labels_each_has_its_own_probability(tmp_path: Path, problem: str | None) -> None:
    torch.manual_seed(0)
    model = lora(bert(num_labels=3, problem_type=problem), ["query", "value"], modules_to_save=["classifier"]).eval()
    data = [{**row, "labels": [1.0, 0.0, float(i % 2)]} for i, row in enumerate(people())]
    collect(model, data, tmp_path)
    store = collect_target(model, data, tmp_path, target=fairness("age"), split="fairness", batch_size=3)
    value = gap(model, data, "age", (0, 1), torch.sigmoid)
    torch.testing.assert_close(store.rows("fairness").stats["value"][0], value.detach(), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(row_of(store, "fairness"), gradient(model, value), rtol=1e-8, atol=1e-12)


class MeanLogit:
    """Of class 1, summed and counted in the model's own numbers."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        z = model(batch["x"]).logits[:, 1]
        return torch.stack([z.sum(), z.new_tensor(len(z))])

    def combine(self, sums: Tensor) -> Tensor:
        return sums[0] / sums[1]


def test_half_precision_counts_every_query(tmp_path: Path) -> None:
    n, model = 600, network(4).bfloat16()
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    data = [{"x": point, "labels": 0, "old": int(i % 3 == 0)} for i, point in enumerate(x)]
    store = collect(model, data[:4], tmp_path, modules="trainable")
    logits = torch.cat([model(one).logits for one in x[:, None].detach()]).detach().double()
    y = logits.softmax(1)[:, 1]
    for batch_size in (1, 200):
        where = f"fairness-{batch_size}"
        collect_target(model, data, tmp_path, target=fairness("old"), split=where, batch_size=batch_size)
        found = store.rows(where).stats["value"][0].double()
        torch.testing.assert_close(found, (y[::3].mean() - y.mean()).abs() * 1.5, rtol=1e-5, atol=0)
    one, two = (row_of(store, f"fairness-{batch_size}") for batch_size in (1, 200))
    longest = max(float(row.norm()) for row in one.values())
    torch.testing.assert_close(two, one, rtol=0, atol=0.02 * longest)
    collect_target(model, data, tmp_path, target=MeanLogit(), split="mean", batch_size=1)
    torch.testing.assert_close(store.rows("mean").stats["value"][0].double(), logits[:, 1].mean(), rtol=1e-9, atol=0)


def test_an_example_that_narrows_the_gap_is_worth_keeping(tmp_path: Path) -> None:
    """A step down the loss of the highest example narrows the gap, one down that of the lowest widens it."""
    model, data = classifier(), people()
    store = collect(model, data, tmp_path)
    collect_target(model, data, tmp_path, target=fairness("age"), split="fairness")
    scores = attribute(store, "ip", query_split="fairness").mean()
    before = gap(model, data, "age", (0, 1))
    for i, narrows in ((int(scores.argmax()), True), (int(scores.argmin()), False)):
        row = {name: rows[i] for name, rows in all_rows(store.rows("train")).items()}
        move(model, row, -1e-5)
        assert bool(gap(model, data, "age", (0, 1)) < before) is narrows
        move(model, row, 1e-5)


def squared_logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.square().sum()


class RatioOfLosses:
    """The loss of the one group over that of the other: no sum over batches, and two numbers a batch."""

    columns = ("age",)

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        old = batch.pop("age") == 1
        loss = example_losses(model, batch)
        return torch.stack([loss[old].sum(), loss[~old].sum()])

    def combine(self, sums: Tensor) -> Tensor:
        return sums[0] / sums[1]

    def __repr__(self) -> str:
        return "RatioOfLosses()"


def test_any_function_is_a_target(tmp_path: Path) -> None:
    model, data = classifier(), people()
    collect(model, data, tmp_path)
    store = collect_target(model, data, tmp_path, target=squared_logits, split="logits", batch_size=3)
    value = torch.stack([model(torch.tensor([row["input_ids"]])).logits.square().sum() for row in data]).sum()
    torch.testing.assert_close(row_of(store, "logits"), gradient(model, value), rtol=1e-8, atol=1e-12)
    assert store.rows("logits").ids == ["squared_logits"]
    collect_target(model, data, tmp_path, target=lambda *given: -squared_logits(*given), split="minus")
    assert store.rows("minus").ids == ["minus"]
    up, down = (attribute(store, "datainf", query_split=split).values for split in ("logits", "minus"))
    torch.testing.assert_close(up, -down)


def test_a_target_need_be_no_sum_over_batches(tmp_path: Path) -> None:
    model, data = classifier(), people()
    collect(model, data, tmp_path)
    store = collect_target(model, data, tmp_path, target=RatioOfLosses(), split="ratio", batch_size=3)
    sums = [torch.stack([own_loss(model, alone(row)) for row in data if row["age"] == a]).sum() for a in (1, 0)]
    torch.testing.assert_close(row_of(store, "ratio"), gradient(model, sums[0] / sums[1]), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_summed_loss_is_the_sum_of_the_query_rows(tmp_path: Path, reduction: Any, side: str) -> None:
    model, data = tiny(), prompts()
    store = collect(model, data, tmp_path, "query", loss_reduction=reduction)

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return example_losses(model, batch, reduction).sum()

    collect_target(model, data, tmp_path, target=loss, split="loss", batch_size=3, data_collator=padding(side))
    rows = {name: rows.sum(0) for name, rows in all_rows(store.rows("query")).items()}
    torch.testing.assert_close(row_of(store, "loss"), rows, rtol=1e-8, atol=1e-12)


def test_a_translator_has_example_losses_too(tmp_path: Path) -> None:
    family = FAMILIES["BART"]
    model, data = family.model().double(), family.data()
    store = collect(model, data, tmp_path, data_collator=family.collate("left"))

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return example_losses(model, batch).sum()

    collect_target(model, data, tmp_path, target=loss, split="loss", data_collator=family.collate("left"))
    rows = {name: rows.sum(0) for name, rows in all_rows(store.rows("train")).items()}
    torch.testing.assert_close(row_of(store, "loss"), rows, rtol=1e-8, atol=1e-12)


def test_groups_have_a_row_each(tmp_path: Path) -> None:
    model, data = classifier(), people()
    store = collect(model, data, tmp_path)

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return example_losses(model, batch).sum()

    collect_target(model, data, tmp_path, target=loss, split="groups", by="sex", batch_size=2)
    assert store.rows("groups").ids == ["m", "f"]
    every = all_rows(store.rows("train"))
    for at, group in enumerate(("m", "f")):
        members = [i for i, row in enumerate(data) if row["sex"] == group]
        for name, rows in all_rows(store.rows("groups")).items():
            torch.testing.assert_close(rows[at], every[name][members].sum(0), rtol=1e-8, atol=1e-12)


def test_the_row_goes_through_the_compressor_of_the_store(tmp_path: Path) -> None:
    model, data = classifier(), people()
    whole = collect(model, data, tmp_path / "whole", skip=["*lora_A*"])
    small = collect(model, data, tmp_path / "small", compress=dropout(5), skip=["*lora_A*"])
    for store in (whole, small):
        collect_target(model, data, store.path, target=fairness("age"), split="fairness")
    for name, row in row_of(small, "fairness").items():
        torch.testing.assert_close(row, row_of(whole, "fairness")[name][small.rows("fairness").columns(name)])
    assert "lora_A" not in "".join(small.blocks)


def moved_loss(model: Any, data: list[Example], moves: list[Tensor]) -> Tensor:
    """Σ ℓ(x_j + δ_j, y_j), one query at a time, through `inputs_embeds`."""
    losses = []
    for row, move in zip(data, moves, strict=True):
        x = model.get_input_embeddings()(torch.tensor([row["input_ids"]])) + move
        losses.append(model(inputs_embeds=x, labels=torch.tensor([row["labels"]])).loss)
    return torch.stack(losses).sum()


def attacked(model: Any, row: Example, epsilon: float, steps: int, direction: str) -> Tensor:
    x = model.get_input_embeddings()(torch.tensor([row["input_ids"]])).detach()
    move = torch.zeros_like(x)
    for _ in range(steps):
        at = (x + move).requires_grad_()
        (g,) = torch.autograd.grad(model(inputs_embeds=at, labels=torch.tensor([row["labels"]])).loss, at)
        move = move + epsilon / steps * (g.sign() if direction == "sign" else g / g.norm())
    return move


@pytest.mark.parametrize("direction", ["sign", "gradient"])
@pytest.mark.parametrize("steps", [1, 3])
def test_robustness_is_the_gradient_at_moved_embeddings(tmp_path: Path, direction: Any, steps: int) -> None:
    model, data = classifier(), people()
    collect(model, data, tmp_path)
    target = robustness(0.05, steps, direction=direction)
    store = collect_target(model, data, tmp_path, target=target, split="robust", batch_size=3)
    moves = [attacked(model, row, 0.05, steps, direction) for row in data]
    value = moved_loss(model, data, moves)
    torch.testing.assert_close(row_of(store, "robust"), gradient(model, value), rtol=1e-7, atol=1e-10)
    assert value > moved_loss(model, data, [torch.zeros(())] * N)  # it is an attack
    measured, own = slope(model, row_of(store, "robust"), lambda: moved_loss(model, data, moves))
    assert measured == pytest.approx(own, rel=1e-4)


def friendly(logits: Tensor, labels: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(logits, labels, reduction="none")


LOSSES: dict[str, tuple[Any, Any, dict[str, Any], Any]] = {
    "label smoothing": (classifier, people, {"task": label_smoothing(0.3)}, None),  # the store tells
    "own function": (classifier, people, {"task": loss_of(friendly)}, loss_of(friendly)),
    "sum over tokens": (tiny, prompts, {"loss_reduction": "sum"}, None),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_robustness_is_of_the_loss_of_the_rows(tmp_path: Path, kind: str) -> None:
    make, queries, settings, told = LOSSES[kind]
    model, data = make(), queries()
    store = collect(model, data, tmp_path, **settings)
    for split, epsilon in (("still", 1e-9), ("moved", 0.05)):
        collect_target(model, data, tmp_path, target=robustness(epsilon), split=split, task=told, batch_size=3)
    rows = {name: rows.sum(0) for name, rows in all_rows(store.rows("train")).items()}
    torch.testing.assert_close(row_of(store, "still"), rows, rtol=1e-5, atol=1e-7)
    still, moved = (store.rows(split).stats["value"][0] for split in ("still", "moved"))
    torch.testing.assert_close(still, store.rows("train").stats["loss"].sum(), rtol=1e-5, atol=1e-7)
    assert moved > still, "up that loss"


@pytest.mark.parametrize("family", [FAMILIES["T5"], FAMILIES["BART"]], ids=["T5", "BART"])
def test_of_a_translator_what_the_encoder_reads_is_moved(tmp_path: Path, family: Family) -> None:
    model, data, collate = family.model().double().eval(), family.data(), family.collate("left")
    collect(model, data, tmp_path, data_collator=collate)
    target = robustness(0.5, 2)
    store = collect_target(model, data, tmp_path, target=target, split="robust", data_collator=collate, batch_size=3)
    moves = [attacked(model, row, 0.5, 2, "gradient") for row in data]
    value = moved_loss(model, data, moves)
    torch.testing.assert_close(store.rows("robust").stats["value"][0], value.detach(), rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(row_of(store, "robust"), gradient(model, value), rtol=1e-6, atol=1e-9)
    assert value > moved_loss(model, data, [torch.zeros(())] * len(data))
    assert 0 <= accuracy_under_attack(model, data, target, data_collator=collate) <= 1


def test_language_models_can_be_attacked_and_images_where_their_pixels_are(tmp_path: Path) -> None:
    model, data = tiny(), prompts()
    store = collect(model, data, tmp_path / "text")
    collect_target(model, data, store.path, target=robustness(0.1), split="robust", batch_size=2)
    collect_target(model, data, store.path, target=robustness(1e-9), split="still")
    rows = {name: rows.sum(0) for name, rows in all_rows(store.rows("train")).items()}
    torch.testing.assert_close(row_of(store, "still"), rows, rtol=1e-5, atol=1e-7)
    assert store.rows("robust").stats["value"] > store.rows("still").stats["value"]

    family = FAMILIES["ViT"]
    model, data = family.model().double(), family.data()
    pixels, labels = (torch.tensor([row[name] for row in data]) for name in ("pixel_values", "labels"))
    pixels = pixels.double().requires_grad_()
    loss = nn.functional.cross_entropy(model.eval()(pixels).logits, labels, reduction="sum")
    moved = (pixels + 0.01 * torch.autograd.grad(loss, pixels)[0].sign()).detach()
    value = nn.functional.cross_entropy(model(moved).logits, labels, reduction="sum")
    images = [
        {"pixel_values": image, "labels": row["labels"]} for image, row in zip(pixels.detach(), data, strict=True)
    ]
    store = collect(model, images, tmp_path / "images")
    collect_target(model, images, store.path, target=robustness(0.01, direction="sign"), split="robust")
    torch.testing.assert_close(row_of(store, "robust"), gradient(model, value), rtol=1e-7, atol=1e-10)


def test_evasion_of_a_linear_model_has_the_closed_form_of_the_paper(tmp_path: Path) -> None:
    """Moved to x − γ (θᵀx + b) / ‖θ‖² θ, with θ and b those of the difference of the two logits."""
    gamma, model = 1.3, network(inputs=3)
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(9, 3, generator=draw, dtype=torch.float64)
    data = examples(points.numpy(), torch.randint(0, 2, (9,), generator=draw).numpy())
    x, y = tensors(data)
    layer = model.layers[0]
    theta, b = (layer.weight[1] - layer.weight[0]).detach(), (layer.bias[1] - layer.bias[0]).detach()
    moved = x - gamma * ((x @ theta + b) / theta.square().sum())[:, None] * theta
    assert (((moved @ theta + b) * (x @ theta + b)) < 0).all()  # all are across
    value = nn.functional.cross_entropy(model(moved).logits, y, reduction="sum")
    store = collect(model, data, tmp_path, modules="trainable")
    collect_target(model, data, tmp_path, target=evasion(gamma), split="evasion", batch_size=4)
    torch.testing.assert_close(row_of(store, "evasion"), gradient(model, value), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(store.rows("evasion").stats["value"][0], value.detach())


def test_a_query_without_a_gradient_stays_where_it_is() -> None:
    model, x = network(4), torch.randn(5, 2, dtype=torch.float64)
    with torch.no_grad():
        model.layers[0].bias.fill_(-100.0)  # no ReLU is ever open
    batch = {"x": x, "labels": torch.tensor([0, 1, 0, 1, 0])}
    for target in (robustness(0.1), robustness(0.1, 3), robustness(0.1, direction="sign"), evasion()):
        assert bool((target.adversary(model, batch) == 0).all())


def test_no_step_is_longer_than_it_is_said_to_be() -> None:
    """Of sure examples the gradient is so small that its squares are 0, or 0 itself."""
    x, model = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)), network().float()
    with torch.no_grad():
        model.layers[0].weight.mul_(100)
    batch = {"x": x, "labels": model(x).logits.argmax(1)}
    lengths = robustness(0.01).adversary(model, batch).norm(dim=1)
    torch.testing.assert_close(lengths, 0.01 * (lengths > 0))
    assert 0 < (lengths == 0).sum() < 25
    assert float(robustness(0.01, 3).adversary(model, batch).norm(dim=1).max()) < 0.010001


def test_the_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model, data = classifier().train(), people()
    collect(model, data, tmp_path)
    before = models.state_of(model)
    for number, target in enumerate((fairness("age"), robustness(0.1), evasion(), squared_logits)):
        collect_target(model, data, tmp_path, target=target, split=f"target-{number}")
    with pytest.raises(RuntimeError, match="no"):
        collect_target(model, data, tmp_path, target=failing_inside, split="failing")
    models.assert_same_state(before, models.state_of(model))


def failing_inside(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    robustness(0.1)(model, batch)
    raise RuntimeError("no")


def test_a_target_is_taken_at_the_weights_of_its_point(tmp_path: Path) -> None:
    model, data = classifier(), people()
    collect(model, data, tmp_path)
    next(weight for weight in model.parameters() if weight.requires_grad).data += 0.1
    collect(model, data, tmp_path, point=3)
    with pytest.raises(StoreMismatch, match="other values of the adapter at point 0"):
        collect_target(model, data, tmp_path, target=fairness("age"), split="target")
    store = collect_target(model, data, tmp_path, target=fairness("age"), split="target", point=3)
    want = gradient(model, gap(model, data, "age", (0, 1)))
    found = {name: rows[0] for name, rows in all_rows(store.rows("target", 3)).items()}
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-12)
    assert store.splits() == ["train"]
    assert attribute(store, "ip", query_split="target", point=3).values.isfinite().all()


def test_a_split_that_is_there_is_replaced_only_on_request(tmp_path: Path) -> None:
    model, data = classifier(), people()
    store = collect(model, data, tmp_path)
    train = all_rows(store.rows("train"))
    collect_target(model, data, tmp_path, target=fairness("age"), split="target")
    first = row_of(store, "target")
    with pytest.raises(StoreMismatch, match=r"'target' at point 0 already.*overwrite=True"):
        collect_target(model, data, tmp_path, target=robustness(0.1), split="target")
    torch.testing.assert_close(row_of(store, "target"), first)
    collect_target(model, data, tmp_path, target=robustness(0.1), split="target", overwrite=True)
    assert store.rows("target").ids == [str(robustness(0.1))]
    torch.testing.assert_close(all_rows(store.rows("train")), train)
    assert store.adapter() is not None
    next(weight for weight in model.parameters() if weight.requires_grad).data += 0.1
    with pytest.raises(StoreMismatch, match="other values of the adapter"):
        collect_target(model, data, tmp_path, target=robustness(0.1), split="target", overwrite=True)
    torch.testing.assert_close(all_rows(store.rows("train")), train)


class NoEmbeddingForSequenceClassification(BertForSequenceClassification):
    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


class OtherEmbeddingForSequenceClassification(BertForSequenceClassification):
    def get_input_embeddings(self) -> nn.Module:
        return nn.Embedding(2, 2)


def built(kind: Any) -> Any:
    model = kind(bert(num_labels=2).config)
    return lora(model, ["query"]).eval()


def regression() -> Any:
    return lora(bert(num_labels=2, problem_type="regression"), ["query"]).eval()


WRONG: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "column": (classifier, fairness("gender"), BadExample, r"no column 'gender'.*its columns are \['input_ids'"),
    "groups": (classifier, fairness("sex"), BadExample, r"a query has sex='[mf]'.*groups=\(…, …\)"),
    "member": (classifier, fairness("sex", groups=("f", "x")), BadExample, "a query has sex='m'"),
    "no member": (classifier, fairness("one"), BadExample, r"no query has one=1.*cannot be compared"),
    "classes": (classifier, fairness("age", positive=2), UnsupportedModel, r"class 2, and .* logits of shape \[8, 2\]"),
    "regression": (regression, fairness("age"), UnsupportedModel, "class 1, and .* predicts numbers"),
    "language model": (tiny, fairness("age"), UnsupportedModel, "Use a classifier with that class"),
    "boundary": (tiny, evasion(), UnsupportedModel, r"no decision boundary.*robustness\(epsilon=…\)"),
    "no embedding": (
        lambda: built(NoEmbeddingForSequenceClassification),
        robustness(0.1),
        UnsupportedModel,
        "of which it has none.*of your own",
    ),
    "idle embedding": (
        lambda: built(OtherEmbeddingForSequenceClassification),
        robustness(0.1),
        UnsupportedModel,
        "which it does not call",
    ),
    "vector": (classifier, lambda m, b: example_losses(m, b), BadSetting, r"result of shape \[8\].*\.sum\(\)"),
    "number": (classifier, lambda m, b: 1.0, BadSetting, "result of type float"),
    "no gradient": (classifier, lambda m, b: torch.ones(()), BadSetting, "a number without a gradient"),
    "zero": (classifier, lambda m, b: squared_logits(m, b) * 0, BadExample, "gradient of zero"),
    "infinite": (classifier, lambda m, b: squared_logits(m, b) / 0, BadExample, "not finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_a_target_is_refused_with_a_reason(tmp_path: Path, case: str) -> None:
    make, target, error, message = WRONG[case]
    model = make()
    data = [{**row, "one": 0, "age": i % 2, "sex": "fm"[i % 2]} for i, row in enumerate(people())]
    if model.config.problem_type == "regression":
        data = [{**row, "labels": [0.5, -1.0]} for row in data]
    if model.config.model_type == "llama":
        data = [{**row, "labels": row["input_ids"]} for row in data]
    store = collect(model, data, tmp_path)
    with pytest.raises(error, match=f"(?s){message}"):
        collect_target(model, data, tmp_path, target=target, split="target", batch_size=N)
    assert store.splits() == ["train"]


def test_settings_and_places_are_checked(tmp_path: Path) -> None:
    model, data = classifier(), people()
    for make in (lambda: robustness(0.0), lambda: robustness(0.1, 0), lambda: evasion(1.0)):
        with pytest.raises(BadSetting, match="must be"):
            make()
    with pytest.raises(BadSetting, match="direction 'sign' or 'gradient'"):
        robustness(0.1, direction="up")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="not a gradient store"):
        collect_target(model, data, tmp_path / "none", target=fairness("age"), split="fairness")
    collect(model, data, tmp_path)
    with pytest.raises(BadSetting, match="a split of its own"):
        collect_target(model, data, tmp_path, target=fairness("age"), split="train", overwrite=True)
    with pytest.raises(BadExample, match="no column 'gender'"):
        collect_target(model, data, tmp_path, target=squared_logits, split="groups", by="gender")
    torch.manual_seed(1)
    with pytest.raises(StoreMismatch, match=r"rows of \d+ blocks"):
        collect_target(lora(bert(), ["query"]), data, tmp_path, target=fairness("age"), split="fairness")
