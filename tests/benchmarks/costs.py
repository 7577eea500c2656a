"""How the cost of each family grows with n rows, d columns a block, m queries, r kept columns and T members.

    python tests/benchmarks/costs.py --json costs.json --plot costs.png

Each size is doubled a few times while the others stay; the exponent is the slope of a straight line through the
logarithms of the times of the larger sizes. Beside the table: what the paper promises for each.

`--gpt2` measures what compressing the gradients of a model of GPT-2's size (random weights, 12 layers of width 768,
124M parameters) costs beyond the forward and backward pass it comes from, dropout against gaussian.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scoring import fill
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_influence.attribution import attribute
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.compress import Compressor, dropout, gaussian
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.gradients.taps import find_taps
from hf_influence.store import PointAbout, number_of
from hf_influence.task import task_of

BASE = {"n": 500, "d": 1024, "m": 50, "r": 16, "T": 5}
STEPS = {
    "n": (500, 1000, 2000, 4000),
    "d": (1024, 2048, 4096, 8192),
    "m": (50, 100, 200, 400),
    "r": (16, 32, 64, 128),
    "T": (1, 2, 4, 8),
}
BLOCKS = 4
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ip": ("n m d", {}),
    "self_ip": ("n d", {}),
    "datainf": ("n m d", {}),
    "self_datainf": ("n² d", {}),
    "fisher": ("n² d + n³ (Gram side)", {"side": "gram"}),
    "dropout": ("n r (r + m)", {}),
    "gaussian": ("n d r", {}),
    "lissa": ("n m d a step", {}),
    "cg": ("n m d a step", {}),
    "ip_ensemble": ("T n m d", {}),
}
GROWS_WITH = {"r": ("dropout", "gaussian"), "T": ("ip_ensemble",)}


def seconds(run: Callable[[], object], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def exponent(sizes: list[float], times: list[float]) -> float:
    """Slope of log time over log size, the smallest size left out: constant costs weigh most there."""
    x, y = ([math.log(value) for value in values[1:]] for values in (sizes, times))
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def grow(method: str, size: str, rounds: int, folder: Path) -> tuple[list[float], list[float]]:
    """Sizes and times; `dropout` starts from rows that are compressed already."""
    times = []
    for value in STEPS[size]:
        sizes = BASE | {size: value}
        kept = dropout(sizes["r"]) if method == "dropout" else None
        members = range(sizes["T"]) if method == "ip_ensemble" else ()
        path = folder / f"{sizes['n']}-{sizes['d']}-{sizes['m']}-{sizes['r'] if kept else 'whole'}-{len(members)}"
        if not path.exists():
            fill(path, sizes["n"], sizes["m"], BLOCKS, sizes["d"], kept)
            for member in members:
                about = PointAbout("parameter_dropout", {"member": member}, "")
                point = number_of(path, about)
                fill(path, sizes["n"], sizes["m"], BLOCKS, sizes["d"], None, about=about, point=point)
        settings = dict(FAMILIES[method][1])
        if method in ("dropout", "gaussian"):
            settings["r"] = sizes["r"]
        times.append(seconds(lambda p=path, s=settings: attribute(p, method, **s), rounds))  # type: ignore[misc]
    return [float(value) for value in STEPS[size]], times


def beyond_the_pass(model: nn.Module, batch: dict[str, Any], compress: Compressor, rounds: int) -> float:
    """Seconds that rows compressed so take beyond the same passes without any rows."""
    task = task_of(model)
    taps = find_taps(model, "trainable", skip=["*wte*", "*wpe*", "*ln*", "*bias"])
    with FixedWeights(model, task, RowCatcher(taps, compress)) as resting:
        caught = seconds(lambda: resting.run(batch), rounds)

    def plain() -> None:
        logits = model(input_ids=batch["input_ids"]).logits
        torch.autograd.backward(logits, torch.ones_like(logits))

    for weight in model.parameters():
        weight.requires_grad_(False)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())
    bare = seconds(plain, rounds)
    handle.remove()
    for weight in model.parameters():
        weight.requires_grad_(True)
    return caught - bare


def gpt2(r: int, rounds: int) -> dict[str, float]:
    """Seconds of compression for one batch, and their ratio."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa"))
    ids = torch.randint(0, 50_000, (4, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    took = {c.name: beyond_the_pass(model, dict(batch), c, rounds) for c in (dropout(r), gaussian(r))}
    return took | {"ratio": took["gaussian"] / took["dropout"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpt2", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="needs matplotlib")
    args = parser.parse_args()
    if args.gpt2:
        print(json.dumps(gpt2(64, args.rounds), indent=1))
        return
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            sizes = [
                size
                for size in STEPS
                if method in GROWS_WITH.get(size, (method,)) and not (size == "m" and "self" in method)
            ]
            curves[method] = {size: grow(method, size, args.rounds, Path(folder)) for size in sizes}
            shown = ", ".join(f"{size}^{exponent(*curve):.2f}" for size, curve in curves[method].items())
            print(f"{method:14} expected {FAMILIES[method][0]:24} measured {shown}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(curves, indent=1))
    if args.plot:
        plot(curves, args.plot)


def plot(curves: dict[str, dict[str, tuple[list[float], list[float]]]], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(STEPS), figsize=(16, 4), sharey=True)
    for axis, size in zip(axes, STEPS, strict=True):
        for method, by_size in curves.items():
            if size in by_size:
                axis.loglog(*by_size[size], marker="o", label=f"{method} ({exponent(*by_size[size]):.2f})")
        axis.set_xlabel(size)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("seconds")
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
