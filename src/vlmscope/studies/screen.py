"""First all sites by an estimate, then those that it finds exactly: a sweep of what a gradient points to.

Sites are ranked by their mean |score| over all examples (attribution patching, arXiv 2403.00745), the first
are swept, and as many others, drawn at random, say what was missed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmscope import files
from vlmscope.data import Examples
from vlmscope.errors import ExampleError, SiteError, StoreError, whole
from vlmscope.patching.backward import check_network
from vlmscope.patching.gradients import check_place, everywhere
from vlmscope.progress import progress
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.model import Model
from vlmscope.sites import Point, Site, Sites, expand, parse
from vlmscope.stats import rng, share_bound
from vlmscope.studies.recheck import CHECKED
from vlmscope.studies.run_folder import Run, read_run
from vlmscope.studies.sweep import Study, study_of
from vlmscope.studies.tables import by_example, change_of
from vlmscope.studies.task import Task, spec_of, task_of

SCREEN = "screen.json"
TOP = 500
"""Sites that are swept, where no number is given."""
DRAWN = 100
"""Others that are swept beside them, at most."""

Array = NDArray[np.float64]


class Group(NamedTuple):
    """Sites of one point whose positions are written alike; they differ by their units."""

    point: Point
    position: str


def screened(
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise = "image",
    *,
    out: str | os.PathLike[str],
    top: int = TOP,
    data: str = "examples",
    check: int = CHECKED,
    **options: Any,
) -> Study:
    """A sweep of the `top` sites with the largest mean |score| of `attribute(…, method="atp")`, and of as
    many others, at most 100, drawn at random; ranked here, unless the folder `out` holds the ranking.

    Sites are those that all examples have that can be run; a position of a pattern (`*`, `image*`) is the
    same site in two examples where its number is. `screen.json` says what was missed (`missed`). The folder
    goes on where it stopped, as a sweep's; other examples are another ranking. A shard ranks by all examples
    and sweeps its own. The other arguments are those of `sweep`.

    Raises what `sweep` and `attribute` raise.

    >>> import tempfile, vlmscope
    >>> from vlmscope.studies.sweep import into_folder
    >>> model, examples = vlmscope.load("toy-blip"), vlmscope.examples("states", limit=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     study = screened(model, examples, "encoder.*.cross.h*@answer", out=folder, top=4)
    ...     run = into_folder(study, folder)
    ...     run.effects()["site"].nunique(), missed(run)["sites"]
    (8, 12)
    """
    top = whole(top, "the number of sites to sweep", 1)
    task = task_of(model, examples, sites, corrupt, **options)
    check_network(model)
    for site in expand(parse(task.sites), model.shapes):
        check_place(site, "atp")
    asked = {"method": "atp", "top": top, "of": task.sites, "data_hash": spec_of(task, data)["data_hash"]}
    best, drawn, many = _known(out, asked) or _ranked(task, top)
    own = {**asked, "best": best, "drawn": drawn, "sites": many}
    return study_of(replace(task, sites=[*best, *drawn]), data, check, {"screen": own}, write_beside)


def write_beside(run: Run) -> None:
    """Write what was missed."""
    files.write_json(run.path / SCREEN, missed(run))


def _known(out: str | os.PathLike[str], asked: Mapping[str, Any]) -> tuple[list[str], list[str], int] | None:
    """The ranking of a folder that is gone on with."""
    with suppress(StoreError):
        own = read_run(out).spec.get("screen") or {}
        if {name: own.get(name) for name in asked} == asked:
            return own["best"], own["drawn"], own["sites"]
    return None


def _ranked(task: Task, top: int) -> tuple[list[str], list[str], int]:
    """The best sites of all, others that are drawn, and how many sites there are."""
    groups: dict[Group, list[tuple[int, ...]]] = defaultdict(list)
    for site in expand(parse(task.sites), task.model.shapes):
        groups[Group(site.point, site.position)].append(site.units)
    totals: dict[Group, dict[str, Array]] = {}
    wrong: Exception | None = None
    with progress(len(task.examples), what="examples ranked") as step:
        for number in range(len(task.examples)):
            try:
                found = _sizes(task, number, groups)
            except (ExampleError, SiteError) as error:
                wrong = wrong or error
                continue
            totals = found if not totals else {group: _sum(totals[group], found[group]) for group in groups}
            step(1, number + 1)
    if not totals and wrong is not None:
        raise wrong
    named = [(group, name, scores) for group, places in totals.items() for name, scores in places.items()]
    ends = np.cumsum([len(scores) for _, _, scores in named])
    sizes = np.concatenate([scores for *_, scores in named]) if named else np.zeros(0)

    def text(number: int) -> str:
        at = int(np.searchsorted(ends, number, side="right"))
        (point, _), name, scores = named[at]
        units = groups[named[at][0]][number - int(ends[at]) + len(scores)]
        return str(Site(*point, units, name))

    order = np.argsort(-sizes, kind="stable")
    best, rest = order[:top], order[top:]
    drawn = rng(task.seed, "screen").permutation(np.sort(rest))[: min(top, DRAWN)]
    return [text(int(n)) for n in best], [text(int(n)) for n in drawn], len(sizes)


def _sum(one: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, Array]:
    """Of the positions that both have."""
    return {name: one[name] + other[name] for name in one if name in other}


def _sizes(task: Task, number: int, groups: Mapping[Group, list[tuple[int, ...]]]) -> dict[Group, Any]:
    """|score| of every unit, or set, of a group in one example, by the names of its positions."""
    pairs, model = task.pairs(task.examples[number]), task.model
    points = {group.point for group in groups}
    each = [everywhere(model, pair, points, task.direction, task.metric) for pair in pairs]
    found: dict[Group, Any] = {}
    for group, units in groups.items():
        table = np.mean([one[group.point] for one in each], 0)
        if all(len(some) == 1 for some in units):
            table = table[:, [unit for (unit,) in units]]
        elif units[0]:
            table = np.stack([table[:, list(some)].sum(1) for some in units], 1)
        placed = model.places(Site(*group.point, units[0], group.position), pairs[0].clean)
        found[group] = {one.position: np.abs(table[list(one.positions)].sum(0)) for one in placed}
    return found


def missed(run: Run) -> dict[str, Any]:
    """What a screen may have missed.

    Of the `unseen` sites, `drawn` were swept, and `above` of these have a mean |effect| larger than the
    smallest of the best, `least`; the share of all unseen ones that have is at most `bound` (95 %, Clopper
    and Pearson 1934). `moving` of the best move the answer more than all that were drawn.
    """
    own: dict[str, Any] = run.spec["screen"]
    effects = run.effects()
    value = change_of(effects)
    size = by_example(effects.assign(size=effects[value].abs()), ["site"], "size").groupby("site").mean()
    best, drawn = (size.reindex(own[name]).dropna() for name in ("best", "drawn"))
    least, above = float(best.min()), int((drawn > best.min()).sum())
    unseen = own["sites"] - len(own["best"])
    return {
        "sites": own["sites"],
        "best": len(own["best"]),
        "unseen": unseen,
        "drawn": len(drawn),
        "above": above,
        "least": least,
        "bound": 0.0 if not unseen else share_bound(above, len(drawn)),
        "moving": int((best > (drawn.max() if len(drawn) else 0.0)).sum()),
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What was missed, in words."""
    yield f"swept the {found['best']:,} of {found['sites']:,} sites that the gradient finds"
    if not found["unseen"]:
        yield "nothing is left out"
        return
    yield (
        f"missed: at most {found['bound']:.1%} of the {found['unseen']:,} others have a larger effect than "
        f"the smallest of these (95 % bound; {found['above']} of {found['drawn']} drawn at random)"
    )
    yield f"{found['moving']:,} of the {found['best']:,} move the answer more than any that was drawn"
