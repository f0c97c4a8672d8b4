"""Knock-outs of attention: what moves the answer when some positions no longer read some others.

Published for LLaVA with windows of 9 layers and sets of tokens (Neo et al. 2024, arXiv 2410.07149; Zhang et
al. 2024, arXiv 2411.18620).
"""

from __future__ import annotations

import os
from typing import Any

import pandas as pd

from vlmscope.data import Examples
from vlmscope.errors import SiteError, choice, shown
from vlmscope.models.inputs import CUTS, Cut
from vlmscope.patching.scores import Metric
from vlmscope.runs.model import Model
from vlmscope.sites import Sites, parse
from vlmscope.studies.recheck import CHECKED
from vlmscope.studies.sweep import Engine, Study, study_of, table_of
from vlmscope.studies.task import Shard, task_of


def knockout(
    model: Model,
    examples: Examples,
    sites: Sites,
    how: Cut = "block",
    *,
    engine: Engine = "fast",
    metric: str | Metric = "ld",
    out: str | os.PathLike[str] | None = None,
    data: str = "examples",
    check: int = CHECKED,
    shard: Shard | None = None,
) -> pd.DataFrame:
    """Cut every edge of attention that `sites` name, in the clean run of every example; a row each.

    An edge is `decoder.*/9.attn@last<image`: in a window of nine layers around each layer, the last position
    no longer reads the image. With `block` the score is −∞ before the softmax and the other weights of the
    row add up to 1; with `zero` the weight is 0 behind it. A row that has nothing left reads nothing. The
    columns are those of `sweep`: `p_change` and `ld_change` say what the knock-out does; what compares with a
    corrupt run is null. `vlmscope.flow_table` averages them. The other arguments are those of `sweep`.

    Raises `SiteError` for a site that is no edge, or that this model or these examples do not have,
    `ModelError` where a family does not show what its heads pay attention to.

    >>> import vlmscope
    >>> model, examples = vlmscope.load("toy-llava"), vlmscope.examples("states", limit=2)
    >>> table = knockout(model, examples, ["decoder.*.attn@last<image", "decoder.*.attn@last<answer"])
    >>> len(table), bool((table["p_change"] < 0).any())
    (16, True)
    """
    options: dict[str, Any] = {"engine": engine, "metric": metric, "shard": shard}
    return table_of(knocked_out(model, examples, sites, how, data=data, check=check, **options), out)


def knocked_out(
    model: Model,
    examples: Examples,
    sites: Sites,
    how: Cut = "block",
    *,
    data: str = "examples",
    check: int = CHECKED,
    **options: Any,
) -> Study:
    """What `knockout`, with the same arguments, puts into a folder."""
    choice(how, "knock-out", CUTS)
    patterns = parse(sites)
    if plain := next((one for one in patterns if not one.source), None):
        raise SiteError(
            f"bad site {shown(plain)}: no edge of attention; expected such as decoder.*/9.attn@last<image, "
            "or ablate activations: vlmscope sweep --patch zero"
        )
    return study_of(task_of(model, examples, patterns, None, patch=how, **options), data, check)
