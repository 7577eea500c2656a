"""The whole path on a real language model: fine-tune, capture, attribute, curate, retrain, evaluate.

Ten sentence transformations, a fifth of the training prompts with the answer of another example of the same task.
SmolLM2-135M-Instruct with LoRA learns them with the ordinary Trainer; then every method says which training examples
share a query's task and which carry a wrong answer, and one of them, chosen beforehand, curates. Everything that was
measured is printed.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from hf_influence.attribution import attribute, lacking, methods
from hf_influence.callbacks import GradientCapture
from hf_influence.evaluation import class_detection, corrupt_answers, mislabel_detection
from hf_influence.evaluation.benchmarks import sentence_transformations, tokenize
from hf_influence.evaluation.benchmarks.tokenization import Part
from hf_influence.filter import DatasetFilter
from hf_influence.gradients import collect, losses
from hf_influence.pretrained import SMOLLM2, load_language_model

ITERATIVE = ("cg", "lissa", "self_cg", "self_lissa")
"""They come close to what `fisher` solves exactly; on few rows of many columns at up to a hundred times its cost."""


@dataclass(kw_only=True)
class Demo:
    """The settings of the demo; `run()` does it all."""

    model: str | None = None
    """Folder or hub name of a causal language model; `None` for SmolLM2-135M-Instruct."""
    size: int = 80
    """Training examples; there are half as many queries, and half as many held-out prompts."""
    seed: int = 0
    """Of the data, the wrong answers, the adapter and the order of training."""
    output: Path = Path("runs/demo")
    """Folder for the stores and `results.json`; replaced."""
    wrong: float = 0.2
    """Share of the training examples that get a wrong answer, and share that is dropped."""
    method: str = "cosine"
    """The method that curates."""
    steps: int = 52
    """Optimiser steps of each training run: smaller sets get as many."""
    batch_size: int = 4
    learning_rate: float = 1e-2
    rank: int = 8
    targets: Sequence[str] = ("q_proj", "v_proj")

    def run(self, console: Console) -> dict[str, Any]:
        """Fine-tune, attribute, curate, retrain; print three tables, write `results.json` and return its content."""
        disable_progress_bar()  # of the datasets library, which shows one for every small step
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()  # of loading weights; that of the training stays
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        started = time.perf_counter()
        shutil.rmtree(self.output, ignore_errors=True)

        with _stage(console, f"data and model: {self.model or SMOLLM2}"):
            _, self.tokenizer = load_language_model(self.model)
            data = sentence_transformations(train=self.size, test=self.size, seed=self.seed)
            train = corrupt_answers(data["train"], ["swapped_within"], self.wrong, self.seed)
            half = self.size // 2
            query, held_out = data["test"].select(range(half)), data["test"].select(range(half, self.size))
        with _stage(console, f"fine-tuning on {len(train)} prompts, {sum(train['is_wrong'])} with a wrong answer"):
            answers = self.output / "answers"
            capture = GradientCapture(answers, self._tokens(query))
            model = self._fine_tune(train, capture)
        with _stage(console, "gradients of the whole text, for class detection"):
            text = self.output / "text"
            for split, rows in (("train", train), ("query", query)):
                collect(model, self._tokens(rows, "text"), text, split)
        detection, mistakes = self._classes(text, train, query), self._mistakes(answers, train)
        console.print(detection_table(detection, "1. Which training examples are of the query's task?"))
        console.print(mistake_table(mistakes, f"2. Which answers are wrong? ({self.wrong:.0%} are)"))

        outcome = {"all data": self._judge(model, held_out)}
        for name, kept in self._remedies(train, answers).items():
            with _stage(console, f"retraining on {name}: {len(kept)} prompts, {sum(kept['is_wrong'])} wrong"):
                outcome[name] = self._judge(self._fine_tune(kept), held_out)
        console.print(outcome_table(outcome, f"3. {len(held_out)} clean held-out prompts after training on …"))

        results = {
            "settings": asdict(self) | {"output": str(self.output)},
            "versions": {name: version(name) for name in ("hf-influence", "torch", "transformers", "peft", "datasets")},
            "class_detection": detection,
            "mistake_detection": mistakes,
            "held_out": outcome,
            "seconds": time.perf_counter() - started,
        }
        (self.output / "results.json").write_text(json.dumps(results, indent=1))
        console.print(f"{results['seconds']:.0f} s; all figures are in {self.output / 'results.json'}")
        return results

    def _tokens(self, dataset: Dataset, gradient: Part = "answer") -> Dataset:
        return tokenize(dataset, self.tokenizer, gradient=gradient)

    def _fine_tune(self, dataset: Dataset, *callbacks: TrainerCallback) -> nn.Module:
        """The same fresh adapter each time, trained on the answers."""
        base, _ = load_language_model(self.model)
        set_seed(self.seed)
        lora = LoraConfig(
            r=self.rank, lora_alpha=2 * self.rank, target_modules=list(self.targets), task_type="CAUSAL_LM"
        )
        arguments = TrainingArguments(
            output_dir=str(self.output / "trainer"),
            per_device_train_batch_size=self.batch_size,
            max_steps=self.steps,
            learning_rate=self.learning_rate,
            warmup_steps=5,
            seed=self.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            dataloader_pin_memory=False,
            disable_tqdm=False,
        )
        trainer = Trainer(
            model=get_peft_model(base, lora),
            args=arguments,
            train_dataset=self._tokens(dataset),
            data_collator=DataCollatorForSeq2Seq(self.tokenizer),
            callbacks=list(callbacks),
        )
        trainer.train()
        return trainer.model

    def _classes(self, store: Path, train: Dataset, query: Dataset) -> dict[str, dict[str, float]]:
        """Class detection by every method but the iterative ones that gives a score for each query."""
        found = {}
        for name, lacks in lacking(store).items():
            by_class = "labels" in lacks
            if "queries" not in methods()[name].needs or set(lacks) - {"labels"} or name in ITERATIVE:
                continue
            scores = attribute(store, name, **({"labels": train["task"]} if by_class else {}))
            if scores.query_ids == list(range(len(query))):  # others have one column for all queries
                # influence counts by its size, as in the papers; how typical a query is of a class counts by its sign
                found[name] = dict(class_detection(scores, train["task"], query["task"], absolute=not by_class))
        return found

    def _mistakes(self, store: Path, train: Dataset) -> dict[str, dict[str, float]]:
        """Detection of the wrong answers by every method but the iterative ones that the store has everything for."""
        named = [name for name, lacks in lacking(store).items() if not lacks and name not in ITERATIVE]
        return {name: dict(mislabel_detection(attribute(store, name), train["is_wrong"])) for name in named}

    def _remedies(self, train: Dataset, store: Path) -> dict[str, Dataset]:
        trim = DatasetFilter(drop=self.wrong)
        return {
            f"the data curated by {self.method}": trim.apply(train, attribute(store, self.method)),
            "a random drop of the same size": trim.apply(train, attribute(store, "random", seed=self.seed)),
            "the truly clean data": train.select([i for i, wrong in enumerate(train["is_wrong"]) if not wrong]),
        }

    def _judge(self, model: nn.Module, held_out: Dataset) -> dict[str, float]:
        """Mean loss of the right answers, and how many would be generated exactly.

        Greedy decoding gives the right answer exactly if each of its tokens is the most likely one after those before.
        """
        stats = losses(model, self._tokens(held_out))
        return {"loss": stats["loss"].mean().item(), "exact_match": (stats["correct"] == 1).float().mean().item()}


def detection_table(found: dict[str, dict[str, float]], title: str) -> Table:
    """Best first; the spread is the standard deviation over the queries."""
    table = _table(title, "method", "AUC", "± over queries", "recall", "± over queries")
    for name, row in sorted(found.items(), key=lambda item: -item[1]["auc_mean"]):
        table.add_row(name, *(f"{row[key]:.3f}" for key in ("auc_mean", "auc_std", "recall_mean", "recall_std")))
    return table


def mistake_table(found: dict[str, dict[str, float]], title: str) -> Table:
    """Best first."""
    table = _table(title, "method", "AUC", "average precision")
    for name, row in sorted(found.items(), key=lambda item: -item[1]["auc"]):
        table.add_row(name, f"{row['auc']:.3f}", f"{row['average_precision']:.3f}")
    return table


def outcome_table(found: dict[str, dict[str, float]], title: str) -> Table:
    """In the order of the retraining."""
    table = _table(title, "trained on", "loss", "exact match")
    for name, row in found.items():
        table.add_row(name, f"{row['loss']:.3f}", f"{row['exact_match']:.0%}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


@contextmanager
def _stage(console: Console, name: str) -> Iterator[None]:
    """Says what is going on and how long it took."""
    console.print(f"[bold]{name}")
    started = time.perf_counter()
    yield
    console.print(f"[dim]… {time.perf_counter() - started:.0f} s")
