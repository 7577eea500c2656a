"""Rows on disk: a folder that describes itself and appears whole.

    runs/sst2/
      store.json                      what all rows share: model, task, blocks, compressor, dtype
      points/0000/point.json          the parameter point: hash of the adapter's values
      points/0000/train/rows.json     dataset, ids, and the list of finished shards with their checksums
      points/0000/train/rows-00000.safetensors

One row is one example at one parameter point: its gradient, cut into blocks (one a parameter), and its statistics.
A shard is written under a temporary name, synced, renamed, and only then listed; so a run that dies loses at most
the rows it had not written, and the next one continues where the list ends. Only safetensors and JSON.
"""

from hf_influence.store.files import check_room
from hf_influence.store.gradient_store import GradientStore
from hf_influence.store.header import Header
from hf_influence.store.rows import Rows
from hf_influence.store.writer import RowWriter

__all__ = ["GradientStore", "Header", "RowWriter", "Rows", "check_room"]
