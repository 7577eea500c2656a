"""How good the scores are: metrics and benchmarks with a known answer."""

from hf_influence.evaluation.class_detection import class_detection
from hf_influence.evaluation.mislabel_detection import mislabel_detection

__all__ = ["class_detection", "mislabel_detection"]
