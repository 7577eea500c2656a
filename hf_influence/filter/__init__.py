"""Scores and a dataset in, a better dataset out."""

from hf_influence.filter.dataset_filter import DatasetFilter
from hf_influence.filter.relabel import Relabel
from hf_influence.filter.report import FilterReport, Removed
from hf_influence.filter.reweight import Reweight
from hf_influence.filter.thresholds import discovery

__all__ = ["DatasetFilter", "FilterReport", "Relabel", "Removed", "Reweight", "discovery"]
