"""Nothing in the tests may use the network (but `HF_HUB_OFFLINE=0 pytest -m checkpoint`)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes that the tests start compute on one thread, too: then their numbers are the same.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)  # the models are tiny: a second thread only waits
