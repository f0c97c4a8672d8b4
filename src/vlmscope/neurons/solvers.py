"""How an edit of neurons' columns is found: in closed form, or learned (see `edits.edit`).

Both see the whole model: a neuron fires at many positions, and later layers read what it adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vlmscope.models.inputs import Inputs
from vlmscope.neurons.tails import Deltas, Tails
from vlmscope.progress import progress
from vlmscope.runs.forward import forward
from vlmscope.runs.model import Model
from vlmscope.sites import Point

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


@dataclass(frozen=True, eq=False)
class Wanted:
    """A caption that the edited model is to give: its tokens, which of them are `new`, and what is fed.

    With `avoid`, anything but the new tokens is to be said there. `logits` are those of the tokens before
    the edit.
    """

    fed: Inputs
    ids: Sequence[int]
    logits: Float[Tensor, "tokens vocabulary"]
    new: Sequence[int] = ()
    avoid: bool = False


@dataclass(frozen=True, eq=False)
class Task:
    """Captions to be changed and to be kept, the columns that may change, and what keeping weighs."""

    model: Model
    changed: Sequence[Wanted]
    kept: Sequence[Wanted]
    deltas: Deltas
    locality: float

    @property
    def captions(self) -> list[Wanted]:
        return [*self.changed, *self.kept]

    @property
    def parameters(self) -> list[Tensor]:
        return [delta.requires_grad_(True) for _, delta in self.deltas.values()]

    @cached_property
    def _tails(self) -> Tails:
        return Tails(self.model, min(self.deltas))

    def logits(self, captions: Sequence[Wanted]) -> list[Float[Tensor, "tokens vocabulary"]]:
        """The logits that predict each caption's tokens, with the deltas added to the columns."""
        return self._tails.logits([(caption.fed, len(caption.ids)) for caption in captions], self.deltas)


def no_deltas(model: Model, neurons: Sequence[tuple[int, int]]) -> Deltas:
    """Nothing added to the columns of some neurons (layer, number)."""
    width, found = model.shapes[model.speaker].width, Deltas()
    for layer in sorted({layer for layer, _ in neurons}):
        at = torch.tensor(sorted(n for there, n in neurons if there == layer), device=model.device)
        found[layer] = (at, torch.zeros(width, len(at), device=model.device))
    return found


def steepest(task: Task, count: int) -> list[int]:
    """The places of the neurons, among all, in whose columns the loss of what is to change is steepest.

    To first order: the length of the loss' gradient in the column, at the weights as they are.
    """
    shape = task.model.shapes[task.model.speaker]
    every = [(layer, n) for layer in shape.having("mlp") for n in range(shape.neurons)]
    own = replace(task, deltas=no_deltas(task.model, every))
    parameters = own.parameters
    for caption in own.changed:
        (found,) = own.logits([caption])
        next(_losses(caption, found.log_softmax(-1), 0.0)).backward()
    lengths = [torch.zeros(shape.neurons) if x.grad is None else x.grad.norm(dim=0).cpu() for x in parameters]
    return torch.cat(lengths).topk(count).indices.tolist()


# -- in closed form ------------------------------------------------------------------------------


def closed(task: Task, margin: float) -> None:
    """Least-norm steps until the margins hold, to first order at the present activations and gradients.

    The norm counts a column by how much its neuron fires elsewhere (as the covariance does in ROME, Meng et
    al. 2022, arXiv 2202.05262), so that what is added there stays small.
    """
    metric = [root.double() for root in _elsewhere(task)]
    change = torch.cat([torch.zeros_like(delta, dtype=torch.float64).flatten() for delta in task.parameters])
    with progress(ROUNDS, what="rounds") as step:
        for number in range(ROUNDS):
            found, needs = _constraints(task, margin, metric)
            step(0, number + 1)
            if not needs or max(needs) < CLOSE:
                return
            rows, needed = torch.stack(found), torch.tensor(needs, dtype=torch.float64, device=change.device)
            gram = rows @ rows.T
            gram += RIDGE * gram.diagonal().median() * torch.eye(len(gram), device=gram.device)
            # The whole change (not the step to it) of least norm that gives each row what it needs.
            aim = rows.T @ torch.linalg.solve(gram, needed + rows @ change)
            change = _go_towards(task, margin, metric, change, aim, sum(need**2 for need in needs))


def _constraints(task: Task, margin: float, metric: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
    """The gradient of each margin that fails, or nearly does and is to stay; and by how much it fails."""
    rows, needs, parameters = [], [], task.parameters
    for caption in task.captions:
        for lead, need, weight in _margins(task, caption, margin):
            if need > -NEAR:
                gradients = torch.autograd.grad(lead, parameters, retain_graph=True, materialize_grads=True)
                parts = [(g.double() @ root).flatten() for g, root in zip(gradients, metric, strict=True)]
                rows.append(weight * torch.cat(parts))
                needs.append(weight * max(need, 0.0))
    return rows, needs


def _margins(task: Task, caption: Wanted, margin: float) -> Iterator[tuple[Tensor, float, float]]:
    """For each position: by how much its token leads, how much more is needed, and what that weighs."""
    (logits,) = task.logits([caption])
    for n, token in enumerate(caption.ids):
        if caption.avoid and n > caption.new[0]:
            return  # behind a word that is to go anything may be said
        lead = _lead(logits[n], token)
        if n not in caption.new:
            least = min(margin / 2, _lead(caption.logits[n], token).item())
            yield lead, least - lead.item(), task.locality
        elif caption.avoid:
            yield -lead, margin + lead.item(), 1.0
        else:
            yield lead, margin - lead.item(), 1.0


def _lead(row: Tensor, token: int) -> Tensor:
    """By how many logits a token leads the best other one."""
    return row[token] - torch.cat([row[:token], row[token + 1 :]]).max()


@torch.no_grad()
def _go_towards(
    task: Task, margin: float, metric: Sequence[Tensor], start: Tensor, aim: Tensor, most: float
) -> Tensor:
    """A step towards a change, halved until the margins lack less than `most`, as a short enough one does."""
    change, deltas = start, task.parameters
    for share in (1.0, 0.5, 0.25, 0.125):
        change = start + share * (aim - start)
        parts = change.split([delta.numel() for delta in deltas])
        for delta, part, root in zip(deltas, parts, metric, strict=True):
            delta.copy_((part.view_as(delta) @ root).to(delta))
        margins = [m for caption in task.captions for m in _margins(task, caption, margin)]
        if sum((weight * need) ** 2 for _, need, weight in margins if need > 0) < most:
            break
    return change


def _elsewhere(task: Task) -> list[Tensor]:
    """By layer the inverse square root of 1 + c·C, with C the second moment of the chosen neurons at all
    positions but those of new words, over their mean square there."""
    points = {layer: Point(task.model.speaker, layer, "mlp", "n") for layer in task.deltas}
    total = {n: torch.zeros(len(at), len(at), device=at.device) for n, (at, _) in task.deltas.items()}
    here = {n: torch.zeros((), device=at.device) for n, (at, _) in task.deltas.items()}
    others = words = 0
    for caption in task.captions:
        run = forward(task.model, caption.fed, keep=points.values())
        is_new = torch.zeros(len(caption.fed.layout[task.model.speaker].tokens), dtype=torch.bool)
        is_new[[n - len(caption.ids) for n in caption.new]] = True
        for layer, (at, _) in task.deltas.items():
            if points[layer] in run.values:  # without a picture a layer may be passed over
                x = run.values[points[layer]][0, :, at].float()
                total[layer] += x[~is_new].T @ x[~is_new]
                here[layer] += x[is_new].square().mean(-1).sum()
        others, words = others + int((~is_new).sum()), words + len(caption.new)
    found = []
    for layer, moment in total.items():
        scale = (here[layer] / max(1, words)).clamp(min=1e-12)
        values, vectors = torch.linalg.eigh((moment / others / scale).double())
        root = (1 + ELSEWHERE * task.locality * values.clamp(min=0)).rsqrt()
        found.append(vectors @ torch.diag(root) @ vectors.T)
    return found


# -- learned ---------------------------------------------------------------------------------------


def learned(task: Task, generator: np.random.Generator) -> None:
    """Adam on the columns, until each new word is probable."""
    parameters = task.parameters
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    sure: dict[int, float] = {}
    with progress(STEPS, what="steps") as step:
        for number in range(STEPS):
            drawn = generator.permutation(len(task.changed))[: BATCH[0]].tolist()
            rest = generator.permutation(len(task.kept))[: BATCH[1]].tolist()
            loss = 1e-3 * torch.stack([delta.square().sum() for delta in parameters]).sum()
            some = [*((n, task.changed[n]) for n in drawn), *((-1, task.kept[n]) for n in rest)]
            every = task.logits([caption for _, caption in some])
            for (n, caption), logits in zip(some, every, strict=True):
                found = logits.log_softmax(-1)
                loss = sum(_losses(caption, found, task.locality), loss)
                if caption.new:
                    sure[n] = _sureness(caption, found)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step(0, number + 1)
            seems = len(sure) == len(task.changed) and min(sure.values()) >= SURE
            if number + 1 >= LEAST and seems:
                # What was computed of the others is some steps old, so all are looked at again.
                with torch.no_grad():
                    every = task.logits(task.changed)
                pairs = zip(task.changed, every, strict=True)
                if all(_sureness(caption, found.log_softmax(-1)) >= SURE for caption, found in pairs):
                    return


def _losses(caption: Wanted, found: Tensor, locality: float) -> Iterator[Tensor]:
    """Of a caption's log-probabilities: the new tokens' loss, how far the others have moved, and the
    probability of the new word where it does not belong."""
    tokens = torch.tensor(caption.ids, device=found.device)
    is_new = torch.zeros(len(tokens), dtype=torch.bool, device=found.device)
    is_new[list(caption.new)] = True
    new = found.gather(1, tokens[:, None])[:, 0][is_new]
    if caption.new and caption.avoid:
        yield -torch.log1p(-new.exp().clamp(max=1 - 1e-6)).mean()
    elif caption.new:
        yield -new.mean()
    if is_new.all():
        return
    before = caption.logits.log_softmax(-1)
    apart = F.kl_div(found, before, log_target=True, reduction="none").sum(-1)
    yield locality * apart[~is_new].mean()
    if caption.new and not caption.avoid:
        words = tokens[is_new].unique()
        belongs = (tokens[~is_new][:, None] == words[None]).float()
        yield locality * (found[~is_new][:, words].exp() * (1 - belongs)).sum(-1).mean()


def _sureness(caption: Wanted, found: Tensor) -> float:
    """The least probability, over the new tokens, of what is wanted there."""
    new = torch.stack([found[n, caption.ids[n]] for n in caption.new]).detach().exp()
    return 1 - new.max().item() if caption.avoid else new.min().item()
