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

Each picture is asked about twice, with either noun and the same options, so that an answer without the noun
is right in half of the cases. In form D the locator has to bring the noun and the reader to look for its
object, and while either does nothing the other's gradient is near zero: other heads are first to find a way,
and the circuit is not learned. So in the first steps the model also says the noun itself, from what enters
layer 1 at the last token: the other example's where the locator is exchanged, its own where other heads are.

A model counts (`accepted`) where the answer after an exchange is right in 99 % of the examples, and no other
head moves LD by more than 1 % of the gap in the mean.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pictures import COLORS, KINDS, Batch, Scenes, batch, scenes, token
from plain import Part, Runs, attention, columns, heads_of, hooked, keep, logits, position, seen
from planting import Planted, Recipe
from random_models import HEADS, random_model
from torch import Tensor, nn

PICTURES, RATE = 32, 2e-3
"""Of a batch: each is new, and stands for two questions."""
STEPS, NAMING = 300, 100
"""All steps, and the first of them in which form D also has to say the noun."""
NOISE = 1.0
"""How large the weights are at the start, as `random_model` has it."""
ALL = 0.7
"""In so many steps all other heads are exchanged at once: what they carry then helps no answer."""
AGREE, LEAK = 0.99, 0.01
"""What a model is accepted by: the share of exchanges that are answered right; the largest share of the gap
that a head outside of the circuit moves."""
STARTS = 3
"""So often a model is begun, until one is accepted."""
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

    def twins(self, rows: Tensor, nouns: Tensor, colors: Tensor) -> Drawn:
        """Of these pictures the question, followed by the same with the other noun, whose answer need not be
        one of the options. A picture stands once for both; `nouns` and `colors` are token ids."""

        def both(first: Tensor, second: Tensor) -> Tensor:
            return torch.stack([first[rows], second[rows]], 1).flatten(0, 1)

        inputs = {name: both(x, x) for name, x in self.given.clean.items() if name != "pixel_values"}
        inputs["pixel_values"] = self.given.clean["pixel_values"][rows]
        color, other = both(self.color, self.other), both(self.other, self.color)
        noun, ids = both(self.noun, 1 - self.noun), inputs["input_ids"]
        ids[:, self.given.noun_at] = nouns[noun]
        given = Batch(inputs, inputs, colors[color], colors[other], self.given.noun_at, ids)
        return Drawn(given, color, other, noun, self.words)


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


def wanted(role: str | None, base: Drawn, order: Tensor) -> Tensor:
    """The color that the causal model answers once a part's output comes from the examples of `order`."""
    if role is None:
        return base.color
    if role == "locator":
        return torch.where(base.noun == base.noun[order], base.color, base.other)
    return base.color[order]


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
        inputs = self.seen(base)
        reads = [attention(self.hf, "decoder", 0, "cross").key] if self.form == "C" else []
        found, kept = keep(self.hf, inputs, [*self.modules, *reads])
        kept_by = {id(m): x for m, x in zip(self.modules, kept, strict=False)}
        return Ran(inputs, found, kept_by, {"text": kept[-1]} if reads else {})

    def seen(self, base: Drawn) -> dict[str, Any]:
        """What is made of each picture, once for all its questions, and these."""
        given = base.given.clean
        each = len(given["input_ids"]) // len(given["pixel_values"])
        once = {name: x if name == "pixel_values" else x[::each] for name, x in given.items()}
        found = seen(self.hf, once, base.words)
        if self.form == "C":
            return given | {"image": found["image"].repeat_interleave(each, 0)}
        found["past_key_values"].batch_repeat_interleave(each)
        asked = given["input_ids"][:, -base.words :]
        return found | {"input_ids": asked, "attention_mask": given["attention_mask"]}

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


def train(form: str, seed: int, start: int = 0, steps: int = STEPS, say: bool = False) -> Planted:
    """A model with a trained circuit: the same for the same seed and start on one kind of machine. A start of
    another number has other weights and examples to begin with, and the same circuit."""
    own = seed + 1_000 * start
    made = Planted(random_model(form, NOISE, own), Recipe(form, seed), circuit(form, seed), {})
    hf = made.model.hf
    nouns, colors = (torch.tensor([token(made.model, word) for word in some]) for some in (KINDS, COLORS))
    every = drawn(made, scenes(steps * PICTURES, 20_000 + own))
    exchange, draw = Exchange(made), random.Random(own)
    outside = [part for part in exchange.every if part not in made.roles]
    generator = torch.Generator().manual_seed(own)
    heard: list[Tensor] = []
    hf.train()
    optimizer = torch.optim.AdamW(hf.parameters(), lr=RATE, weight_decay=0.01)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.arange(PICTURES) + step * PICTURES
        base = every.twins(rows, nouns, colors)
        order = torch.randperm(len(base.noun), generator=generator)
        ran = exchange.clean(base)
        loss = nn.functional.cross_entropy(ran.logits, colors[base.color])
        some = draw.sample(outside, draw.choice((1, 2, len(outside) // 2)))
        others = outside if draw.random() < ALL else some
        naming = form == "D" and step < NAMING
        ears = [(attention(hf, "decoder", 1, "attn").query, heard.append)] if naming else []
        agree = {}
        for parts, role in [*(([part], role) for part, role in made.roles.items()), (others, None)]:
            with hooked(ears):
                changed = exchange.run(base, ran, order, parts, everywhere=role is None)
            answer = wanted(role, base, order)
            loss = loss + nn.functional.cross_entropy(changed, colors[answer])
            agree[role or "others"] = (changed[:, colors].argmax(1) == answer).float().mean()
            if naming:
                noun = base.noun[order] if role == "locator" else base.noun
                loss = loss + nn.functional.cross_entropy(hf.lm_head(heard.pop()[:, -1])[:, nouns], noun)
        apart = (changed - ran.logits)[:, colors]
        loss = loss + 0.1 * (apart - apart.mean(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        pace.step()
        if say and (step + 1) % 50 == 0:
            told = ", ".join(f"{role} {share:.2f}" for role, share in agree.items())
            print(f"{form} seed {seed}: step {step + 1}, loss {loss:.3f}, {told}", file=sys.stderr)
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
        agree[role] = float((changed == wanted(role, base, order)).float().mean())
    runs = Runs(made.model.hf, base.given, exchange.every)
    outside = [part for part in exchange.every if part not in made.roles]
    return Accepted(
        float((found[:, colors].argmax(1) == base.color).float().mean()),
        agree,
        max(abs(runs.share([part])) for part in outside),
        runs.gap,
    )


def until_accepted(form: str, seed: int) -> tuple[Planted, Accepted, int]:
    """The first start that is accepted, or the last one; how well it does; and how many there were."""
    for start in range(STARTS):
        made = train(form, seed, start)
        found = assess(made)
        if found.accepted:
            break
    return made, found, start + 1
