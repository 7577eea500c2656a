"""What exact per-example rows cost: time of collecting them over a plain batched forward and backward pass.

    python tests/benchmarks/capture.py

Same model, batch and data on both sides, real lengths with padding, evaluation mode, float32. Collecting includes
forming the rows, the statistics and handing them to the store's writer. Each round runs the plain step and every way of
collecting once, in random order; the first rounds are dropped and the ratio is the median over rounds of the ratio
within a round.

"Of training" compares with the step that a Trainer makes, which draws dropout masks: what an epoch of collecting costs
in epochs of training.

Measured on two CPU cores (AVX2) with torch 2.13, in two runs of 40 rounds for MiniLM and of 20 for SmolLM2 (one at
batch 16); the medians move by about ±0.02 from run to run:

    model     batch    full rows (at most 1.03)    dropout r=16 (at most 0.97)    full / dropout rows of training
    MiniLM     8       0.91 to 0.94                0.92                           0.76 / 0.77
    MiniLM    16       0.88                        0.85 to 0.86                   0.71 / 0.69
    SmolLM2    8       0.95 to 0.98                0.96 to 0.97                   0.97 / 0.96
    SmolLM2   16       0.96                        0.94                           1.02 / 1.00

Peak memory 3.4 GiB. Of the gain on MiniLM most comes from its last layer, which works on the first token alone since
the classifier reads no other; without that the ratios at batch 8 are 1.00 and 0.98. Merging the adapters into the
frozen weights gains another 0.03 at most, and moves a row of SmolLM2 by 3e-5, more than the 1e-5 by which rows may
differ from autograd.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_influence.evaluation.benchmarks import math_problems, sentence_transformations, tokenize
from hf_influence.gradients.batches import Examples, padding_with
from hf_influence.gradients.capture import RowCatcher
from hf_influence.gradients.compress import Compressor, dropout
from hf_influence.gradients.fixed import FixedWeights
from hf_influence.gradients.plan import header_of
from hf_influence.gradients.taps import find_taps
from hf_influence.pretrained import load_classifier, load_language_model
from hf_influence.store import GradientStore
from hf_influence.task import task_of

LIMITS = {"full rows": 1.03, "dropout r=16": 0.97}


def minilm(n: int) -> tuple[nn.Module, list[dict[str, Any]], int]:
    """MiniLM with LoRA on query and value; short sentences and word problems to be told apart."""
    model, tokenizer = load_classifier(num_labels=2)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"))
    texts = [(row["text"], 0) for row in sentence_transformations(train=n, test=0)["train"]]
    texts += [(row["text"], 1) for row in math_problems(train=n, test=0, reasoning=True)["train"]]
    random.Random(0).shuffle(texts)
    return model, [{**tokenizer(text), "labels": label} for text, label in texts[:n]], tokenizer.pad_token_id


def smollm2(n: int) -> tuple[nn.Module, list[dict[str, Any]], int]:
    """SmolLM2-135M-Instruct with LoRA on q_proj and v_proj; sentence transformations and word problems."""
    model, tokenizer = load_language_model()
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    rows: list[dict[str, Any]] = []
    for data in (sentence_transformations(train=n, test=0), math_problems(train=n, test=0, reasoning=True)):
        rows += tokenize(data["train"], tokenizer, gradient="text").select_columns(["input_ids", "labels"]).to_list()
    random.Random(0).shuffle(rows)
    return model, rows[:n], tokenizer.pad_token_id


def collecting(
    model: nn.Module, batches: list[dict[str, Tensor]], compress: Compressor | None, folder: str, stack: ExitStack
) -> Callable[[int], None]:
    """A function that collects the rows of one batch, as `collect` does, until the stack is closed."""
    task = task_of(model)
    taps = find_taps(model)
    store = GradientStore.create(Path(folder) / str(compress), header_of(model, taps, task, compress))
    writer = stack.enter_context(store.writer("train", adapter="", dataset="", n=1, ids=None))
    resting = FixedWeights(model, task, RowCatcher(taps, compress))

    def step(i: int) -> None:
        with resting:
            started = time.perf_counter()
            rows, stats = resting.run(batches[i])
            writer.append(range(len(stats["loss"])), rows, stats)
            step.seconds = time.perf_counter() - started  # type: ignore[attr-defined]

    return step


def measure(model: nn.Module, batches: list[dict[str, Tensor]], rounds: int, warmup: int) -> dict[str, float]:
    """Median ratio to the plain step of each way of collecting."""
    model.eval()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ways: dict[str, Callable[[int], Any]] = {
            "full rows": collecting(model, batches, None, folder, stack),
            "dropout r=16": collecting(model, batches, dropout(16), folder, stack),
        }

        def plain(i: int) -> None:
            started = time.perf_counter()
            model(**batches[i]).loss.backward()
            plain.seconds = time.perf_counter() - started  # type: ignore[attr-defined]
            model.zero_grad()

        def training(i: int) -> None:
            model.train()
            started = time.perf_counter()
            model(**batches[i]).loss.backward()
            training.seconds = time.perf_counter() - started  # type: ignore[attr-defined]
            model.zero_grad()
            model.eval()

        ways |= {"plain": plain, "training": training}
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        order = list(ways)
        for round_ in range(-warmup, rounds):
            seconds = {}
            random.shuffle(order)
            for name in order:
                ways[name](round_ % len(batches))
                seconds[name] = ways[name].seconds  # type: ignore[attr-defined]
            if round_ >= 0:
                for name in ways:
                    ratios[name].append(seconds[name] / seconds["plain"])
    of_training = {
        f"{name} of training": statistics.median(a / b for a, b in zip(ratios[name], ratios["training"], strict=True))
        for name in LIMITS
    }
    return {name: statistics.median(ratios[name]) for name in LIMITS} | of_training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm", "smollm2"], choices=["minilm", "smollm2"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for name in args.models:
        for size in args.batch_sizes:
            model, rows, pad = {"minilm": minilm, "smollm2": smollm2}[name](8 * size)
            examples = Examples(rows, model)
            order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
            starts = range(0, len(rows), size)
            batches = [padding_with(pad)(examples[order[start : start + size]]) for start in starts]
            for way, ratio in measure(model, batches, args.rounds, args.warmup).items():
                bar = LIMITS.get(way)
                note = "" if bar is None else f" of a plain step (at most {bar})"
                print(f"{name:8} batch {size:2} {way:25} {ratio:5.3f}{note}", flush=True)
                results.append({"model": name, "batch": size, "way": way, "ratio": ratio, "limit": bar})
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
