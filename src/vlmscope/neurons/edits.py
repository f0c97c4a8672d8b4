"""Make a model say another word for what it sees, by changing a few neurons' columns only.

The neurons are those that contribute most to the word (`neurons`); what is added to their columns of the
down projection is found in one of two ways (Pan et al., arXiv 2311.07470; the learned one after FiNE, arXiv
2503.01090). Both see the whole model: a neuron fires at many positions, and later layers read what it adds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.errors import ExampleError, ModelError, VlmscopeError
from vlmscope.inputs import Inputs
from vlmscope.neurons.contributions import Caption, say, weights
from vlmscope.neurons.weight_edit import WeightEdit, edited
from vlmscope.progress import progress
from vlmscope.runs.forward import forward
from vlmscope.runs.hooks import Access, Hooks
from vlmscope.runs.model import Model
from vlmscope.stats import bootstrap, rng, shuffled

SHARE = 0.01
"""The share of all neurons that an edit changes by default."""
PICTURES = 64
"""How many pictures that show the word an edit is made on, at most."""
OTHERS = 192
"""How many pictures that do not show it are kept as they are, at most."""
BLIND = 16
"""How many prompts are kept as they are without a picture, at most."""
ROUNDS = 16
NEAR = 1.0
"""Margins that hold by less than so many logits are kept in sight."""
RIDGE = 1e-4
ELSEWHERE = 30.0
"""What it weighs that a neuron fires elsewhere, against its own column."""
CLOSE = 0.05
"""A margin holds if no more than so many logits lack."""
STEPS, LEAST, BATCH = 400, 120, (8, 8)
"""Steps of the learned solver at most and at least, and captions to be changed and kept in each."""
MARGIN = 4.0
"""By how many logits a new word is to lead, for the closed solver."""
SURE = 0.9
"""The learned solver stops when each new word is as probable."""

Solver = Literal["closed", "learned"]


@dataclass(eq=False)
class _Wanted:
    """A caption to be said about a picture: its tokens, which of them are new, and what is fed.

    `was` is what the model says by itself, with as many tokens behind the new ones.
    """

    fed: Inputs
    start: int
    ids: list[int]
    new: list[int]
    avoid: int | None
    was: _Wanted | None = None
    margins: Tensor | None = None
    logits: Tensor | None = None


def edit(
    model: Model,
    examples: Examples,
    source: str,
    target: str | None,
    *,
    prompt: str | None = None,
    neurons: int | None = None,
    solver: Solver = "learned",
    margin: float | None = None,
    locality: float = 1.0,
    seed: int = 0,
) -> WeightEdit:
    """An edit after which the model says `target` where it said `source` (or anything else, if None).

    It is made on up to `PICTURES` examples whose caption has the word; up to `OTHERS` whose caption has
    not are to keep theirs. `prompt` asks for the captions (each example's own by default). `neurons` is
    how many columns may change (1 % of all by default). `locality` weighs what is to stay against what is to
    change. Made within `edited`, an edit is for the model with those edits (`WeightEdit.on`).

    - `learned`: Adam on the columns; negative log-likelihood of the new words, plus the divergence of
      all other positions from what they were, plus the probability of the new word where it does not
      belong, plus a decay; until each new word has a probability of 0.9.
    - `closed`: the change of least norm (see `_closed`) after which every margin holds, to first order at the
      activations and with the gradients of the model as it is; repeated from where that leads until they hold,
      or `ROUNDS` times. A new word's margin is that it leads by `margin` logits (4 by default).

    Raises `ExampleError` if no caption has the word, `ModelError` if the weights cannot be edited,
    `VlmscopeError` for a margin of the learned solver, which has none.
    """
    margin = checked(solver, margin)
    if target is not None and source.casefold() == target.casefold():
        raise ExampleError(f"'{source}' is already '{target}'; give another target")
    has, other = _split(model, listed(examples), source, prompt, seed)
    chosen = choose(model, [said for _, said in has], source, neurons)
    wanted = [w for one, said in has if (w := _changed(model, one, said, source, target, prompt))]
    if not wanted:
        raise ExampleError(
            f"'{target}' cannot take the place of '{source}' in these captions: the tokens around it change"
        )
    kept = [_same(model, one, said, prompt) for one, said in other]
    asked = dict.fromkeys(prompt or one.clean_prompt for one, _ in [*has, *other])
    alone = [one for text in list(asked)[:BLIND] if (one := _blind_same(model, text, source))]
    kept += (alone * BLIND)[:BLIND]  # they are few, and to be met as often
    with _frozen(model):
        width, delta = model.shapes[model.speaker].width, {}
        for layer in sorted({layer for layer, _ in chosen}):
            at = torch.tensor(sorted(n for own, n in chosen if own == layer), device=model.device)
            delta[layer] = (at, torch.zeros(width, len(at), device=model.device))
        for one in [*wanted, *kept]:
            _remember(model, one)
        if solver == "closed":
            _closed(model, wanted, kept, delta, margin, locality)
        else:
            draw = rng(seed, "edit", source, target)
            _learned(model, wanted, kept, delta, locality, draw)
    about = {
        "from": source,
        "to": target or "",
        "solver": solver,
        "pictures": str(len(wanted)),
        "model": model.name,
    }
    columns = {layer: (at.cpu(), d.detach().cpu()) for layer, (at, d) in delta.items()}
    return WeightEdit(columns, model.unedited or model.fingerprint(), about, model.edits)


def checked(solver: str, margin: float | None) -> float:
    """The margin of a solver; raises `VlmscopeError` where it has none, or there is no such solver.

    >>> checked("closed", None)
    4.0
    """
    if solver not in get_args(Solver):
        raise VlmscopeError(f"unknown solver '{solver}'; expected {' or '.join(get_args(Solver))}")
    if solver != "closed" and margin is not None:
        raise VlmscopeError(
            f"a margin is of the closed solver; the learned one goes on until each new word has a probability of "
            f"{SURE}; leave the margin out, or take the solver closed"
        )
    return MARGIN if margin is None else margin


def choose(
    model: Model, captions: Sequence[Caption], word: str, many: int | None = None
) -> list[tuple[int, int]]:
    """The `many` neurons (1 % by default) that contribute most to a word, meant over captions; best first.

    Raises `ModelError` if there are not as many.
    """
    layers = model.shapes[model.speaker].having("mlp")
    width = model.shapes[model.speaker].neurons
    many = max(1, round(SHARE * len(layers) * width)) if many is None else many
    if not 1 <= many <= len(layers) * width:
        raise ModelError(f"{many} neurons cannot be chosen; expected 1 to {len(layers) * width}")
    total, count = torch.zeros(len(layers) * width, device=model.device), 0
    known: dict[int, Tensor] = {}
    for said in captions:
        for number in said.find(word):
            token = said.ids[number]
            if token not in known:
                known[token] = weights(model, [token])[0].flatten()
            total += (said.activations[number].flatten() * known[token]).float()
            count += 1
    best = (total / count).topk(many).indices.tolist()
    return [(layers[n // width], n % width) for n in best]


def _split(
    model: Model, examples: Sequence[Example], word: str, prompt: str | None, seed: int
) -> tuple[list[tuple[Example, Caption]], list[tuple[Example, Caption]]]:
    """Examples whose caption has the word, and others, with their captions."""
    has: list[tuple[Example, Caption]] = []
    other: list[tuple[Example, Caption]] = []
    with progress(len(examples), what="captions") as step:
        order = shuffled(seed, [one.id for one in examples])
        for done, one in enumerate((examples[n] for n in order), start=1):
            said = say(model, _inputs(model, one, prompt))
            where = has if says(said.text, word) else other
            if len(where) < (PICTURES if where is has else OTHERS):
                where.append((one, said))
            step(0, done)
            if len(has) == PICTURES and len(other) == OTHERS:
                break
    if not has:
        seen = sorted({w for _, said in other for w in re.findall(r"\w+", said.text)})
        raise ExampleError(
            f"no caption of these pictures has the word '{word}'; they have: {', '.join(seen[:30])}"
        )
    return has, other


def says(text: str, word: str) -> bool:
    """Whether a text has a word, as a whole word."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _inputs(model: Model, one: Example, prompt: str | None, said: Sequence[int] = ()) -> Inputs:
    return model.inputs(one.clean_image, prompt or one.clean_prompt, one.more_images, said)


def _changed(
    model: Model, one: Example, said: Caption, source: str, target: str | None, prompt: str | None
) -> _Wanted | None:
    """What is to be said instead; None where the rest of the caption would be other tokens."""
    numbers = said.find(source)
    if target is None:
        return _Wanted(
            _inputs(model, one, prompt, said.ids[:-1]),
            said.start,
            list(said.ids),
            numbers,
            said.ids[numbers[0]],
        )
    pattern = rf"(?<!\w){re.escape(source)}(?!\w)"
    text = re.sub(pattern, target, said.text.strip(), flags=re.IGNORECASE)
    ids = model.family.options(model.processor, prompt or one.clean_prompt, text, 1 + len(one.more_images))
    unknown = model.processor.tokenizer.unk_token_id
    if unknown is not None and unknown in ids[:-1]:
        raise ExampleError(f"'{target}' is unknown to the model's tokenizer; give another word")
    before, after = numbers[0], len(said.ids) - 1 - numbers[-1]
    if tuple(ids[:before]) != said.ids[:before] or (after and tuple(ids[-after:]) != said.ids[-after:]):
        return None
    new = [n for n in range(before, len(ids) - after) if n >= len(said.ids) or ids[n] != said.ids[n]]
    was = _same(model, one, said, prompt)
    return _Wanted(_inputs(model, one, prompt, ids[:-1]), said.start, ids, new, None, was)


def _same(model: Model, one: Example, said: Caption, prompt: str | None) -> _Wanted:
    return _Wanted(_inputs(model, one, prompt, said.ids[:-1]), said.start, list(said.ids), [], None)


def _blind_same(model: Model, prompt: str, source: str) -> _Wanted | None:
    """What the model says to a prompt alone, if it takes such and does not say the word."""
    try:
        plain = model.inputs(None, prompt)
    except ExampleError:
        return None
    said = say(model, plain)
    if says(said.text, source):
        return None
    fed = model.inputs(None, prompt, (), said.ids[:-1])
    return _Wanted(fed, said.start, list(said.ids), [], None)


# -- the two solvers -----------------------------------------------------------------------------


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """No gradients of the model's own weights are kept."""
    wanted = [p for p in model.hf.parameters() if p.requires_grad]
    for one in wanted:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in wanted:
            one.requires_grad_(True)


def _logits(model: Model, one: _Wanted, delta: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
    """The logits of all positions that say the caption, with `delta` added to the columns."""
    with model.alone(), Hooks() as hooks:
        for layer, (at, added) in delta.items():
            column = _Added(at, added)
            hooks.at(Access(model.down(layer), before=True), column.enter)
            hooks.at(Access(model.down(layer)), column.leave)
        logits = forward(model, one.fed, positions=None, grad=torch.is_grad_enabled()).logits
    return logits[one.start : one.start + len(one.ids)].float()


class _Added:
    """What is added to columns of one down projection, as it is computed."""

    def __init__(self, at: Tensor, added: Tensor) -> None:
        self.at, self.added = at, added
        self.activations = added

    def enter(self, x: Tensor) -> Tensor:
        self.activations = x[..., self.at.to(x.device)]
        return x

    def leave(self, x: Tensor) -> Tensor:
        return x + self.activations @ self.added.T.to(x)


def _lead(row: Tensor, token: int) -> Tensor:
    """By how many logits a token leads the best other one."""
    others = row.detach().clone()
    others[token] = -torch.inf
    return row[token] - row[int(others.argmax())]


def _remember(model: Model, one: _Wanted) -> None:
    """How surely each token is said before the edit, and with which probabilities.

    Behind a new word that is what was said behind the old one: fed the new one, a model that knows which
    objects it has named may go on otherwise.
    """
    with torch.no_grad():
        if one.was is None:
            one.logits = _logits(model, one, {})
        else:
            old, last = _logits(model, one.was, {}), one.new[-1]
            longer = len(one.ids) - len(old)
            rows = [n - longer if n > last else min(n, len(old) - 1) for n in range(len(one.ids))]
            one.logits = old[rows]
        leads = [_lead(row, token) for row, token in zip(one.logits, one.ids, strict=True)]
        one.margins = torch.stack(leads)


def _closed(
    model: Model,
    wanted: Sequence[_Wanted],
    kept: Sequence[_Wanted],
    delta: dict[int, tuple[Tensor, Tensor]],
    margin: float,
    locality: float,
) -> None:
    """Least-norm steps until the margins hold; see `edit`.

    The norm counts a column by how much its neuron fires elsewhere (as the covariance does in ROME, Meng et
    al. 2022, arXiv 2202.05262), so that what is added there stays small. A step is halved until it brings the
    margins nearer, as a first-order step does if it is short enough.
    """
    parameters = [d.requires_grad_(True) for _, d in delta.values()]
    metric = [one.double() for one in _elsewhere(model, wanted, kept, delta, locality)]
    captions = [*wanted, *kept]
    change = [torch.zeros_like(d, dtype=torch.float64) for d in parameters]
    with progress(ROUNDS, what="rounds") as step:
        for number in range(ROUNDS):
            rows, needs = [], []
            for one in captions:
                for lead, need, weight in _leads(_logits(model, one, delta), one, margin, locality):
                    if need > -NEAR:  # what nearly fails is to stay as it is
                        parts = torch.autograd.grad(
                            lead, parameters, retain_graph=True, materialize_grads=True
                        )
                        rows.append(
                            weight
                            * torch.cat(
                                [(x.double() @ m).flatten() for x, m in zip(parts, metric, strict=True)]
                            )
                        )
                        needs.append(weight * max(need, 0.0))
            step(0, number + 1)
            if not needs or max(needs) < CLOSE:
                return
            matrix, there = torch.stack(rows), torch.cat([x.flatten() for x in change])
            gram = matrix @ matrix.T
            gram += RIDGE * gram.diagonal().median() * torch.eye(len(gram), device=gram.device)
            needed = torch.tensor(needs, dtype=torch.float64, device=gram.device)
            # Of the whole change the norm is to be least, not of this step.
            whole = matrix.T @ torch.linalg.solve(gram, needed + matrix @ there)
            aim = [
                x.view_as(d)
                for x, d in zip(whole.split([d.numel() for d in parameters]), parameters, strict=True)
            ]
            before, old = sum(need**2 for need in needs), change
            for share in (1.0, 0.5, 0.25, 0.125):
                change = [x + share * (y - x) for x, y in zip(old, aim, strict=True)]
                with torch.no_grad():
                    for added, x, m in zip(parameters, change, metric, strict=True):
                        added.copy_((x @ m).to(added))
                    now = sum(
                        (weight * need) ** 2
                        for one in captions
                        for _, need, weight in _leads(_logits(model, one, delta), one, margin, locality)
                        if need > 0
                    )
                if now < before:
                    break


def _elsewhere(
    model: Model,
    wanted: Sequence[_Wanted],
    kept: Sequence[_Wanted],
    delta: Mapping[int, tuple[Tensor, Tensor]],
    locality: float,
) -> list[Tensor]:
    """By layer the inverse square root of 1 + c·C, with C the second moment of the chosen neurons at all
    positions but those of new words, over their mean square there."""
    seen: dict[int, Tensor] = {}
    total = {layer: torch.zeros(len(at), len(at), device=at.device) for layer, (at, _) in delta.items()}
    here = {layer: torch.zeros((), device=at.device) for layer, (at, _) in delta.items()}
    count = many = 0
    with model.alone(), Hooks() as hooks, torch.no_grad():
        for layer, (at, _) in delta.items():

            def keep(x: Tensor, layer: int = layer, at: Tensor = at) -> Tensor:
                seen[layer] = x.reshape(-1, x.shape[-1])[:, at].float().clone()
                return x

            hooks.at(Access(model.down(layer), before=True), keep)
        for one in [*wanted, *kept]:
            seen.clear()  # without a picture a layer may be passed over
            forward(model, one.fed)
            new = [one.start + n for n in one.new]
            for layer, x in seen.items():
                is_new = torch.zeros(len(x), dtype=torch.bool, device=x.device)
                is_new[new] = True
                total[layer] += x[~is_new].T @ x[~is_new]
                here[layer] += x[is_new].square().mean(-1).sum()
            count, many = count + int((~is_new).sum()), many + len(new)
    found = []
    for layer, moment in total.items():
        scale = (here[layer] / max(1, many)).clamp(min=1e-12)
        values, vectors = torch.linalg.eigh((moment / count / scale).double())
        root = (1 + ELSEWHERE * locality * values.clamp(min=0)).rsqrt()
        found.append(vectors @ torch.diag(root) @ vectors.T)
    return found


def _leads(
    logits: Tensor, one: _Wanted, margin: float, locality: float
) -> Iterator[tuple[Tensor, float, float]]:
    """For each position: by how much its token leads, how much more is needed, and what that weighs."""
    assert one.margins is not None
    for n, token in enumerate(one.ids):
        if one.avoid is not None and n > one.new[0]:
            return  # behind a word that is to go anything may be said
        lead = _lead(logits[n], token)
        if n not in one.new:
            least = min(margin / 2, float(one.margins[n]))
            yield lead, least - lead.item(), locality
        elif one.avoid is None:
            yield lead, margin - lead.item(), 1.0
        else:
            yield -lead, margin + lead.item(), 1.0


def _learned(
    model: Model,
    wanted: Sequence[_Wanted],
    kept: Sequence[_Wanted],
    delta: dict[int, tuple[Tensor, Tensor]],
    locality: float,
    draw: np.random.Generator,
) -> None:
    """Adam on the columns; see `edit`."""
    parameters = [d.requires_grad_(True) for _, d in delta.values()]
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    sure: dict[int, float] = {}
    with progress(STEPS, what="steps") as step:
        for number in range(STEPS):
            some = [wanted[int(n)] for n in draw.permutation(len(wanted))[: BATCH[0]]]
            rest = [kept[int(n)] for n in draw.permutation(len(kept))[: BATCH[1]]]
            loss = 1e-3 * torch.stack([d.square().sum() for d in parameters]).sum()
            for one in [*some, *rest]:
                found = F.log_softmax(_logits(model, one, delta), -1)
                assert one.logits is not None
                tokens = torch.tensor(one.ids, device=found.device)
                is_new = torch.zeros(len(tokens), dtype=torch.bool, device=found.device)
                is_new[one.new] = True
                own = found.gather(1, tokens[:, None])[:, 0]
                if one.new and one.avoid is None:
                    loss = loss - own[is_new].mean()
                    sure[id(one)] = own[is_new].detach().exp().min().item()
                elif one.new:
                    loss = loss - torch.log1p(-own[is_new].exp().clamp(max=1 - 1e-6)).mean()
                    sure[id(one)] = 1 - own[is_new].detach().exp().max().item()
                before = F.log_softmax(one.logits, -1)
                apart = F.kl_div(found, before, log_target=True, reduction="none").sum(-1)
                if (~is_new).any():
                    loss = loss + locality * apart[~is_new].mean()
                    if one.new and one.avoid is None:  # the new word, once more where it does not belong
                        again = found[~is_new][:, tokens[is_new].unique()].exp()
                        belongs = (tokens[~is_new][:, None] == tokens[is_new].unique()[None]).float()
                        loss = loss + locality * (again * (1 - belongs)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step(0, number + 1)
            seems = len(sure) == len(wanted) and min(sure.values()) >= SURE
            # What was seen of the others is some steps old, so all are looked at again.
            if number + 1 >= LEAST and seems and all(_is_sure(model, x, delta) for x in wanted):
                return


@torch.no_grad()
def _is_sure(model: Model, one: _Wanted, delta: Mapping[int, tuple[Tensor, Tensor]]) -> bool:
    """Whether every new word is as probable as it has to be."""
    found = _logits(model, one, delta).softmax(-1)
    own = torch.stack([found[n, one.ids[n]] for n in one.new])
    return bool((own >= SURE).all() if one.avoid is None else (own <= 1 - SURE).all())


# -- how good an edit is -------------------------------------------------------------------------


def assess(
    model: Model,
    edits: Sequence[WeightEdit],
    examples: Examples,
    source: str,
    target: str | None,
    *,
    prompts: Sequence[str | None] = (None,),
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What edits do to free captions of pictures that they were not made on: measures, and the captions.

    The captions have the columns `example, prompt, before, after, has, took, same`: whether the caption
    had the word, whether it now has the other one instead, and whether it is what it was. Measures have
    an interval over pictures (bootstrap, 95 %):

    - `generality` (the first prompt) and `generality, other wording`: of the captions that had the word,
      those that took the new one;
    - `only the word`: those in which nothing else has changed;
    - `locality` and `locality, other wording`: of the other captions, those unchanged; `locality, no image`: of what is
      said to the same prompts without a picture, where the model takes such;
    - `repetition` and `length`: of the edited captions, words that repeat the one before, and words
      relative to before (fluency).
    """
    found = []
    given = listed(examples)
    asked = [(one, prompt) for prompt in prompts for one in given]
    before = _captions(model, asked, "captions before")
    without = list(dict.fromkeys(p or one.clean_prompt for one, p in asked))[:64]
    silent = [_blind(model, prompt) for prompt in without]
    with edited(model, *edits):
        after = _captions(model, asked, "captions after")
        now_silent = [_blind(model, prompt) for prompt in without]
    for (one, prompt), old, new in zip(asked, before, after, strict=True):
        has = says(old, source)
        took = has and not says(new, source) and (target is None or says(new, target))
        wanted = re.sub(rf"(?<!\w){re.escape(source)}(?!\w)", target or "", old, flags=re.IGNORECASE)
        found.append((one.id, prompt or one.clean_prompt, old, new, has, took, old == new, wanted == new))
    names = ["example", "prompt", "before", "after", "has", "took", "same", "only"]
    table = pd.DataFrame(found, columns=names)
    first = table["prompt"].isin([prompts[0] or one.clean_prompt for one in given])
    has = table["has"]
    words = table.assign(
        twice=[_repeated(text) for text in table["after"]],
        longer=[
            len(a.split()) / max(1, len(b.split()))
            for a, b in zip(table["after"], table["before"], strict=True)
        ],
    )
    values: dict[str, Any] = {
        "generality": table.loc[has & first, "took"],
        "generality, other wording": table.loc[has & ~first, "took"],
        "only the word": table.loc[has & table["took"], "only"] if target else [],
        "locality": table.loc[~has & first, "same"],
        "locality, other wording": table.loc[~has & ~first, "same"],
        "locality, no image": [
            a == b for a, b in zip(silent, now_silent, strict=True) if a is not None and not says(a, source)
        ],
        "repetition": words["twice"],
        "length": words["longer"],
    }
    rows = []
    for name, some in values.items():
        scores = np.sort(np.asarray(some, dtype=float))  # their order is not to matter
        if len(scores):
            low, high = bootstrap(scores[:, None], rng(seed, name))
            rows.append((name, scores.mean(), low[0], high[0], len(scores)))
    return pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n"]), table.drop(columns="only")


def _captions(model: Model, asked: Sequence[tuple[Example, str | None]], what: str) -> list[str]:
    found = []
    with progress(len(asked), what=what) as step:
        for number, (one, prompt) in enumerate(asked):
            found.append(model.answer(_inputs(model, one, prompt)))
            step(0, number + 1)
    return found


def _blind(model: Model, prompt: str) -> str | None:
    """What the model says to a prompt alone; None where it takes no prompt without a picture."""
    try:
        return model.answer(model.inputs(None, prompt))
    except ExampleError:
        return None


def _repeated(text: str) -> float:
    words = text.split()
    return sum(a == b for a, b in pairwise(words)) / max(1, len(words) - 1)


def hallucination(
    captions: Sequence[str], shown: Sequence[frozenset[str]], objects: Iterable[str]
) -> dict[str, float]:
    """Objects that captions name and pictures do not show, as CHAIR counts them.

    `chair_i` is the share of the objects named that are not there, `chair_s` the share of captions that
    name any such, `precision` is 1 − `chair_i`, and `recall` the share of the objects shown that are named
    (Rohrbach et al. 2018, arXiv 1809.02156). An object counts once a caption.

    >>> found = hallucination(["a cat and a dog"], [frozenset({"cat", "owl"})], ["cat", "dog", "owl"])
    >>> found["chair_i"], found["chair_s"], found["recall"]
    (0.5, 1.0, 0.5)
    """
    names = [o.casefold() for o in objects]
    named = wrong = bad = there = right = 0
    for text, what in zip(captions, shown, strict=True):
        said = {o for o in names if says(text, o) or says(text, f"{o}s")}
        true = {o for o in names if o in what}
        named, wrong, bad = named + len(said), wrong + len(said - true), bad + bool(said - true)
        there, right = there + len(true), right + len(said & true)
    chair = wrong / named if named else 0.0
    return {
        "chair_i": chair,
        "chair_s": bad / max(1, len(captions)),
        "precision": 1 - chair,
        "recall": right / there if there else 0.0,
    }


def yes_or_no(answers: Sequence[str], truth: Sequence[bool]) -> dict[str, float]:
    """Answers to whether an object is there, as POPE scores them (Li et al. 2023, arXiv 2305.10355).

    Yes is the class that counts: `accuracy`, `precision`, `recall`, `f1`, and `yes`, the share of yes.

    >>> yes_or_no(["yes", "Yes, there is.", "no"], [True, False, False])["precision"]
    0.5
    """
    said = [re.match(r"\W*yes\b", one, re.IGNORECASE) is not None for one in answers]
    both = sum(a and b for a, b in zip(said, truth, strict=True))
    precision, recall = both / max(1, sum(said)), both / max(1, sum(truth))
    return {
        "accuracy": sum(a == b for a, b in zip(said, truth, strict=True)) / max(1, len(said)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-12, precision + recall),
        "yes": sum(said) / max(1, len(said)),
    }


def objects(
    model: Model,
    edits: Sequence[WeightEdit],
    examples: Sequence[Example],
    names: Sequence[str],
    *,
    prompt: str | None = None,
    asked: Sequence[Example] = (),
) -> pd.DataFrame:
    """Objects that are named and not there (`hallucination`), before and after edits, and with `asked` answers
    to whether an object is there (`yes_or_no`): a row a measure, with the columns `before` and `after`."""
    given: list[tuple[Example, str | None]] = [(one, prompt) for one in examples]
    truth = [one.answer == "yes" for one in asked]

    def count() -> dict[str, float]:
        captions = _captions(model, given, "captions")
        found = hallucination(captions, [one.shows for one in examples], names)
        if asked:
            answers = _captions(model, [(one, None) for one in asked], "questions")
            found |= {f"yes or no: {k}": v for k, v in yes_or_no(answers, truth).items()}
        return found

    before = count()
    with edited(model, *edits):
        after = count()
    return pd.DataFrame(
        {"measure": list(before), "before": list(before.values()), "after": list(after.values())}
    )


def questions(
    examples: Sequence[Example],
    objects: Sequence[str],
    template: str = "does this picture show {}?",
    *,
    absent: Literal["random", "popular", "adversarial"] = "random",
    seed: int = 0,
) -> list[Example]:
    """A question for an object that each picture shows, and one for an object that it does not.

    The absent one is drawn at random, or is the most shown elsewhere (`popular`), or the one that is most
    often shown beside what the picture shows (`adversarial`), as POPE draws them.

    >>> one = Example("1", "a.png", "?", "a", "b", shows=frozenset({"circle"}))
    >>> [(q.clean_prompt, q.answer) for q in questions([one], ["circle", "square"])]
    [('does this picture show a circle?', 'yes'), ('does this picture show a square?', 'no')]
    """
    common = Counter(o for one in examples for o in one.shows if o in objects)
    beside: dict[str, Counter[str]] = {o: Counter() for o in objects}
    for one in examples:
        for o in one.shows & set(objects):
            beside[o].update(one.shows & set(objects) - {o})
    found = []
    for one in examples:
        there = sorted(one.shows & set(objects))
        missing = [o for o in objects if o not in one.shows]
        if not there or not missing:
            continue
        draw = rng(seed, "questions", one.id)
        named, drawn = str(draw.choice(there)), str(draw.choice(missing))
        if absent == "popular":
            drawn = max(missing, key=lambda o: common[o])
        elif absent == "adversarial":
            drawn = max(missing, key=lambda o, there=there: sum(beside[x][o] for x in there))  # type: ignore[misc]
        for name, answer in ((named, "yes"), (drawn, "no")):
            article = "an" if name[0] in "aeiou" else "a"
            found.append(
                Example(
                    id=f"{one.id}-{name}",
                    clean_image=one.clean_image,
                    answer=answer,
                    clean_prompt=template.format(f"{article} {name}"),
                    foil="no" if answer == "yes" else "yes",
                    shows=one.shows,
                )
            )
    return found
