"""Make a model say another word for what it sees, by changing a few neurons' columns only.

The neurons are those that contribute most to the word; what is added to their columns of the down
projection is found in one of two ways (Pan et al., arXiv 2311.07470; the learned one after FiNE, arXiv
2503.01090).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, get_args

import torch

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.errors import ExampleError, VlmscopeError
from vlmscope.models.inputs import Inputs
from vlmscope.neurons.captions import (
    LENGTH,
    Caption,
    caption_pictures,
    imageless,
    inputs_of,
    tokenized,
    whole_word,
)
from vlmscope.neurons.contributions import strongest
from vlmscope.neurons.results import Found
from vlmscope.neurons.solvers import MARGIN, SURE, Deltas, Task, Wanted, closed, last_logits, learned
from vlmscope.neurons.weight_edit import WeightEdit, base_fingerprint
from vlmscope.runs.forward import generate
from vlmscope.runs.model import Model
from vlmscope.stats import rng, shuffled

PICTURES = 64
"""How many pictures that show the word an edit is made on, at most."""
OTHERS = 192
"""How many pictures that do not show it are kept as they are, at most."""
BLIND = 16
"""How many prompts are kept as they are without a picture, at most."""

Solver = Literal["closed", "learned"]
Captioned = tuple[Example, Caption]


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
    found: Found | None = None,
    seed: int = 0,
) -> WeightEdit:
    """An edit after which the model says `target` where it said `source` (or anything else, if None).

    It is made on up to `PICTURES` examples whose caption has the word; up to `OTHERS` whose caption has
    not are to keep theirs. `prompt` asks for the captions (each example's own by default); `found` is what
    `find` gave for these pictures, which are then not captioned again. `neurons` is how many columns may
    change (1 % of all by default). `locality` weighs what is to stay against what is to change. Made within
    `edited`, an edit is for the model with those edits (`WeightEdit.on`).

    - `learned`: Adam on the columns, until each new word has a probability of 0.9; negative log-likelihood of
      the new words, divergence of all other positions from what they were, the probability of the new word
      where it does not belong, and a decay.
    - `closed`: the change of least norm (see `solvers.closed`) after which, to first order, every new word
      leads by `margin` logits (4 by default); repeated from where that leads until they do, or 16 times.

    Raises `ExampleError` if no caption has the word, `ModelError` if the weights cannot be edited,
    `VlmscopeError` for a margin of the learned solver, which has none.
    """
    margin = check_margin(solver, margin)
    if target is not None and source.casefold() == target.casefold():
        raise ExampleError(f"'{source}' is already '{target}'; give another target")
    has, other = _split(model, listed(examples), source, prompt, found, seed)
    chosen = strongest(model, [caption for _, caption in has], source, neurons)
    width, deltas = model.shapes[model.speaker].width, Deltas()
    for layer in sorted({layer for layer, _ in chosen}):
        at = torch.tensor(sorted(n for there, n in chosen if there == layer), device=model.device)
        deltas[layer] = (at, torch.zeros(width, len(at), device=model.device))
    with _frozen(model):
        changed = [w for pair in has if (w := _changed(model, *pair, source, target, prompt))]
        if not changed:
            raise ExampleError(
                f"'{target}' cannot take the place of '{source}' in these captions: the tokens around it "
                "change"
            )
        kept = [_kept(model, inputs_of(model, e, prompt, said.ids[:-1]), said.ids) for e, said in other]
        asked = list(dict.fromkeys(prompt or example.clean_prompt for example, _ in [*has, *other]))
        alone = [w for text in asked[:BLIND] if (w := _without_picture(model, text, source))]
        kept += (alone * BLIND)[:BLIND]  # they are few, and to be met as often
        task = Task(model, changed, kept, deltas, locality)
        if solver == "closed":
            closed(task, margin)
        else:
            learned(task, rng(seed, "edit", source, target))
    about = {"from": source, "to": target or "", "solver": solver, "pictures": str(len(changed))}
    columns = {layer: (at.cpu(), delta.detach().cpu()) for layer, (at, delta) in deltas.items()}
    return WeightEdit(columns, base_fingerprint(model), {**about, "model": model.name}, model.edits)


def check_margin(solver: str, margin: float | None) -> float:
    """The margin of a solver; raises `VlmscopeError` where it has none, or there is no such solver.

    >>> check_margin("closed", None)
    4.0
    """
    if solver not in get_args(Solver):
        raise VlmscopeError(f"unknown solver '{solver}'; expected {' or '.join(get_args(Solver))}")
    if solver != "closed" and margin is not None:
        raise VlmscopeError(
            "a margin is of the closed solver; the learned one goes on until each new word has a probability "
            f"of {SURE}; leave the margin out, or take the solver closed"
        )
    return MARGIN if margin is None else margin


def _split(
    model: Model, examples: Sequence[Example], word: str, prompt: str | None, found: Found | None, seed: int
) -> tuple[list[Captioned], list[Captioned]]:
    """Examples whose caption has the word, and others, with their captions."""
    has: list[Captioned] = []
    other: list[Captioned] = []
    order = [examples[n] for n in shuffled(seed, [example.id for example in examples])]
    for example, caption in zip(order, caption_pictures(model, order, prompt, found=found), strict=True):
        where, most = (has, PICTURES) if whole_word(word).search(caption.text) else (other, OTHERS)
        if len(where) < most:
            where.append((example, caption))
        if len(has) == PICTURES and len(other) == OTHERS:
            break
    if not has:
        words = sorted({w for _, caption in other for w in re.findall(r"\w+", caption.text)})
        raise ExampleError(
            f"no caption of these pictures has the word '{word}'; they have: {', '.join(words[:30])}; "
            "name one of these"
        )
    return has, other


def _changed(
    model: Model, example: Example, caption: Caption, source: str, target: str | None, prompt: str | None
) -> Wanted | None:
    """What is to be said instead; None where the rest of the caption would be other tokens."""
    numbers, old = caption.find(source), caption.ids
    same = _kept(model, inputs_of(model, example, prompt, old[:-1]), old)
    if target is None:
        return replace(same, new=numbers, avoid=True)
    ids = tokenized(model, example, whole_word(source).sub(target, caption.text.strip()), prompt)
    if model.processor.tokenizer.unk_token_id in ids[:-1]:
        raise ExampleError(f"'{target}' is unknown to the model's tokenizer; give another word")
    before, after, longer = numbers[0], len(old) - 1 - numbers[-1], len(ids) - len(old)
    if tuple(ids[:before]) != old[:before] or (after and tuple(ids[-after:]) != old[-after:]):
        return None
    new = [n for n in range(before, len(ids) - after) if n >= len(old) or ids[n] != old[n]]
    # Behind a new word, what was said behind the old one: fed the new one, a model that knows which objects
    # it has named may go on otherwise.
    rows = [n - longer if n > new[-1] else min(n, len(old) - 1) for n in range(len(ids))]
    return Wanted(inputs_of(model, example, prompt, ids[:-1]), ids, same.logits[rows], new)


@torch.no_grad()
def _kept(model: Model, fed: Inputs, ids: Sequence[int]) -> Wanted:
    return Wanted(fed, ids, last_logits(model, fed, len(ids), {}))


def _without_picture(model: Model, prompt: str, source: str) -> Wanted | None:
    """What the model says to a prompt alone, if it takes such and does not say the word."""
    plain = imageless(model, prompt)
    if plain is None:
        return None
    ids = generate(model, plain, most=LENGTH).tolist()
    if whole_word(source).search(model.processor.tokenizer.decode(ids, skip_special_tokens=True)):
        return None
    return _kept(model, model.inputs(None, prompt, (), ids[:-1]), ids)


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """No gradients of the model's own weights are kept."""
    weights = [p for p in model.hf.parameters() if p.requires_grad]
    model.hf.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
