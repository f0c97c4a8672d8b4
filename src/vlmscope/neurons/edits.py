"""Make a model say another word for what it sees, by changing a few neurons' columns only.

The neurons are those that contribute most to the word; what is added to their columns of the down
projection is found in one of two ways (Pan et al., arXiv 2311.07470; the learned one after FiNE, arXiv
2503.01090). The fewest columns are taken with which the edit holds on pictures that it was not made on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.errors import ExampleError, ModelError, VlmscopeError, choice
from vlmscope.models.inputs import Inputs
from vlmscope.neurons.captions import (
    LENGTH,
    Caption,
    caption_pictures,
    imageless,
    inputs_of,
    spoken,
    tokenized,
    whole_word,
)
from vlmscope.neurons.contributions import Neuron, count_neurons, named, strongest, top_share
from vlmscope.neurons.results import Found
from vlmscope.neurons.solvers import MARGIN, SURE, Task, Wanted, closed, learned, no_deltas, steepest
from vlmscope.neurons.turns import QUESTION, Turn, of_concept, took
from vlmscope.neurons.weight_edit import Columns, WeightEdit, base_fingerprint, changed
from vlmscope.neurons.words import random_places
from vlmscope.patching.backward import frozen
from vlmscope.runs.forward import forward, generate
from vlmscope.runs.model import Model
from vlmscope.stats import rng, shuffled

PICTURES = 64
"""How many pictures that show the word an edit is made on, at most."""
OTHERS = 192
"""How many pictures that do not show it are kept as they are, at most."""
BLIND = 16
"""How many prompts are kept as they are without a picture, at most."""
CHECKED, CHECKS = 4, 16
"""Every so many pictures of each kind see whether an edit holds, but at most so many."""
HOLDS = 0.95
"""An edit holds where so large a share of what is to change does, and of what is to stay."""

Solver = Literal["closed", "learned"]
Captioned = tuple[Example, Caption]


@dataclass(frozen=True, eq=False)
class _Check:
    """What is asked to see whether an edit holds: what was said, and what is to change in it, if anything."""

    inputs: Inputs
    before: str
    turn: Turn | None = None

    def holds(self, after: str) -> bool:
        return after == self.before if self.turn is None else took(after, self.turn.old, self.turn.new)


def edit(
    model: Model,
    examples: Examples,
    source: str,
    target: str | None,
    *,
    prompt: str | None = None,
    neurons: int | Sequence[Neuron] | None = None,
    concept: bool = False,
    wordings: Sequence[str] = (),
    question: str = QUESTION,
    falsely: bool = False,
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
    change (1 % of all by default): of 1, 2, 4 … the fewest are taken with which the edit holds on every
    `CHECKED`th picture, which it is not made on: `HOLDS` of what is to change does, and of what is to stay.
    Where no number holds, it is the one that comes nearest; where fewer pictures than that have the word,
    these themselves are looked at. A list of neurons takes just these, for example `random_columns`.
    `locality` weighs what is to stay against what is to change. Made within `edited`, an edit is for the
    model with those edits (`WeightEdit.on`).

    So made, it is an edit of a word: asked whether there is a `target`, the model may say no, as before. With
    `concept` it is also made on what else would be said if the other thing were seen: other `wordings`,
    `question`s whether the one (no) and the other (yes) is there, and the example's own question with both as
    its options, in both orders. The columns are then those in which the loss of all that is steepest.
    With `falsely` only captions are changed that say the word of a picture that does not show it
    (`Example.shows`); those that say it rightly are to stay.

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
    given = list(neurons) if isinstance(neurons, Sequence) else None
    most = top_share(model) if neurons is None else neurons if isinstance(neurons, int) else len(neurons)
    if not 1 <= most <= count_neurons(model):
        raise ModelError(f"{most} neurons cannot be chosen; expected 1 to {count_neurons(model)}")
    has, other = _split(model, listed(examples), source, prompt, found, seed, falsely=falsely)
    turns = _Turns(source, target, prompt, tuple(wordings), question, concept)
    (made_on, checked), (rest, others) = (
        (pairs, []) if given is not None else _held_out(pairs) for pairs in (has, other)
    )
    checked = checked or ([] if given is not None else made_on[:CHECKS])
    with frozen(model):
        task, asked = _task(model, turns, made_on, rest, locality, seed)
        if given is not None:
            ranked = given
        elif concept:
            ranked = named(model, steepest(task, most))
        else:
            ranked = strongest(model, [caption for _, caption in made_on], source, most)
        checks = [check for pair in checked for check in _checks(model, turns, *pair, has=True)]
        checks += [check for pair in others for check in _checks(model, turns, *pair, has=False)]

        def solve(own: Task) -> None:
            if solver == "closed":
                closed(own, margin)
            else:
                learned(own, rng(seed, "edit", source, target))

        columns, tried = _fewest(task, ranked, _counts(most) if checked else [most], solve, checks)
    about = {"from": source, "to": target or "", "solver": solver, "pictures": str(len(made_on))}
    about |= {"asked": asked, "model": model.name}
    about |= {"tried": "; ".join(tried)} if checked else {}
    about |= {"where": "falsely"} if falsely else {}
    return WeightEdit(columns, base_fingerprint(model), about, model.edits)


def _fewest(
    task: Task,
    ranked: Sequence[Neuron],
    counts: Sequence[int],
    solve: Callable[[Task], None],
    checks: Sequence[_Check],
) -> tuple[Columns, list[str]]:
    """What is added to the fewest columns with which the edit holds, or else to as many as come nearest; and
    what was tried."""
    best, columns, tried = -1.0, dict[int, tuple[Tensor, Tensor]](), []
    for count in counts:
        own = replace(task, deltas=no_deltas(task.model, ranked[:count]))
        solve(own)
        found = {layer: (at.cpu(), delta.detach().cpu().clone()) for layer, (at, delta) in own.deltas.items()}
        changes, stays = _held(task.model, found, checks)
        tried.append(f"{count}: {changes:.2f} of changes, {stays:.2f} of the rest")
        if min(changes, stays) > best:
            best, columns = min(changes, stays), found
        if best >= HOLDS:
            break
    return columns, tried


def random_columns(model: Model, edit: WeightEdit, seed: int = 0) -> list[Neuron]:
    """As many other neurons of the same layers as an edit changes: with these, `edit` makes its null.

    Raises `ModelError` where a layer has not as many others.

    >>> from vlmscope.checkpoint import load
    >>> made = WeightEdit({3: (torch.tensor([7, 9]), torch.ones(96, 2))}, "…")
    >>> [layer for layer, number in random_columns(load("toy-llava"), made) if number not in (7, 9)]
    [3, 3]
    """
    shape = model.shapes[model.speaker]
    layers = shape.having("mlp")
    chosen = np.array([layers.index(layer) * shape.neurons + number for layer, number in edit.neurons])
    return named(model, random_places(chosen, shape.neurons, rng(seed, "columns", *edit.neurons)))


def _counts(most: int) -> list[int]:
    """1, 2, 4 … and the most."""
    return [*(2**n for n in range(most.bit_length()) if 2**n < most), most]


def _held_out(pairs: Sequence[Captioned]) -> tuple[list[Captioned], list[Captioned]]:
    """Pictures to make an edit on, and others that see whether it holds; of too few none of these."""
    apart = range(CHECKED - 1, len(pairs), CHECKED)[:CHECKS]
    return [pair for n, pair in enumerate(pairs) if n not in apart], [pairs[n] for n in apart]


@torch.no_grad()
def _held(model: Model, columns: Columns, checks: Sequence[_Check]) -> tuple[float, float]:
    """The share of what is to change that does, and of what is to stay that does; 1 where there is none."""
    with changed(model, [columns]):
        held = [(check.turn is not None, check.holds(model.answer(check.inputs))) for check in checks]
    shares = ([holds for is_new, holds in held if is_new == kind] for kind in (True, False))
    changes, stays = (float(np.mean(found)) if found else 1.0 for found in shares)
    return changes, stays


def check_margin(solver: str, margin: float | None) -> float:
    """The margin of a solver; raises `VlmscopeError` where it has none, or there is no such solver.

    >>> check_margin("closed", None)
    4.0
    """
    choice(solver, "solver", get_args(Solver))
    if solver != "closed" and margin is not None:
        raise VlmscopeError(
            "a margin is of the closed solver; the learned one goes on until each new word has a probability "
            f"of {SURE}; leave the margin out, or take the solver closed"
        )
    return MARGIN if margin is None else margin


def _split(
    model: Model,
    examples: Sequence[Example],
    word: str,
    prompt: str | None,
    found: Found | None,
    seed: int,
    *,
    falsely: bool,
) -> tuple[list[Captioned], list[Captioned]]:
    """Examples whose caption has the word (`falsely`: and whose picture has not), and others."""
    has: list[Captioned] = []
    other: list[Captioned] = []
    order = [examples[n] for n in shuffled(seed, [example.id for example in examples])]
    for example, caption in zip(order, caption_pictures(model, order, prompt, found=found), strict=True):
        is_wrong = not falsely or (bool(example.shows) and word.casefold() not in example.shows)
        says = is_wrong and whole_word(word).search(caption.text)
        where, most = (has, PICTURES) if says else (other, OTHERS)
        if len(where) < most:
            where.append((example, caption))
        if len(has) == PICTURES and len(other) == OTHERS:
            break
    if not has:
        words = sorted({w for _, caption in other for w in re.findall(r"\w+", caption.text)})
        raise ExampleError(
            f"no caption of these pictures has the word '{word}'{' falsely' if falsely else ''}; they have: "
            f"{', '.join(words[:30])}; name one of these"
        )
    return has, other


@dataclass(frozen=True, eq=False)
class _Turns:
    """What an edit is to be about: what is asked of each picture, and what is to change in the answers."""

    source: str
    target: str | None
    prompt: str | None
    wordings: tuple[str, ...]
    question: str
    concept: bool

    def changing(self, example: Example) -> list[Turn]:
        """What is asked about a picture that the caption says the word of, beside the caption."""
        if not self.concept:
            return []
        return of_concept(example, self.source, self.target, self.wordings, self.question)

    def staying(self, example: Example) -> list[str]:
        """What is asked about another picture beside the caption, and answered as before."""
        asked = [turn.prompt or example.clean_prompt for turn in self.changing(example)]
        return [*asked, example.clean_prompt] if self.concept else []


def _task(
    model: Model,
    turns: _Turns,
    has: Sequence[Captioned],
    other: Sequence[Captioned],
    locality: float,
    seed: int,
) -> tuple[Task, str]:
    """What is to be said otherwise, and what as before; and how much is asked, in words."""
    source, target, prompt = turns.source, turns.target, turns.prompt
    wanted = [w for pair in has if (w := _changed(model, *pair, Turn(prompt, source, target)))]
    if not wanted:
        raise ExampleError(
            f"'{target}' cannot take the place of '{source}' in these captions: the tokens around it change"
        )
    captions = len(wanted)
    kept = [_kept(model, inputs_of(model, e, prompt, said.ids[:-1]), said.ids) for e, said in other]
    for example, _ in has:
        for turn in turns.changing(example):
            (said,) = caption_pictures(model, [example], turn.prompt)
            wanted += [w] if (w := _changed(model, example, said, turn)) else []
    for example, _ in other:
        if asked := turns.staying(example):
            words = asked[int(rng(seed, "turn", example.id).integers(len(asked)))]
            (said,) = caption_pictures(model, [example], words)
            kept.append(_kept(model, inputs_of(model, example, words, said.ids[:-1]), said.ids))
    every = [prompt or example.clean_prompt for example, _ in [*has, *other]]
    every += [words for example, _ in has for words in turns.staying(example)]
    alone = [w for text in list(dict.fromkeys(every))[:BLIND] if (w := _without_picture(model, text, source))]
    kept += (alone * BLIND)[:BLIND]  # they are few, and to be met as often
    task = Task(model, wanted, kept, {}, locality)
    return task, f"{captions} captions, {len(wanted) - captions} other questions"


def _checks(
    model: Model, turns: _Turns, example: Example, caption: Caption, *, has: bool
) -> Iterator[_Check]:
    """What is asked about a picture that an edit is not made on."""
    own = Turn(turns.prompt, turns.source, turns.target) if has else None
    yield _Check(inputs_of(model, example, turns.prompt), spoken(model, caption), own)
    for turn in turns.changing(example):
        inputs = inputs_of(model, example, turn.prompt)
        before = model.answer(inputs)
        if not has:
            yield _Check(inputs, before)
        elif whole_word(turn.old).search(before):
            yield _Check(inputs, before, turn)


def _changed(model: Model, example: Example, caption: Caption, turn: Turn) -> Wanted | None:
    """What is to be said instead; None where the rest would be other tokens, or the word is not said."""
    prompt, source, target = turn
    if not whole_word(source).search(caption.text):
        return None
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
    return Wanted(fed, ids, forward(model, fed, positions=len(ids)).logits.float())


def _without_picture(model: Model, prompt: str, source: str) -> Wanted | None:
    """What the model says to a prompt alone, if it takes such and does not say the word."""
    plain = imageless(model, prompt)
    if plain is None:
        return None
    ids = generate(model, plain, most=LENGTH).tolist()
    if whole_word(source).search(model.processor.tokenizer.decode(ids, skip_special_tokens=True)):
        return None
    return _kept(model, model.inputs(None, prompt, (), ids[:-1]), ids)
