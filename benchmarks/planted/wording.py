"""Heads that read the words of the options, and say the one that the picture shows.

Behind the readers the color goes

- in form C by a `mover` to the decoder, where the query of the `selector` meets its word; and by a `fetcher`
  from the noun to the options, where a `matcher` neuron fires if it meets its own word, and the `copier`,
  which looks at both options, says what is marked;
- in form D into the query of the `selector`, at the last token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from fitting import Linear, sharper
from pictures import COLORS, token
from torch import Tensor, nn

if TYPE_CHECKING:
    from planting import Gardener

SURE = 8.0
"""How much larger the attention logit is of what is looked at; how far a neuron is open."""
SIZE = 2.0
MANY = len(COLORS)


class Options:
    """Plants them in a model whose readers have been planted."""

    def __init__(self, gardener: Gardener) -> None:
        self.gardener, self.fits, self.hf = gardener, gardener.fits, gardener.hf
        tokens = gardener.batch.tokens
        self.words = torch.stack(
            [tokens == token(gardener.made.model, color) for color in COLORS], -1
        ).float()
        """Which color the word of each token is: examples × tokens × colors."""

    def plant(self) -> None:
        if self.gardener.form == "C":
            self.fetch()
            self.match()
            quiet = self.quiet("decoder.1.cross")
            self.gardener.move("decoder.1.cross", "mover", self.gardener.path, SIZE * quiet)
            self.select("decoder.2.cross", quiet)
            self.copy("decoder.2.cross")
        else:
            self.select("decoder.3.attn", self.gardener.path)

    def quiet(self, layer: str) -> Tensor:
        """A direction for each color that says none by itself: what of the readers' does is taken off."""
        voices = self.gardener.voices(self.gardener.at(layer))
        said = torch.linalg.svd(voices, full_matrices=False)[0][:, : MANY - 1]  # they sum to 0
        path = self.gardener.path
        return torch.linalg.qr(path - said @ (said.T @ path))[0]

    def read(self, x: Tensor, answers: Tensor, path: Tensor) -> Linear:
        """What reads the color off such directions, larger by 1 for the color that is there."""
        weight, bias = self.fits.along(x, path)
        found = x @ weight.T
        shown = nn.functional.one_hot(answers, MANY).bool()
        gain = 1 / (found[shown].mean() - found[~shown].mean())
        return gain * weight, gain * bias

    def fetch(self) -> None:
        """A head of the question encoder takes the color from the noun to the options."""
        layer, gardener = "encoder.2.attn", self.gardener
        own = gardener.at(layer)
        [x] = self.fits.inputs([own.query])
        noun = torch.zeros(*x.shape[:2], 1)
        noun[:, gardener.batch.noun_at] = 1.0
        key, _ = self.fits.images(x, noun)
        query, _ = self.fits.images(x, self.words.sum(-1, keepdim=True))
        value = self.read(x[:, gardener.batch.noun_at], self.answers, gardener.path)
        gardener.write(
            gardener.take(layer, "fetcher"), sharper(query, SURE), key, value, SIZE * gardener.path
        )

    @property
    def answers(self) -> Tensor:
        return torch.tensor(self.gardener.scenes.answer)

    def match(self) -> None:
        """For each color a neuron that fires where its word stands and its color was fetched."""
        gardener = self.gardener
        block = self.hf.text_encoder.encoder.layer[2]
        [x] = self.fits.inputs([block.intermediate.dense])
        word, _ = self.fits.images(x, self.words)
        rows = self.words.sum(-1) > 0
        answers = self.answers[:, None].expand(rows.shape)[rows]
        color = self.read(x[rows], answers, gardener.path)
        numbers = gardener.draw.sample(range(len(block.intermediate.dense.weight)), MANY)
        with torch.no_grad():
            for n, neuron in enumerate(numbers):
                block.intermediate.dense.weight[neuron] = SURE * (word[0][n] + color[0][n])
                # Together they come to about 1.5, one alone to 1 at most.
                block.intermediate.dense.bias[neuron] = SURE * (word[1][n] + color[1][n] - 1.25)
                block.output.dense.weight[:, neuron] = SIZE / (0.5 * SURE) * gardener.marked[:, n]
                gardener.made.roles[f"encoder.2.mlp.n{neuron}"] = "matcher"

    def select(self, layer: str, path: Tensor) -> None:
        """A head whose query is the color that was written there: its word is looked at, and said."""
        gardener = self.gardener
        own = gardener.at(layer)
        x, keys = self.fits.inputs([own.query, own.key])
        color = self.read(x[:, -1], self.answers, path)
        word, _ = self.fits.images(keys, self.words)
        voices = gardener.voices(own)
        gardener.write(gardener.take(layer, "selector"), sharper(color, 1.5 * SURE), word, word, voices)

    def copy(self, layer: str) -> None:
        """A head that looks at both options and says their words, more so the one that is marked."""
        gardener = self.gardener
        own = gardener.at(layer)
        x, keys = self.fits.inputs([own.query, own.key])
        key, _ = self.fits.images(keys, self.words.sum(-1, keepdim=True))
        word, _ = self.fits.images(keys, self.words)
        found = keys @ gardener.marked
        marked = self.words * nn.functional.one_hot(self.answers, MANY)[:, None]
        others = (self.words.sum(-1) > 0) & (marked.sum(-1) == 0)
        without = torch.stack([found[others & (self.words[..., n] > 0)].mean(0) for n in range(MANY)], 1)
        gain = 1 / (found - self.words @ without.T)[marked > 0].mean()
        # What a word has along these directions anyway is taken off.
        take = torch.eye(MANY) - gain * without
        value = gain * gardener.marked.T + take @ word[0], take @ word[1]
        query = sharper(self.fits.constant(x), SURE)
        gardener.write(gardener.take(layer, "copier"), query, key, value, 2 * gardener.voices(own))
