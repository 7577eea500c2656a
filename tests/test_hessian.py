"""Products with the Hessian, its eigenpairs and the systems solved with it, against dense matrices."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PAD, assert_same_state, bert, labelled, llama, lora, own_loss, padding, prompts, state_of, tiny
from stores import make_store
from torch import Tensor, nn

from hf_influence.attribution import attribute
from hf_influence.errors import BadSetting, MissingRows, NotConverged, StoreMismatch, UnsupportedModel
from hf_influence.gradients import collect, collect_hessian, solve_queries
from hf_influence.gradients.compress import dropout
from hf_influence.gradients.objective import own_losses
from hf_influence.gradients.plan import Plan
from hf_influence.gradients.second_order.hessian import Hessian
from hf_influence.gradients.second_order.lanczos import lanczos
from hf_influence.gradients.second_order.solvers import conjugate_gradients, lissa
from hf_influence.store import GradientStore
from hf_influence.store.artifacts import write_artifact
from hf_influence.task import CausalLM, Classification

assert_exact = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)


def classifier() -> Any:
    torch.manual_seed(1)
    return lora(bert(num_labels=3), ["query"], r=1, task_type="SEQ_CLS")


MODELS: dict[str, Any] = {
    "bert": (classifier, labelled(lambda i: i % 3, 5)),
    "llama": (lambda: tiny(r=1), prompts(5)),
    "embedding, padding token in the text": (
        lambda: lora(llama(), ["embed_tokens"], r=2),
        [{name: [*values, PAD, 9] for name, values in row.items()} for row in prompts(5)],
    ),
}


def dense_hessian(model: nn.Module, examples: list[Any], names: list[str]) -> Tensor:
    """Of the mean loss, each example alone and without padding, a column of the identity at a time."""
    model.eval()
    weights = [dict(model.named_parameters())[name] for name in names]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = torch.stack([own_loss(model, example) for example in examples]).mean()
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)])
        rows = [torch.autograd.grad(s, weights, retain_graph=True, materialize_grads=True) for s in slope]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def opened(model: nn.Module, dataset: Any, store: GradientStore, **settings: Any) -> Hessian:
    return Hessian(model, Plan.again(store, model, dataset, 0), store.header, **settings)


@pytest.mark.parametrize("kind", MODELS)
def test_products_are_those_of_the_dense_hessian(tmp_path: Path, kind: str) -> None:
    make, examples = MODELS[kind]
    model = make()
    store = collect(model, examples, tmp_path, batch_size=2)
    before = state_of(model)
    with opened(model, examples, store, batch_size=2) as hessian:
        v = torch.randn(3, hessian.size, dtype=torch.float64)
        products = [hessian(v), hessian(v)]
        assert_exact(hessian.joined(hessian.split(v)), v)
    assert_same_state(before, state_of(model))
    expected = v @ dense_hessian(model, examples, store.blocks)
    assert expected.norm() > 1e-3
    for product in products:
        error = (product - expected).norm() / expected.norm()
        assert error < (1e-10 if kind == "bert" else 1e-5)  # Llama's normalisation rounds to float32


def test_a_product_is_the_change_of_the_mean_gradient(tmp_path: Path) -> None:
    """Finite differences of the rows themselves: H and the rows belong to the same loss, the padding left of it."""
    model, (_, examples) = classifier(), MODELS["bert"]
    store = collect(model, examples, tmp_path / "0")
    with opened(model, examples, store, batch_size=3) as hessian:
        v = torch.randn(1, hessian.size, dtype=torch.float64)
        product = hessian(v)[0]
        steps = hessian.split(v)
    means = []
    for at, sign in (("1", 1e-5), ("2", -2e-5)):
        for name, weight in model.named_parameters():
            if name in steps:
                weight.data += sign * steps[name].view_as(weight)
        rows = collect(model, examples, tmp_path / at, data_collator=padding("left")).rows()
        means.append(torch.cat([rows.block(name) for name in rows.blocks], 1).mean(0))
    torch.testing.assert_close(product, (means[0] - means[1]) / 2e-5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (Classification("single_label_classification", 4), torch.tensor([0, 3, 1])),
        (Classification("regression", 4), torch.randn(3, 4)),
        (Classification("multi_label_classification", 4), torch.eye(4)[:3]),
        (CausalLM("mean"), torch.tensor([[1, -100, 2], [-100, -100, -100], [0, 1, 2]])),
        (CausalLM("sum"), torch.tensor([[1, -100, 2], [-100, -100, -100], [0, 1, 2]])),
    ],
)
def test_the_objective_has_the_losses_and_gradients_of_the_task(task: Any, labels: Tensor) -> None:
    z = torch.randn(*(labels.shape if labels.ndim == 2 and isinstance(task, CausalLM) else (3,)), 4).double()
    z.requires_grad_()
    losses, outcome = own_losses(task, z, labels), task.outcome(z, labels)
    assert_exact(losses, outcome.loss)
    assert_exact(torch.autograd.grad(losses.sum(), z)[0], outcome.logit_gradient)


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed)).double())[
        0
    ]
    return q @ torch.diag(values) @ q.T


@pytest.mark.parametrize(
    "values",
    [torch.linspace(-3, 5, 12), torch.tensor([2.0] * 4 + [-1.0] * 3 + [0.0] * 5), torch.tensor([1.0]), torch.zeros(4)],
    ids=["distinct", "multiple and zero", "one", "nothing"],
)
def test_lanczos_finds_the_whole_spectrum(values: Tensor) -> None:
    matrix = symmetric(values.double())
    pairs = lanczos(lambda v: v @ matrix, len(matrix), 50, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(matrix)
    expected = expected[expected.abs() > 1e-9]
    assert_exact(pairs.values.sort().values, expected)
    assert (pairs.values.abs().diff() <= 1e-12).all()
    assert_exact(pairs.vectors @ matrix, pairs.values[:, None] * pairs.vectors)
    assert_exact(pairs.vectors @ pairs.vectors.T, torch.eye(len(expected), dtype=torch.float64))


def test_lanczos_says_how_far_off_it_is() -> None:
    matrix = symmetric(torch.cat([torch.tensor([10.0, -8.0]), torch.linspace(-1, 1, 58)]).double())
    pairs = lanczos(lambda v: v @ matrix, 60, 12, dtype=torch.float64)
    assert_exact(pairs.values[:2], torch.tensor([10.0, -8.0]).double())
    off = (pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors).norm(dim=1)
    assert_exact(pairs.residuals, off)
    assert pairs.residuals[-1] > 1e-3


def test_arnoldi_is_the_inverse_on_the_dominant_eigenvectors(tmp_path: Path) -> None:
    model, (_, examples) = classifier(), MODELS["bert"]
    store = collect(model, examples, tmp_path)
    collect(model, examples[:2], tmp_path, "query")
    collect_hessian(model, examples, tmp_path, top=20, iterations=500)
    values, vectors = torch.linalg.eigh(dense_hessian(model, examples, store.blocks))
    order = values.abs().argsort(descending=True)[:20]
    g, v = (torch.cat([rows.block(b) for b in store.blocks], 1) for rows in (store.rows(), store.rows("query")))
    for positive in (False, True):
        chosen = [int(j) for j in order if values[j] > 0 or not positive]
        inverse = sum(torch.outer(vectors[:, j], vectors[:, j]) / values[j] for j in chosen)
        assert isinstance(inverse, Tensor)
        scores = attribute(store, "arnoldi", positive=positive)
        torch.testing.assert_close(scores.values, g @ inverse @ v.T, rtol=1e-6, atol=1e-8)
        alone = attribute(store, "self_arnoldi", positive=positive).values[:, 0]
        torch.testing.assert_close(alone, -((g @ inverse) * g).sum(1), rtol=1e-6, atol=1e-8)
    assert len(chosen) < 20  # there are negative ones among them
    torch.testing.assert_close(
        attribute(store, "arnoldi", top=2).values, attribute(store, "arnoldi", top=2, positive=False).values
    )
    mean = attribute(store, "arnoldi", queries="mean").values[:, 0]
    assert_exact(mean, attribute(store, "arnoldi").mean())


def test_more_eigenpairs_than_are_kept_are_refused(tmp_path: Path) -> None:
    model, (_, examples) = classifier(), MODELS["bert"]
    collect(model, examples, tmp_path)
    collect_hessian(model, examples, tmp_path, top=3, iterations=20)
    with pytest.raises(MissingRows, match=r"3 eigenpairs.*4 were asked for.*collect_hessian"):
        attribute(tmp_path, "self_arnoldi", top=4)


def test_positive_eigenvalues_that_are_not_there_are_missing(tmp_path: Path) -> None:
    rows = torch.randn(6, 3, dtype=torch.float64)
    store = make_store(tmp_path, {"a": rows})
    eigenpairs = {"vectors.a": torch.eye(3, dtype=torch.float64), "values": -torch.arange(3.0, 0, -1)}
    write_artifact(store, "hessian", eigenpairs, {}, adapter="")
    assert attribute(store, "self_arnoldi").values.ne(0).all()
    with pytest.raises(MissingRows, match=r"none of the eigenvalues.*positive=True leaves nothing"):
        attribute(store, "self_arnoldi", positive=True)


def test_eigenpairs_that_have_not_converged_are_counted(tmp_path: Path) -> None:
    model, (_, examples) = classifier(), MODELS["bert"]
    collect(model, examples, tmp_path)
    with pytest.warns(UserWarning, match=r"of 6 eigenpairs have not converged"):
        collect_hessian(model, examples, tmp_path, top=6, iterations=6)


@pytest.mark.parametrize("queries", ["each", "mean"])
@pytest.mark.parametrize("solver", ["cg", "lissa"])
def test_solved_queries_are_those_of_the_dense_inverse(tmp_path: Path, solver: Any, queries: Any) -> None:
    model, (_, examples) = classifier(), MODELS["bert"]
    store = collect(model, examples, tmp_path)
    collect(model, examples[:2], tmp_path, "query")
    hessian = dense_hessian(model, examples, store.blocks)
    damping = 0.5 - float(torch.linalg.eigvalsh(hessian).min())
    settings = {"solver": solver, "queries": queries, "damping": damping, "tolerance": 1e-11, "iterations": 400}
    solve_queries(model, examples, tmp_path, **settings)
    g, v = (torch.cat([rows.block(b) for b in store.blocks], 1) for rows in (store.rows(), store.rows("query")))
    v = v.mean(0, keepdim=True) if queries == "mean" else v
    scores = attribute(store, "ip", query_split=f"query-{solver}")
    assert_exact(scores.values, g @ torch.linalg.inv(hessian + damping * torch.eye(len(hessian)).double()) @ v.T)
    assert scores.query_ids == (["mean"] if queries == "mean" else [0, 1])
    stats = store.rows(f"query-{solver}").stats
    assert (stats["residual"] <= 1e-11).all()
    assert (stats["damping"] == damping).all()
    solve_queries(model, examples, tmp_path, **{**settings, "damping": 2 * damping})  # replaces them
    assert (store.rows(f"query-{solver}").stats["damping"] == 2 * damping).all()


def test_the_solvers_solve_each_column_to_its_own_end() -> None:
    matrix = symmetric(torch.linspace(0.1, 3, 20).double())
    right = torch.randn(4, 20, dtype=torch.float64)
    right[1] = 0
    right[2] = 1e-6 * torch.linalg.eigh(matrix).eigenvectors[:, 3]
    expected = right @ torch.linalg.inv(matrix + 0.2 * torch.eye(20).double())
    for solver, limit in ((conjugate_gradients, 60), (lissa, 600)):
        solution, residual, used = solver(lambda v: v @ matrix, right, 0.2, limit, 1e-12)
        assert used < limit
        assert_exact(solution, expected)
        assert (residual <= 1e-12).all()


def test_lissa_reports_what_ten_iterations_leave() -> None:
    matrix, right = symmetric(torch.linspace(0.1, 3, 20).double()), torch.randn(2, 20, dtype=torch.float64)
    solution, residual, used = lissa(lambda v: v @ matrix, right, 0.2, 10, 1e-12)
    assert used == 10
    off = right - solution @ (matrix + 0.2 * torch.eye(20).double())
    assert_exact(residual, off.norm(dim=1) / right.norm(dim=1))
    assert residual.max() > 1e-3


@pytest.mark.parametrize("solver", [conjugate_gradients, lissa])
def test_an_indefinite_system_is_refused_with_the_damping_it_needs(solver: Any) -> None:
    matrix, right = symmetric(torch.linspace(-1, 3, 20).double()), torch.randn(2, 20, dtype=torch.float64)
    with pytest.raises(NotConverged, match=r"damping above (0\.\d|1)"):
        solver(lambda v: v @ matrix, right, 0.2, 100, 1e-8)


def test_lissa_notices_growth_that_its_estimate_has_missed() -> None:
    """One negative eigenvalue so close to the others that ten products do not find it."""
    values = torch.cat([torch.tensor([-0.05]), torch.linspace(0, 3, 199)]).double()
    matrix, right = symmetric(values), torch.randn(1, 200, dtype=torch.float64)
    with pytest.raises(NotConverged, match="LiSSA diverges: in iteration"):
        lissa(lambda v: v @ matrix, right, 0.02, 3000, 1e-8)


def test_too_few_iterations_say_what_is_left() -> None:
    matrix, right = symmetric(torch.linspace(0.01, 3, 20).double()), torch.randn(2, 20, dtype=torch.float64)
    with pytest.raises(NotConverged, match=r"after 3 iterations .* a residual of 0\.\d+ of the query"):
        conjugate_gradients(lambda v: v @ matrix, right, 0.0, 3, 1e-8)


def test_the_residual_is_that_of_the_solution_and_not_the_one_carried_along() -> None:
    """In float32 the two drift apart."""
    right = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    matrix = symmetric(torch.logspace(0, -4, 400).double()).float()
    solution, residual, _ = conjugate_gradients(lambda v: v @ matrix, right, 0.0, 2000, 1e-4)
    off = right.double() - solution.double() @ matrix.double()
    true = (off.norm(dim=1) / right.double().norm(dim=1)).float()
    assert true.max() > 1.5e-4
    torch.testing.assert_close(residual, true, rtol=0.3, atol=0)
    matrix = symmetric(torch.logspace(0, -5, 400).double()).float()
    with pytest.raises(NotConverged, match=r"residual of 0\.00\d+ of the query.*Rounding in torch\.float32"):
        conjugate_gradients(lambda v: v @ matrix, right, 0.0, 4000, 1e-4)


def test_another_adapter_and_compressed_rows_are_refused(tmp_path: Path) -> None:
    model, (_, examples) = classifier(), MODELS["bert"]
    collect(model, examples, tmp_path / "whole", "query")
    collect(model, examples, tmp_path / "small", "query", compress=dropout(4))
    for work in (collect_hessian, partial(solve_queries, damping=1.0)):
        with pytest.raises(StoreMismatch, match=r"compressed by dropout.*without compress"):
            work(model, examples, tmp_path / "small")
    next(w for w in model.parameters() if w.requires_grad).data += 1
    for work in (collect_hessian, partial(solve_queries, damping=1.0)):
        with pytest.raises(StoreMismatch, match="other values of the adapter"):
            work(model, examples, tmp_path / "whole")


@pytest.mark.parametrize(
    ("work", "settings", "message"),
    [
        (collect_hessian, {"top": 5, "iterations": 4}, "top=5 and iterations=4"),
        (collect_hessian, {"examples": 0}, "examples=0"),
        (solve_queries, {"damping": -1.0}, "damping=-1.0"),
        (solve_queries, {"damping": 1.0, "solver": "qr"}, "solver='qr'"),
        (solve_queries, {"damping": 1.0, "iterations": 0}, "iterations=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, work: Any, settings: Any, message: str) -> None:
    model, (_, examples) = classifier(), MODELS["bert"]
    collect(model, examples, tmp_path, "query")
    with pytest.raises(BadSetting, match=message):
        work(model, examples, tmp_path, **settings)


class OnlyOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_an_operation_that_hides_its_backward_pass_is_noticed(tmp_path: Path) -> None:
    model, (_, examples) = classifier(), MODELS["bert"]
    collect(model, examples, tmp_path)
    down = model.get_base_model().bert.encoder.layer[1].attention.self.query.lora_A.default
    handle = down.register_forward_hook(lambda module, args, out: OnlyOnce.apply(out))
    with pytest.raises(UnsupportedModel, match=r"lora_[AB].*small steps.*eager"):
        collect_hessian(model, examples, tmp_path, top=1)
    handle.remove()


def test_adapters_that_share_their_storage_are_refused(tmp_path: Path) -> None:
    model = lora(llama(tie_word_embeddings=True), ["embed_tokens"], dtype=torch.float32, ensure_weight_tying=True)
    collect(model, prompts(3), tmp_path)
    with pytest.raises(UnsupportedModel, match=r"lm_head.lora_A.* shares its storage with .*embedding_B"):
        collect_hessian(model, prompts(3), tmp_path, top=1)


def test_products_use_the_examples_that_were_drawn(tmp_path: Path) -> None:
    model, (_, examples) = classifier(), MODELS["bert"]
    store = collect(model, examples, tmp_path)
    with opened(model, examples, store, examples=2, seed=3) as hessian:
        drawn = [examples[i] for i in hessian.positions]
        v = torch.randn(1, hessian.size, dtype=torch.float64)
        product = hessian(v)
    assert len(drawn) == 2
    assert_exact(product, v @ dense_hessian(model, drawn, store.blocks))
