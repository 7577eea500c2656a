"""Trainer callbacks."""

from hf_influence.callbacks.capture import GradientCapture

__all__ = ["GradientCapture"]
