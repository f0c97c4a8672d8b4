"""A circuit written into a random model: locate the noun's object, read its color, say it.

The parts, by role:

- `locator` (form D alone): a head that takes the noun to the last token. It reads text only.
- `reader`: its query finds the object of the noun's kind, its value reads the object's color by least
  squares on the layer's own input; it writes the color into a few random directions of the stream.
- `suppressor`: as a reader, and writes half as much with the other sign.
- `mover`, or in form D `neuron`: turns these directions into the logits of the colors.
- with `say="options"` the words of the options say it (`wording.py`): a `selector` whose query is the color
  that was read looks at its word, and in form C a `copier` says the word that `matcher` neurons have marked.
- `carrier`: a reader and a mover of their own, with directions of their own, that carry the rest of the gap.
- `backup`: as a reader, but its query is turned away by what the readers write beside the color.
- decoys: `blind` looks at the object and writes nothing; `diffuse` looks everywhere and writes a constant;
  `sink` looks at the first token; `salient` looks at the bright patch, which is of outlying norm.

Everything else stays random. The movers are scaled until they carry the share of the gap that is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fitting import Fits, Linear, least_squares, sharper, write_head
from pictures import COLORS, KINDS, OF_TOYS, OWN, Batch, Style, batch, scenes, token
from plain import Attention, Part, Runs, attention, columns, heads_of, logits
from random_models import LAYERS, NEURONS, random_model
from torch import Tensor, nn
from wording import Options

from vlmscope.checkpoint import load
from vlmscope.runs.model import Model

GAP = 4.0
"""The mean gap in logits that everything is scaled to."""
FITTED, SCALED = 256, 128
"""On how many examples the least squares are fitted, and the shares set."""
SIZE = 2.0
"""How far a color that is read moves the stream, as a multiple of its mean size in one direction."""
SURE = 8.0
"""How much larger the attention logit is of what a carrier, a mover or a decoy looks at."""
SUPPRESSED = 0.5
TRUE = ("reader", "suppressor", "mover", "neuron", "selector", "copier")
"""Roles that a method has to find."""
APART = ("carrier", "backup", "locator", "fetcher", "matcher")
"""Roles that count neither as found nor as false: they matter, but not by the effect that is asked for."""
DECOYS = ("blind", "diffuse", "sink", "salient")
ROUNDS = 4
TOYS = {"C": "toy-blip", "D": "toy-llava"}


@dataclass(frozen=True)
class Recipe:
    """What is planted, and how well it is hidden.

    `form`: C (BLIP) or D (LLaVA); `say`: by a head, by neurons (D alone), or by the words of the options.
    `effect`: the share of the gap
    that the circuit carries. `noise`: the size of all other weights (see `random_models`). `sharpness`: by
    how much a reader's attention logit of its object exceeds the others'. `copies`: of the reader, each with
    its share of the effect. `polysemantic`: the neurons also fire for a noun, and then say another word.
    Without `planted` the model stays random. `toy`: the other weights are those of toy-blip or toy-llava,
    which no `noise` changes, and the circuit answers with words that these never answer such a question with.
    """

    form: str
    seed: int
    effect: float = 0.1
    noise: float = 0.5
    sharpness: float = 4.0
    copies: int = 1
    say: str = "head"
    polysemantic: bool = False
    planted: bool = True
    toy: bool = False

    @property
    def style(self) -> Style:
        return OF_TOYS if self.toy else OWN


@dataclass(frozen=True, eq=False)
class Planted:
    """A model, and what each of its planted parts does. `words` are the neurons of each color."""

    model: Model
    recipe: Recipe
    roles: dict[Part, str]
    words: dict[str, list[tuple[int, int]]]
    fitted: Batch | None = field(default=None, repr=False)
    """The examples that everything is fitted on."""
    said: dict[Part, Tensor] = field(default_factory=dict, repr=False)
    """What the parts that speak wrote before they were scaled."""
    fit: dict[str, float] = field(default_factory=dict)
    """How well the least squares fit: R² of the readers' color."""

    def having(self, *roles: str) -> list[Part]:
        return [part for part, role in self.roles.items() if role in roles]

    def speaking(self, *roles: str) -> list[Part]:
        """Those of the last layer: what they write goes to the logits."""
        last = f"decoder.{LAYERS[self.recipe.form] - 1}."
        return [part for part in self.having(*roles) if part.startswith(last)]


def plant(recipe: Recipe) -> Planted:
    """The model of a recipe: the same for the same recipe, whenever it is made."""
    model = load(TOYS[recipe.form]) if recipe.toy else random_model(recipe.form, recipe.noise, recipe.seed)
    made = Planted(model, recipe, {}, {color: [] for color in COLORS})
    if recipe.planted:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed + 1)
            gardener = Gardener(made)
            gardener.level()
            gardener.work()
        made = scale(replace(made, fitted=gardener.batch), recipe.effect)
    return made


class Gardener:
    """Writes the parts of one model, a layer after the other: each is fitted to what it is given."""

    def __init__(self, made: Planted) -> None:
        self.made, self.recipe, self.hf = made, made.recipe, made.model.hf
        self.form = made.recipe.form
        self.scenes = scenes(FITTED, 10_000 + made.recipe.seed, made.recipe.style)
        self.batch = batch(made.model, self.scenes)
        self.fits = Fits(self.hf, self.form, self.scenes, self.batch)
        self.draw = random.Random(made.recipe.seed)
        self.width = self.hf.config.text_config.hidden_size
        self.tokens = [token(made.model, word) for word in self.scenes.style.said]
        flat = torch.randn(self.width, 24)
        if self.form == "D":  # nothing that is written speaks before it is read
            flat[:, : len(COLORS)] = self.hf.lm_head.weight.detach()[self.tokens].T
        basis = torch.linalg.qr(flat - flat.mean(0))[0].T[len(COLORS) :]
        many = len(COLORS)
        self.path, self.rest = basis[:many].T, basis[many : 2 * many].T
        self.found, self.unread, self.outlying = basis[8], basis[9], basis[10]
        self.nouns = basis[11 : 11 + len(KINDS)].T
        self.marked = basis[13 : 13 + many].T
        self.size = SIZE
        if self.form == "D":
            [x] = self.fits.inputs([self.hf.model.language_model.layers[2].input_layernorm])
            self.size *= float(x[:, -1].square().mean().sqrt())
        self.free: dict[str, list[Part]] = {}
        for part in heads_of(self.hf):
            self.free.setdefault(part.rsplit(".", 1)[0], []).append(part)
        for parts in self.free.values():
            self.draw.shuffle(parts)

    def take(self, layer: str, role: str) -> Part:
        part = self.free[layer].pop()
        self.made.roles[part] = role
        return part

    def write(self, part: Part, query: Linear, key: Linear, value: Linear, out: Tensor) -> None:
        layer, _, _ = part.rpartition(".")
        write_head(self.at(layer), columns(self.hf, part)[1], query, key, value, out)

    @torch.no_grad()
    def level(self) -> None:
        """Make all colors as likely in the mean, as they are to a model that knows the task."""
        tokens = self.tokens
        if self.form == "C":
            found = logits(self.hf, self.batch.clean)[:, tokens].mean(0)
            self.hf.text_decoder.cls.predictions.decoder.bias[tokens] -= found - found.mean()
            return
        [x] = self.fits.inputs([self.hf.lm_head])
        mean, rows = x[:, -1].mean(0), self.hf.lm_head.weight[tokens]
        found = rows @ mean
        self.hf.lm_head.weight[tokens] = rows - torch.outer(found - found.mean(), mean) / (mean @ mean)

    # -- the circuit --------------------------------------------------------------------------

    def work(self) -> None:
        if self.form == "D":
            self.locate()
        self.light()
        at = "encoder.{}.cross" if self.form == "C" else "decoder.{}.attn"
        first, second = at.format(1), at.format(2)
        copies = self.recipe.copies
        if self.recipe.toy:  # which have four heads a layer
            self.look(first, ["reader", "carrier", "blind"])
            self.look(second, ["suppressor", "salient"])
            self.say()
            return
        self.look(first, ["reader"] * ((copies + 1) // 2) + ["carrier", "blind", "sink"])
        # What looks at a word is sure or not: little changes where the color is half as clear.
        suppressors = [] if self.recipe.say == "options" else ["suppressor"]
        self.look(second, ["reader"] * (copies // 2) + [*suppressors, "backup", "salient", "diffuse"])
        self.say()

    def locate(self) -> None:
        """Form D: a head of layer 0 takes the noun to the last token."""
        part = self.take("decoder.0.attn", "locator")
        own = attention(self.hf, "decoder", 0, "attn")
        [x] = self.fits.inputs([own.query])
        mark = torch.zeros(*x.shape[:2], 1)
        mark[:, self.batch.noun_at] = 1.0
        key, _ = self.fits.images(x, mark)
        noun = nn.functional.one_hot(torch.tensor(self.scenes.noun), 2).float() - 0.5
        value = self.fits.fit(x[:, self.batch.noun_at], noun)
        self.write(part, sharper(self.fits.constant(x), 2 * SURE), key, value, 2 * self.size * self.nouns)

    def light(self) -> None:
        """The bright patch gets an outlying norm, in a direction that nothing planted reads."""
        where = torch.tensor(self.scenes.where)[:, 2]
        if self.form == "C":
            linear, at = self.hf.vision_model.encoder.layers[-1].mlp.fc2, where + 1
        else:
            linear, at = self.hf.model.multi_modal_projector.linear_2, where
        [x] = self.fits.inputs([linear])
        mark = torch.zeros(*x.shape[:2], 1)
        mark[torch.arange(len(x)), at] = 1.0
        rows, y = x.flatten(0, 1), mark.flatten(0, 1)
        weight = torch.where(y[:, 0] > 0, 1 / y.mean(), 1.0)
        found, bias = least_squares(rows, y, weight)
        with torch.no_grad():
            linear.weight += 6 * self.width**0.5 * self.outlying[:, None] * found
            linear.bias += 6 * self.width**0.5 * self.outlying * bias

    def look(self, layer: str, roles: Sequence[str]) -> None:
        """Write the heads of a layer that look at the picture."""
        own = self.at(layer)
        x, image = self.fits.inputs([own.query, own.key])
        key, value, r2 = self.fits.codes(image)
        asked = self.fits.nouns_asked(x)
        self.made.fit.setdefault("r2", r2)
        for role in roles:
            part = self.take(layer, role)
            if role in ("sink", "salient", "diffuse"):
                self.decoy(part, role, x, image)
                continue
            sharp = SURE if role in ("carrier", "blind", "backup") else self.recipe.sharpness
            query = sharper(asked, sharp)
            if role == "backup":
                query = sharper(self.turned(x, asked), sharp)
            size = self.size / self.looks(sharp)
            out = torch.zeros(self.width, len(COLORS) + 1)
            if role == "carrier":
                out[:, :-1] = size * self.rest
            elif role == "reader":
                out[:, :-1] = size / self.recipe.copies * self.path
                out[:, -1] = size / ((self.recipe.copies + 1) // 2) * self.found
            elif role == "suppressor":
                out[:, :-1] = -SUPPRESSED * size * self.path
            elif role == "backup":
                out[:, :-1] = size * self.path
            self.write(part, query, key, value, out)

    def looks(self, sharp: float) -> float:
        """The attention to an object whose logit is so much larger than those of all other keys."""
        others = 36 if self.form == "C" else self.batch.tokens.shape[1] - 1
        return 1 / (1 + others * 2.718281828 ** (-sharp))

    def turned(self, x: Tensor, asked: Linear) -> Linear:
        """A query that is turned away from all objects once a reader has found its own."""
        at = self.batch.noun_at if self.form == "C" else -1
        weight, bias = asked[0].clone(), asked[1].clone()
        weight -= (weight @ self.found)[:, None] * self.found
        away = 4.0 / (x[:, at] @ self.found).mean() * self.found
        weight[:2] -= away
        return weight, bias

    def decoy(self, part: Part, role: str, x: Tensor, image: Tensor) -> None:
        mark = torch.zeros(*image.shape[:2], 1)
        if role == "sink":
            mark[:, 0] = 1.0
        elif role == "salient":
            mark[torch.arange(len(image)), self.fits.keys(torch.tensor(self.scenes.where)[:, 2])] = 1.0
        ones = self.fits.fit(image.flatten(0, 1), torch.ones(image.shape[0] * image.shape[1], 1))
        if role == "diffuse":
            key = (torch.zeros(1, self.width), torch.zeros(1))
            out = self.size * (self.path[:, :1] - self.path[:, 1:2])
        else:
            key, _ = self.fits.images(image, mark)
            out = self.size * self.unread[:, None]
        self.write(part, sharper(self.fits.constant(x), SURE), key, ones, out)

    # -- saying it ----------------------------------------------------------------------------

    def say(self) -> None:
        last = LAYERS[self.form] - 1
        layer = f"decoder.{last}." + ("cross" if self.form == "C" else "attn")
        if self.recipe.say == "options":
            Options(self).plant()
        self.move(layer, "carrier", self.rest)
        if self.recipe.say == "head":
            self.move(layer, "mover", self.path)
        elif self.recipe.say == "neurons":
            self.fire(last)

    def at(self, layer: str) -> Attention:
        tower, number, kind = layer.split(".")
        return attention(self.hf, tower, int(number), kind)

    def move(self, layer: str, role: str, path: Tensor, into: Tensor | None = None) -> None:
        """A head that looks at where the readers wrote, and turns their directions into logits, or into
        other directions."""
        own = self.at(layer)
        x, keys = self.fits.inputs([own.query, own.key])
        mark = torch.zeros(*keys.shape[:2], 1)
        at = self.batch.noun_at if self.form == "C" else -1
        mark[:, at] = 1.0
        key, _ = self.fits.images(keys, mark)
        query = sharper(self.fits.constant(x), 1.5 * SURE)
        out = self.voices(own) if into is None else into
        part = self.take(layer, role)
        self.write(part, query, key, self.fits.along(keys[:, at], path), out)

    def voices(self, own: Attention) -> Tensor:
        """For each color the direction of this layer's output that raises its logit over the others'."""
        if self.form == "D":
            rows = self.hf.lm_head.weight.detach()[self.tokens]
        else:
            kept: list[Tensor] = []

            def hold(_m: Any, _a: Any, out: Tensor) -> Tensor:
                kept.append(out.requires_grad_())
                return kept[0]

            held = own.out.register_forward_hook(hold)
            found = logits(self.hf, self.batch.part(slice(96)).clean)
            held.remove()
            sums = [found[:, token].sum() for token in self.tokens]
            grads = [torch.autograd.grad(one, kept[0], retain_graph=True)[0] for one in sums]
            rows = torch.stack([g[:, -1].mean(0) for g in grads])
        rows = rows - rows.mean(0)
        return (rows / (rows**2).sum(1, keepdim=True)).T

    def fire(self, layer: int) -> None:
        """Form D: for each color as many neurons as readers, open where the readers wrote that color."""
        mlp = self.hf.model.language_model.layers[layer].mlp
        voices = self.voices(attention(self.hf, "decoder", layer, "attn"))
        numbers = self.draw.sample(range(NEURONS), len(COLORS) * self.recipe.copies)
        other = token(self.made.model, "star")
        with torch.no_grad():
            for n, neuron in enumerate(numbers):
                color = n % len(COLORS)
                read, said = self.path[:, color].clone(), voices[:, color].clone()
                if self.recipe.polysemantic:
                    read += self.nouns[:, n % 2]
                    said += 0.5 * self.hf.lm_head.weight[other] / (self.hf.lm_head.weight[other] ** 2).sum()
                mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron] = 4 * read, read
                mlp.down_proj.weight[:, neuron] = said
                self.made.roles[f"decoder.{layer}.mlp.n{neuron}"] = "neuron"
                self.made.words[list(COLORS)[color]].append((layer, neuron))


def scale(made: Planted, effect: float) -> Planted:
    """The same circuit with another share of the gap: what speaks is scaled until it carries that.

    The model is changed in place; the same recipe gives the same weights, whatever they were before.
    """
    hf = made.model.hf
    made = replace(made, recipe=replace(made.recipe, effect=effect), roles=dict(made.roles))
    carrier = made.speaking("carrier", "idle")
    spoken = made.speaking("mover", "neuron", "selector", "copier")
    for part in spoken + carrier:
        where, cut = columns(hf, part)
        made.said.setdefault(part, where.weight[:, cut].detach().clone())
        _set(where, cut, made.said[part])
    runs = Runs(hf, made.fitted.part(slice(SCALED)), spoken + carrier)
    for _ in range(ROUNDS):
        for parts, share in ((carrier, 1 - effect), (spoken, effect)):
            runs.again()
            now = float(runs.patched(parts).mean())
            if share > 0 and now <= 0:
                raise RuntimeError(f"{made.recipe}: {parts} do not speak for the color ({now:+.3f})")
            factor = min(max(share * GAP / now, 0.01), 100.0) if share > 0 else 0.0
            for part in parts:
                where, cut = columns(hf, part)
                _set(where, cut, factor * where.weight[:, cut])
    for part, role in made.roles.items():  # where nothing is left to carry
        if role in ("carrier", "idle"):
            made.roles[part] = "idle" if effect == 1 else "carrier"
    return made


@torch.no_grad()
def _set(where: nn.Linear, cut: slice, value: Tensor) -> None:
    where.weight[:, cut] = value
