"""Small fine-tuning data sets with a known answer: which examples share a task."""

from hf_influence.evaluation.benchmarks.math_problems import math_problems
from hf_influence.evaluation.benchmarks.sentence_transformations import TRANSFORMATIONS, sentence_transformations
from hf_influence.evaluation.benchmarks.tokenization import tokenize

__all__ = ["TRANSFORMATIONS", "math_problems", "sentence_transformations", "tokenize"]
