"""Rows in float16, which loses what is small and has no room for what is large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert, labelled, lora, padding, prompts, stored, tiny
from torch import Tensor, nn
from watched import HalfPrecision, train

from hf_influence.errors import BadExample
from hf_influence.gradients import dropout, fixed, gaussian, logra, own_loss, sparse_jl
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.gradients.own_loss import task_of
from hf_influence.gradients.taps import find_taps
from hf_influence.points.laplace import MomentCatcher
from hf_influence.store import Rows

HALF = torch.float16
TOLERANCE = 1e-2


def faint(logits: Tensor, labels: Tensor, factor: float = 1e-6) -> Tensor:
    """A gradient such as sure examples have."""
    return factor * nn.functional.cross_entropy(logits, labels, reduction="none")


FAINT = own_loss(faint)


def off(rows: Rows, want: Rows) -> float:
    """Largest ‖row − reference‖ / ‖reference‖."""
    got, reference = (torch.cat([one.block(name) for name in one.blocks], 1).double() for one in (rows, want))
    return float(((got - reference).norm(dim=1) / reference.norm(dim=1)).max())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Examples of each pass forward."""
    sizes: list[int] = []
    forward = FixedWeights.forward

    def count(self: FixedWeights, batch: dict[str, Any]) -> Any:
        sizes.append(len(batch["input_ids"]))
        return forward(self, batch)

    monkeypatch.setattr(FixedWeights, "forward", count)
    return sizes


def classifier(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return lora(bert(num_labels=3), ["query", "dense"], dtype=dtype, modules_to_save=["classifier"])


COMPRESSORS = {"whole": None, "dropout": dropout(5), "gaussian": gaussian(5), "jl": sparse_jl(5), "logra": logra(4, 4)}


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
def test_small_gradients_come_through_float16(tmp_path: Path, compress: Any) -> None:
    options: dict[str, Any] = {"task": FAINT, "compress": compress}
    want = stored(tiny(torch.float32), prompts(), tmp_path / "want", **options)
    rows = stored(tiny(HALF), prompts(), tmp_path / "rows", **options)
    assert off(rows, want) < TOLERANCE
    torch.testing.assert_close(rows.stats["grad_norm"], want.stats["grad_norm"], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(rows.stats["loss"], want.stats["loss"], rtol=TOLERANCE, atol=0)


def test_small_gradients_of_a_classifier_come_through_float16(tmp_path: Path) -> None:
    data = labelled(lambda i: i % 3)
    want = stored(classifier(torch.float32), data, tmp_path / "want", task=FAINT)
    assert off(stored(classifier(HALF), data, tmp_path / "rows", task=FAINT), want) < TOLERANCE


def test_small_gradients_come_through_embeddings_in_float16(tmp_path: Path) -> None:
    made = [tiny(dtype, target_modules=["embed_tokens", "q_proj"]) for dtype in (torch.float32, HALF)]
    want, rows = (stored(model, prompts(), tmp_path / str(i), task=FAINT) for i, model in enumerate(made))
    assert off(rows, want) < TOLERANCE


def test_small_gradients_come_through_float16_that_a_trainer_has_switched_on(tmp_path: Path) -> None:
    model = tiny(torch.float32)
    want = stored(model, prompts(), tmp_path / "want", task=FAINT)
    train(model, tmp_path, kind=HalfPrecision, fp16=True, num_train_epochs=1, learning_rate=0.0)
    assert off(stored(model, prompts(), tmp_path / "rows", task=FAINT), want) < TOLERANCE


def test_rows_in_float16_do_not_depend_on_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed, "LARGEST", 2.0**15)  # too much for some
    sizes = counted(monkeypatch)
    rows = [stored(tiny(HALF), prompts(), tmp_path / str(b), batch_size=b) for b in (1, 7)]
    assert sizes.count(7) > 1
    assert off(*rows) < TOLERANCE
    assert off(rows[0], stored(tiny(torch.float32), prompts(), tmp_path / "want")) < TOLERANCE


def test_what_float16_cannot_hold_at_any_scale_is_refused(tmp_path: Path) -> None:
    loud = own_loss(faint, factor=1e6)
    with pytest.raises(BadExample, match=r"a gradient that is not finite.*wider dtype"):
        stored(tiny(HALF), prompts(), tmp_path, task=loud)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_other_types_go_through_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.delattr(fixed, "_scale")
    assert len(stored(tiny(dtype), prompts(), tmp_path)) == 7


def moments(dtype: torch.dtype, largest: float) -> dict[str, Tensor]:
    model = tiny(dtype)
    catcher = MomentCatcher(find_taps(model))
    with pytest.MonkeyPatch.context() as patch, FixedWeights(model, task_of(model, task=FAINT), catcher) as resting:
        patch.setattr(fixed, "LARGEST", largest)
        resting.backward(padding()(prompts()))
        catcher.settle()
    return catcher.factors


@pytest.mark.parametrize("largest", [fixed.LARGEST, 2.0**15])
def test_kronecker_factors_of_small_gradients_come_through_float16(largest: float) -> None:
    want, got = moments(torch.float32, largest), moments(HALF, largest)
    assert list(got) == list(want)
    for name, factor in want.items():
        assert (got[name] - factor).norm() <= 2 * TOLERANCE * factor.norm(), name
