"""Least squares from what a layer is given to what a planted head should look for and read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pictures import COLORS, Batch, Scenes
from plain import Attention, entering
from torch import Tensor, nn

Linear = tuple[Tensor, Tensor]
"""A matrix of few rows, and its bias."""


def least_squares(x: Tensor, y: Tensor, weight: Tensor, *, bias: bool = True) -> Linear:
    """What takes `x` (rows, width) to `y` (rows, columns) best, rows weighted, with a little ridge."""
    x, w = x.double(), (weight / weight.sum())[:, None].double()
    if bias:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    gram = x.T @ (x * w)
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    found = torch.linalg.solve(gram, x.T @ (y.double() * w)).float()
    if bias:
        return found[:-1].T.contiguous(), found[-1]
    return found.T.contiguous(), torch.zeros(y.shape[1])


def sharper(query: Linear, sharpness: float) -> Linear:
    """A query whose attention logit is so large where it meets a key of 1."""
    return query[0] * sharpness, query[1] * sharpness


def write_head(own: Attention, cut: slice, query: Linear, key: Linear, value: Linear, out: Tensor) -> None:
    """Put these in the place of the head that has these columns of what the output projection is given; `out`
    is (width, rows of value). All else of the head is zero."""
    rows = list(range(cut.start, cut.stop))
    dim = len(rows)
    query = sharper(query, dim**0.5)
    # In rotary's slowest pairs (form D) a query and a key meet in the same way wherever they stand.
    half = dim // 2
    slots = list(range(dim)) if own.query.bias is not None else [half - 1, dim - 1, half - 2, dim - 2]
    with torch.no_grad():
        for linear, (weight, bias), places in (
            (own.query, query, slots),
            (own.key, key, slots),
            (own.value, value, list(range(dim))),
        ):
            linear.weight[rows] = 0.0
            if linear.bias is not None:
                linear.bias[rows] = 0.0
            for n in range(len(weight)):
                linear.weight[rows[places[n]]] = weight[n]
                if linear.bias is not None:
                    linear.bias[rows[places[n]]] = bias[n]
        own.out.weight[:, rows] = 0.0
        own.out.weight[:, rows[: out.shape[1]]] = out


class Fits:
    """What is fitted on some scenes of a model of one form: queries, keys and values."""

    def __init__(self, hf: Any, form: str, given: Scenes, tensors: Batch) -> None:
        self.hf, self.form, self.scenes, self.batch = hf, form, given, tensors

    @property
    def first(self) -> int:
        """The first token of the picture among the keys of what looks at it."""
        if self.form == "C":
            return 1  # behind the class token
        return int((self.batch.tokens[0] == self.hf.config.image_token_id).nonzero()[0])

    def keys(self, of: Tensor) -> Tensor:
        """The keys of each example that show a patch: of (examples,) or (examples, 3) numbers of patches."""
        return of + self.first

    def inputs(self, modules: Sequence[nn.Module]) -> list[Tensor]:
        return entering(self.hf, self.batch.clean, modules)

    def fit(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Linear:
        """Least squares; without a bias where the model has none."""
        weight = torch.ones(len(x)) if weight is None else weight
        return least_squares(x, y, weight, bias=self.form == "C")

    def along(self, x: Tensor, directions: Tensor) -> Linear:
        """What reads some directions (width, many) of `x` (rows, width), 0 in the mean: without a bias, the
        mean's own direction is not read."""
        mean, weight = x.mean(0), directions.T.clone()
        if self.form == "C":
            return weight, -weight @ mean
        return weight - torch.outer(weight @ mean, mean) / (mean @ mean), torch.zeros(len(weight))

    def images(self, x: Tensor, targets: Tensor) -> tuple[Linear, Tensor]:
        """Least squares from the keys of the picture (and what stands before it) to `targets` (examples,
        keys, columns), each kind of key weighing as much; and what that gives."""
        flat, y = x.flatten(0, 1), targets.flatten(0, 1)
        kinds, which = torch.unique(y, dim=0, return_inverse=True)
        weight = 1.0 / torch.bincount(which, minlength=len(kinds)).float()[which]
        found = self.fit(flat, y, weight)
        return found, (flat @ found[0].T + found[1]).unflatten(0, x.shape[:2])

    def codes(self, x: Tensor) -> tuple[Linear, Linear, float]:
        """Keys that tell objects of the kinds (and, in form C, the class token), each larger by 1 than the
        average of the rest; values: the color, and that there is an object; R² of the color."""
        n, length = x.shape[:2]
        each, where = torch.arange(n), self.keys(torch.tensor(self.scenes.where))
        noun = torch.tensor(self.scenes.noun)
        marks = torch.zeros(n, length, 3 if self.form == "C" else 2)
        marks[each, where[:, 0], noun] = 1.0
        marks[each, where[:, 1], 1 - noun] = 1.0
        if self.form == "C":
            marks[:, 0, 2] = 1.0
        (weight, bias), got = self.images(x, marks)
        for k in range(marks.shape[-1]):
            there = marks[..., k] > 0
            gain = 1.0 / (got[..., k][there].mean() - got[..., k][~there].mean())
            weight[k] *= gain
            bias[k] *= gain
        colors = torch.zeros(n, length, len(COLORS) + 1)
        answer = torch.tensor(self.scenes.answer)
        colors[each, where[:, 0], :-1] = nn.functional.one_hot(answer, len(COLORS)).float() - 1 / len(COLORS)
        colors[each, where[:, 0], -1] = 1.0
        value, got = self.images(x[each[:, None], _with(where[:, :1], length)], _rows(colors, where[:, :1]))
        there = got[:, 0, :-1]
        true = colors[each, where[:, 0], :-1]
        r2 = 1 - float(((there - true) ** 2).sum() / ((true - true.mean(0)) ** 2).sum())
        return (weight, bias), value, r2

    def nouns_asked(self, x: Tensor) -> Linear:
        """Queries: the noun's kind where the head asks, and the class token (form C) at all other tokens."""
        noun = nn.functional.one_hot(torch.tensor(self.scenes.noun), 2).float()
        if self.form == "D":
            return self.fit(x[:, -1], noun)
        y = torch.zeros(*x.shape[:2], 3)
        y[..., 2] = 1.0
        y[:, self.batch.noun_at] = torch.cat([noun, torch.zeros(len(noun), 1)], 1)
        return self.fit(x.flatten(0, 1), y.flatten(0, 1))

    def constant(self, x: Tensor) -> Linear:
        """A query that is 1 wherever the head asks."""
        rows = x[:, -1] if self.form == "D" else x.flatten(0, 1)
        return self.fit(rows, torch.ones(len(rows), 1))


def _with(where: Tensor, length: int) -> Tensor:
    """The keys from which a value is fitted: an object's, and some others'."""
    some = torch.randint(length, (len(where), 8))
    return torch.cat([where, torch.where(some == where, (some + 1) % length, some)], 1)


def _rows(colors: Tensor, where: Tensor) -> Tensor:
    zeros = torch.zeros(len(colors), 9, colors.shape[-1])
    zeros[:, 0] = colors[torch.arange(len(colors)), where[:, 0]]
    return zeros
