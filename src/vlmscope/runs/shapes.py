"""What the towers of a model have, read off its modules and its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from vlmscope.errors import ModelError
from vlmscope.sites import Shape

if TYPE_CHECKING:
    from vlmscope.runs.network import Network

SUBLAYERS = ("attn", "cross", "mlp")


def shape_of(network: Network, tower: str) -> Shape:
    """What one tower has, read off its modules and its config."""
    table = network.family.towers[tower]
    config = network.hf.config
    for part in filter(None, table.config.split(".")):
        config = _entry(config, part)
    blocks = network.blocks(tower)
    widths: dict[str, int] = {}
    lacks: dict[str, frozenset[int]] = {}
    width = 0
    for kind in SUBLAYERS:
        path = getattr(table, kind)
        found = {n: b.get_submodule(path) for n, b in enumerate(blocks) if path and has(b, path)}
        missing = frozenset(range(len(blocks))) - set(found)
        if kind == "mlp" and (missing or not found) and _experts(blocks):
            raise ModelError(
                f"{network.name}: the feed-forward blocks of its {tower} tower are made of experts, which "
                "cannot be split into neurons; models with plain or gated blocks are supported"
            )
        if path and (not found or (missing and table.cross is None)):
            raise network.misfit(f"no module '{path}' in block {min(missing)} of {tower}")
        if found:
            first: Any = next(iter(found.values()))
            widths[kind], width = int(first.in_features), int(first.out_features)
            if missing:
                lacks[kind] = missing
    attention = [kind for kind in ("attn", "cross") if kind in widths]
    heads: dict[str, int] = {kind: _entry(config, table.heads) for kind in attention}
    for kind, count in heads.items():
        if widths[kind] % count:
            raise network.misfit(
                f"{tower}.{kind} is {widths[kind]} wide, not a multiple of its {count} heads"
            )
    middle = ["resid_mid"] if attention and (table.middle or not table.normed) else []
    kinds = ["resid_pre", *attention, *middle, "mlp", "resid"]
    if table.deepstack:
        kinds.append("deepstack")
        lacks["deepstack"] = frozenset(range(table.deepstack(network.hf.config), len(blocks)))
    out: dict[str, int] = {}
    if table.output:
        kinds.append("output")
        wide = getattr(network.module(table.output), "out_features", width)
        out = {} if wide == width else {"output": wide}
    groups = getattr(config, "num_key_value_heads", None)
    return Shape(len(blocks), tuple(kinds), heads, widths["mlp"], width, lacks, out, groups)


def has(block: nn.Module, path: str) -> bool:
    """Whether a block has a module at a path."""
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def _experts(blocks: Sequence[nn.Module]) -> bool:
    return any(name.endswith("experts") for block in blocks for name, _ in block.named_modules())


def _entry(config: Any, name: str) -> Any:
    """A part of a config, which may be a dictionary."""
    return config[name] if isinstance(config, Mapping) else getattr(config, name)
