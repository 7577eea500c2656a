"""Time and memory of the scoring methods, as ratios to the inner product on the same rows.

    python tests/benchmarks/scoring.py
    python tests/benchmarks/scoring.py --rows 4000 --queries 400 --methods datainf fisher self_fisher

The methods take turns, so that a busy machine slows all of them alike; a ratio is the median over the rounds of the
method's time by the inner product's in the same round. Memory is the peak of anonymous memory in a process of its own
beyond what it held before, as a share of the rows: pages of the mapped store are not counted.

Measured on two CPU cores with torch 2.13, otherwise idle (memory counts the buffers of the linear algebra library,
which do not grow with the rows):

    method     time / ip   limit    memory / rows
    ip          1                   0.05
    cosine      1.37                0.38
    datainf     2.75       4        0.04
    fisher      9.84       14       0.29
    dropout     0.053      0.1      0.01
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from hf_influence.attribution import attribute
from hf_influence.gradients.compress import Compressor, dropout
from hf_influence.store import GradientStore, Header

LIMITS = {"datainf": 4.0, "fisher": 14.0, "dropout": 0.1}


def fill(
    path: Path, rows: int, queries: int, blocks: int, width: int, compress: Compressor | None, **where: Any
) -> Path:
    """A store of random rows, the same ones whole and compressed; `where` names the point, by default the first."""
    names = {f"block{i}": [width] for i in range(blocks)}
    header = Header(
        model={},
        task={},
        blocks=names,
        compress=compress.settings() if compress else None,
        widths={name: compress.width(shape) for name, shape in names.items()} if compress else None,
    )
    maps = {name: compress.fit(name, width) if compress else (lambda g: g) for name in names}
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", rows), ("query", queries)):
        writer = GradientStore.create(path, header).writer(split, adapter="", dataset="", n=n, ids=None, **where)
        for start in range(0, n, 50):
            index = range(start, min(start + 50, n))
            whole = {name: torch.randn(len(index), width, generator=generator) for name in names}
            writer.append(index, {name: maps[name](g) for name, g in whole.items()}, {})
        writer.flush()
    return path


def seconds(store: Path, method: str) -> float:
    start = time.perf_counter()
    attribute(store, method)
    return time.perf_counter() - start


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def peak_bytes(store: Path, method: str) -> int:
    """Anonymous memory that scoring takes at most, sampled every two milliseconds."""
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    attribute(store, method)
    done.set()
    watcher.join()
    return peak - before


def main() -> None:
    """Print the table of ratios; exit with an error where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in {"rows": 1000, "queries": 100, "blocks": 24, "width": 3072, "r": 16, "rounds": 7}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--methods", nargs="+", default=["cosine", *LIMITS])
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        sizes = args.rows, args.queries, args.blocks, args.width
        whole = fill(Path(folder, "whole"), *sizes, None)
        kept = fill(Path(folder, "dropout"), *sizes, dropout(args.r))
        stores = {method: kept if method == "dropout" else whole for method in ("ip", *args.methods)}

        rounds = [{method: seconds(stores[method], method) for method in stores} for _ in range(args.rounds + 1)][1:]
        ratios = {method: statistics.median(took[method] / took["ip"] for took in rounds) for method in stores}
        row_bytes = 4 * args.rows * args.blocks * args.width
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
            peaks = {method: fresh.submit(peak_bytes, stores[method], method).result() for method in stores}

    print(
        f"{args.rows} rows, {args.queries} queries, {args.blocks} blocks of {args.width} columns, {args.rounds} rounds"
    )
    print(f"{'method':<16}{'time / ip':>12}{'limit':>8}{'memory / rows':>16}")
    for method, ratio in ratios.items():
        limit = LIMITS.get(method, "")
        print(f"{method:<16}{ratio:>12.3f}{limit:>8}{peaks[method] / row_bytes:>16.3f}")
    late = [method for method, limit in LIMITS.items() if ratios.get(method, 0) > limit]
    if late:
        raise SystemExit(f"over the limit: {', '.join(late)}")


if __name__ == "__main__":
    main()
