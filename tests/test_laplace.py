"""Draws from the Laplace posterior against a dense one of its own, from plain autograd, a token at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PAD, assert_same_state, bert, labelled, llama, lora, own_loss, padding, prompts, state_of, tiny
from torch import Tensor, nn

from hf_influence import attribute, collect_at
from hf_influence.errors import BadExample, BadSetting, MissingRows, StoreMismatch, UnsupportedModel
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.gradients.plan import Plan
from hf_influence.points import Point, laplace, parameter_dropout, present
from hf_influence.points.laplace import Laplace, MomentCatcher, Posterior
from hf_influence.points.point import trainable, trainable_values

assert_exact = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)
same = partial(torch.testing.assert_close, rtol=0, atol=0)
EXAMPLES, QUERIES = prompts(), prompts(3, seed=1)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return lora(bert(num_labels=3), ["value"], r=2, bias="lora_only", task_type="SEQ_CLS")


def words() -> nn.Module:
    torch.manual_seed(0)
    return lora(llama(), ["embed_tokens"], r=2, lora_dropout=0.0)


CASES: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "language model": (tiny, EXAMPLES),
    "classifier with biases": (classifier, labelled(lambda i: i % 3)),
}


def posterior(model: nn.Module, examples: Any, **settings: Any) -> Posterior:
    point = laplace(model, examples, 1, **settings)[0]
    assert isinstance(point, Laplace)
    return point.posterior


def precision(model: nn.Module, examples: list[Any], name: str, scale: float) -> Tensor:
    """Of the posterior of a weight or bias, `[d, d]`, from what its module sees of each unpadded token."""
    weight, module = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
    tokens: list[tuple[Tensor, Tensor]] = []
    for example in examples:
        seen: dict[str, Tensor] = {}

        def note(_: nn.Module, args: Any, out: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen["x"] = args[0].detach()
            out.register_hook(partial(seen.__setitem__, "g"))

        handle = module.register_forward_hook(note)
        own_loss(model.eval(), example).backward()
        handle.remove()
        pairs = list(zip(seen["x"].flatten(0, -2), seen["g"].flatten(0, -2), strict=True))
        most = max(float(x.norm() * g.norm()) for x, g in pairs)
        tokens += [(x, g) for x, g in pairs if x.norm() * g.norm() > 1e-10 * most]
    n, t = len(examples), len(tokens)
    s = torch.stack([torch.outer(g, g) for _, g in tokens]).sum(0) / n
    a = torch.stack([torch.outer(x, x) for x, _ in tokens]).sum(0) / t
    prior = 1 / (scale * weight.detach().square().mean().sqrt()) ** 2
    data = n * (s if weight.ndim == 1 else torch.kron(s, a))
    return data + prior * torch.eye(weight.numel(), dtype=torch.float64)


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [0.1, 3000.0])
def test_a_draw_is_the_root_of_the_dense_covariance_times_noise(case: str, scale: float) -> None:
    make, examples = CASES[case]
    model = make()
    before = state_of(model)
    spread = posterior(model, examples, prior_scale=scale, batch_size=3).spread
    assert_same_state(before, state_of(model))
    assert list(spread) == list(trainable(model))
    for name, one in spread.items():
        shape = trainable(model)[name].shape
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        dense = precision(model, examples, name, scale)
        if scale > 1:  # where the prior is wide, the data count
            assert torch.linalg.eigvalsh(dense)[-1] > 1.5 / one.variance
        expected = power(dense, -0.5) @ noise.flatten()
        assert_exact(one.draw(torch.Generator().manual_seed(3)).flatten(), expected)


@pytest.mark.parametrize("extra", [[], [PAD]], ids=["words", "padding token in the text"])
def test_an_embedding_has_a_diagonal_factor(extra: list[int]) -> None:
    """On sequences in which no token comes twice, so that a token's column of the row is its own gradient."""
    model, scale = words(), 300.0
    texts = ([*extra, 4, 9, 30, 17], [9, *extra, 5, 40], [21, 17, 4, 6, 33])
    examples = [{"input_ids": ids, "labels": ids} for ids in texts]
    (name,) = (name for name in trainable(model) if "embedding_A" in name)
    weight, columns = trainable(model)[name], []
    for example in examples:
        (row,) = torch.autograd.grad(own_loss(model.eval(), example), [weight])
        columns += [(token, row[:, token]) for token in example["input_ids"] if row[:, token].norm() > 1e-12]
    assert len(columns) == 9  # nothing follows the last token of an example
    s = torch.stack([torch.outer(column, column) for _, column in columns]).sum(0)
    counts = torch.zeros(weight.shape[1], dtype=torch.float64)
    for token, _ in columns:
        counts[token] += 1 / len(columns)
    prior = 1 / (scale**2 * weight.detach().square().mean())
    dense = torch.kron(s, torch.diag(counts)) + prior * torch.eye(weight.numel(), dtype=torch.float64)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = posterior(model, examples, prior_scale=scale).spread[name].draw(torch.Generator().manual_seed(3))
    assert_exact(step.flatten(), power(dense, -0.5) @ noise.flatten())


def test_many_draws_have_the_dense_covariance() -> None:
    """In units in which it is the identity, over two weights at once: they are independent."""
    model, scale = tiny(), 300.0
    names = [name for name in trainable(model) if "layers.1.self_attn.v_proj" in name]
    skip = [name for name in trainable(model) if name not in names]
    points = laplace(model, EXAMPLES, 8000, seed=2, prior_scale=scale, skip=skip)
    start, roots = trainable_values(model), [power(precision(model, EXAMPLES, name, scale), 0.5) for name in names]
    states = [point.values(model) for point in points]
    steps = [torch.stack([(one[name] - start[name]).flatten() for one in states]) for name in names]  # [M, d]
    plain = torch.cat([step @ root for step, root in zip(steps, roots, strict=True)], 1)
    size = plain.shape[1]
    assert (plain.mean(0).abs() < 5 / 8000**0.5).all()
    off = plain.T @ plain / len(points) - torch.eye(size, dtype=torch.float64)
    assert off.abs().max() < 6 * (2 / 8000) ** 0.5
    same({name: states[0][name] for name in skip}, {name: start[name] for name in skip})


def states_of(points: list[Point], model: nn.Module) -> list[dict[str, Tensor]]:
    out = []
    for point in points:
        with point.entered(model):
            out.append(trainable_values(model))
    return out


def test_members_follow_the_seed_and_not_their_number() -> None:
    model = tiny(torch.float32)
    before = state_of(model)
    few, many, others = (
        states_of(laplace(model, EXAMPLES, n, seed=seed), model) for n, seed in ((2, 0), (4, 0), (2, 1))
    )
    assert_same_state(before, state_of(model))
    same(few, many[:2])
    name = next(iter(few[0]))
    assert len({float(state[name].flatten()[0]) for state in (*many, *others)}) == 6


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 7}, {"data_collator": padding("left", 3)}])
def test_batches_and_padding_do_not_change_the_members(settings: dict[str, Any]) -> None:
    model = lora(llama(), ["embed_tokens", "q_proj", "down_proj"], r=2)
    expected = states_of(laplace(model, EXAMPLES, 1), model)
    assert_exact(states_of(laplace(model, EXAMPLES, 1, **settings), model), expected)


def tokens_reached(model: nn.Module, examples: list[Any]) -> dict[str, int]:
    plan = Plan.of(model, examples, None, "mean", None, "trainable", (), None, True)
    catcher = MomentCatcher(plan.taps)
    with FixedWeights(model, plan.task, catcher) as resting:
        resting.backward(plan.examples.batch(range(len(examples))))
        catcher.settle()
    return {name: int(count) for name, count in catcher.factors.items() if name.startswith("tokens.")}


def test_half_precision_counts_the_same_tokens() -> None:
    model, examples = tiny(torch.bfloat16), prompts(40, shortest=20, longest=32)
    found = tokens_reached(model, examples)
    assert found == tokens_reached(copy.deepcopy(model).float(), examples)
    assert min(found.values()) > 0


def test_a_weight_that_is_zero_stays_and_none_moves_by_more_than_the_prior() -> None:
    model = tiny()
    first, *others = trainable(model)
    with torch.no_grad():
        trainable(model)[first].zero_()
    (state,) = states_of(laplace(model, EXAMPLES, 1, prior_scale=0.1), model)
    assert not state[first].any()
    for name in others:
        own = trainable(model)[name].detach()
        moved = (state[name] - own).square().mean().sqrt() / own.square().mean().sqrt()
        assert 0.01 < moved < 0.15


def test_la_from_end_to_end(tmp_path: Path) -> None:
    model, splits = tiny(lora_dropout=0.0), {"train": EXAMPLES, "query": QUERIES}
    points = laplace(model, EXAMPLES, 3)
    collect_at(model, splits, tmp_path, [present(), *parameter_dropout(1)], rows=False)
    store = collect_at(model, splits, tmp_path, points, rows=False)
    assert store.points("laplace") == [2_000_000, 2_000_001, 2_000_002]
    again = collect_at(model, splits, tmp_path, laplace(model, EXAMPLES, 4), rows=False)
    assert again.points("laplace") == [2_000_000, 2_000_001, 2_000_002, 2_000_003]
    examples = [*EXAMPLES, *QUERIES]
    moved = []
    with torch.no_grad():
        start = [float(own_loss(model.eval(), z)) for z in examples]
        for point in points:
            with point.entered(model):
                moved.append([float(own_loss(model, z)) - was for z, was in zip(examples, start, strict=True)])
    changes = torch.tensor(moved, dtype=torch.float64)  # [M, n + m]
    expected = torch.zeros(7, 3, dtype=torch.float64)
    for change in changes:
        expected += torch.outer(change[:7], change[7:]) / 3
    chosen = store.points("laplace")[:3]
    assert changes.abs().max() > 1e-3
    assert_exact(attribute(store, "la", points=chosen).values, expected)
    assert_exact(attribute(store, "self_la", points=chosen).values, -changes[:, :7].square().mean(0)[:, None])
    assert attribute(store, "la").settings["points"] == again.points("laplace")


def test_members_that_would_round_otherwise_are_not_taken_for_those_that_are_there(tmp_path: Path) -> None:
    model = tiny(torch.float32)
    for n in (1, 2):
        collect_at(model, {"train": EXAMPLES}, tmp_path, laplace(model, EXAMPLES, n, batch_size=2), rows=False)
    with pytest.raises(StoreMismatch, match=r"'laplace' at other values .* same weights: .*another batch_size"):
        collect_at(model, {"train": EXAMPLES}, tmp_path, laplace(model, EXAMPLES, 3, batch_size=7), rows=False)
    others = laplace(model, EXAMPLES, 3, batch_size=7)
    store = collect_at(model, {"train": EXAMPLES}, tmp_path, others, rows=False, overwrite=True)
    assert store.points("laplace") == [1_000_000, 1_000_001, 1_000_002]


def test_many_small_draws_give_the_linear_influence() -> None:
    """The theorem behind the method, for the draws alone: `mean_m ⟨g_i, step_m⟩ ⟨g_q, step_m⟩` is `g_iᵀ P⁻¹ g_q`."""
    model, scale = tiny(), 300.0
    name = next(name for name in trainable(model) if "layers.1.self_attn.v_proj.lora_B" in name)
    weight = trainable(model)[name]
    g = torch.stack([torch.autograd.grad(own_loss(model.eval(), z), [weight])[0].flatten() for z in EXAMPLES])
    spread, generator = posterior(model, EXAMPLES, prior_scale=scale).spread[name], torch.Generator().manual_seed(0)
    changes = torch.stack([g @ spread.draw(generator).flatten() for _ in range(8000)])  # [M, n]
    exact = g @ torch.linalg.inv(precision(model, EXAMPLES, name, scale)) @ g.T
    off = (changes.T @ changes / 8000 - exact) / torch.outer(exact.diagonal(), exact.diagonal()).sqrt()
    assert off.abs().max() < 6 * (2 / 8000) ** 0.5


@pytest.mark.parametrize("method", ["la", "self_la"])
def test_without_members_it_says_how_to_make_them(tmp_path: Path, method: str) -> None:
    model = tiny()
    store = collect_at(model, {"train": EXAMPLES, "query": QUERIES}, tmp_path, [present()], rows=False)
    with pytest.raises(MissingRows, match=r"no points of the kind 'laplace'.*collect_at\(.*laplace\(model, train\)"):
        attribute(store, method)


def test_members_of_other_weights_are_refused(tmp_path: Path) -> None:
    model = tiny()
    points = laplace(model, EXAMPLES, 1)
    with torch.no_grad():
        next(iter(trainable(model).values())).add_(1)
    with pytest.raises(StoreMismatch, match="made from other weights"):
        collect_at(model, {"train": EXAMPLES}, tmp_path, points, rows=False)
    with pytest.raises(StoreMismatch, match="does not fit the model"), points[0].entered(tiny(r=2)):
        pass


@pytest.mark.parametrize(
    "settings", [{"n": 0}, {"n": 2.5}, {"prior_scale": 0}, {"prior_scale": float("inf")}, {"prior_scale": float("nan")}]
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting, match=rf"laplace\({next(iter(settings))}="):
        laplace(tiny(), EXAMPLES, **settings)


def test_gradients_that_are_not_finite_are_refused() -> None:
    model = tiny()
    with torch.no_grad():
        model.get_submodule("base_model.model.model.norm").weight.fill_(float("nan"))
    before = state_of(model)
    with pytest.raises(BadExample, match=r"gradients of the dataset at .*lora_.* are not finite"):
        laplace(model, EXAMPLES, 1)
    assert all(not module.training or was for module, was in zip(model.modules(), before["modes"], strict=True))
    assert [weight.requires_grad for weight in model.parameters()] == before["flags"]


def test_a_weight_that_no_gradient_reaches_is_named() -> None:
    model = tiny()
    model.unused = nn.Linear(2, 2, bias=False).double()
    with pytest.raises(UnsupportedModel, match=r"no gradient reached unused\.weight .*skip=\['unused\.weight'"):
        laplace(model, EXAMPLES, 1)
    (state,) = states_of(laplace(model, EXAMPLES, 1, skip=["unused.*"]), model)
    same(state["unused.weight"], model.unused.weight.detach())
