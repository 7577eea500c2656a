"""Training runs in processes of their own: several at once, or one that is killed and resumed.

python tests/runs.py FOLDER                       one run
torchrun --nproc_per_node 2 tests/runs.py FOLDER  the same by two processes
python tests/runs.py FOLDER --kill 10             killed ten times, resumed each time, in FOLDER/0, FOLDER/1, …
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from models import padding, prompts, tiny
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_influence.callbacks import GradientCapture

QUERY = prompts(5, seed=1)


class Recording(Trainer):
    """Notes the weights before each step and what this process was given in it."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        folder, step = Path(self.args.output_dir) / "record", self.state.global_step + 1
        folder.mkdir(exist_ok=True)
        weights = {name: w.detach().clone() for name, w in self.model.named_parameters() if w.requires_grad}
        self.micro = getattr(self, "micro", 0) + 1
        kept = {"step": step, "weights": weights, "batch": {name: value.clone() for name, value in inputs.items()}}
        torch.save(kept, folder / f"{self.args.process_index}-{self.micro:03d}.pt")
        return super().training_step(model, inputs, *args, **kwargs)


def run(
    folder: Path,
    *,
    examples: int = 31,
    batch_size: int = 2,
    dropout: float = 0.1,
    record: bool = False,
    twice: bool = False,
) -> None:
    """Train to the end, from the last complete checkpoint if there is one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=batch_size // processes,
        gradient_accumulation_steps=2,
        save_steps=3,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    states = folder.glob("checkpoint-*/trainer_state.json")
    done = [int(file.parent.name.split("-")[1]) for file in states if whole(file)]
    capture = GradientCapture(folder / "rows", Dataset.from_list(QUERY), during="epochs", overwrite=not done)
    model = tiny(torch.float32, lora_dropout=dropout)
    data = Dataset.from_list([row for row in prompts(examples // 2) for _ in "ab"] if twice else prompts(examples))
    kind = Recording if record else Trainer
    trainer = kind(model, args, data_collator=padding(), train_dataset=data, callbacks=[capture])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{max(done)}") if done else None)


def whole(file: Path) -> bool:
    """Whether a checkpoint was written to its end; the state comes last."""
    try:
        return bool(json.loads(file.read_text()))
    except ValueError:
        return False


def killed(folder: Path, times: int, seed: int = 0) -> None:
    """Run, but kill the process at random moments; where a fast run ends before the last of them, run another."""
    draw = random.Random(seed)
    kills = ends = 0
    while kills < times or not ends or (folder / str(ends)).exists():  # the last of them runs to its end
        child = os.fork()
        if child == 0:
            try:
                run(folder / str(ends))
            except BaseException as error:
                print(f"the run failed: {error!r}", flush=True)
                os._exit(1)
            os._exit(0)
        if kills < times:
            time.sleep(draw.uniform(0.1, 0.7))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        elif status == 0:
            ends += 1
        else:
            raise SystemExit(1)
    print(f"{ends} runs finished after {kills} kills", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", type=int, default=0)
    parser.add_argument("--examples", type=int, default=31)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--twice", action="store_true", help="each example occurs twice")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if chosen.kill:
        killed(chosen.folder, chosen.kill)
    else:
        settings = vars(chosen)
        del settings["kill"]
        run(settings.pop("folder"), **settings)
