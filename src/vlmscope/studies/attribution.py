"""How much of a logit difference each place accounts for: one loop and one table, whatever the method.

`direct`: what each writer of the stream gives by itself (`patching.direct`), exact. The others estimate what
a patch of each site would do (`patching.gradients`), and patch some of them to say how well.
"""

from __future__ import annotations

import os
from dataclasses import fields
from functools import partial
from typing import Any, get_args

import pandas as pd

from vlmscope import files
from vlmscope.data import Examples, listed
from vlmscope.data.lazy import readable
from vlmscope.errors import SEED, VlmscopeError, choice, whole
from vlmscope.patching import gradients as estimates
from vlmscope.patching.backward import check_network
from vlmscope.patching.direct import check_place
from vlmscope.patching.scores import Metric
from vlmscope.runs import corrupt as corruptions
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.model import Model, check_model
from vlmscope.runs.prepare import option_of
from vlmscope.sites import Sites, expand, parse
from vlmscope.studies.agreement import UNSIGNED, agreement
from vlmscope.studies.direct import check_sums, writers_of, written
from vlmscope.studies.gradients import check_effects, estimated
from vlmscope.studies.run_folder import ATTRIBUTIONS, Run
from vlmscope.studies.sweep import Direction, Study, table_of
from vlmscope.studies.task import (
    Attribution,
    Method,
    Shard,
    Task,
    check_any,
    check_examples,
    spec_of,
    task_of,
)

METHODS = get_args(Method)
AGREEMENT = "agreement.json"
MOST = 100_000
"""Sites of a kind and example that are verified, at most."""


def attribute(
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None = None,
    *,
    method: Method = "direct",
    direction: Direction = "denoise",
    metric: str | Metric = "ld",
    verify: int = 0,
    steps: int | None = None,
    word: str | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    data: str = "examples",
    shard: Shard | None = None,
) -> pd.DataFrame:
    """How much of LD = logit(answer) − logit(foil) each site accounts for; a row a site (columns as in
    `run_folder.ATTRIBUTIONS`), `score` in logits. With `word`, the logit of its first token takes LD's place.

    `direct`: what a writer to the stream of the tower that says the words gives by itself, past all that
    comes behind it, in the clean run: `attn`, `cross`, `mlp`, their heads (`attn.h*`) and neurons (`mlp.n*`),
    and `decoder.0.resid_pre`, the embedding, all `@readout`. With `corrupt`, what it gives in the clean run
    less what it gives in the corrupt one. `decoder.*.attn.h*@readout<image*` splits heads over what they
    read: a row a head and patch, whose `position`, `token`, `role` and `slot` are those of what is read.
    The biases have rows of their own (`unit` b): that of the final norm and the head, and those behind the
    heads and neurons that are named. All writers, each once, and these sum to LD (or its change).
    `attrs["check"]` says of how many examples (`rows`) this sum was compared with the model's own, whatever
    the sites, and the `largest` difference.

    `atp`, attribution patching (arXiv 2403.00745): what a patch of any site that `sweep` takes would change
    of `metric`, estimated for all sites from two runs and one backward pass: Σ (x_source − x_base) · ∂m/∂x.
    The base is the run that is patched, the corrupt one of `denoise` and the clean one of `noise`; a function
    as metric has to be one of torch. Gradients are taken in the model's own precision, their products with
    activations in float32 at least. `atp-star`, `relp` and `ig` (with `steps` points, 5 by default) are
    others of this sort (`patching.gradients`): of `atp-star` scores have no sign.

    With `verify`, in each example the so many best sites of each kind, and as many drawn at random, are
    patched exactly: `exact` is what that changes of the metric, and `attrs["agreement"]` (`agreement.json`
    in a run folder) says how well the scores agree, by kind (`studies.agreement`). `attrs["check"]` then
    says how many of these were recomputed by plain forwards, and the largest difference.

    `out`, `data` and `shard` are as in `sweep`. Raises `ModelError` for a family without direct effects,
    `SiteError` for a site that the method says nothing about, `VlmscopeError` for a metric without a
    gradient, `DataError` if no example can be run, `StoreError` for a folder of another run.

    >>> import vlmscope
    >>> model, one = vlmscope.load("toy-llava"), vlmscope.examples("states", limit=1)
    >>> writers = ["decoder.0.resid_pre@readout", "decoder.*.attn.h*@readout", "decoder.*.mlp@readout"]
    >>> table = attribute(model, one, writers)
    >>> ld = vlmscope.baselines(model, one)["ld_clean"]
    >>> bool(abs(table["score"].sum() - ld.item()) < 1e-4)
    True
    >>> table = attribute(model, one, "decoder.*.attn.h*@readout", "image", method="atp", verify=8)
    >>> int(table["exact"].notna().sum()), table.attrs["agreement"]["decoder.attn.h"]["spearman"] > 0.5
    (16, True)
    """
    options: dict[str, Any] = {"method": method, "verify": verify, "steps": steps, "word": word}
    options |= {"direction": direction, "metric": metric, "seed": seed, "data": data, "shard": shard}
    table = table_of(attributed(model, examples, sites, corrupt, **options), out)
    if verify:
        table.attrs["agreement"] = agreement(table, verify, signed=method != UNSIGNED)
    return table


def attributed(
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None = None,
    *,
    method: Method = "direct",
    verify: int = 0,
    steps: int | None = None,
    word: str | None = None,
    direction: Direction = "denoise",
    metric: str | Metric = "ld",
    seed: int = 0,
    data: str = "examples",
    shard: Shard | None = None,
) -> Study:
    """What `attribute`, with the same arguments, puts into a folder."""
    own = {"method": method, "verify": verify, "steps": steps, "word": word}
    options = {"direction": direction, "metric": metric, "seed": seed, "shard": shard}
    task = _task_of(model, examples, sites, corrupt, own, options)
    way: Any = (written, check_sums) if method == "direct" else (estimated, check_effects)
    work, check = way
    specify = partial(_spec_of, task, data)
    return Study(task, ATTRIBUTIONS, work, partial(check, task), specify, write_beside)


def _task_of(
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None,
    own: dict[str, Any],
    options: dict[str, Any],
) -> Attribution:
    """Checked against the model and the data before anything runs."""
    method = own["method"]
    choice(method, "method", METHODS)
    own["verify"] = whole(own["verify"], "the number of sites to verify", most=MOST)
    if own["steps"] is not None and method != "ig":
        raise VlmscopeError(f"{method} has no steps, only ig has; leave them out")
    if method == "ig":
        steps = estimates.STEPS if own["steps"] is None else own["steps"]
        own["steps"] = whole(steps, "the number of steps", 1, 1000)
    if method == "direct":
        return _direct_task(model, examples, sites, corrupt, own, options)
    if own["word"] is not None:
        raise VlmscopeError("a word is accounted for by the method direct alone; leave it out")
    if corrupt is None:
        raise VlmscopeError(
            f"{method} estimates what a patch does, which takes two runs; name a corruption (--corrupt "
            "image, text or noise), or take the method direct"
        )
    task = task_of(model, examples, sites, corrupt, **options)
    check_network(model)
    for site in expand(parse(task.sites), model.shapes):
        estimates.check_place(site, method)
    if task.metric == "kl" and task.direction == "noise" and method != "ig":
        raise VlmscopeError(
            "the metric kl is of the distance from the clean run, around which it has no gradient; take "
            "ld, logprob or p, denoise (--direction), or the method ig"
        )
    return Attribution(**{each.name: getattr(task, each.name) for each in fields(Task)}, **own)


def _direct_task(
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None,
    own: dict[str, Any],
    options: dict[str, Any],
) -> Attribution:
    check_model(model)
    if own["verify"] or options["direction"] != "denoise" or options["metric"] != "ld":
        raise VlmscopeError(
            "the method direct is exact and of the logits: it has nothing to verify, no direction and no "
            "other metric; leave these out, or take atp"
        )
    whole(options["seed"], "the seed", most=SEED)
    corruption = None if corrupt is None else corruptions.parse(corrupt)
    names, own = [str(site) for site in parse(sites)], {**own, "shard": options["shard"]}
    task = Attribution(model, listed(examples), names, corruption, seed=options["seed"], **own)
    check_examples(task)
    if task.word is not None:  # one that is none is wrong in all examples: said before a folder is begun
        first = next(readable(task.examples))
        option_of(model, first.clean_prompt, "word", task.word, 1 + len(first.more_images))
    expanded = expand(parse(task.sites), model.shapes)
    for site in expanded:
        check_place(model, site)
    check_any(task.examples, lambda example: writers_of(model, expanded, task.pairs(example)[0].clean))
    return task


def _spec_of(task: Attribution, data: str) -> dict[str, Any]:
    """What of a folder has to be the same; the best of some sites are not those of more, so none are added to
    what is verified."""
    of_patches = ["engine", "patch", "select"]
    more: dict[str, Any] = {"method": task.method}
    if task.method == "direct":
        of_patches += ["direction", "metric"]
        more["word"] = task.word
    else:
        more |= {"verify": task.verify, **({"ranked": task.sites} if task.verify else {})}
        more |= {"steps": task.steps} if task.steps else {}
    return {name: value for name, value in spec_of(task, data).items() if name not in of_patches} | more


def write_beside(run: Run) -> None:
    """Write how well the scores agree with patches (`studies.agreement`), where some are verified."""
    if verify := run.spec.get("verify"):
        found = agreement(run.attributions(), verify, signed=run.spec["method"] != UNSIGNED)
        files.write_json(run.path / AGREEMENT, found)
