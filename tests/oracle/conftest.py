"""One model of each family, made once; every test is run over all of them.

Where the variable `VLMSCOPE_TORCHVISION` is set, the families whose processors need torchvision take the
place of the others (`test_video_oracle.py` starts that).
"""

from __future__ import annotations

import pytest
import torch
import zoo


@pytest.fixture(params=list(zoo.MAKERS))
def case(request):
    return zoo.case(request.param)


@pytest.fixture(autouse=True)
def quick():
    with torch.no_grad():
        yield
