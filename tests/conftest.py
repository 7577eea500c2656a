"""Settings that all tests share."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_threads = max(1, min(4, torch.get_num_threads()) // _workers)
torch.set_num_threads(_threads)
os.environ["OMP_NUM_THREADS"] = str(_threads)  # of the processes that tests start


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
