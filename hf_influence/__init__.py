"""Find out which fine-tuning examples help and which hurt, and get back a better dataset.

capture = GradientCapture("runs/sst2", query_dataset=validation)      # from hf_influence.callbacks
Trainer(model=peft_model, ..., callbacks=[capture]).train()
scores = attribute("runs/sst2")                                      # higher = more worth keeping
curated = DatasetFilter(drop=0.05).apply(train, scores)               # a datasets.Dataset
"""

from hf_influence.attribution import attribute, combined, lacking, methods
from hf_influence.filter import DatasetFilter
from hf_influence.gradients import (
    adam_state,
    collect,
    collect_ekfac,
    collect_hessian,
    collect_target,
    dropout,
    evasion,
    fairness,
    gaussian,
    logra,
    losses,
    per_sample_gradients,
    robustness,
    solve_queries,
    sparse_jl,
)
from hf_influence.points import collect_at
from hf_influence.scores import Scores
from hf_influence.store import GradientStore

__all__ = [
    "DatasetFilter",
    "GradientStore",
    "Scores",
    "adam_state",
    "attribute",
    "collect",
    "collect_at",
    "collect_ekfac",
    "collect_hessian",
    "collect_target",
    "combined",
    "dropout",
    "evasion",
    "fairness",
    "gaussian",
    "lacking",
    "logra",
    "losses",
    "methods",
    "per_sample_gradients",
    "robustness",
    "solve_queries",
    "sparse_jl",
]
__version__ = "0.1.0"
