"""Compressors by themselves, and the methods that look at rows through them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from stores import Blocks, make_store, make_trained_store
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_influence.attribution import attribute
from hf_influence.errors import BadSetting, StoreError, StoreMismatch
from hf_influence.gradients import dropout, gaussian, logra, sparse_jl
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.compress import Compressor, compressor_of
from hf_influence.gradients.taps import find_taps

assert_exact = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TRAIN: Blocks = {"layer0": random(1, 20, 7), "layer1": random(2, 20, 26)}
QUERY: Blocks = {"layer0": random(3, 5, 7), "layer1": random(4, 5, 26)}


def compressed(rows: Blocks, compressor: Compressor) -> Blocks:
    return {name: compressor.fit(name, g.shape[1])(g) for name, g in rows.items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: gaussian(8, seed),
        lambda seed: sparse_jl(8, seed),
        lambda seed: sparse_jl(8, seed, 0.5),
        lambda seed: logra(3, 4, seed),
    ],
    ids=["gaussian", "sparse_jl", "sparse_jl half full", "logra"],
)
def test_projections_keep_inner_products_on_average(make: Any) -> None:
    g, v = random(1, 2, 60)
    found = torch.stack([torch.dot(*make(seed).fit("w", [6, 10])(torch.stack([g, v]))) for seed in range(2000)])
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - g @ v) < 4 * error
    assert error < 0.1 * g.norm() * v.norm()


def test_two_sided_projection_is_a_kronecker_product() -> None:
    compressor, rows = logra(3, 4, seed=7), random(1, 5, 6 * 10)
    left, right = compressor.sides("w", [6, 10])
    assert left is not None
    assert right is not None
    assert_exact(compressor.fit("w", [6, 10])(rows), rows @ torch.kron(left.double(), right.double()))


@pytest.mark.parametrize(
    ("shape", "width"), [([4, 100], 4 * 16), ([100, 4], 16 * 4), ([3], 3), ([100], 16), ([2, 3], 6), ([50, 60], 256)]
)
def test_no_side_is_projected_up(shape: list[int], width: int) -> None:
    compressor = logra(16, 16)
    rows = random(1, 2, torch.Size(shape).numel())
    assert compressor.width(shape) == width
    assert compressor.fit("w", shape)(rows).shape == (2, width)
    for side, kept in zip(shape, compressor.sides("w", shape), strict=False):
        assert (kept is None) == (side <= 16)


@pytest.mark.parametrize("compressor", [gaussian(9), sparse_jl(9), dropout(9), logra(9, 9)], ids=lambda c: c.name)
def test_a_narrow_block_is_kept_as_it_is(compressor: Compressor) -> None:
    rows = random(1, 4, 9)
    assert torch.equal(compressor.fit("w", 9)(rows), rows)


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0, None])
def test_sparse_projections_have_few_entries_of_one_size(density: float | None) -> None:
    d, r = 2500, 40
    matrix = sparse_jl(r, seed=3, density=density).fit("w", d)(torch.eye(d))
    share = density or d**-0.5
    entries = matrix[matrix != 0]
    torch.testing.assert_close(entries.abs(), torch.full_like(entries, (share * r) ** -0.5))
    assert abs(len(entries) / (d * r) - share) <= 4 * (share * (1 - share) / (d * r)) ** 0.5
    assert abs(entries.sign().mean()) < 4 / len(entries) ** 0.5


@pytest.mark.parametrize("compressor", [dropout(5, 1), gaussian(5, 1), sparse_jl(5, 1, 0.2), logra(2, 3, 1)])
def test_a_compressor_is_made_again_from_its_settings(compressor: Compressor) -> None:
    again = compressor_of(compressor.settings())
    assert again == compressor
    rows = random(1, 3, 60)
    assert torch.equal(again.fit("w", [6, 10])(rows), compressor.fit("w", [6, 10])(rows))
    other = compressor_of({**compressor.settings(), "seed": 2})
    assert other is not None
    assert not torch.equal(other.fit("w", [6, 10])(rows), compressor.fit("w", [6, 10])(rows))


def test_an_unknown_compressor_says_which_are_known() -> None:
    with pytest.raises(StoreError, match=r"name.*'zip'.*it has: dropout, gaussian, sparse_jl, logra"):
        compressor_of({"name": "zip", "r": 3})


@pytest.mark.parametrize("make", [lambda: logra(0, 4), lambda: logra(4, 0), lambda: sparse_jl(0), lambda: gaussian(0)])
def test_no_columns_are_refused(make: Any) -> None:
    with pytest.raises(BadSetting, match="must be at least 1"):
        make()


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5])
def test_a_density_that_is_no_share_is_refused(density: float) -> None:
    with pytest.raises(BadSetting, match="above 0 and at most 1"):
        sparse_jl(4, density=density)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(part.numel() for part in (out,) if isinstance(part, Tensor))])
        return out


@pytest.mark.parametrize(("compress", "whole"), [(logra(4, 4), False), (None, True)])
def test_the_whole_row_never_exists(compress: Compressor | None, whole: bool) -> None:
    model, x = nn.Sequential(nn.Linear(400, 300)), torch.randn(2, 3, 400)
    catcher = RowCatcher(find_taps(model, "trainable"), compress)
    model.requires_grad_(False)
    catcher.attach()
    y = model(x)
    with Largest() as made:
        y.square().sum().backward()
        catcher.take()
    assert (made.size >= 300 * 400) == whole


SEEN = {
    "logra": (logra(3, 4, seed=3), "fisher", {"r_in": 3, "r_out": 4}),
    "rand_proj": (gaussian(4, seed=3), "ip", {"r": 4}),
    "rand_select": (dropout(4, seed=3), "ip", {"r": 4}),
}


@pytest.mark.parametrize("method", SEEN)
def test_methods_on_compressed_rows_are_others_on_rows_compressed_before(tmp_path: Path, method: str) -> None:
    compressor, plain, settings = SEEN[method]
    inverse = oracle.fisher if plain == "fisher" else oracle.identity
    expected = oracle.influence(compressed(TRAIN, compressor), compressed(QUERY, compressor), inverse)
    whole = attribute(make_store(tmp_path / "whole", TRAIN, QUERY), method, **settings, seed=3)
    small = make_store(tmp_path / "small", TRAIN, QUERY, compress=compressor)
    kept = attribute(small, method)
    assert_exact(whole.values, expected)
    assert_exact(kept.values, expected)
    assert_exact(attribute(small, plain).values, expected)
    assert whole.settings == kept.settings
    assert whole.settings.items() >= {**settings, "seed": 3}.items()


@pytest.mark.parametrize("stored", [True, False])
def test_tracin_on_projected_rows(tmp_path: Path, stored: bool) -> None:
    whole = make_trained_store(tmp_path / "whole", TRAIN, QUERY)
    small = make_trained_store(tmp_path / "small", TRAIN, QUERY, compress=gaussian(4, seed=3))
    expected = attribute(small, "tracin").values
    assert not torch.allclose(expected, attribute(whole, "tracin").values)
    scores = attribute(small, "tracin_rp") if stored else attribute(whole, "tracin_rp", r=4, seed=3)
    assert_exact(scores.values, expected)


def test_any_method_works_on_sparsely_projected_rows(tmp_path: Path) -> None:
    compressor = sparse_jl(5, seed=1)
    expected = oracle.influence(compressed(TRAIN, compressor), compressed(QUERY, compressor), oracle.fisher)
    assert_exact(attribute(make_store(tmp_path, TRAIN, QUERY, compress=compressor), "fisher").values, expected)


@pytest.mark.parametrize(
    ("stored", "method", "settings", "plain"),
    [
        (logra(3, 4), "gaussian", {}, "fisher"),
        (logra(3, 4), "logra", {"r_in": 4}, "fisher"),
        (logra(3, 4), "logra", {"seed": 1}, "fisher"),
        (dropout(4), "rand_proj", {}, "ip"),
        (gaussian(4), "rand_select", {}, "ip"),
        (dropout(4), "tracin_rp", {}, "tracin"),
        (sparse_jl(4), "gaussian", {}, "fisher"),
    ],
)
def test_rows_compressed_otherwise_are_refused(
    tmp_path: Path, stored: Compressor, method: str, settings: dict[str, Any], plain: str
) -> None:
    store = make_trained_store(tmp_path, TRAIN, QUERY, compress=stored)
    with pytest.raises(StoreMismatch, match=rf"compressed by {stored.name}\(.*method='{plain}'"):
        attribute(store, method, **settings)
