"""The models of all families, each made once.

Where the variable `VLMSCOPE_TORCHVISION` is set, the families whose processors need torchvision take the
place of the others (`test_oracle_video.py` starts that).
"""

from __future__ import annotations

import os
from functools import cache

from cases import Case

if os.environ.get("VLMSCOPE_TORCHVISION"):
    from video_models import MAKERS
else:
    from still_models import MAKERS


@cache
def case(name: str, seed: int = 0) -> Case:
    """A model by its name; another seed gives another one of the same class."""
    return MAKERS[name](seed)
