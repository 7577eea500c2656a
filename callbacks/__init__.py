"""Trainer callbacks."""

from hf_influence.callbacks.capture import GradientCapture
from hf_influence.callbacks.packing import prepared

__all__ = ["GradientCapture", "prepared"]
