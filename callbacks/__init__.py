"""Trainer callbacks."""

from hf_influence.callbacks.capture import GradientCapture
from hf_influence.callbacks.packing import prepared
from hf_influence.callbacks.weighted import WeightedTrainer

__all__ = ["GradientCapture", "WeightedTrainer", "prepared"]
