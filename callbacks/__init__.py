"""Trainer callbacks."""

from hf_influence.callbacks.capture import GradientCapture
from hf_influence.callbacks.curate import CurateEachEpoch
from hf_influence.callbacks.packing import prepared
from hf_influence.callbacks.rounds import Retrained, curate_and_retrain
from hf_influence.callbacks.weighted import WeightedTrainer, soft_cross_entropy

__all__ = [
    "CurateEachEpoch",
    "GradientCapture",
    "Retrained",
    "WeightedTrainer",
    "curate_and_retrain",
    "prepared",
    "soft_cross_entropy",
]
