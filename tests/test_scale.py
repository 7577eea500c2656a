"""What a training step shows at the logits of a language model, against each token's own probabilities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_influence.errors import UnsupportedModel
from hf_influence.gradients.during_training.scale import of_log_probabilities, of_outcome, of_tokens
from hf_influence.task import CausalLM, Classification

EXAMPLES, LENGTH, VOCABULARY = 5, 12, 40


def sent_back(logits: Tensor, targets: Tensor, factor: float, smoothing: float = 0.0) -> Tensor:
    """The gradient of the summed loss times a factor, at the logits."""
    z = logits.clone().requires_grad_()
    loss = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=smoothing)
    (factor * loss).backward()
    assert z.grad is not None
    return z.grad


def world(sure: float, labelled: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and owners, of which the labels are raised by up to `sure`."""
    logits = 3 * torch.randn(EXAMPLES, LENGTH, VOCABULARY, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (EXAMPLES, LENGTH))
    logits.scatter_add_(2, targets[..., None], sure * torch.rand(EXAMPLES, LENGTH, 1, dtype=torch.float64))
    targets[torch.rand(EXAMPLES, LENGTH) > labelled] = -100
    targets[:, 3] = 7  # each example has some
    owner = torch.arange(EXAMPLES)[:, None].expand(EXAMPLES, LENGTH)
    return logits.to(dtype), targets, owner


@pytest.mark.parametrize("labelled", [0.2, 1.0])
@pytest.mark.parametrize("sure", [0.0, 12.0, 60.0, 2000.0])
def test_scale_and_statistics_are_those_of_the_probabilities(sure: float, labelled: float) -> None:
    logits, targets, owner = world(sure, labelled)
    logits[0, 3] = 0  # all alike: the label is first and improbable
    measured = of_tokens(logits, targets, owner, EXAMPLES, sent_back(logits, targets, 0.037), "mean")
    for i in range(EXAMPLES):
        at = targets[i] != -100
        z, y = logits[i][at], targets[i][at]
        p, hot = z.softmax(1), F.one_hot(y, VOCABULARY)
        margin = z.gather(1, y[:, None])[:, 0] - z.masked_fill(hot.bool(), -torch.inf).amax(1)
        torch.testing.assert_close(measured.scale[i] * 0.037 * at.sum(), measured.scale.new_tensor(1.0))
        expected = {
            "loss": F.cross_entropy(z, y),
            "margin": margin.mean(),
            "correct": (margin > 0).double().mean(),
            "el2n": (p - hot).norm(dim=1).mean(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(measured.stats[name][i], value, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sure", [5.0, 10.0, 14.0])
def test_errors_of_tokens_that_are_known_well_keep_their_digits(sure: float) -> None:
    """At the end of training 1 − p is far below what single precision tells from 1."""
    logits, targets = torch.randn(1, 6, VOCABULARY), torch.randint(0, VOCABULARY, (1, 6))
    logits.scatter_(2, targets[..., None], sure)
    error = logits.double().softmax(2) - F.one_hot(targets, VOCABULARY)
    outcome = CausalLM().outcome(logits, targets)
    torch.testing.assert_close(outcome.stats["el2n"].double(), error.norm(dim=2).mean(1), rtol=2e-2, atol=0)


def test_single_precision_keeps_its_digits() -> None:
    logits, targets, owner = world(12.0, 1.0)
    exact = of_tokens(logits, targets, owner, EXAMPLES, sent_back(logits, targets, 2e-4), "sum")
    single = of_tokens(logits.float(), targets, owner, EXAMPLES, sent_back(logits.float(), targets, 2e-4), "sum")
    torch.testing.assert_close(single.scale, exact.scale, rtol=2e-6, atol=0)
    for name in ("loss", "margin", "el2n"):
        torch.testing.assert_close(single.stats[name].double(), exact.stats[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [15.0, 55.0, -145.0])
def test_an_answer_that_is_known_well_is_cross_entropy_whatever_the_level_of_its_logits(level: float) -> None:
    """One token of which 1 − p is some 1e-4, at which the difference of large logits has no digits left."""
    generator = torch.Generator().manual_seed(0)
    targets, owner = torch.tensor([[-100, 7]]), torch.zeros(1, 2, dtype=torch.long)
    for missing in torch.linspace(1.05e-4, 4e-4, 30):
        z = torch.randn(1, 2, VOCABULARY, generator=generator)
        z[0, 1, 7] = -torch.inf
        z[0, 1, 7] = z[0, 1].logsumexp(0) + ((1 - missing) / missing).log()
        z = (z + level - z[0, 1, 7]).requires_grad_()
        F.cross_entropy(z[0, 1:], targets[0, 1:]).backward()
        measured = of_tokens(z.detach(), targets, owner, 1, z.grad, "mean")
        assert measured.scale.item() == pytest.approx(1, rel=2e-2)


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_what_is_no_cross_entropy_is_refused(factor: float) -> None:
    logits, targets, owner = world(4.0, 1.0)
    g = sent_back(logits, targets, factor, smoothing=0.1 if factor > 0 else 0.0)
    with pytest.raises(UnsupportedModel, match="not the mean or sum"):
        of_tokens(logits, targets, owner, EXAMPLES, g, "mean")


def test_token_weights_are_refused() -> None:
    logits, targets, owner = world(4.0, 1.0)
    g = sent_back(logits, targets, 1.0)
    g[2, 5] *= 1.5
    with pytest.raises(UnsupportedModel, match="example 2 of the batch"):
        of_tokens(logits, targets, owner, EXAMPLES, g, "mean")


def test_an_example_of_which_nothing_comes_back_is_missing() -> None:
    """Its weight is 0. The others have their scales as ever."""
    logits, targets, owner = world(4.0, 1.0)
    g = sent_back(logits, targets, 0.037)
    whole = of_tokens(logits, targets, owner, EXAMPLES, g, "mean")
    assert not whole.missing.any()
    g[2] = 0
    part = of_tokens(logits, targets, owner, EXAMPLES, g, "mean")
    others = torch.arange(EXAMPLES) != 2
    assert part.missing.tolist() == (~others).tolist()
    torch.testing.assert_close(part.scale[others], whole.scale[others])
    task = Classification("single_label_classification", VOCABULARY)
    z, y = logits[:, 3], torch.arange(EXAMPLES)
    arrived = (z.softmax(1) - F.one_hot(y, VOCABULARY)) * (y != 1)[:, None]
    measured = of_outcome(task, z, y, arrived)
    assert measured.missing.tolist() == (y == 1).tolist()
    torch.testing.assert_close(measured.scale[y != 1], torch.ones(EXAMPLES - 1).to(measured.scale))
    log_p = logits.log_softmax(2).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    sent = torch.where(targets != -100, -0.5, 0.0).to(log_p)
    sent[2] = 0
    seen = of_log_probabilities(log_p, targets != -100, owner, EXAMPLES, sent, "mean", None)
    assert seen.missing.tolist() == (~others).tolist()
