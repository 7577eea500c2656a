"""Scores and a dataset in, a better dataset out."""

from hf_influence.filter.card import add_to_card, save_curated
from hf_influence.filter.dataset_filter import DatasetFilter
from hf_influence.filter.decision import Decision, Removed
from hf_influence.filter.prune import Prune
from hf_influence.filter.relabel import Relabel
from hf_influence.filter.reweight import Reweight
from hf_influence.filter.rule import Rule
from hf_influence.filter.separate import Separate
from hf_influence.filter.streams import StreamRows
from hf_influence.filter.thresholds import discovery

__all__ = [
    "DatasetFilter",
    "Decision",
    "Prune",
    "Relabel",
    "Removed",
    "Reweight",
    "Rule",
    "Separate",
    "StreamRows",
    "add_to_card",
    "discovery",
    "save_curated",
]
