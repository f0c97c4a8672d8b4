"""Runs by several processes, through Ray: one model each, examples as they get free, one folder.

Workers write parts beside those of the folder, under temporary names; the driver, which holds the folder,
gives them their names, and that commits them. So what a worker that dies has not handed over is computed
again, by another one, and nothing is there twice. Names and paths travel, no tensors. `Alone` does in this
process what a `Team` does in others.
"""

from __future__ import annotations

from vlmscope.studies.workers.cluster import started as started
