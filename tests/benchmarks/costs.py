"""How the cost of each family grows with n rows, d columns, m queries, r kept columns and T members.

    python tests/benchmarks/costs.py --gpt2 --markdown costs.md --json costs.json --plot costs.png

**Growth.** A cost is the time that one thread spends on the CPU, so that what else runs on the machine counts little:
the least of several runs after one to warm up. Stores have one block of random float32 rows. Each size is doubled three
times while the others stay; the exponent is the slope of a straight line through the logarithms of the last three, as
constant costs weigh most at the first. The expected exponent is the slope of the family's formula at the same sizes.
`dropout` starts from rows that are compressed already, `gaussian` from whole ones. Where a method iterates, the time is
that of one step.

**Compression** (`--gpt2`). What forming compressed rows adds to the passes of a model of GPT-2's size (random weights,
12 layers of width 768): the inputs and gradients of its 48 weights are kept once, and the rows are formed from them
again and again, whole, projected and picked. A layer at a time, as a projection of all 85M columns takes 22 GB.

**Memory.** The most that torch holds at once while scoring, but for the mapped rows; from the allocations that its
profiler sees, not sampled. No self-influence is to form n × n and nothing d × d for d > n, so exponents are to be 1 at
most. `self_fisher` needs the smaller of both: n × n up to n = d, and d × d, which grows no more, beyond.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import cleandoc
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from scoring import fill
from series import publish
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from hf_influence.attribution import attribute
from hf_influence.evaluation.provenance import described, provenance
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.compress import Compressor, dropout, gaussian
from hf_influence.gradients.taps import Tap, find_taps
from hf_influence.store import PointAbout, number_of

SIZES = ("n", "d", "m", "r", "T")
FAR = 0.2
"""How far a measured exponent may be from the expected one without a word."""
MEMBERS = 5
CHEAPER = 50
SEQUENCES, TOKENS, KEPT = 4, 64, 64
Call = tuple[nn.Module, Tensor, Tensor]
"""A module, its input and the gradient at its output."""


@dataclass(frozen=True)
class Family:
    """What the cost of a method is said to be, and the sizes that are doubled from."""

    formula: str
    work: Callable[..., float]
    base: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    "ip": Family("n m d", lambda n, m, d: n * m * d, {"n": 2000, "d": 4096, "m": 100}),
    "ip_ensemble": Family("T n m d", lambda n, m, d, T: T * n * m * d, {"n": 2000, "d": 4096, "m": 100, "T": 1}),
    "datainf": Family("n m d", lambda n, m, d: n * m * d, {"n": 1000, "d": 2048, "m": 200}),
    "fisher": Family(
        "n² d / 2 + n³ / 3 + n m (n + d), Gram side",
        lambda n, m, d: n * n * d / 2 + n**3 / 3 + n * m * (n + d),
        {"n": 500, "d": 4096, "m": 50},
        {"side": "gram"},
    ),
    "lissa": Family("n m d a step", lambda n, m, d: n * m * d, {"n": 500, "d": 1024, "m": 100}),
    "cg": Family("n m d a step", lambda n, m, d: n * m * d, {"n": 500, "d": 1024, "m": 100}),
    "dropout": Family("n r (r + m)", lambda n, m, d, r: n * r * (r + m), {"n": 8000, "d": 2048, "m": 50, "r": 128}),
    "gaussian": Family("n d r", lambda n, d, r: n * d * r, {"n": 2000, "d": 2048, "r": 64}),
    "self_ip": Family("n d", lambda n, d: n * d, {"n": 2000, "d": 8192}),
    "self_datainf": Family("n² d", lambda n, d: n * n * d, {"n": 500, "d": 1024}),
}
NOTES = {
    ("dropout", "r"): "the n × m scores are written and put in order whatever r is.",
}
"""Why an exponent is far from the expected one, by method and the size that grows, or what its memory is for."""


def store_of(folder: Path, n: int, d: int, m: int = 50, kept: Compressor | None = None, T: int = 0) -> Path:
    """A store of random rows, with T members of an ensemble."""
    path = folder / f"{n}-{d}-{m}-{kept}-{T}"
    if not path.exists():
        fill(path, n, m, 1, d, kept)
        for member in range(T):
            about = PointAbout("parameter_dropout", {"member": member}, "")
            fill(path, n, m, 1, d, kept, about=about, point=number_of(path, about))
    return path


def seconds(run: Callable[[], Any]) -> float:
    """CPU seconds of a run, the least of as many as fit into one second, at least three; one to warm up before."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < 1:
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return min(times)


def doubled(value: int) -> list[int]:
    return [value * 2**k for k in range(4)]


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Of log cost over log size, the first one left out."""
    return statistics.linear_regression([math.log(x) for x in sizes[1:]], [math.log(y) for y in costs[1:]]).slope


def growth(method: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Size -> its values, the seconds at each, and the exponents."""
    family = FAMILIES[method]
    found = {}
    for size in (size for size in SIZES if size in family.base):
        values = doubled(family.base[size])
        every = [{**family.base, size: value} for value in values]
        work, took = [family.work(**one) for one in every], [cost(method, folder, **one) for one in every]
        found[size] = {
            "values": values,
            "work": work,
            "seconds": took,
            "expected": slope(values, work),
            "measured": slope(values, took),
        }
    return found


def cost(method: str, folder: Path, *, r: int = 0, **sizes: int) -> float:
    """CPU seconds of a method; of a step, where it iterates."""
    path = store_of(folder, **sizes, kept=dropout(r) if method == "dropout" else None)
    settings = {**FAMILIES[method].settings, **({"r": r} if r else {})}
    steps = attribute(path, method, **settings).report.get("iterations", 1)
    return seconds(lambda: attribute(path, method, **settings)) / steps


def ensemble_over_ip(folder: Path) -> float:
    """Cost of `ip_ensemble` over that of `ip`."""
    path = store_of(folder, 2000, 2048, 100, T=MEMBERS)
    return seconds(lambda: attribute(path, "ip_ensemble")) / seconds(lambda: attribute(path, "ip"))


def gpt2() -> dict[str, float]:
    """Seconds of forming the rows of one batch, by what is kept of them."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    taps = find_taps(model, "trainable", skip=["*wte*", "*wpe*", "*ln_*", "*bias"])
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        out.register_hook(lambda g: calls.append((module, args[0].detach(), g)))

    for tap in taps:
        tap.module.register_forward_hook(note)
    ids = torch.randint(0, 50_000, (SEQUENCES, TOKENS))
    model(input_ids=ids, labels=ids).loss.backward()
    ways = {"whole": None, "gaussian": gaussian(KEPT), "dropout": dropout(KEPT)}
    took = dict.fromkeys(ways, 0.0)
    for _, layer in groupby(taps, lambda tap: tap.module_name.rsplit(".", 2)[0]):
        those = list(layer)
        for way, compress in ways.items():
            took[way] += seconds_of_rows(those, calls, compress)
    return took


def seconds_of_rows(taps: Sequence[Tap], calls: Sequence[Call], compress: Compressor | None) -> float:
    """Of forming the rows of some layers out of what they saw of a batch."""
    catcher = RowCatcher(taps, compress)
    modules = {tap.module for tap in taps}
    seen = [call for call in calls if call[0] in modules]

    def rows() -> None:
        for module, x, g in seen:
            catcher.watch(module, x)(g)
        catcher.take()

    return seconds(rows)


SELF = ("self_ip", "self_ip_ensemble", "self_datainf", "self_lissa", "self_cg", "self_fisher")
SOLVING = ("datainf", "lissa", "cg", "fisher", "gaussian", "self_datainf", "self_fisher")
CHEAPLY = {"self_lissa": {"iterations": 1}, "self_cg": {"damping": 10.0}}
"""Fewer steps; each needs the same memory."""


@dataclass(frozen=True)
class Held:
    """The rows of which one size is doubled, and the methods whose memory is looked at."""

    size: str
    rows: dict[str, Any]
    methods: Sequence[str]


MEMORY = {
    "whole rows": Held("n", {"n": 500, "d": 2048}, SELF),
    "16 kept columns": Held("n", {"n": 4000, "d": 2048, "kept": dropout(16)}, SELF),
    "more columns than rows": Held("d", {"n": 500, "d": 1024}, SOLVING),
}


def memory(held: Held, folder: Path) -> dict[str, Any]:
    """MiB of each method at each size, and the exponent; beside them a square matrix of that size."""
    values = doubled(held.rows[held.size])
    found = {f"{held.size} × {held.size} float32": [value**2 / 2**18 for value in values]}
    for method in held.methods:
        stores = [store_of(folder, **held.rows | {held.size: v}, T=2 * ("ensemble" in method)) for v in values]
        found[method] = [peak_bytes(store, method) / 2**20 for store in stores]
    rows = {name: {"MiB": mib, "measured": slope(values, mib)} for name, mib in found.items()}
    return {"size": held.size, "values": values, "rows": rows}


def peak_bytes(store: Path, method: str) -> int:
    """The most that torch holds at once while scoring, but for what has the size of a file: those are mapped."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        attribute(store, method, **CHEAPLY.get(method, {}))
    mapped = {file.stat().st_size for file in store.rglob("*.safetensors")}
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(size for size in sizes if abs(size) not in mapped))


def markdown(found: Mapping[str, Any]) -> str:
    """All that was found, as tables; a line on each exponent that is not the expected one."""
    how = re.findall(r"^\*\*.*?(?=\n\n|\Z)", cleandoc(__doc__), re.M | re.S)
    said = dict(zip(("growth", "compression", "memory"), how, strict=True))
    rows, odd = [], []
    for method, sizes in found["growth"].items():
        for size, one in sizes.items():
            span = f"{one['values'][0]:,} to {one['values'][-1]:,}"
            took = f"{1e3 * one['seconds'][0]:.1f} to {1e3 * one['seconds'][-1]:.1f}"
            exponents = f"{one['expected']:.2f}", f"{one['measured']:.2f}"
            rows.append([f"`{method}`", FAMILIES[method].formula, size, span, took, *exponents])
            if abs(one["measured"] - one["expected"]) > FAR:
                odd.append((method, size))
    parts = ["# What scoring costs", described(found["about"]), said["growth"]]
    parts += [
        table("family", "formula", "size", "from … to", "ms of CPU", "expected", "measured", rows=rows),
        *notes(odd),
    ]
    ratio = found["ensemble over ip"]
    rows = [[f"`ip_ensemble` of {MEMBERS} members by `ip`", str(MEMBERS), f"{ratio:.2f}"]]
    if took := found.get("gpt2"):
        parts.append(said["compression"])
        parts.append("Seconds a batch: " + ", ".join(f"{way} {seconds:.4f}" for way, seconds in took.items()) + ".")
        whole, gauss, drop, limit = *(took[way] for way in ("whole", "gaussian", "dropout")), f"at least {CHEAPER}"
        rows.append([f"GPT-2: `gaussian({KEPT})` by `dropout({KEPT})`", limit, f"{gauss / drop:,.0f}"])
        rows.append(["the same without forming the whole rows to project", limit, f"{(gauss - whole) / drop:,.0f}"])
    parts += [table("ratio", "promised", "measured", rows=rows), said["memory"]]
    for title, one in found["memory"].items():
        rows = [[f"`{m}`", *(f"{x:,.1f}" for x in y["MiB"]), f"{y['measured']:.2f}"] for m, y in one["rows"].items()]
        parts.append(table(f"{title}, MiB", *(f"{one['size']} = {v:,}" for v in one["values"]), "exponent", rows=rows))
        methods = MEMORY[title].methods
        parts += notes([(m, title) for m in methods if one["rows"][m]["measured"] > 1 + FAR])
    return "\n\n".join(parts) + "\n"


def notes(odd: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each explanation, and what it explains."""
    alike: dict[str, list[str]] = {}
    for method, where in odd:
        alike.setdefault(NOTES.get((method, where), "not explained."), []).append(f"`{method}` ({where})")
    return [f"{', '.join(which)}: {note}" for note, which in alike.items()]


def table(*head: str, rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def plot(growth: Mapping[str, Any], file: Path) -> None:
    """A panel for each size: what was measured as dots, the formula through the last of them as a line."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 9), sharey=True)
    colours = dict(zip(growth, plt.get_cmap("tab10").colors, strict=False))
    for axis, size in zip(axes.flat, SIZES, strict=False):
        for method, one in ((method, sizes[size]) for method, sizes in growth.items() if size in sizes):
            label = f"{method}: {one['measured']:.2f} ({one['expected']:.2f})"
            axis.loglog(one["values"], one["seconds"], "o", color=colours[method], label=label)
            line = [one["seconds"][-1] * work / one["work"][-1] for work in one["work"]]
            axis.loglog(one["values"], line, "-", color=colours[method], alpha=0.6)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel(size)
        axis.legend(title="measured exponent (expected)", fontsize=8, title_fontsize=8, loc="upper right")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylim(top=100)  # room for the legends
    axes[1, 2].axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("seconds of CPU, one thread")
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--gpt2", action="store_true", help="the cost of compression as well; takes 4 GB")
    parser.add_argument("--markdown", type=Path, help="the tables")
    parser.add_argument("--json", type=Path, help="the single figures")
    parser.add_argument("--plot", type=Path, help="of the growth; needs matplotlib")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop
    found: dict[str, Any] = {"about": provenance(), "growth": {}, "memory": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for method in args.methods:
            found["growth"][method] = growth(method, folder)
            measured = (f"{size}^{one['measured']:.2f}" for size, one in found["growth"][method].items())
            print(method, *measured, flush=True)
        found["ensemble over ip"] = ensemble_over_ip(folder)
        found["memory"] = {title: memory(held, folder) for title, held in MEMORY.items()}
    if args.gpt2:
        found["gpt2"] = gpt2()
    found["seconds of CPU in all"] = time.process_time()
    publish(markdown(found), found, args)
    if args.plot:
        plot(found["growth"], args.plot)


if __name__ == "__main__":
    main()
