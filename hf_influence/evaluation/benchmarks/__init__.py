"""Small fine-tuning data sets with a known answer: which examples share a task, and which answers are wrong."""

from hf_influence.evaluation.benchmarks.math_problems import math_problems
from hf_influence.evaluation.benchmarks.sentence_transformations import TRANSFORMATIONS, sentence_transformations
from hf_influence.evaluation.benchmarks.tokenization import tokenize
from hf_influence.evaluation.benchmarks.wrong_answers import swap_answers

__all__ = ["TRANSFORMATIONS", "math_problems", "sentence_transformations", "swap_answers", "tokenize"]
