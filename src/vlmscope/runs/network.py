"""A Hugging Face model with its processor, and where its family's table finds things in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmscope.errors import ModelError, SiteError, shown
from vlmscope.models.dtypes import QUANTIZED
from vlmscope.models.families import family_of
from vlmscope.models.inputs import Change, Edit, Inputs
from vlmscope.runs.hooks import attending
from vlmscope.runs.norms import scaling
from vlmscope.runs.turns import alone
from vlmscope.sites import Pattern, Point, Shape, Site, Sites, expand, parse, place
from vlmscope.stored.tensors import digest

SUBLAYERS = ("attn", "cross", "mlp")


class Network:
    """The modules of a model, by its family's table; `shapes` says which sites each tower has.

    Raises `ModelError` if the model is of no supported family or does not fit its family's table.
    """

    def __init__(self, hf: PreTrainedModel, processor: Any, name: str = "model") -> None:
        self.hf = hf.eval()
        self.processor = processor
        self.name = name
        self._fingerprint: tuple[list[tuple[str, int, int]], str] | None = None
        self.unedited: str | None = None
        """The fingerprint before edits of the weights, while there are any."""
        self.edits: tuple[str, ...] = ()
        """The digests of these edits, in the order in which they were made."""
        language = getattr(hf.config.get_text_config(), "model_type", None)
        self.family = family_of([type(hf).__name__], language, name)
        self.speaker = list(self.family.towers)[-1]
        """The tower that says the words: the last one."""
        self.shapes = {tower: shape_of(self, tower) for tower in self.family.towers}
        self.text_towers = [tower for tower in self.shapes if tower in ("encoder", "decoder")]
        """The towers whose positions are tokens of text; the Q-Former's are queries."""

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def precision(self) -> str:
        """The type of the weights, as `load` takes it."""
        four = getattr(self.hf, "is_loaded_in_4bit", False)
        return QUANTIZED if four else str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where inputs go; a model that is spread over several devices begins there."""
        return self.hf.device

    def free_memory(self) -> int:
        """Bytes of free memory on the fullest device of the model."""
        spread = getattr(self.hf, "hf_device_map", {}).values()  # accelerate's; "disk" is where it looks last
        return min(map(free_memory, {torch.device(one) for one in spread if one != "disk"} or {self.device}))

    def alone(self) -> AbstractContextManager[None]:
        """Within this context no other thread runs the model (`turns.alone`)."""
        return alone(self.hf, self.name)

    @property
    def image_site(self) -> Site:
        """What the language model reads of the image, all of it: its tokens as they enter the first block, or
        the output of the tower that is read (`Family.image`).

        >>> from vlmscope.checkpoint import load
        >>> str(load("toy-blip").image_site), str(load("toy-llava").image_site)
        ('vision.2.output@all', 'decoder.0.resid_pre@image')
        """
        tower = self.family.image
        if tower is not None:
            return Site(tower, self.shapes[tower].layers - 1, "output")
        return Site(self.text_towers[0], 0, "resid_pre", position="image")

    @property
    def image_sites(self) -> tuple[Site, ...]:
        """`image_site`, and what is added to the image's tokens behind the first blocks (DeepStack)."""
        text = self.text_towers[0]
        added = self.shapes[text].having("deepstack")
        return (self.image_site, *(Site(text, n, "deepstack", position="image") for n in added))

    def attended(self, tower: str, kind: str) -> str:
        """The tower whose positions `attn` or `cross` of a tower attends to."""
        return tower if kind == "attn" else self.family.towers[tower].reads or tower

    def idle(self, tower: str, inputs: Inputs) -> list[int]:
        """The layers that a run passes over: those that read a picture, where there is none."""
        reads = self.family.towers[tower].reads
        return [] if reads is None or reads in inputs.layout else self.shapes[tower].having("cross")

    def flow(self, tower: str, inputs: Inputs) -> str:
        """How patches of a tower are computed: as its table says, or `plain` where a batch holds several
        pictures, or several blocks make up what leaves the tower."""
        table = self.family.towers[tower]
        joined = table.joined is not None and table.joined(self.hf.config)
        return "plain" if joined or inputs.layout[tower].sequences > 1 else table.flow

    def units(self, point: Point) -> int | None:
        """How many heads or neurons lie side by side at a point; None for a kind itself."""
        return self.shapes[point.tower].units(point.kind, point.part)

    def module(self, path: str) -> nn.Module:
        """The module at a path of the family's table."""
        try:
            return self.hf.get_submodule(path)
        except AttributeError as error:
            raise self.misfit(f"no module '{path}'") from error

    def blocks(self, tower: str) -> Sequence[nn.Module]:
        """The blocks of a tower that are used, in order."""
        table = self.family.towers[tower]
        blocks = list(self.module(table.blocks).children())
        return blocks if table.depth is None else blocks[: table.depth(self.hf.config)]

    def attention_modules(self, tower: str, kind: str) -> list[nn.Module]:
        """The modules of a tower that pay attention, block by block."""
        path = self.family.towers[tower].attention.get(kind)
        if path is None:
            raise ModelError(
                f"{self.name}: the models of {self.family.name} do not tell what the {kind} heads of the "
                f"{tower} tower attend to"
            )
        return [block.get_submodule(path) for block in self.blocks(tower) if has(block, path)]

    def attending(self, tower: str, function: Any, kind: str = "attn") -> AbstractContextManager[None]:
        """Within this context a tower's attention calls `function` (`hooks.attending`)."""
        return attending(self.attention_modules(tower, kind), function)

    def down(self, layer: int) -> nn.Module:
        """The down projection of a block that says the words: its input are the neurons."""
        table = self.family.towers[self.speaker]
        return self.blocks(self.speaker)[layer].get_submodule(table.mlp or "")

    def columns(self, layer: int) -> Float[Tensor, "width neurons"]:
        """The weights of `down`, a column a neuron, as `matrix` gives them."""
        return self.matrix(self.down(layer))

    def matrix(self, module: nn.Module) -> Float[Tensor, "out in"]:
        """The weights of a linear module, in float32 or more; not to be changed, as they may be no copy."""
        weight: Any = module.weight
        state = getattr(weight, "quant_state", None)
        if state is not None:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight, state)
        return upcast(weight.detach())

    def unembedding(
        self, tokens: Sequence[int] | slice, *, gain: bool = False
    ) -> Float[Tensor, "tokens width"]:
        """Rows of the output embedding, in float32 or more; with `gain`, times the final norm's weight.

        Raises `ModelError` for a gain where more than a norm is between the last block and the logits.
        """
        head: Any = self.module(self.family.head)
        rows = upcast(head.weight.detach()[tokens])
        return rows * self._gain().to(rows) if gain else rows

    @torch.inference_mode()
    def _gain(self) -> Float[Tensor, "width"]:
        """What the final norm multiplies each feature by, whatever the norm: read off its output."""
        if self.family.norm is None:
            raise ModelError(
                f"{self.name}: more than a norm is between the last block and the logits of "
                f"{self.family.name}, so there is no gain; leave it out"
            )
        like = torch.zeros(self.shapes[self.speaker].width, dtype=self.dtype, device=self.device)
        return scaling(self.module(self.family.norm), like).gain

    def fingerprint(self) -> str:
        """SHA-256 over the names, types and bytes of all weights, as hexadecimal digits; computed anew only
        when a weight has been written to or replaced."""
        weights = self.hf.state_dict()
        state = [(name, tensor.data_ptr(), tensor._version) for name, tensor in sorted(weights.items())]
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = state, digest(weights)
        return self._fingerprint[1]

    @property
    def mark(self) -> str:
        """What stands for an image in a prompt; empty where nothing does."""
        return str(getattr(self.processor, "image_token", None) or "")

    def token(self, number: int) -> str:
        """A token of the model's tokenizer as it is written there, such as `▁red`."""
        return str(self.processor.tokenizer.convert_ids_to_tokens(number))

    def places(self, site: Pattern | Site, inputs: Inputs) -> list[Site]:
        """The places that the site of an edit names: one layer and unit (of edges any number), one or more
        positions; raises `SiteError` if what it is in does not run."""
        sites = [site] if isinstance(site, Site) else expand([site], self.shapes)
        if len(sites) != 1 and not site.source:
            raise SiteError(
                f"an edit is of one layer and unit; {shown(site)} names {len(sites)}: give an edit for "
                "each, or a window of layers (2/3) or a set of units (h[0,1])"
            )
        found = [part for one in sites for part in ([one] if one.positions else place(one, inputs.layout))]
        for part in (part for one in found for part in one.parts):
            if part.layer in self.idle(part.tower, inputs):
                raise SiteError(
                    f"bad site '{site}': layer {part.layer} of the {part.tower} tower attends to the picture "
                    "alone and is passed over in a run without one; name another layer"
                )
        return found

    def placed(self, sites: Sites, inputs: Inputs) -> list[Site]:
        """All sites that expressions name in one run; what has its numbers of positions stays as it is."""
        return [place for site in self.named(sites) for place in self.places(site, inputs)]

    def named(self, sites: Sites) -> list[Site]:
        """All sites that expressions name, in any run; what is a site already stays as it is."""
        several = [sites] if isinstance(sites, (str, Pattern, Site)) else sites
        return [
            found
            for site in several
            for found in ([site] if isinstance(site, Site) else expand(parse(site), self.shapes))
        ]

    def changes(self, inputs: Inputs, edits: Iterable[Edit]) -> list[Change]:
        """What edits are in one run, layer by layer."""
        return [
            Change(part, edit.op, edit.value)
            for edit in edits
            for site in self.places(edit.site, inputs)
            for part in site.parts
        ]

    def misfit(self, what: str) -> ModelError:
        return ModelError(
            f"{self.name}: the table of family {self.family.name} does not fit this model under "
            f"transformers {transformers.__version__}: {what}"
        )


def upcast(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.float() if x.dtype.itemsize < 4 else x


def free_memory(device: torch.device) -> int:
    """Bytes of free memory on a device; where the system does not tell, half a gigabyte."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError, ValueError):  # Linux counts what it would give up for a program
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    return 2**29


# -- what the towers have ------------------------------------------------------------------------


def has(block: nn.Module, path: str) -> bool:
    """Whether a block has a module at a path."""
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def shape_of(network: Network, tower: str) -> Shape:
    """What one tower has, read off its modules and its config."""
    table, config = network.family.towers[tower], network.hf.config
    for part in filter(None, table.config.split(".")):
        config = _entry(config, part)
    blocks = network.blocks(tower)
    widths: dict[str, int] = {}
    lacks: dict[str, frozenset[int]] = {}
    heads: dict[str, int] = {}
    width = 0
    for kind in SUBLAYERS:
        found = _projections(network, tower, kind)
        if not found:
            continue
        if missing := frozenset(range(len(blocks))) - set(found):
            lacks[kind] = missing
        first: Any = next(iter(found.values()))
        widths[kind], width = int(first.in_features), int(first.out_features)
        if kind == "mlp":
            continue
        heads[kind] = _entry(config, table.heads)
        if widths[kind] % heads[kind]:
            raise network.misfit(
                f"{tower}.{kind} is {widths[kind]} wide, not a multiple of its {heads[kind]} heads"
            )
    middle = ["resid_mid"] if heads and (table.middle or not table.normed) else []
    kinds = ["resid_pre", *heads, *middle, "mlp", "resid"]
    if table.deepstack:
        kinds.append("deepstack")
        lacks["deepstack"] = frozenset(range(table.deepstack(network.hf.config), len(blocks)))
    out: dict[str, int] = {}
    if table.output:
        kinds.append("output")
        wide = getattr(network.module(table.output), "out_features", width)
        out = {} if wide == width else {"output": wide}
    groups = getattr(config, "num_key_value_heads", None)
    return Shape(len(blocks), tuple(kinds), heads, widths["mlp"], width, lacks, out, groups, table.reads)


def _projections(network: Network, tower: str, kind: str) -> dict[int, nn.Module]:
    """The output projections of a sublayer by block; raises `ModelError` where they have to be there."""
    table, blocks = network.family.towers[tower], network.blocks(tower)
    path = getattr(table, kind)
    found = {n: b.get_submodule(path) for n, b in enumerate(blocks) if path and has(b, path)}
    missing = set(range(len(blocks))) - set(found)
    names = (name for block in blocks for name, _ in block.named_modules())
    if kind == "mlp" and missing and any(name.endswith("experts") for name in names):
        raise ModelError(
            f"{network.name}: the feed-forward blocks of its {tower} tower are made of experts, which "
            "cannot be split into neurons; models with plain or gated blocks are supported"
        )
    if path and (not found or (missing and table.cross is None)):
        raise network.misfit(f"no module '{path}' in block {min(missing)} of {tower}")
    return found


def _entry(config: Any, name: str) -> Any:
    """A part of a config, which may be a dictionary."""
    return config[name] if isinstance(config, Mapping) else getattr(config, name)
