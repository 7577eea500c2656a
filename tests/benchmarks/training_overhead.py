"""What capture during training costs: time of a captured training step over a plain one, in one run of the Trainer.

    python tests/benchmarks/training_overhead.py

A real Trainer trains on real sentences with padding; every batch comes three times, once plain, once with whole rows
and once with dropout r=16 rows, in random order. A step is all between `on_step_begin` and `on_step_end`: forward,
backward, clipping, optimizer and, where captured, forming rows and statistics, finding the examples and handing the
rows to the writer, which writes beside the steps after it. The first rounds are dropped; the ratio is the median over
rounds of the ratio within a round, and the mean time of all steps is compared as well, as that has the writing in it.

Memory is the peak of a process that trains in one of the three ways, over that of plain training.

Measured with torch 2.13, batch 8, float32, on two idle CPU cores with AVX2, three runs of MiniLM and two of SmolLM2;
memory with `--memory --rounds 8`:

    model     rows             step (limits 1.03, 1.01)    mean             peak memory (limit 1.1)
    MiniLM    whole            0.99, 1.00, 1.02            0.99 to 1.00     1.07
    MiniLM    dropout r=16     0.99, 1.00, 1.01            0.98 to 1.19     1.05
    SmolLM2   whole            0.97, 1.00                  0.98             1.07
    SmolLM2   dropout r=16     0.97, 0.99                  0.97 to 0.99     1.04

Medians move by two percent from run to run, and machines differ: two cores with AVX-512 gave 1.02 to 1.04 (whole) and
1.02 to 1.03 for MiniLM, 1.00 and 1.03 for SmolLM2, and other AVX2 machines up to 1.04 and 1.06, so the dropout rows are
within their limit on some and not on all. By one thread's time a step of MiniLM of 300 ms takes 5 to 8 ms more, half of
them in 50 hooks between products of matrices, which find code and data out of the caches. Of a step of SmolLM2 of 2,200
ms, 18 ms are passes over the gradient at 49,152 logits and 20 ms rows and hooks: less than 2 % in all.
No GPU was at hand.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from capture import minilm, smollm2
from datasets import Dataset
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_influence.callbacks.during import DuringTraining
from hf_influence.callbacks.schedule import Schedule
from hf_influence.gradients import dropout
from hf_influence.gradients.batches import padding_with
from hf_influence.gradients.plan import Plan
from hf_influence.store import Claim, GradientStore

LIMITS = {"whole": 1.03, "dropout": 1.01}
COMPRESS = {"whole": None, "dropout": dropout(16)}
MEMORY_LIMIT = 1.1


class InOrder(Trainer):
    """Takes the batches as they come in the dataset."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


class Clock(TrainerCallback):
    """The time of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def train(name: str, size: int, rounds: int, ways: list[str], folder: str) -> dict[str, list[float]]:
    """Times of the steps of each way, round by round."""
    model, rows, pad = {"minilm": minilm, "smollm2": smollm2}[name](rounds * size)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    order = [random.sample(ways, len(ways)) for _ in batches]
    data = Dataset.from_list([row for batch in batches for _ in ways for row in batch])
    clock = Clock()
    args = TrainingArguments(
        folder,
        max_steps=len(batches) * len(ways),
        per_device_train_batch_size=size,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    trainer = InOrder(model, args, data_collator=padding_with(pad), train_dataset=data, callbacks=[clock])
    steps: dict[str, Any] = {"plain": trainer.training_step}
    captures = []
    for way in ways:
        if way != "plain":
            plan = Plan.of(model, data, padding_with(pad), "mean", COMPRESS[way], "lora", (), None, True)
            store = GradientStore.create(Path(folder) / way, plan.header)
            during = DuringTraining(trainer, plan, store, Schedule("epochs", 1, None), None, Claim.take(store.path))
            during.epoch = 1
            steps[way] = trainer.training_step
            during.stop()
            captures.append(during)
    queue = [way for round_ in order for way in round_]

    def next_step(*given: Any, **named: Any) -> Tensor:
        taken: Tensor = steps[queue[trainer.state.global_step]](*given, **named)
        return taken

    vars(trainer)["training_step"] = next_step
    trainer.train()
    for capture in captures:
        capture.flush()
    times: dict[str, list[float]] = {way: [] for way in ways}
    for way, seconds in zip(queue, clock.seconds, strict=True):
        times[way].append(seconds)
    return times


def peak(name: str, size: int, way: str, rounds: int) -> float:
    """Peak memory in MiB of a process of its own."""
    command = [sys.executable, __file__, "--models", name, "--batch-size", str(size), "--only", way]
    done = subprocess.run([*command, "--rounds", str(rounds)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2"], choices=["minilm", "smollm2"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=0, help="by default 80 for MiniLM and 24 for SmolLM2")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name in args.models:
        rounds = args.rounds or {"minilm": 80, "smollm2": 24}[name]
        if args.only:
            with tempfile.TemporaryDirectory() as folder:
                train(name, args.batch_size, rounds, [args.only], folder)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
            return
        if args.memory:
            plain = peak(name, args.batch_size, "plain", rounds)
            for way in LIMITS:
                ratio = peak(name, args.batch_size, way, rounds) / plain
                print(
                    f"{name:8} {way:8} peak memory {ratio:5.3f} of plain training (at most {MEMORY_LIMIT})", flush=True
                )
                results.append({"model": name, "way": way, "memory": ratio, "limit": MEMORY_LIMIT})
            continue
        with tempfile.TemporaryDirectory() as folder:
            times = train(name, args.batch_size, rounds, ["plain", *LIMITS], folder)
        times = {way: seconds[args.warmup :] for way, seconds in times.items()}
        for way, limit in LIMITS.items():
            median = statistics.median(a / b for a, b in zip(times[way], times["plain"], strict=True))
            mean = statistics.mean(times[way]) / statistics.mean(times["plain"])
            print(f"{name:8} {way:8} step {median:5.3f} of a plain one (at most {limit}), mean {mean:5.3f}", flush=True)
            results.append({"model": name, "way": way, "median": median, "mean": mean, "limit": limit})
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
