"""Whether a model fits its family's table, found out by running it."""

from __future__ import annotations

import torch
from PIL import Image

from vlmscope.models.inputs import Edit, Inputs
from vlmscope.runs.forward import forward
from vlmscope.runs.network import Network
from vlmscope.runs.prepare import encode
from vlmscope.sites import Point, Site


def verify(network: Network, fits: bool = False) -> None:
    """Check that a model fits its family's table; raises `ModelError` naming what does not.

    Every path resolves, head counts and widths divide, an activation set to NaN at each
    kind of site in each tower reaches the logits (a NaN shows the connection whatever the
    weights are), and what the sublayers add makes up what a block does. With `fits` that is known, and only
    whether the weights give NaN is looked at.
    """
    if network.family.blank is None:
        inputs = encode(network, [Image.new("RGB", (64, 64))], "a")
    else:
        blank = network.family.blank(network.hf)
        inputs = Inputs({k: v.to(network.device) for k, v in blank.tensors.items()}, blank.layout)
    if forward(network, inputs).logits.isnan().any():
        raise network.misfit("a run without edits gives NaN")
    if fits:
        return
    for tower, shape in network.shapes.items():
        for kind in shape.kinds:
            parts = ["", *["h"] * (kind in shape.heads), *["n"] * (kind == "mlp")]
            for part in parts:
                site = Site(tower, shape.having(kind)[-1], kind, part, (0,) * bool(part))
                if not forward(network, inputs, [Edit(site, "set", torch.nan)]).logits.isnan().any():
                    raise network.misfit(f"an edit at {site} does not reach the logits")
        if not network.family.towers[tower].normed:
            _check_sums(network, tower, inputs)


def _check_sums(network: Network, tower: str, inputs: Inputs) -> None:
    """A block's input and what its sublayers add, in one layer of each sort, are its output."""
    shape = network.shapes[tower]
    kinds = [kind for kind in shape.kinds if kind not in ("deepstack", "output", "resid_mid")]
    sorts = {tuple(k for k in kinds if n in shape.having(k)): n for n in range(shape.layers)}
    points = {n: [Point(tower, n, kind) for kind in kinds] for kinds, n in sorts.items()}
    found = forward(network, inputs, keep=[point for own in points.values() for point in own]).values
    for layer, own in points.items():
        *parts, whole = (found[point] for point in own)
        wide = torch.promote_types(whole.dtype, torch.float32)
        added = torch.stack([part.to(wide) for part in parts])
        rounding = 8 * torch.finfo(whole.dtype).eps * added.abs().sum(0)
        if ((added.sum(0) - whole).abs() > rounding).any():
            names = ", ".join(point.kind for point in own[1:-1])
            raise network.misfit(
                f"{names} do not add up to what block {layer} of {tower} does, so something stands between "
                "them and the residual stream; name it (docs/add-a-family.md, `behind`)"
            )
