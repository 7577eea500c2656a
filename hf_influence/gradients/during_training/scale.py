"""How much of an example's own gradient is in the gradient that a training step makes.

A training loop divides the loss by the examples, by the tokens of this batch or of several, by accumulation steps or
processes, and multiplies it to fit half precision; the rules change between versions. So the factor is measured. At a
token t with logits z and label y, cross-entropy sends back

    ∂L/∂z_t = c · (softmax(z_t) − onehot(y))

whatever L is divided by. One number `c` an example undoes every scale at once, and a gradient that points anywhere else
is no cross-entropy: it is refused, not guessed at. Where a task has another loss, its gradient at the logits takes the
place of that vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_influence.errors import UnsupportedModel
from hf_influence.task import IGNORED, TOKENS_AT_ONCE_ACCELERATOR, LanguageModel, Reduction, Task

TOKENS_AT_ONCE = 32
"""Few enough for the probabilities over a vocabulary to stay in the cache of a processor."""

NUMBERS_AT_ONCE = 1 << 20

TOLERANCE = 1e-2
TOLERANCE_HALF = 6e-2
FAINT = 1e-4
"""An error vector shorter than this is mostly rounding: the factor of the other examples of the batch is used."""


RARE = 0.1
"""A probability below this loses digits where it is known as its distance from 1."""


@dataclass(frozen=True)
class Measured:
    """What a training step shows of each example.

    Attributes:
        scale: `[n]`, turns the gradient that the step makes through an example into that of its own loss.
        stats: Name -> `[n]`, as in `Outcome`.
        missing: `[n]`, where nothing came back of a loss that is not 0: the example has a weight of 0 in this step.
    """

    scale: Tensor
    stats: dict[str, Tensor]
    missing: Tensor


def of_outcome(task: Task, logits: Tensor, labels: Tensor, gradient: Tensor) -> Measured:
    """From the gradient at the logits of whole examples, both `[b, …]`: a factor of what the task says of each alone.

    Raises:
        UnsupportedModel: It is no such thing.
    """
    outcome = task.outcome(logits, labels)
    down, up, _, square = _products(outcome.logit_gradient, gradient).flatten(1).unbind(1)  # [n] each
    factor = up / down if bool((down > FAINT**2).all()) else _steady(up, down)
    left = square - factor * (2 * up - factor * down)  # of what was seen, without its part along the own gradient
    tolerance = _tolerance(gradient)
    missing = (square == 0) & (down > FAINT**2)
    if bool(((left <= tolerance**2 * square) & (factor > 0)).all()):
        scale = 1 / factor
    else:
        miss = (left.clamp(min=0) / square.clamp(min=torch.finfo(square.dtype).tiny)).sqrt()
        _check(miss, down.sqrt().masked_fill(missing, 0), factor, tolerance, task)
        scale = _inverse(factor)
    return Measured(scale.to(logits.device), {"loss": outcome.loss, **outcome.stats}, missing)


def of_own_loss(
    task: LanguageModel, logits: Tensor, targets: Tensor, owner: Tensor, n: int, gradient: Tensor
) -> Measured:
    """From the gradient at the logits of a language model that trains on another loss than cross-entropy.

    The arguments are those of `of_tokens`. Every labelled token is compared in its whole direction.
    """
    at = (targets.flatten() != IGNORED).nonzero()[:, 0]  # [m], the examples one after the other
    who = owner.flatten()[at]
    count = torch.bincount(who, minlength=n)
    place = torch.arange(len(at), device=at.device) - (count.cumsum(0) - count)[who]
    position = torch.zeros(n, max(1, int(count.max())), dtype=torch.long, device=at.device)  # [n, k]
    labels = torch.full_like(position, IGNORED)
    position[who, place], labels[who, place] = at, targets.flatten()[at]
    arrived = gradient.flatten(0, 1)[position].masked_fill((labels == IGNORED)[..., None], 0)  # [n, k, v]
    return of_outcome(task, logits.flatten(0, 1)[position], labels, arrived)


def of_tokens(
    logits: Tensor, targets: Tensor, owner: Tensor, n: int, gradient: Tensor, reduction: Reduction
) -> Measured:
    """From the gradient at the logits of a language model.

    Every labelled token is asked for its factor, the hardest one of each example for its whole direction.

    Args:
        logits: `[b, t, v]`.
        targets: `[b, t]`, what each position predicts, -100 for nothing.
        owner: `[b, t]`, the example of each position.
        n: Number of examples.
        gradient: Of the training loss at the logits, `[b, t, v]`.
        reduction: "mean" or "sum" over an example's labelled tokens.
    """
    at = (targets.flatten() != IGNORED).nonzero()[:, 0]  # [k]
    y, who = targets.flatten()[at], owner.flatten()[at]
    z, g = logits.flatten(0, 1), gradient.flatten(0, 1)  # [b t, v]
    length, g_top = _over_rows(g, at, _length, _top)  # [k]
    some, token = _hardest(length, who, n)
    error, arrived = _error(z, at[token], y[token]), g[at[token]].double()  # [n, v]
    c = _factor_of(error, arrived, some, n)[who].to(g)  # [k]
    loss, margin, el2n = _read_off(z, g, at, y, length, g_top, c) or _judge(z, at, y)
    own = torch.expm1(-loss)  # [k], p_y − 1
    seen = g[at, y].to(own)  # [k], gradient at the label: c (p_y − 1)
    count = torch.bincount(who, minlength=n)
    mean = lambda values: _total(values, who, n) / count.clamp(min=1)  # noqa: E731  (the one thing it is used for)
    square = _total(own.double().square(), who, n)  # [n]
    factor = _steady(_total(seen.double() * own, who, n), square)
    # every token of an example weighs the same
    missing = torch.zeros(n, dtype=torch.bool, device=z.device)
    missing[some] = (length[token] == 0) & (square[some] > FAINT**2)
    heavy = square.sqrt().masked_fill(missing, 0)
    off = _total((seen.double() - factor[who] * own).square(), who, n).sqrt() / (factor.abs() * heavy)
    _check(off, heavy / count.clamp(min=1).sqrt(), factor, _tolerance(gradient))
    # and what comes back at the hardest token is an error vector of cross-entropy
    miss = (arrived - factor[some, None] * error).norm(dim=1)
    miss = miss / arrived.norm(dim=1).clamp(min=torch.finfo(miss.dtype).tiny)
    _check(miss, error.norm(dim=1).masked_fill(missing[some], 0), factor[some], _tolerance(gradient))
    stats = {
        "loss": mean(loss) if reduction == "mean" else _total(loss, who, n),
        "n_tokens": count,
        "margin": mean(margin),
        "correct": mean((margin > 0).to(loss)),
        "el2n": mean(el2n),
    }
    return Measured(_own(factor, count, reduction), stats, missing)


def of_log_probabilities(
    log_p: Tensor,
    labelled: Tensor,
    owner: Tensor,
    n: int,
    gradient: Tensor,
    reduction: Reduction,
    correct: Tensor | None,
) -> Measured:
    """From the gradient at the log-probabilities of the labels, for a head that makes no logits.

    There cross-entropy sends back the same `−c` at every labelled token of an example.

    Args:
        log_p: `[b, t]`.
        labelled: `[b, t]`, which of them count.
        owner: `[b, t]`, the example of each position.
        n: Number of examples.
        gradient: Of the training loss at `log_p`.
        reduction: "mean" or "sum" over an example's labelled tokens.
        correct: `[b, t]`, whether the label was the most probable token, if known.
    """
    at = labelled.flatten().nonzero()[:, 0]
    who, loss, seen = owner.flatten()[at], -log_p.flatten()[at], -gradient.flatten()[at].double()
    count = torch.bincount(who, minlength=n)
    total = _total(loss, who, n)
    factor = _total(seen, who, n) / count.clamp(min=1)
    off = _total((seen - factor[who]).square(), who, n).sqrt() / (factor.abs() * count.sqrt())
    missing = (_total(seen.abs(), who, n) == 0) & (count > 0)
    _check(off, count.to(off).masked_fill(missing, 0), factor, _tolerance(gradient))
    stats = {"loss": total / count.clamp(min=1) if reduction == "mean" else total, "n_tokens": count}
    if correct is not None:
        stats["correct"] = _total(correct.flatten()[at].to(loss), who, n) / count.clamp(min=1)
    return Measured(_own(factor, count, reduction), stats, missing)


def _factor_of(error: Tensor, arrived: Tensor, some: Tensor, n: int) -> Tensor:
    """The factor of each example `[n]`, told by one token of each of the examples `some`."""
    up, down = error.new_zeros(2, n)
    up[some], down[some] = (arrived * error).sum(1), error.square().sum(1)
    return _steady(up, down)


def _read_off(
    z: Tensor, g: Tensor, at: Tensor, y: Tensor, length: Tensor, g_top: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `_judge` gives, read off the gradient `g` that came back: it has the probabilities in it already.

    With the factor `c [k]` of each token's example, `p = g / c` wherever the label is not, and `p_y = 1 + g_y / c`.
    Three passes over the vocabulary instead of eight, and no exponentials.

    Args:
        z: Logits `[·, v]`.
        g: What came back at them.
        at: The labelled tokens `[k]`.
        y: Their labels.
        length: The length of each row `g[at]`.
        g_top: Its largest entry.
        c: The factor of each.

    Returns:
        `None` where `g` says too little: in half precision, or with a factor that is not positive, which the checks
        will refuse.
    """
    if not {z.dtype, g.dtype} <= {torch.float32, torch.float64} or not len(at):
        return None
    if not bool((torch.isfinite(c) & (c > 0)).all()):
        return None
    (z_top,) = _over_rows(z, at, _top)
    z_y, own, log_p_top = z[at, y], g[at, y] / c, (g_top / c).log()  # own: p_y − 1
    first = z_y >= z_top
    normalizer = torch.where(first, z_y - own.log1p(), z_top - log_p_top)  # log Σ exp z
    margin = z_y - torch.where(first, normalizer + log_p_top, z_top)
    loss = torch.where(first, -own.log1p(), normalizer - z_y)  # the difference of large logits would round it away
    judged = loss, margin, length / c
    lost = ((g_top <= 0) | (first & (own < RARE - 1))).nonzero()[:, 0]
    if len(lost):
        for values, exact in zip(judged, _judge(z, at[lost], y[lost]), strict=True):
            values[lost] = exact
    return judged


def _over_rows(values: Tensor, at: Tensor, *measures: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Each measure of the rows `at` of `values [·, v]`, `[k]`; few rows are copied, and those a few at a time."""
    if 2 * len(at) > len(values):
        return [measure(values)[at] for measure in measures]
    pieces = [[measure(rows) for measure in measures] for piece in at.split(TOKENS_AT_ONCE) for rows in [values[piece]]]
    return [torch.cat(measured) for measured in zip(*pieces, strict=True)]


def _top(rows: Tensor) -> Tensor:
    return rows.amax(1)


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))


def _hardest(weight: Tensor, who: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The examples that have tokens, and of each the token of the largest weight `[k]`."""
    hardest = torch.full((n,), -1, device=who.device, dtype=torch.long)
    order = weight.argsort(stable=True)
    hardest[who[order]] = order
    some = (hardest >= 0).nonzero()[:, 0]
    return some, hardest[some]


def _error(z: Tensor, at: Tensor, y: Tensor) -> Tensor:
    """softmax(z) − onehot(y) at a few tokens, `[n, v]` in float64."""
    p = z[at].softmax(1, dtype=torch.float64)  # whose sum is over tens of thousands
    return p.scatter_add_(1, y[:, None], torch.full_like(p[:, :1], -1))


def _judge(z: Tensor, at: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, margin and EL2N of the tokens `at` in `z [·, v]` with the labels `y`, each `[k]`, a few at a time."""
    exact = torch.promote_types(z.dtype, torch.float32)
    numbers = torch.empty(3, len(at), dtype=exact, device=z.device)
    step = TOKENS_AT_ONCE if z.device.type == "cpu" else TOKENS_AT_ONCE_ACCELERATOR
    for start in range(0, len(at), step):
        piece = slice(start, start + step)
        label = y[piece, None]
        rows = z[at[piece]].to(exact)  # a copy
        z_y = rows.gather(1, label)
        best_other = rows.scatter_(1, label, -torch.inf).amax(1, keepdim=True)
        top = torch.maximum(z_y, best_other)
        e = rows.sub_(top).exp_()  # of all but the label
        others, e_y = e.sum(1, keepdim=True), torch.exp(z_y - top)
        total = others + e_y
        numbers[0, piece] = (total.log() + top - z_y)[:, 0]
        numbers[1, piece] = (z_y - best_other)[:, 0]
        numbers[2, piece] = (torch.hypot(torch.linalg.vector_norm(e, dim=1, keepdim=True), others) / total)[:, 0]
    return numbers[0], numbers[1], numbers[2]


def _products(own: Tensor, seen: Tensor) -> Tensor:
    """Scalar products of each example's two gradients `[b, …]` with themselves and each other, `[b, 2, 2]`.

    In float64, so that what is left of one without the other can be told from them, and on the CPU, where the few
    numbers that are made of them cost least.
    """
    own, seen = own.flatten(1), seen.flatten(1)
    many = max(1, NUMBERS_AT_ONCE // max(1, own.shape[1]))
    if len(own) > many:
        pieces = zip(own.split(many), seen.split(many), strict=True)
        return torch.cat([_products(*piece) for piece in pieces])
    both = torch.stack((own, seen), 1).double()
    return torch.bmm(both, both.mT).cpu()


def _total(values: Tensor, who: Tensor, n: int) -> Tensor:
    return values.new_zeros(n).index_add_(0, who, values)


def _steady(up: Tensor, down: Tensor) -> Tensor:
    """`up / down` of each example; of the whole batch where an example says too little, 0 where none says anything."""
    together = up.sum() / down.sum().clamp(min=torch.finfo(down.dtype).tiny)
    return torch.where(down > FAINT**2, up / down.clamp(min=FAINT**2), together)


def _own(factor: Tensor, count: Tensor, reduction: Reduction) -> Tensor:
    scale = _inverse(factor)
    return scale / count.clamp(min=1) if reduction == "mean" else scale


def _inverse(factor: Tensor) -> Tensor:
    return torch.where(factor != 0, 1 / factor, 0.0)


def _tolerance(gradient: Tensor) -> float:
    return TOLERANCE_HALF if gradient.dtype in (torch.float16, torch.bfloat16) else TOLERANCE


def _check(miss: Tensor, length: Tensor, factor: Tensor, tolerance: float, task: Task | None = None) -> None:
    finite = torch.isfinite(factor)  # half precision overflows now and then; such rows are dropped later
    wrong = finite & (length > FAINT) & ((miss > tolerance) | (factor <= 0))
    if not bool(wrong.any()):
        return
    at = int(wrong.nonzero()[0])
    loss = "cross-entropy" if task is None else f"the loss of the task {task.settings()}"
    raise UnsupportedModel(
        f"the training loss is not the mean or sum of the examples' own losses: what it sends back to the output of "
        f"the model for example {at} of the batch is off by {float(miss[at]):.1%} of its length from the gradient of "
        f"{loss} (factor {float(factor[at]):.3g}). Label smoothing, a custom compute_loss_func, token weights "
        "and preference losses do this. Say what the loss of one example is (task=label_smoothing(0.1), "
        "task=own_loss(function)), train with the plain loss, or capture at the end alone (during=None)."
    )
