"""How good the scores are: metrics, planted mistakes, retraining, and benchmarks with a known answer."""

from hf_influence.evaluation.biases import biases
from hf_influence.evaluation.class_detection import class_detection
from hf_influence.evaluation.corruptions import corrupt_answers
from hf_influence.evaluation.datamodeling import draw_subsets, lds, retrain_on_subsets
from hf_influence.evaluation.flipped_labels import flipped_labels
from hf_influence.evaluation.mislabel_detection import mislabel_detection
from hf_influence.evaluation.provenance import provenance
from hf_influence.evaluation.removal import removal_curve
from hf_influence.evaluation.retraining_gain import retraining_gain
from hf_influence.evaluation.runs import Run, Runs
from hf_influence.evaluation.table import Table

__all__ = [
    "Run",
    "Runs",
    "Table",
    "biases",
    "class_detection",
    "corrupt_answers",
    "draw_subsets",
    "flipped_labels",
    "lds",
    "mislabel_detection",
    "provenance",
    "removal_curve",
    "retrain_on_subsets",
    "retraining_gain",
]
