"""How good the scores are: metrics, planted mistakes, retraining, and benchmarks with a known answer."""

from hf_influence.evaluation.accuracy_under_attack import accuracy_under_attack
from hf_influence.evaluation.biased_labels import biased_labels
from hf_influence.evaluation.biases import biases
from hf_influence.evaluation.class_detection import class_detection
from hf_influence.evaluation.corruptions import corrupt_answers
from hf_influence.evaluation.datamodeling import draw_subsets, lds, retrain_on_subsets
from hf_influence.evaluation.demographic_parity import demographic_parity
from hf_influence.evaluation.fair_score import fair_score
from hf_influence.evaluation.flipped_labels import flipped_labels
from hf_influence.evaluation.mislabel_detection import mislabel_detection
from hf_influence.evaluation.out_of_fold import out_of_fold
from hf_influence.evaluation.provenance import provenance
from hf_influence.evaluation.removal import removal_curve
from hf_influence.evaluation.retraining_gain import retraining_gain
from hf_influence.evaluation.runs import Run, Runs
from hf_influence.evaluation.swap_terms import swap_terms
from hf_influence.evaluation.table import Table

__all__ = [
    "Run",
    "Runs",
    "Table",
    "accuracy_under_attack",
    "biased_labels",
    "biases",
    "class_detection",
    "corrupt_answers",
    "demographic_parity",
    "draw_subsets",
    "fair_score",
    "flipped_labels",
    "lds",
    "mislabel_detection",
    "out_of_fold",
    "provenance",
    "removal_curve",
    "retrain_on_subsets",
    "retraining_gain",
    "swap_terms",
]
