from . import attribution as attribution
from . import callbacks as callbacks
from . import curvature as curvature
from . import dataset as dataset
from . import evaluation as evaluation
from . import filter as filter
from . import gradients as gradients
from . import points as points
from . import scores as scores
from . import store as store
from .attribution import attribute, combined, lacking, methods
from .filter import DatasetFilter
from .gradients import (
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
from .points import collect_at
from .scores import Scores
from .store import GradientStore

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
__version__: str
