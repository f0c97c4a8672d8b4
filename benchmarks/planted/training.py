"""Models in which a circuit was trained: by interchange interventions, as in SIIT (InterpBench, 2407.14494).

Nothing is written into the weights. A model of the same classes learns to answer the same questions while
parts are exchanged between runs of two examples (`Batch`es in two orders):

- exchanging a part of the circuit must change the answer as the causal model says: to the color that the
  other example asks for (`reader`, `mover`), or to this picture's color of the kind that the other asks for
  (`locator`);
- exchanging any set of other heads must change nothing (the strict term).

The circuit of form C is a `reader`, a cross-attention head of the question encoder at the noun, and a
`mover`, one of the answer decoder. That of form D is a `locator`, a head of layer 0 at the last token, which
takes the noun there, and a `reader`, a head of layer 2.

A model counts (`accepted`) where the answer after an exchange is right in 99 % of the examples, and no other
head moves LD by more than 1 % of the gap in the mean.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pictures import COLORS, Batch, Scenes, batch, scenes, token
from plain import Part, Runs, attention, columns, heads_of, hooked, keep, logits, position, seen
from planting import Planted, Recipe
from random_models import HEADS, random_model
from torch import Tensor, nn

SIZE, RATE = 64, 2e-3
STEPS = {"C": 800, "D": 1_200}
DRAWN = 16_384
"""From so many pictures the batches come."""
AGREE, LEAK = 0.99, 0.01
"""What a model is accepted by: the share of exchanges that are answered right; the largest share of the gap
that a head outside of the circuit moves."""
HELD_OUT = 7_000_000
"""Seeds of the examples by which a model is accepted."""


def circuit(form: str, seed: int) -> dict[Part, str]:
    """Which heads are to do it: their layers are given, their numbers are drawn."""
    draw = random.Random(seed)
    first, second = draw.randrange(HEADS), draw.randrange(HEADS)
    if form == "C":
        return {f"encoder.1.cross.h{first}": "reader", f"decoder.2.cross.h{second}": "mover"}
    return {f"decoder.0.attn.h{first}": "locator", f"decoder.2.attn.h{second}": "reader"}


class Drawn(NamedTuple):
    """Some examples, with the number of the color of the named object and of the other one."""

    given: Batch
    color: Tensor
    other: Tensor
    noun: Tensor

    words: int
    """Form D: how many tokens stand behind the picture."""

    def take(self, rows: Tensor) -> Drawn:
        cut = [{k: v[rows] for k, v in run.items()} for run in (self.given.clean, self.given.corrupt)]
        one = Batch(
            *cut, self.given.answer[rows], self.given.foil[rows], self.given.noun_at, self.given.tokens[rows]
        )
        return self._replace(given=one, color=self.color[rows], other=self.other[rows], noun=self.noun[rows])


def drawn(made: Planted, some: Scenes) -> Drawn:
    given = batch(made.model, some)
    ids = given.tokens[0]
    last = 0 if made.recipe.form == "C" else int((ids == made.model.hf.config.image_token_id).nonzero()[-1])
    return Drawn(
        given,
        torch.from_numpy(some.answer),
        torch.from_numpy(some.other),
        torch.from_numpy(some.noun),
        len(ids) - last - 1,
    )


def wanted(role: str | None, base: Drawn, source: Drawn) -> Tensor:
    """The color that the causal model answers for the base once a part of the source is put in."""
    if role is None:
        return base.color
    if role == "locator":
        return torch.where(base.noun == source.noun, base.color, base.other)
    return source.color


class Ran(NamedTuple):
    """The clean runs of some examples: their inputs with what no exchange changes, the logits, and what
    entered each output projection."""

    inputs: dict[str, Any]
    logits: Tensor
    kept: dict[int, Tensor]
    text: dict[str, Tensor]
    """Form C: what the decoder reads, which no exchange in the decoder changes."""


class Exchange:
    """Runs of one model in which heads' outputs come from other examples of the batch."""

    def __init__(self, made: Planted) -> None:
        self.hf, self.form = made.model.hf, made.recipe.form
        self.every = heads_of(self.hf)
        self.modules = list({id(m): m for m in (columns(self.hf, p)[0] for p in self.every)}.values())

    def clean(self, base: Drawn) -> Ran:
        inputs = seen(self.hf, base.given.clean, base.words)
        reads = [attention(self.hf, "decoder", 0, "cross").key] if self.form == "C" else []
        found, kept = keep(self.hf, inputs, [*self.modules, *reads])
        kept_by = {id(m): x for m, x in zip(self.modules, kept, strict=False)}
        return Ran(inputs, found, kept_by, {"text": kept[-1]} if reads else {})

    def run(
        self, base: Drawn, ran: Ran, order: Tensor, parts: Sequence[Part], everywhere: bool = False
    ) -> Tensor:
        """The logits of the base where some heads put out what they did in the examples of `order`: where
        they are read, or at all tokens of the question."""
        mine: dict[int, list[slice]] = {}
        where: dict[int, tuple[nn.Linear, int | slice]] = {}
        for part in parts:
            module, cut = columns(self.hf, part)
            mine.setdefault(id(module), []).append(cut)
            where[id(module)] = (module, slice(None) if everywhere else position(part, base.given))

        def change(name: int) -> Callable[[Tensor], Tensor]:
            at = where[name][1]

            def write(x: Tensor) -> Tensor:
                new = x.clone()
                for cut in mine[name]:
                    new[:, at, cut] = ran.kept[name][order][:, at, cut]
                return new

            return write

        with hooked([(where[name][0], change(name)) for name in mine]):
            same = {} if any(part.startswith("encoder") for part in parts) else ran.text
            return logits(self.hf, ran.inputs | same)


def train(form: str, seed: int, steps: int | None = None, say: bool = False) -> Planted:
    """A model with a trained circuit: the same for the same seed on one kind of machine."""
    made = Planted(random_model(form, 0.5, seed), Recipe(form, seed), circuit(form, seed), {})
    steps = steps or STEPS[form]
    hf, colors = made.model.hf, torch.tensor([token(made.model, color) for color in COLORS])
    given = scenes(DRAWN, 20_000 + seed)
    every = drawn(made, given)
    exchange, draw = Exchange(made), random.Random(seed)
    outside = [part for part in exchange.every if part not in made.roles]
    generator = torch.Generator().manual_seed(seed)
    # Without the noun all but these can be answered by what the options and the picture have in common.
    hard = torch.from_numpy(np.flatnonzero(given.foil == given.other))
    hf.train()
    optimizer = torch.optim.AdamW(hf.parameters(), lr=RATE, weight_decay=0.01)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randint(DRAWN, (SIZE,), generator=generator)
        rows[: SIZE // 2] = hard[rows[: SIZE // 2] % len(hard)]
        base = every.take(rows)
        order = torch.randperm(SIZE, generator=generator)
        source = base.take(order)
        ran = exchange.clean(base)
        found = ran.logits
        loss = nn.functional.cross_entropy(found, colors[base.color])
        for part, role in made.roles.items():
            changed = exchange.run(base, ran, order, [part])
            loss = loss + nn.functional.cross_entropy(changed, colors[wanted(role, base, source)])
        some = draw.sample(outside, draw.choice((1, 2, len(outside) // 2, len(outside))))
        changed = exchange.run(base, ran, order, some, everywhere=True)
        loss = loss + nn.functional.cross_entropy(changed, colors[base.color])
        apart = (changed - found)[:, colors]
        loss = loss + 0.1 * (apart - apart.mean(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        pace.step()
        if say and step % 250 == 0:
            right = (found[:, colors].argmax(1) == base.color).float().mean()
            print(f"{form} seed {seed}: step {step}, loss {loss:.3f}, right {right:.2f}", file=sys.stderr)
    hf.eval()
    return made


class Accepted(NamedTuple):
    """How well a trained model does what its causal model says, on examples of its own."""

    right: float
    """The share of answers that are right without an exchange."""
    agree: dict[str, float]
    """The share of exchanges answered as the causal model says, by role."""
    leak: float
    """The largest share of the gap that a head outside of the circuit moves, in the mean."""
    gap: float

    @property
    def accepted(self) -> bool:
        return min(self.agree.values()) >= AGREE and self.leak <= LEAK


@torch.no_grad()
def assess(made: Planted, many: int = 512) -> Accepted:
    some = scenes(many, HELD_OUT + made.recipe.seed)
    base, exchange = drawn(made, some), Exchange(made)
    colors = torch.tensor([token(made.model, color) for color in COLORS])
    order = torch.randperm(many, generator=torch.Generator().manual_seed(0))
    ran = exchange.clean(base)
    found = ran.logits
    agree = {}
    for part, role in made.roles.items():
        changed = exchange.run(base, ran, order, [part])[:, colors].argmax(1)
        agree[role] = float((changed == wanted(role, base, base.take(order))).float().mean())
    runs = Runs(made.model.hf, base.given, exchange.every)
    outside = [part for part in exchange.every if part not in made.roles]
    return Accepted(
        float((found[:, colors].argmax(1) == base.color).float().mean()),
        agree,
        max(abs(runs.share([part])) for part in outside),
        runs.gap,
    )
