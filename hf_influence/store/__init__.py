"""Rows on disk: a folder that describes itself and appears whole.

    runs/sst2/
      store.json                      what all rows share: model, task, blocks, compressor, dtype
      run.json                        the process that fills it, while one trains
      points/0000/point.json          the parameter point: hash of the adapter's values, its kind and details
      points/0000/train/rows.json     dataset, ids, and the list of finished shards with their checksums
      points/0000/train/rows-00000.safetensors
      points/1000000/displacement.safetensors   of a point made from other weights: how far it lies from them

One row is one example at one parameter point: its gradient, cut into blocks (one a parameter), and its statistics.
A shard is written under a temporary name, synced, renamed, and only then listed; so a run that dies loses at most
the rows it had not written, and the next one continues where the list ends. Only safetensors and JSON.
"""

from hf_influence.store.claim import Claim
from hf_influence.store.displacement import Displacement
from hf_influence.store.files import check_room, check_writable
from hf_influence.store.gradient_store import GradientStore
from hf_influence.store.header import Header
from hf_influence.store.points import WEIGHTS, PointAbout, number_of
from hf_influence.store.rows import Rows
from hf_influence.store.writer import RowWriter

__all__ = [
    "WEIGHTS",
    "Claim",
    "Displacement",
    "GradientStore",
    "Header",
    "PointAbout",
    "RowWriter",
    "Rows",
    "check_room",
    "check_writable",
    "number_of",
]
