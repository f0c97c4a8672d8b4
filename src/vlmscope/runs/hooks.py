"""All that reaches into the modules of transformers: hooks and attention functions.

What is relied on, each held by a test: blocks take hidden states as their first argument (or by the name
`hidden_states`) and return them, alone, first in a tuple, or as `last_hidden_state`; attention modules look
up a function by the name in their config, and their file has an `eager_attention_forward`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmscope.errors import ModelError
from vlmscope.runs.edges import Edges, gone

Function = Callable[[Tensor], Tensor]
"""From hidden states `(rows, pos, width)` to what takes their place."""
NUMBERS = count()
"""Every use of `attending` has a number, and by it a name of its own."""


# -- hooks ---------------------------------------------------------------------------------------


class _Taps:
    """Our functions on one module, in the order in which they came, before any hook of others.

    transformers records hidden states by hooks of its own, which some families read image features from:
    they have to get what ours have changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self.before: list[Callable[[Any, dict[str, Any]], Any]] = []
        self.behind: list[Callable[[Any], Any]] = []
        self.handles = (
            module.register_forward_pre_hook(self._call, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._leave, prepend=True),
        )

    def _call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        for function in self.before:
            args, kwargs = function(args, kwargs) or (args, kwargs)
        return args, kwargs

    def _leave(self, module: nn.Module, args: Any, out: Any) -> Any:
        for function in self.behind:
            found = function(out)
            out = out if found is None else found
        return out


_TAPS: WeakKeyDictionary[nn.Module, _Taps] = WeakKeyDictionary()


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, to: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return None, gradient


def through(value: Tensor, to: Tensor) -> Tensor:
    """A value, bit for bit, whose gradient goes to another way in which it can be computed."""
    return _Through.apply(value.detach(), to) if to.requires_grad else value  # type: ignore[no-untyped-call]


class Hooks(ExitStack):
    """Functions on modules, until the end of a `with`; the models' turns have to be held."""

    def on_call(self, module: nn.Module, function: Callable[[Any, dict[str, Any]], Any]) -> None:
        """`function(args, kwargs)` gives what the module is called with instead, or None for no change."""
        self._tap(module, "before", function)

    def on_output(self, module: nn.Module, function: Callable[[Any], Any]) -> None:
        """`function(output)` gives what the module is taken to have returned, or None for no change."""
        self._tap(module, "behind", function)

    def on_hidden(
        self, module: nn.Module, function: Function, *, before: bool = False, flat: bool = False
    ) -> None:
        """`function` gets the hidden states that a module returns, or gets (`before`), and gives others or
        the same; as `(1, all positions, width)`, where they lie end to end (`flat`)."""
        change = partial(_laid, function, flat)
        if before:
            self.on_call(module, partial(_in_call, change))
        else:
            self.on_output(module, partial(_in_output, change))

    def _tap(self, module: nn.Module, where: str, function: Any) -> None:
        taps = _TAPS.get(module)
        if taps is None:
            taps = _TAPS[module] = _Taps(module)
        getattr(taps, where).append(function)
        self.callback(_release, module, where, function)


def _release(module: nn.Module, where: str, function: Any) -> None:
    taps = _TAPS[module]
    getattr(taps, where).remove(function)
    if not taps.before and not taps.behind:
        for handle in _TAPS.pop(module).handles:
            handle.remove()


def hidden_of(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


def _laid(function: Function, flat: bool, x: Tensor) -> Tensor:
    if not flat and x.ndim > 2:
        return function(x)
    return function(x.reshape(1, -1, x.shape[-1])).reshape(x.shape)


def _in_call(change: Function, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    new = change(hidden_of(args, kwargs))
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


def _in_output(change: Function, out: Any) -> Any:
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, tuple):
        return (change(out[0]), *out[1:])
    out.last_hidden_state = change(out.last_hidden_state)
    return out


# -- attention -----------------------------------------------------------------------------------


def eager(module: nn.Module) -> Callable[..., Any] | None:
    """The eager function of a module that pays attention through transformers' interface."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


@dataclass(frozen=True)
class Plain:
    """The attention function that modules call by themselves, and its name there."""

    name: str
    function: Callable[..., Any]
    configs: Mapping[nn.Module, Any]

    def __call__(self, module: nn.Module, *args: Any, **keywords: Any) -> Any:
        # Flash kernels look up in the module's config which of them is meant.
        ours, module.config = module.config, self.configs[module]
        try:
            return self.function(module, *args, **keywords)
        finally:
            module.config = ours

    def mask(
        self, module: nn.Module, mask: Any, queries: int, keys: int, device: torch.device, **kw: Any
    ) -> Tensor | None:
        """The mask of a call as a dense one, `(tiles or 1, heads or 1, queries, keys)`: true where a key is
        visible, or what is added to the scores. None: everything is visible.

        Kernels without a mask leave out what comes later, where the call or the module is causal, and what is
        beyond the window of the call; eager attention leaves out nothing. Raises `ModelError` for other
        forms.
        """
        if mask is None:
            causal, window = kw.get("is_causal"), kw.get("sliding_window")
            causal = queries > 1 and (getattr(module, "is_causal", True) if causal is None else causal)
            if self.function is eager(module) or not (causal or window):
                return None
            behind = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
            visible = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
            return (visible & (behind.abs() < window) if window else visible)[None, None]
        if isinstance(mask, Tensor) and mask.ndim == 4:
            return mask[..., :keys].expand(-1, -1, queries, -1)
        form = f"one of {mask.ndim} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ModelError(
            f"the attention '{self.name}' of {type(module).__name__} has {form} as its mask, which is not "
            "read here; expected none or one of 4 dimensions, as 'sdpa' and 'eager' have: "
            "model.hf.set_attn_implementation('sdpa')"
        )


@contextmanager
def attending(modules: Sequence[Any], function: Callable[..., Any]) -> Iterator[None]:
    """Within this context the attention of modules calls `function(plain, module, q, k, v, mask,
    **keywords)`, where `plain` is the attention function that they would call otherwise.

    Each use has a name of its own among transformers' attention functions, which only copies of these
    modules' configs say: masks are made as always, and other models are left alone. Uses may be within each
    other; the model's turn has to be held.
    """
    configs = {module: module.config for module in modules}
    name = modules[0].config._attn_implementation
    plain = Plain(str(name), ALL_ATTENTION_FUNCTIONS.get_interface(name, eager(modules[0])), configs)

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any = None, **kw: Any) -> Any:
        return function(plain, module, q, k, v, attention_mask, **kw)

    # Some modules read in the name which kind of kernel they call.
    ours = f"{name}, by vlmscope {next(NUMBERS)}"
    copies: list[tuple[Any, Any]] = []  # modules that share a config go on sharing one
    ALL_ATTENTION_FUNCTIONS.register(ours, attend)
    try:
        for module, config in configs.items():
            module.config = next((new for known, new in copies if known is config), None) or copy(config)
            # not by its property, which sets sub-configs, too
            module.config._attn_implementation_internal = ours
            copies.append((config, module.config))
        yield
    finally:
        for module, config in configs.items():
            module.config = config
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(ours)


def patterns(
    plain: Plain,
    module: Any,
    q: Float[Tensor, "tiles heads queries width"],
    k: Float[Tensor, "tiles kv_heads keys width"],
    v: Float[Tensor, "tiles kv_heads keys value_width"],
    mask: Any,
    at: Sequence[int],
    **kw: Any,
) -> Float[Tensor, "heads at every"]:
    """The attention patterns of a few queries, by the module's own eager function: with its scale, soft cap,
    mask and precision.

    Tiles look only within themselves; positions count through all of them.
    """
    tiles, heads, queries, _ = q.shape
    keys = k.shape[2]
    mask = plain.mask(module, mask, queries, keys, q.device, **kw)
    if mask is not None and mask.dtype == torch.bool:  # eager attention adds its mask
        mask = q.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(q.dtype).min)
    by_tile = defaultdict(list)
    for number, position in enumerate(at):
        by_tile[position // queries].append((number, position % queries))
    function: Any = eager(module)
    found = q.new_zeros(heads, len(at), tiles * keys)
    for tile, places in by_tile.items():
        numbers, rows = map(list, zip(*places, strict=True))
        this = slice(tile, tile + 1)
        visible = None if mask is None else (mask[this] if len(mask) > 1 else mask)[:, :, rows]
        _, paid = function(module, q[this, :, rows], k[this], v[this], visible, **_of_rows(kw, rows))
        found[:, numbers, tile * keys : (tile + 1) * keys] = paid[0].to(found)
    return found


class _Inside:
    """Our functions within one attention module, in the order in which it computes: of its queries, keys and
    values, of what it pays (cuts first), whichever came first."""

    def __init__(self, module: Any) -> None:
        self.functions: dict[str, list[Any]] = {part: [] for part in (*"qkv", "cut", "p")}
        self.context = ExitStack()
        self.context.enter_context(attending([module], self.attend))

    def attend(self, plain: Plain, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        given = {"q": q, "k": k, "v": v}
        for part in given:
            for function in self.functions[part]:
                x = given[part].transpose(1, 2)  # tiles, positions, heads, width
                new = function(x.reshape(1, -1, x.shape[2] * x.shape[3]))
                given[part] = new.reshape(x.shape).transpose(1, 2)
        call = (plain, module, given["q"], given["k"], given["v"], mask)
        tiles, _, queries, _ = q.shape
        cuts = [cut for find in self.functions["cut"] for cut in find(tiles * queries, tiles * k.shape[2])]
        if self.functions["p"]:
            return _pay(*call, cuts, self.functions["p"], **kw)
        return _cut(*call, cuts, **kw) if cuts else plain(*call[1:], **kw)


_INSIDE: WeakKeyDictionary[nn.Module, _Inside] = WeakKeyDictionary()


@contextmanager
def inner(module: Any, part: str, function: Any) -> Iterator[None]:
    """Within this context `function` gets the queries, keys, values (`q`, `k`, `v`) or attention patterns
    (`p`) of a module that uses transformers' attention interface: `(1, all positions, heads x width)`; or
    (`cut`) it says which edges are cut in a call (`Cuts`)."""
    inside = _INSIDE.get(module)
    if inside is None:
        inside = _INSIDE[module] = _Inside(module)
    inside.functions[part].append(function)
    try:
        yield
    finally:
        inside.functions[part].remove(function)
        if not any(inside.functions.values()):
            _INSIDE.pop(module).context.close()


def _of_rows(kw: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The keywords of a call for some of its queries: T5's bias has a row for each."""
    bias = kw.get("position_bias")
    return dict(kw) if bias is None else {**kw, "position_bias": bias[:, :, rows]}


class Paid(NamedTuple):
    """What some queries of a tile pay, and which of them are to be computed anew."""

    paid: Float[Tensor, "heads rows keys"]
    changed: Bool[Tensor, "heads rows"]


def paid_by(
    plain: Plain,
    module: Any,
    q: Tensor,
    k: Tensor,
    mask: Any,
    tile: int,
    rows: Sequence[int],
    edges: Sequence[Edges] = (),
    **kw: Any,
) -> Paid:
    """What queries pay, by the module's own kernel, with all its digits and in float32 at least: it gives the
    patterns themselves where the values are unit vectors."""
    tiles, heads, queries, _ = q.shape
    keys, this, wide = k.shape[2], slice(tile, tile + 1), torch.promote_types(q.dtype, torch.float32)
    mine = q[this, :, rows].to(wide), k[this].to(wide)
    mask = plain.mask(module, mask, queries, keys, q.device, **kw)
    if mask is not None:
        mask = (mask[this] if len(mask) == tiles else mask[:1])[:, :, rows]
        mask = mask if mask.dtype == torch.bool else mask.to(wide)
    at = [tile * queries + row for row in rows]
    lost = gone(edges, at, heads, keys, tile * keys, q.device)
    seen = torch.ones_like(lost.block) if mask is None else seeing(mask)[0].expand_as(lost.block)
    if lost.block.any():
        blocked = lost.block[None]
        mask = ~blocked if mask is None else mask & ~blocked if mask.dtype == torch.bool else mask
        mask = mask if mask.dtype == torch.bool else mask.masked_fill(blocked, -torch.inf)
    name = plain.name.partition(",")[0]
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(name if name == "eager" else "sdpa", eager(module))
    if name == "eager" and mask is not None and mask.dtype == torch.bool:  # it adds its mask
        mask = torch.zeros(mask.shape, dtype=wide, device=q.device).masked_fill(~mask, torch.finfo(wide).min)
    units = torch.eye(keys, dtype=wide, device=q.device).expand(1, k.shape[1], -1, -1)
    out, _ = kernel(module, *mine, units, mask, **_of_rows(kw, rows))
    nothing = (lost.block & seen).any(-1) & ~(seen & ~lost.block).any(-1)
    paid = out[0].transpose(0, 1).masked_fill(nothing[..., None] | lost.zero, 0.0)
    return Paid(paid, ((lost.block | lost.zero) & seen).any(-1))


def doubled(
    plain: Plain,
    module: Any,
    q: Float[Tensor, "tiles heads queries width"],
    k: Float[Tensor, "tiles kv_heads keys width"],
    beside: Float[Tensor, "tiles kv_heads keys width"],
    mask: Any,
    **kw: Any,
) -> tuple[Float[Tensor, "tiles heads queries keys"], Float[Tensor, "tiles heads queries keys"]]:
    """What queries pay to keys, and to others that stand beside them in the same places: a row of both adds
    up to one. Two keys of a place then differ by what the module's own kernel makes of them alone."""
    (tiles, _, queries, _), keys = q.shape, k.shape[2]
    mask = plain.mask(module, mask, queries, keys, q.device, **kw)
    mask = None if mask is None else torch.cat([mask, mask], -1)
    if (bias := kw.get("position_bias")) is not None:
        kw = {**kw, "position_bias": torch.cat([bias, bias], -1)}
    both = torch.cat([k, beside], 2)
    rows = [paid_by(plain, module, q, both, mask, tile, range(queries), **kw).paid for tile in range(tiles)]
    return tuple(torch.stack(rows).split(keys, -1))  # type: ignore[return-value]


def seeing(mask: Tensor) -> Tensor:
    """Where a dense mask shows a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _cut(
    plain: Plain, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, edges: Sequence[Edges], **kw: Any
) -> Any:
    """The attention's output without edges: computed anew where a row loses any."""
    out, weights = plain(module, q, k, v, mask, **kw)
    queries, by_tile = q.shape[2], defaultdict(list)
    for position in sorted({position for edge in edges for position in edge.targets}):
        by_tile[position // queries].append(position % queries)
    for tile, rows in by_tile.items():
        paid, changed = paid_by(plain, module, q, k, mask, tile, rows, edges, **kw)
        if changed.any():
            values = v[tile].to(paid).repeat_interleave(q.shape[1] // v.shape[1], 0)
            mixed = (paid @ values).transpose(0, 1).to(out)
            out = out.clone()
            out[tile, rows] = torch.where(changed.T[..., None], mixed, out[tile, rows])
    return out, weights


def _pay(
    plain: Plain,
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    edges: Sequence[Edges],
    functions: Sequence[Function],
    **kw: Any,
) -> Any:
    """The attention's output with other patterns, where they are others."""
    (tiles, heads, queries, _), keys = q.shape, k.shape[2]
    out, weights = plain(module, q, k, v, mask, **kw)
    paid = q.new_zeros(heads, tiles * queries, tiles * keys)
    changed = paid.new_zeros(heads, tiles * queries, dtype=torch.bool)
    for tile in range(tiles):
        rows, columns = (slice(tile * n, (tile + 1) * n) for n in (queries, keys))
        found = paid_by(plain, module, q, k, mask, tile, range(queries), edges, **kw)
        paid[:, rows, columns], changed[:, rows] = found.paid.to(paid), found.changed
    new = paid
    for function in functions:
        laid = function(new.transpose(0, 1).reshape(1, tiles * queries, -1))
        new = laid.unflatten(-1, (heads, -1))[0].transpose(0, 1)  # heads, all queries, all keys
    changed |= (new != paid).any(-1)
    if not (changed.any() or new.requires_grad):
        return out, weights
    values = v.repeat_interleave(heads // v.shape[1], 1).transpose(0, 1).flatten(1, 2)
    mixed = (new @ values).unflatten(1, (tiles, queries)).permute(1, 2, 0, 3)
    at = changed.unflatten(1, (tiles, queries)).permute(1, 2, 0)[..., None]
    return torch.where(at, mixed, through(out, mixed)), weights
