"""Per-example gradients: hooks, rules for each kind of layer, compression, and the pass over a dataset."""

from hf_influence.gradients.capture import per_sample_gradients
from hf_influence.gradients.collect import collect
from hf_influence.gradients.compress import dropout, gaussian, logra, sparse_jl
from hf_influence.gradients.example_losses import example_losses
from hf_influence.gradients.losses import losses
from hf_influence.gradients.own_loss import label_smoothing, own_loss
from hf_influence.gradients.second_order.adam import adam_state
from hf_influence.gradients.second_order.eigenpairs import collect_hessian
from hf_influence.gradients.second_order.factors import collect_ekfac
from hf_influence.gradients.second_order.solve_queries import solve_queries
from hf_influence.gradients.targets.fairness import fairness
from hf_influence.gradients.targets.robustness import evasion, robustness
from hf_influence.gradients.targets.target import collect_target
from hf_influence.gradients.verify import verify

__all__ = [
    "adam_state",
    "collect",
    "collect_ekfac",
    "collect_hessian",
    "collect_target",
    "dropout",
    "evasion",
    "example_losses",
    "fairness",
    "gaussian",
    "label_smoothing",
    "logra",
    "losses",
    "own_loss",
    "per_sample_gradients",
    "robustness",
    "solve_queries",
    "sparse_jl",
    "verify",
]
