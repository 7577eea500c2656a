"""EK-FAC against a dense construction of its own, from plain autograd, one example and one token at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PAD, assert_same_state, bert, labelled, llama, lora, own_loss, padding, prompts, state_of
from torch import Tensor, nn

from hf_influence.attribution import attribute
from hf_influence.errors import MissingRows, StoreMismatch
from hf_influence.gradients import collect, collect_ekfac, dropout
from hf_influence.store import GradientStore

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)


def classifier() -> Any:
    return lora(bert(num_labels=3), ["query", "value"], r=2, bias="lora_only", task_type="SEQ_CLS")


MODELS: dict[str, Any] = {
    "classifier": (classifier, labelled(lambda i: i % 3, 6)),
    "language model": (lambda: lora(llama(), ["q_proj", "down_proj", "embed_tokens"], r=2), prompts(6)),
}


def factors(model: nn.Module, examples: list[Any], name: str) -> tuple[Tensor, Tensor | None]:
    """`S` and `A` of a weight, from the input and output gradient of its module, an unpadded example at a time."""
    module: Any = model.get_submodule(name.rsplit(".", 1)[0])
    left, right = torch.zeros(()), torch.zeros(())
    for example in examples:
        seen: dict[str, Tensor] = {}

        def note(_: nn.Module, args: Any, out: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen["x"] = args[0].detach()
            out.register_hook(partial(seen.__setitem__, "g"))

        handle = module.register_forward_hook(note)
        own_loss(model, example).backward()
        handle.remove()
        tokens = list(zip(seen["x"].flatten(0, -2), seen["g"].flatten(0, -2), strict=True))
        most = max(float(x.norm() * g.norm()) for x, g in tokens)
        for x, g in tokens:
            if x.norm() * g.norm() > 1e-10 * most:
                left = left + torch.outer(g, g)
                right = right + torch.outer(x, x)
    return left, None if name.endswith("bias") else right


def dense_inverse(left: Tensor, right: Tensor | None, g: Tensor, damping: float) -> Tensor:
    basis = torch.linalg.eigh(left)[1].contiguous()
    basis = basis if right is None else torch.kron(basis, torch.linalg.eigh(right)[1].contiguous())
    spectrum = torch.stack([(basis.T @ row) ** 2 for row in g]).mean(0)
    lam = damping * float(g.square().mean())
    return basis @ torch.diag(1 / (spectrum + lam)) @ basis.T


def collected(tmp_path: Path, kind: str) -> tuple[nn.Module, list[Any], GradientStore]:
    make, examples = MODELS[kind]
    model = make()
    collect(model, examples[:2], tmp_path, "query")
    return model, examples, collect(model, examples, tmp_path)


def test_scores_are_those_of_the_dense_construction(tmp_path: Path) -> None:
    model, examples, store = collected(tmp_path, "classifier")
    before = state_of(model)
    collect_ekfac(model, examples, tmp_path, batch_size=4)
    assert_same_state(before, state_of(model))
    model.eval()
    expected, alone = torch.zeros(6, 2, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64)
    for name in store.blocks:
        g, v = store.rows().block(name), store.rows("query").block(name)
        inverse = dense_inverse(*factors(model, examples, name), g, 0.3)
        expected += g @ inverse @ v.T
        alone -= ((g @ inverse) * g).sum(1, keepdim=True)
    assert any(name.endswith("bias") for name in store.blocks)
    close(attribute(store, "ekfac", damping=0.3).values, expected)
    close(attribute(store, "self_ekfac", damping=0.3).values, alone)


def test_padding_and_batches_do_not_change_the_basis(tmp_path: Path) -> None:
    """Embeddings and a language model included: the projections on the bases are the same."""
    model, examples, store = collected(tmp_path, "language model")
    assert any("lora_embedding_A" in name for name in store.blocks)
    scores = []
    for settings in ({"batch_size": 1}, {"batch_size": 6}, {"data_collator": padding("left", 3)}):
        collect_ekfac(model, examples, tmp_path, **settings)  # type: ignore[arg-type]
        scores.append(attribute(store, "ekfac").values)
    close(scores[1], scores[0])
    close(scores[2], scores[0])
    assert not torch.allclose(scores[0], attribute(store, "ip").values)


@pytest.mark.parametrize("extra", [[], [PAD]], ids=["words", "padding token in the text"])
def test_the_basis_of_one_hot_inputs_is_the_identity(tmp_path: Path, extra: list[int]) -> None:
    """Of the embedding alone, on sequences in which no token comes twice: a token's column is its own gradient."""
    model = lora(llama(), ["embed_tokens"], r=2)
    texts = ([*extra, 4, 9, 30, 17], [9, *extra, 5, 40], [21, 17, 4, 6, 33])
    examples = [{"input_ids": ids, "labels": ids} for ids in texts]
    store = collect(model, examples, tmp_path, skip=["*embedding_B*"])
    collect_ekfac(model, examples, tmp_path)
    (name,) = store.blocks
    g = store.rows().block(name)
    columns = g.unflatten(1, store.header.blocks[name]).transpose(1, 2).flatten(0, 1)  # [n vocabulary, r]
    counts = torch.diag(torch.arange(store.header.blocks[name][1]).double())  # any diagonal matrix will do
    expected = -((g @ dense_inverse(columns.T @ columns, counts, g, 0.1)) * g).sum(1, keepdim=True)
    close(attribute(store, "self_ekfac").values, expected)


def test_missing_factors_say_how_to_collect_them(tmp_path: Path) -> None:
    _, _, store = collected(tmp_path, "classifier")
    with pytest.raises(MissingRows, match=r"'ekfac' .*collect_ekfac\(model, dataset, "):
        attribute(store, "self_ekfac")


def test_compressed_rows_are_refused(tmp_path: Path) -> None:
    make, examples = MODELS["classifier"]
    model = make()
    collect(model, examples, tmp_path, compress=dropout(4))
    with pytest.raises(StoreMismatch, match="compressed by dropout"):
        collect_ekfac(model, examples, tmp_path)
    with pytest.raises(StoreMismatch, match="compressed by dropout"):
        attribute(tmp_path, "self_ekfac")
