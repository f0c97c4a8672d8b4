"""Nothing in the tests may use the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)  # the models are tiny: a second thread only waits
