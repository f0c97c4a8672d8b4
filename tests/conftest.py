"""Nothing in the tests may use the network (but `HF_HUB_OFFLINE=0 pytest -m checkpoint`)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)  # the models are tiny: a second thread only waits
