"""How the inverse curvature is approximated: functions from the rows of a block to `v -> P v`."""

from hf_influence.curvature.curvature import Curvature, Damped, Solve
from hf_influence.curvature.datainf import MeanInverse
from hf_influence.curvature.fisher import EmpiricalFisher
from hf_influence.curvature.identity import Identity

__all__ = ["Curvature", "Damped", "EmpiricalFisher", "Identity", "MeanInverse", "Solve"]
