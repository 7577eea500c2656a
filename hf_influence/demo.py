"""The whole path on a real language model: fine-tune, capture, attribute, curate, retrain, evaluate.

Five of the ten sentence transformations, rules about words and about letters; a fifth of the training prompts carries
the answer of another example of the same task. SmolLM2-135M-Instruct with LoRA learns them with the ordinary Trainer,
while gradients are captured epoch by epoch and compared with those of clean queries; then every method says which
training examples share a query's task and which carry a wrong answer, and as many as are wrong are dropped by "auto".
Everything that was measured is printed.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from hf_influence.attribution import attribute, lacking, methods
from hf_influence.callbacks import GradientCapture
from hf_influence.dataset.wording import printable
from hf_influence.errors import BadSetting
from hf_influence.evaluation import class_detection, corrupt_answers, mislabel_detection
from hf_influence.evaluation.benchmarks import TRANSFORMATIONS, sentence_transformations, tokenize
from hf_influence.evaluation.benchmarks.tokenization import Part
from hf_influence.filter import DatasetFilter
from hf_influence.gradients import collect, losses
from hf_influence.pretrained import SMOLLM2, load_language_model
from hf_influence.scores import Scores

TASKS = tuple(TRANSFORMATIONS)[1::2]
"""So few that each has a dozen prompts to learn it from."""

ITERATIVE = ("cg", "lissa", "self_cg", "self_lissa")
"""They come close to what `fisher` solves exactly; on few rows of many columns at up to a hundred times its cost."""

WITHIN = "auto, groups=task"
"""For data of several tasks: without groups what goes is, rather, the task that is the hardest."""

RESULTS = "results.json"
"""All figures; by it the folder of a demo is known."""

Rows = dict[str, dict[str, float]]
"""The rows of a table by their names, each with its columns."""


@dataclass(kw_only=True)
class Demo:
    """The settings of the demo; `run()` does it all."""

    model: str | None = None
    """Folder or hub name of a causal language model; `None` for SmolLM2-135M-Instruct."""
    size: int = 64
    """Training examples; there are half as many queries."""
    seed: int = 0
    """Of the data, the wrong answers, the adapter and the order of training."""
    output: Path = Path("runs/demo")
    """Folder for the stores and `results.json`; one of an earlier demo is replaced."""
    held_out: int = 100
    """Clean prompts to judge the models by."""
    wrong: float = 0.2
    """Share of the training examples that get a wrong answer, and share that is dropped."""
    epochs: int = 3
    """Of the first training; those on smaller sets have as many steps."""
    batch_size: int = 2
    learning_rate: float = 5e-3

    def run(self, console: Console) -> dict[str, Any]:
        """Fine-tune, attribute, curate, retrain; print three tables, write `results.json` and return its content.

        Raises:
            BadSetting: The folder holds something else than an earlier demo.
        """
        self._make_room()
        disable_progress_bar()  # of the datasets library, which shows one for every small step
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()  # of loading weights; that of the training stays
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        self.seconds: dict[str, float] = {}  # stage -> how long it took

        with self._stage(console, f"data and model: {self.model or SMOLLM2}"):
            _, self.tokenizer = load_language_model(self.model)
            queries = self.size // 2
            data = sentence_transformations(train=self.size, test=queries + self.held_out, seed=self.seed, tasks=TASKS)
            train = corrupt_answers(data["train"], ["swapped_within"], self.wrong, seed=self.seed)
            query, held_out = data["test"].select(range(queries)), self._tokens(data["test"].skip(queries))
        with self._stage(console, f"fine-tuning on {len(train)} prompts, {sum(train['is_wrong'])} with a wrong answer"):
            capture = GradientCapture(self.output / "store", self._tokens(query), during="epochs")
            model = self._fine_tune(train, capture)
            judged = {"all data": losses(model, held_out)}
        with self._stage(console, "gradients of the whole text, which tell tasks apart"):
            text = self.output / "text"
            for split, rows in (("train", train), ("query", query)):
                collect(model, self._tokens(rows, "text"), text, split)
        with self._stage(console, "scores by every method"):
            classes, scores = self._classes(text, train, query), self._scores(capture.path, train)
            mistakes = {name: mistaken(own, train["is_wrong"]) for name, own in scores.items()}
        show(console, "1. Which training examples are of the query's task? (± over the queries)", best_first(classes))
        show(console, f"2. Which answers are wrong? ({self.wrong:.0%} are)", best_first(mistakes))

        trim = DatasetFilter(drop=self.wrong)
        remedies = {
            "the data curated by auto, within tasks": trim.apply(train, scores[WITHIN]),
            "a random drop of the same size": trim.apply(train, attribute(capture.path, "random", seed=self.seed)),
            "the truly clean data": train.select([i for i, wrong in enumerate(train["is_wrong"]) if not wrong]),
        }
        for name, kept in remedies.items():
            with self._stage(console, f"retraining on {name}"):
                judged[name] = losses(self._fine_tune(kept), held_out)
        outcome = outcomes({"all data": train, **remedies}, judged)
        show(console, f"3. {len(held_out)} clean held-out prompts after {self._steps} steps on …", outcome)

        results = {
            "settings": asdict(self) | {"output": str(self.output)},
            "versions": {name: version(name) for name in ("hf-influence", "torch", "transformers", "peft", "datasets")},
            "class_detection": classes,
            "mistake_detection": mistakes,
            "held_out": outcome,
            "seconds": self.seconds,
        }
        (self.output / RESULTS).write_text(json.dumps(results, indent=1))
        console.print(f"{sum(self.seconds.values()):.0f} s; all figures are in {self.output / RESULTS}")
        return results

    def _make_room(self) -> None:
        """Delete an earlier demo, and leave a mark by which this one is known should it be interrupted."""
        held = {path.name: path for path in self.output.iterdir()} if self.output.exists() else {}
        if held and (RESULTS not in held or not held.keys() <= {RESULTS, "store", "text", "trainer"}):
            raise BadSetting(
                f"the folder {self.output} holds {printable(', '.join(sorted(held)))}, which is no earlier demo, and "
                "would be deleted. Name a new or an empty folder: --output FOLDER."
            )
        for path in held.values():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / RESULTS).write_text("{}")

    @property
    def _steps(self) -> int:
        return self.epochs * math.ceil(self.size / self.batch_size)

    def _tokens(self, dataset: Dataset, gradient: Part = "answer") -> Dataset:
        return tokenize(dataset, self.tokenizer, gradient=gradient)

    def _fine_tune(self, dataset: Dataset, *callbacks: TrainerCallback) -> nn.Module:
        """The same fresh adapter each time, trained on the answers."""
        base, _ = load_language_model(self.model)
        set_seed(self.seed)
        arguments = TrainingArguments(
            output_dir=str(self.output / "trainer"),
            per_device_train_batch_size=self.batch_size,
            max_steps=self._steps,
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
            model=get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_alpha=16)),
            args=arguments,
            train_dataset=self._tokens(dataset),
            data_collator=DataCollatorForSeq2Seq(self.tokenizer),
            callbacks=list(callbacks),
        )
        trainer.train()
        return trainer.model

    def _methods(self, store: Path, *given: str) -> list[str]:
        """All but the iterative ones that have what they need, in the store or given."""
        return [name for name, lacks in lacking(store).items() if set(lacks) <= set(given) and name not in ITERATIVE]

    def _classes(self, store: Path, train: Dataset, query: Dataset) -> Rows:
        """Class detection by every method that gives a score for each query."""
        found = {}
        for name in self._methods(store, "labels"):
            by_class = "labels" in methods()[name].needs
            if "queries" not in methods()[name].needs:
                continue
            scores = attribute(store, name, **({"labels": train["task"]} if by_class else {}))
            if scores.query_ids == list(range(len(query))):  # others have one column for all queries
                # influence counts by its size, as in the papers; how typical a query is of a class counts by its sign
                detected = class_detection(scores, train["task"], query["task"], absolute=not by_class)
                columns = {"AUC": "auc_mean", "AUC ±": "auc_std", "recall": "recall_mean", "recall ±": "recall_std"}
                found[name] = {column: detected[key] for column, key in columns.items()}
        return found

    def _scores(self, store: Path, train: Dataset) -> dict[str, Scores]:
        """The scores of the training examples by every method."""
        scores = {name: attribute(store, name) for name in self._methods(store)}
        return scores | {WITHIN: attribute(store, groups=train["task"])}

    @contextmanager
    def _stage(self, console: Console, name: str) -> Iterator[None]:
        """Says what is going on and how long it took."""
        console.print(f"[bold]{name}")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        console.print(f"[dim]… {self.seconds[name]:.0f} s")


def mistaken(scores: Scores, wrong: Sequence[bool]) -> dict[str, float]:
    """How well the scores detect the wrong answers."""
    detected = mislabel_detection(scores, wrong)
    return {"AUC": detected.auc, "average precision": detected.average_precision}


def outcomes(sets: Mapping[str, Dataset], judged: Mapping[str, Mapping[str, Tensor]]) -> Rows:
    """What the models make of the held-out answers, and how far their mean loss is below that of the first, ± s.e."""
    first = judged[next(iter(sets))]["loss"]  # [n]
    found = {}
    for name, dataset in sets.items():
        gain = first - judged[name]["loss"]
        found[name] = {
            "prompts": len(dataset),
            "wrong": sum(dataset["is_wrong"]),
            "loss": judged[name]["loss"].mean().item(),
            "gain": gain.mean().item(),
            "±": (gain.std() / len(gain) ** 0.5).item(),
            "right tokens": judged[name]["correct"].mean().item(),
        }
    return found


def best_first(found: Rows) -> Rows:
    """In the order of the AUC."""
    return dict(sorted(found.items(), key=lambda row: -row[1]["AUC"]))


def show(console: Console, title: str, rows: Rows) -> None:
    """As a Markdown table."""
    table = Table("", *next(iter(rows.values())), box=box.MARKDOWN)
    for name, row in rows.items():
        table.add_row(name, *(str(value) if isinstance(value, int) else f"{value:.3f}" for value in row.values()))
    console.print(f"\n[bold]{title}", table)
