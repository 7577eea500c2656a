"""How the inverse curvature is approximated: functions from the rows of a block to `v -> P v`."""

from hf_influence.curvature.choice import choose_damping
from hf_influence.curvature.conjugate import ConjugateGradients
from hf_influence.curvature.curvature import Curvature, DampedPath, Solve
from hf_influence.curvature.datainf import MeanInverse
from hf_influence.curvature.ekfac import KroneckerEigenbasis
from hf_influence.curvature.fisher import EmpiricalFisher
from hf_influence.curvature.identity import Identity
from hf_influence.curvature.neumann import NeumannSeries
from hf_influence.curvature.spectrum import Apply, by_dense_side, by_gram_side

__all__ = [
    "Apply",
    "ConjugateGradients",
    "Curvature",
    "DampedPath",
    "EmpiricalFisher",
    "Identity",
    "KroneckerEigenbasis",
    "MeanInverse",
    "NeumannSeries",
    "Solve",
    "by_dense_side",
    "by_gram_side",
    "choose_damping",
]
