"""What stands around the work of a callback: the Trainer, whose fault an error is, what must not be lost or moved."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerControl, TrainerState

from hf_influence.errors import BadExample, BadSetting, InfluenceError

logger = logging.getLogger(__name__)


def trainer_of(state: TrainerState) -> Trainer:
    """The Trainer that is calling: callbacks are not told, so look for it among the callers.

    Raises:
        BadSetting: It is not `transformers.Trainer` that runs the callback.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and caller.state is state:
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise BadSetting("GradientCapture and CurateEachEpoch need transformers.Trainer (or a subclass) to run them.")


def log(trainer: Trainer, control: TrainerControl, numbers: Mapping[str, float]) -> None:
    """Log numbers of our own; the Trainer's own logging goes on as it would.

    Past a subclass that would add its own to them and begin those anew (SFTTrainer).
    """
    wanted = control.should_log
    Trainer.log(trainer, {name: float(value) for name, value in numbers.items()})
    control.should_log = wanted


@contextmanager
def naming(split: str) -> Iterator[None]:
    """Let an error say which examples it is about."""
    name = "the training set" if split == "train" else "query_dataset"
    try:
        yield
    except InfluenceError as error:
        if split != "train" or isinstance(error, BadExample):  # others are about the model or the folder
            error.args = (f"{name}: {error}",)
        raise
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadExample(
            f"{name}: its examples do not go through the data_collator and the model ({type(error).__name__}: {error})"
            ". They must be tokenised, by the tokenizer of the model and to no more than its length, and have the "
            "columns that the data_collator takes."
        ) from error


@contextmanager
def keeping_the_model(trainer: Trainer, errors: type[Exception] = Exception) -> Iterator[None]:
    """Save the model if an error in the block ends the training, as the script will not come to it any more."""
    try:
        yield
    except errors:
        step, last = trainer.state.global_step, trainer.state.max_steps
        if trainer.args.should_save and step > 0:
            folder = Path(trainer.args.output_dir) / f"trained-{step}"
            try:
                trainer.save_model(str(folder), _internal_call=True)  # and nothing goes to the Hub
            except Exception as error:
                logger.warning("the model after step %d of %d could not be saved: %s", step, last, error)
            else:
                logger.warning("rows failed after step %d of %d; the trained model is in %s", step, last, folder)
        raise


@contextmanager
def undisturbed_randomness() -> Iterator[None]:
    """Trying out a collator that draws random numbers must not move the training run."""
    python, numpy_ = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_)
