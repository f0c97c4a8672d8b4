"""A Hugging Face model with its processor: load, prepare, run, capture, verify; the hooks.

The model runs unmodified. Everything vlmscope reads or writes goes through forward hooks on the
modules that the family's table names.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import count
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.utils import logging as hub_logging
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import cached_file, logging

from vlmscope.errors import ExampleError, ModelError, SiteError, VlmscopeError
from vlmscope.example import Box, Example, Picture, Span, find_roles, open_image
from vlmscope.families import Family, Tower, families
from vlmscope.inputs import Edit, Inputs, Logits, Pair
from vlmscope.sites import Layout, Point, Shape, Site, expand, grid

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
QUANTIZED = "4bit"
"""Weights of 4 bits (NF4, by bitsandbytes), which compute in bfloat16."""
TOYS = Path(__file__).parent / "toys"
_WORD = "\0"
"""What the name of a word's own role begins with, which no column of a CSV file can."""
_UNFIT = re.compile(r"image tokens do not match|image size .* doesn't match")
"""How transformers says that pictures or their tokens are not what the model takes."""
SAID = 20
"""How many tokens a model says at most."""
NUMBERS = count()
"""Every use of `Model.attending` has a number, and by it a name of its own."""


class Model:
    """A vision-language model that can be run with edits and looked into.

    `hf` is the Hugging Face model, `shapes` says which sites each tower has. Make one with
    `vlmscope.load`, or from objects you have: `Model(hf, processor)`; then call `verify`, as `load`
    does. A processor is whatever the family's `encode` takes: it has a `tokenizer`.

    Several threads may use one model: their runs wait for each other (`alone`). All runs are in
    evaluation mode; a model that is being trained is back in training mode behind them.

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
        self.family = _family([type(hf).__name__], language, name)
        self.shapes = {tower: self._shape(tower) for tower in self.family.towers}

    # -- what there is ---------------------------------------------------------------------------

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
        return min(free_memory(one) for one in {p.device for p in self.hf.parameters()})

    def blocks(self, tower: str) -> Sequence[nn.Module]:
        """The blocks of a tower that are used, in order."""
        table = self.family.towers[tower]
        blocks = list(self._module(table.blocks).children())
        return blocks if table.depth is None else blocks[: table.depth(self.hf.config)]

    def flow(self, tower: str, inputs: Inputs) -> str:
        """How patches of a tower are computed: one forward a patch where a batch holds several pictures,
        or where several blocks make up what leaves the tower."""
        table = self.family.towers[tower]
        joined = table.joined is not None and table.joined(self.hf.config)
        return "plain" if joined or inputs.layout[tower].sequences > 1 else table.flow

    def module(self, point: Point, inputs: Inputs) -> Access:
        """How a point is read and written, for `hooks`."""
        table = self.family.towers[point.tower]
        flat = self.flow(point.tower, inputs) == "plain"
        if point.kind == "output":
            view = _Gaps.of(inputs.layout[point.tower])
            return Access(self._module(table.output or ""), False, flat, view)
        if point.kind == "deepstack":
            layout = inputs.layout[point.tower]
            added = _Deepstack(point, layout.image, len(layout.tokens))
            return Access(self._module(table.blocks.rpartition(".")[0]), True, flat, added)
        block = self.blocks(point.tower)[point.layer]
        if point.kind in ("resid", "resid_pre"):
            return Access(block, point.kind == "resid_pre", flat)
        if point.part:
            return Access(block.get_submodule(getattr(table, point.kind) or ""), True, flat)
        module = block.get_submodule(self._adds(table, block, point.kind))
        factor = table.factor[point.kind](block) if point.kind in table.factor else None
        gain = None if factor is None else _Gain(point, block, factor)
        return Access(module, False, flat, gain)

    def _adds(self, table: Tower, block: nn.Module, kind: str) -> str:
        """The path of the module that gives what a sublayer adds: its last, or the norm behind it."""
        if all(_has(block, path) for path in table.behind.values()):
            return table.behind.get(kind) or getattr(table, kind) or ""
        return getattr(table, kind) or ""

    @property
    def image_site(self) -> Site:
        """What the language model reads of the image, all of it.

        Where the image's tokens enter the language model's first block, that is the block's input there;
        elsewhere it is the output of the tower that is read (`Family.image`). Whoever asks for patches
        takes the same place at `image`; what has no place in the picture (`Layout.cells`), such as the
        queries of a Q-Former, is no patch.

        >>> str(load("toy-blip").image_site), str(load("toy-llava").image_site)
        ('vision.2.output@all', 'decoder.0.resid_pre@image')
        """
        tower = self.family.image
        if tower is not None:
            return Site(tower, str(self.shapes[tower].layers - 1), "output", None, "all")
        text = self.text_towers[0]
        return Site(text, "0", "resid_pre", None, "image")

    def units(self, point: Point) -> int | None:
        """How many heads or neurons lie side by side at a point; None for a kind itself."""
        shape = self.shapes[point.tower]
        return {"h": shape.heads.get(point.kind), "n": shape.neurons}.get(point.part)

    @property
    def speaker(self) -> str:
        """The tower that says the words: the last one."""
        return list(self.family.towers)[-1]

    @property
    def text_towers(self) -> list[str]:
        """The towers whose positions are tokens of text; the Q-Former's are queries."""
        return [tower for tower in self.shapes if tower in ("encoder", "decoder")]

    def down(self, layer: int) -> nn.Module:
        """The down projection of a block that says the words: its input are the neurons."""
        table = self.family.towers[self.speaker]
        return self.blocks(self.speaker)[layer].get_submodule(table.mlp)

    def columns(self, layer: int) -> Float[Tensor, "width neurons"]:
        """The weights of `down`, a column a neuron; in float32 where they are of fewer bits.

        Without a copy where they are float32 already, so these are not to be changed.
        """
        weight: Any = self.down(layer).weight
        state = getattr(weight, "quant_state", None)
        if state is not None:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight, state)
        return weight.detach().float() if weight.dtype.itemsize < 4 else weight.detach()

    def unembedding(
        self, tokens: Sequence[int] | slice, *, gain: bool = False
    ) -> Float[Tensor, "tokens width"]:
        """Rows of the output embedding, in float32 or more; with `gain`, times the final norm's weight.

        Raises `ModelError` for a gain where more than a norm is between the last block and the logits.
        """
        head: Any = self._module(self.family.head)
        rows = head.weight.detach()[tokens]
        rows = rows.float() if rows.dtype.itemsize < 4 else rows
        return rows * self._gain().to(rows) if gain else rows

    @torch.inference_mode()
    def _gain(self) -> Float[Tensor, "width"]:
        """What the final norm multiplies each feature by, whatever the norm: read off its output."""
        if self.family.norm is None:
            raise ModelError(
                f"{self.name}: more than a norm is between the last block and the logits of "
                f"{self.family.name}, so there is no gain; leave it out"
            )
        norm, width = self._module(self.family.norm), self.shapes[self.speaker].width
        signs = torch.ones(1, 1, width, dtype=self.dtype, device=self.device)
        signs[..., ::2] = -1.0  # mean zero, mean square one
        return ((norm(signs) - norm(-signs)) / (2 * signs))[0, 0]

    def fingerprint(self) -> str:
        """SHA-256 over the names, types and bytes of all weights, as hexadecimal digits.

        Computed once, and anew only when a weight was written to or replaced since.
        """
        weights = sorted(self.hf.state_dict().items())
        state = [(name, tensor.data_ptr(), tensor._version) for name, tensor in weights]
        if self._fingerprint is None or self._fingerprint[0] != state:
            digest = hashlib.sha256()
            for name, tensor in weights:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._fingerprint = state, digest.hexdigest()
        return self._fingerprint[1]

    def save(self, folder: str | Path) -> None:
        """Write model and processor as a checkpoint that plain transformers, and `load`, read."""
        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self.hf.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        finally:
            if bar:
                logging.enable_progress_bar()

    # -- from an example to tensors --------------------------------------------------------------

    def prepare(self, example: Example) -> Pair:
        """The clean and the corrupt run of an example, and the tokens that are scored.

        What the example leaves out of the corrupt run (image or prompt) is as in the clean one.
        Answers of several tokens are scored at the first one in which the two options differ,
        after what they share has been fed.

        Raises `ExampleError` if an image cannot be read, the prompts do not align token for token,
        or an option is empty, unknown to the tokenizer, or the same as the other.
        """
        prompt = example.clean_prompt
        many = 1 + len(example.more_images)
        prefix, answer, foil = self._options(prompt, example.answer, example.foil, many)
        corrupt_prompt = prompt if example.corrupt_prompt is None else example.corrupt_prompt
        more = example.more_images
        if example.corrupt_image is None and corrupt_prompt == prompt:
            clean = self._encode([example.clean_image, *more], prompt, example.roles, prefix)
            return Pair(clean, clean, answer, foil)
        words = [self._words(one) for one in (prompt, corrupt_prompt)]
        clean = self._encode([example.clean_image, *more], prompt, {**example.roles, **words[0]}, prefix)
        image = example.corrupt_image or example.clean_image
        corrupt = self._encode([image, *more], corrupt_prompt, words[1], prefix)
        self._check_grids(clean, corrupt)
        clean = self._aligned(clean, corrupt, prompt, corrupt_prompt)
        tensors, layout = dict(corrupt.tensors), dict(corrupt.layout)
        if example.corrupt_image is None:  # the same tensor, so that nobody encodes it twice
            pixels = self.family.pixels
            tensors[pixels] = clean.tensors[pixels]
        for tower, there in clean.layout.items():  # the prompts align: roles stand where they stood
            layout[tower] = replace(there, tokens=layout[tower].tokens)
        return Pair(clean, Inputs(tensors, layout), answer, foil)

    def view(self, image: Image.Image) -> Box:
        """The part of a picture that the grid of patches covers: left, top, right, bottom in pixels.

        LLaVA 1.5 cuts out the middle of a picture; where its processor pads, the part is larger than the
        picture.
        """
        return self.family.view(self.processor, image)

    def seen(self, picture: Picture) -> Image.Image:
        """A picture as the grid of patches covers it, for drawing over it."""
        image = open_image(picture)
        left, top, right, bottom = (round(x) for x in self.view(image))
        return image.crop((left, top, right, bottom))

    def inputs(
        self, image: Picture | None, prompt: str, more: Sequence[Picture] = (), said: Sequence[int] = ()
    ) -> Inputs:
        """The tensors of one run on a picture (or `more`) and a prompt, with nothing to be scored.

        Without a picture (None) a model that takes such prompts gets the words alone.

        `said` are tokens that the model is taken to have said behind the prompt.

        >>> from PIL import Image
        >>> model = load("toy-llava")
        >>> inputs = model.inputs(Image.new("RGB", (48, 48), "white"), "describe this picture.")
        >>> len(inputs.layout["decoder"].cells)
        36
        """
        return self._encode([] if image is None else [image, *more], prompt, {}, said)

    def _encode(
        self, images: Sequence[Picture], prompt: str, roles: Mapping[str, Any], prefix: Sequence[int]
    ) -> Inputs:
        inputs = self.family.encode(
            self.hf, self.processor, [open_image(image) for image in images], prompt, roles, prefix
        )
        tensors = {k: v.to(self.device) for k, v in inputs.tensors.items()}
        there = inputs.layout[self.speaker]
        there = replace(there, readout=len(there.tokens) - 1, fed=len(prefix))
        return Inputs(tensors, {**inputs.layout, self.speaker: there})

    def _options(self, prompt: str, answer: str, foil: str, images: int) -> tuple[list[int], int, int]:
        unknown = self.processor.tokenizer.unk_token_id
        ids = []
        for what, text in (("answer", answer), ("foil", foil)):
            if not text.strip():
                raise ExampleError(f"the {what} '{text}' is empty; give it a word")
            # Its end belongs to an option, and tells "red" from "red wine".
            tokens = self.family.options(self.processor, prompt, text, images)
            if unknown is not None and unknown in tokens[:-1]:  # OPT's end token is this, too
                raise ExampleError(f"the {what} '{text}' is unknown to the model's tokenizer")
            ids.append(tokens)
        same = 0
        while same < min(map(len, ids)) and ids[0][same] == ids[1][same]:
            same += 1
        if same == min(map(len, ids)):
            raise ExampleError(f"answer '{answer}' and foil '{foil}' are the same tokens")
        return ids[0][:same], ids[0][same], ids[1][same]

    def _words(self, prompt: str) -> dict[str, Span]:
        """The words of a prompt as roles, which `_aligned` takes out again; the image's mark is none."""
        mark = str(getattr(self.processor, "image_token", ""))
        words = enumerate(re.finditer(r"\S+", prompt))
        return {f"{_WORD}{n}": m.span() for n, m in words if not mark or mark not in m[0]}

    def _aligned(self, clean: Inputs, corrupt: Inputs, prompt: str, other: str) -> Inputs:
        """The clean run without the words' roles; positions of the two runs must correspond, word by word."""
        words = [one.split() for one in (prompt, other)]
        if len(words[0]) != len(words[1]):
            raise ExampleError(
                "the prompts do not align token for token: the clean one has "
                f"{len(words[0])} words, the corrupt one {len(words[1])}; choose other words"
            )
        layout = {}
        for tower, there in clean.layout.items():
            here, many = corrupt.layout[tower].roles, len(corrupt.layout[tower].tokens)
            for name, at in there.roles.items():
                if name.startswith(_WORD) and at != here.get(name, ()):
                    n = int(name.removeprefix(_WORD))
                    raise ExampleError(
                        f"the prompts do not align token for token: word {n + 1} is '{words[0][n]}' "
                        f"({len(at)} tokens) in the clean one, '{words[1][n]}' "
                        f"({len(here.get(name, ()))} tokens) in the corrupt one; choose other words"
                    )
            if len(there.tokens) != many:
                raise ExampleError(
                    f"the clean run has {len(there.tokens)} positions in the {tower} tower, the corrupt one "
                    f"{many}, so they do not correspond; choose other words or images"
                )
            own = {name: at for name, at in there.roles.items() if not name.startswith(_WORD)}
            layout[tower] = replace(there, roles=own)
        return Inputs(clean.tensors, layout)

    def _check_grids(self, clean: Inputs, corrupt: Inputs) -> None:
        """Patches of the two runs must correspond."""
        for tower, there in clean.layout.items():
            here = corrupt.layout[tower]
            if sorted(there.cells.values()) != sorted(here.cells.values()):
                sizes = [" x ".join(map(str, grid(x))) for x in (there, here)]
                raise ExampleError(
                    f"the clean image has a grid of {sizes[0]} patches, the corrupt one of {sizes[1]}, so "
                    "their positions do not correspond; resize the corrupt image to the clean one's size"
                )

    def token(self, number: int) -> str:
        """A token of the model's tokenizer as it is written there, such as `▁red`."""
        return str(self.processor.tokenizer.convert_ids_to_tokens(number))

    def pieces(self, word: str) -> int:
        """How many tokens a word is behind another one."""
        return _pieces(self.processor.tokenizer, word)

    def layouts(self) -> Mapping[str, Layout]:
        """What stands at each position of each tower, for a blank picture and a short question."""
        prompt = "is this circle red or blue?"
        roles = find_roles(prompt, {"answer": "red", "foil": "blue", "noun": "circle"})
        return self._encode([Image.new("RGB", (64, 64))], prompt, roles, []).layout

    # -- runs ------------------------------------------------------------------------------------

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within this context no other thread runs the model, and it is in evaluation mode.

        Hooks are on the modules, so two runs at once would see each other's edits. Everything that runs
        the model or holds hooks on it does so within this context, which may be entered again.
        """
        turn = _turn(self.hf)
        with turn.lock:
            training = [] if turn.taken else _training(self.hf)
            if training and not turn.told:
                turn.told = True
                warnings.warn(
                    f"{self.name} is in training mode, where dropout makes results random; it is run in "
                    "evaluation mode and put back behind each run",
                    stacklevel=4,
                )
            before, turn.taken = turn.taken, True
            for module in training:
                module.training = False
            try:
                yield
            finally:
                turn.taken = before
                for module in training:
                    module.training = True

    @torch.inference_mode()
    def run(self, inputs: Inputs, edits: Iterable[Edit] = ()) -> Logits:
        """The logits at the read-out position, with the edits made as the model computes.

        Without edits this is a plain forward of the Hugging Face model, bit for bit.
        """
        return self.record(inputs, (), edits)[0]

    @torch.inference_mode()
    def capture(
        self, inputs: Inputs, sites: Iterable[Site | str], edits: Iterable[Edit] = ()
    ) -> dict[str, Float[Tensor, "pos width"]]:
        """The activations at sites, by site; one row a position that the site names.

        The width is that of the kind, of one head, or 1 for a neuron.
        """
        parsed = [Site.parse(s) if isinstance(s, str) else s for s in sites]
        placed = [p for s in expand(parsed, self.shapes) for p in self._places(s, inputs)]
        _, values = self.record(inputs, {site.point for site, _ in placed}, edits)
        return {str(site): self.read(values[site.point], site, at) for site, at in placed}

    def read(self, value: Tensor, site: Site, at: Sequence[int]) -> Float[Tensor, "pos width"]:
        """A site's part of the activation `(1, pos, width)` recorded at its point."""
        value = value[0, list(at)]
        many = self.units(site.point)
        return value if many is None else value.unflatten(-1, (many, -1))[:, site.index]

    def logits(self, inputs: Inputs, every: bool = False) -> Float[Tensor, "pos vocabulary"]:
        """The logits of a plain forward at the last position, or at every one; gradients can flow."""
        found: list[Tensor] = []
        drop = {"logits_to_keep"} if every else set()
        keywords = {k: v for k, v in self.family.keywords.items() if k not in drop}
        with self.alone(), handles() as held:
            module = self._module(self.family.logits)
            held(module.register_forward_hook(lambda m, args, out: found.append(out.logits)))
            self.hf(**inputs.tensors, **keywords)
        return found[0][0] if every else found[0][0, -1:]

    @torch.inference_mode()
    def record(
        self, inputs: Inputs, points: Collection[Point], edits: Iterable[Edit] = ()
    ) -> tuple[Logits, dict[Point, Float[Tensor, "1 pos width"]]]:
        """One run: its logits, and the whole activation at each point (after the edits)."""
        found: dict[Point, Tensor] = {}
        logits: list[Tensor] = []
        with self.editing(inputs, edits), hooks() as hook, handles() as held:
            for point in points:
                hook(*self.module(point, inputs), lambda x, p=point: found.update({p: x.clone()}) or x)
            module = self._module(self.family.logits)
            held(module.register_forward_hook(lambda m, args, out: logits.append(out.logits)))
            try:
                self.hf(**inputs.tensors, **self.family.keywords)
            except ValueError as error:
                if not _UNFIT.search(str(error)):
                    raise
                raise ModelError(
                    f"{self.name} refuses what its processor made of the example: {error}; "
                    "load the processor that was saved with the model"
                ) from error
        return logits[0][0, -1].clone(), found

    @torch.inference_mode()
    def attention(
        self, inputs: Inputs, tower: str, kind: str, at: Sequence[int] | str
    ) -> Float[Tensor, "layers heads at keys"]:
        """What every head of a tower's `attn` or `cross` pays attention to, from the positions `at`.

        `at` are numbers, or a position of the site language such as `last`. Keys are the positions of
        `attended(tower, kind)`. Only these rows are kept, in float32. They are what transformers' own eager
        attention pays, whichever attention the model runs with.

        Raises `SiteError` for a position or a tower that there is not, `ModelError` where the model does
        not tell what is paid, or where its kernel reads its mask in a form of its own.
        """
        at = self._numbers(inputs, tower, kind, at)
        path = self.family.towers[tower].attention.get(kind)
        if path is None:
            raise ModelError(
                f"{self.name}: the models of {self.family.name} do not tell what the {kind} "
                f"heads of the {tower} tower attend to"
            )
        rows: list[Tensor] = []
        modules = [b.get_submodule(path) for b in self.blocks(tower) if _has(b, path)]
        if _interface(modules[0]) is None:
            with self.alone(), handles() as held:
                for module in modules:

                    def keep(m: nn.Module, args: Any, out: Any) -> None:
                        rows.append(out[1][0][:, list(at)].float())

                    held(module.register_forward_hook(keep))
                self.run(inputs)
        else:

            def pay(plain: Plain, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
                rows.append(_paid(plain, module, q, k, v, mask, at, **kw))
                return plain(module, q, k, v, mask, **kw)

            with self.attending(tower, pay, kind):
                self.run(inputs)
        paid = torch.stack([row.to(self.device) for row in rows])
        tokens = inputs.layout[self.attended(tower, kind)].tokens
        if paid.shape[-1] == len(tokens):
            return paid
        # What fills up the tiles of Mllama is left out before anything attends to them.
        there = [n for n, token in enumerate(tokens) if not token.endswith("[PAD]")]
        every = paid.new_zeros(*paid.shape[:-1], len(tokens))
        every[..., there] = paid
        return every

    def _numbers(self, inputs: Inputs, tower: str, kind: str, at: Sequence[int] | str) -> Sequence[int]:
        """Positions as numbers, each of which is there, as what they attend to has to be."""
        whole = Site.parse(f"{tower}.*.{kind}@all")
        expand([whole], self.shapes)
        inputs.place(replace(whole, tower=self.attended(tower, kind)))
        if isinstance(at, str):
            named = Site.parse(f"{tower}.*.{kind}@{at}")
            return [n for _, some in inputs.place(named) for n in some]
        many = len(inputs.layout[tower].tokens)
        for n in at:
            if not isinstance(n, Integral) or not -many <= n < many:
                raise SiteError(
                    f"no position {n!r} in the {tower} tower; expected whole numbers from 0 to {many - 1}, "
                    "or a name such as 'last'"
                )
        return [int(n) % many for n in at]

    @contextmanager
    def attending(self, tower: str, function: Callable[..., Any], kind: str = "attn") -> Iterator[None]:
        """Within this context the attention of a tower calls `function(plain, module, q, k, v, mask,
        **keywords)`, where `plain` is the attention function that it would call otherwise.

        Each use has a name of its own among transformers' attention functions, and only the tower's own
        modules know it, each by a copy of its config: masks are made as they always are, and another
        model with the same config is left as it is. Uses may be within each other.
        """
        path = self.family.towers[tower].attention[kind]
        modules: list[Any] = [b.get_submodule(path) for b in self.blocks(tower) if _has(b, path)]
        with self.alone():
            configs = {module: module.config for module in modules}
            name = modules[0].config._attn_implementation
            known = ALL_ATTENTION_FUNCTIONS.get_interface(name, _interface(modules[0]))
            plain = Plain(str(name), known, configs)

            def attend(
                module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any = None, **kw: Any
            ) -> Any:
                return function(plain, module, q, k, v, attention_mask, **kw)

            # Some modules read in the name which kind of kernel they call.
            ours = f"{name}, by vlmscope {next(NUMBERS)}"
            copies = {id(config): copy(config) for config in configs.values()}
            for config in copies.values():  # not by its property, which sets sub-configs, too
                config._attn_implementation_internal = ours
            ALL_ATTENTION_FUNCTIONS.register(ours, attend)
            try:
                for module, config in configs.items():
                    module.config = copies[id(config)]
                yield
            finally:
                for module, config in configs.items():
                    module.config = config
                ALL_ATTENTION_FUNCTIONS._global_mapping.pop(ours)

    def attended(self, tower: str, kind: str) -> str:
        """The tower whose positions `attn` or `cross` of a tower attends to."""
        return tower if kind == "attn" else self.family.towers[tower].reads or tower

    @torch.inference_mode()
    def answer(self, inputs: Inputs, edits: Iterable[Edit] = ()) -> str:
        """What the model says: its own greedy generation, as text."""
        with self.editing(inputs, edits, generating=True):
            ids = self.family.generate(self.hf, inputs, max_new_tokens=self.room(inputs, SAID))
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def room(self, inputs: Inputs, most: int) -> int:
        """How many tokens a model can say behind a prompt, up to `most`: its positions are numbered.

        The last one takes no position, since nothing is said behind it.
        """
        longest = getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)
        there = len(inputs.layout[self.speaker].tokens)
        return most if longest is None else max(1, min(most, longest - there + 1))

    @contextmanager
    def editing(self, inputs: Inputs, edits: Iterable[Edit], generating: bool = False) -> Iterator[None]:
        """Within this context every run of the model, in any number of rows, has the edits; other threads
        wait until it is left.

        Where one generation is run, they are made as the model reads the prompt; a step behind it that
        sees only what was said last has what came before in its cache.
        """
        with self.alone(), hooks() as hook:
            for edit in edits:
                for site, at in self.placed(edit.site, inputs):
                    hook(
                        *self.module(site.point, inputs),
                        _Change(self, Edit(site, edit.op, edit.value), at, generating),
                    )
            yield

    def placed(self, site: Site, inputs: Inputs) -> list[tuple[Site, tuple[int, ...]]]:
        """The places that the site of an edit names: one layer and unit, one or more positions."""
        sites = expand([site], self.shapes)
        if len(sites) != 1:
            raise SiteError(f"an edit is of one layer and unit; '{site}' names {len(sites)}")
        return self._places(sites[0], inputs)

    def _places(self, site: Site, inputs: Inputs) -> list[tuple[Site, tuple[int, ...]]]:
        """Where an expanded site is in a run; raises `SiteError` if what it is in does not run."""
        found = inputs.place(site)
        if site.center in self.idle(site.tower, inputs):
            raise SiteError(
                f"bad site '{site}': layer {site.center} of the {site.tower} tower attends to the picture alone "
                "and is passed over in a run without one; name another layer"
            )
        return found

    def idle(self, tower: str, inputs: Inputs) -> list[int]:
        """The layers that a run passes over: those that read a picture, where there is none."""
        reads = self.family.towers[tower].reads
        return [] if reads is None or reads in inputs.layout else self.shapes[tower].having("cross")

    def copied(self, source: Inputs, inputs: Inputs, sites: Iterable[Site | str]) -> list[Edit]:
        """Edits of `inputs` that copy the activations at sites from another run.

        Raises `SiteError` if the two have other grids of patches, or other numbers of positions, so that
        places do not correspond.
        """
        for tower, there in inputs.layout.items():
            here = source.layout[tower]
            same = sorted(there.cells.values()) == sorted(here.cells.values())
            if not same or len(there.tokens) != len(here.tokens):
                one, other = (
                    f"{len(x.tokens)} positions ({' x '.join(map(str, grid(x)))} patches)"
                    for x in (there, here)
                )
                raise SiteError(
                    f"the {tower} tower has {one} for this picture and {other} for the one that is copied from, "
                    "so they do not correspond; resize one picture to the other's size"
                )
        found = self.capture(source, sites)
        return [Edit(site, "set", value) for site, value in found.items()]

    def edited(self, x: Float[Tensor, "rows pos width"], edit: Edit, at: Sequence[int]) -> Tensor:
        """A copy of an activation with one edit made at the positions `at`, in every row."""
        x = x.clone()
        many = self.units(edit.site.point)
        view = x if many is None else x.unflatten(-1, (many, -1))[:, :, edit.site.index]
        now = view[:, list(at)]
        value = edit.value
        if isinstance(value, Tensor):
            if not _fits(value, now):
                raise VlmscopeError(
                    f"the value of the edit at '{edit.site}' has the shape {tuple(value.shape)}; expected a "
                    f"number, or one that broadcasts to {tuple(now.shape[1:])}: (positions, width)"
                )
            value = value.to(now)
        new = {"set": lambda: value, "add": lambda: now + value, "scale": lambda: now * value}
        view[:, list(at)] = torch.as_tensor(new[edit.op](), dtype=x.dtype).expand_as(now)
        return x

    # -- fitting the family's table --------------------------------------------------------------

    def verify(self) -> None:
        """Check that the model fits its family's table; raises `ModelError` naming what does not.

        Every path resolves, head counts and widths divide, an activation set to NaN at each
        kind of site in each tower reaches the logits (a NaN shows the connection whatever the
        weights are), and what the sublayers add makes up what a block does.
        """
        if self.family.blank is None:
            inputs = self._encode([Image.new("RGB", (64, 64))], "a", {}, [])
        else:
            inputs = self.family.blank(self.hf)
        inputs = Inputs({k: v.to(self.device) for k, v in inputs.tensors.items()}, inputs.layout)
        if self.run(inputs).isnan().any():
            raise self._misfit("a run without edits gives NaN")
        for tower, shape in self.shapes.items():
            for kind in shape.kinds:
                units = ["", *(["h0"] if kind in shape.heads else []), *(["n0"] * (kind == "mlp"))]
                for unit in units:
                    last = str(shape.having(kind)[-1])
                    site = Site(tower, last, kind, unit or None, "all")
                    if not self.run(inputs, [Edit(site, "set", torch.nan)]).isnan().any():
                        raise self._misfit(f"an edit at {site} does not reach the logits")
            if not self.family.towers[tower].normed:
                self._check_sums(tower, inputs)

    def _check_sums(self, tower: str, inputs: Inputs) -> None:
        """A block's input and what its sublayers add, in one layer of each sort, are its output."""
        shape = self.shapes[tower]
        kinds = [kind for kind in shape.kinds if kind not in ("deepstack", "output")]
        sorts = {tuple(k for k in kinds if n in shape.having(k)): n for n in range(shape.layers)}
        points = {n: [Point(tower, n, kind, "") for kind in own] for own, n in sorts.items()}
        _, found = self.record(inputs, [point for some in points.values() for point in some])
        for layer, some in points.items():
            *parts, whole = (found[point] for point in some)
            wide = torch.promote_types(whole.dtype, torch.float32)
            added = torch.stack([part.to(wide) for part in parts])
            rounding = 8 * torch.finfo(whole.dtype).eps * added.abs().sum(0)
            if ((added.sum(0) - whole).abs() > rounding).any():
                names = ", ".join(point.kind for point in some[1:-1])
                raise self._misfit(
                    f"{names} do not add up to what block {layer} of {tower} does, so something stands "
                    "between them and the residual stream; name it (docs/add-a-family.md, `behind`)"
                )

    def _misfit(self, what: str) -> ModelError:
        import transformers

        return ModelError(
            f"{self.name}: the table of family {self.family.name} does not fit this model under "
            f"transformers {transformers.__version__}: {what}"
        )

    def _module(self, path: str) -> nn.Module:
        try:
            return self.hf.get_submodule(path)
        except AttributeError as error:
            raise self._misfit(f"no module '{path}'") from error

    def _shape(self, tower: str) -> Shape:
        table = self.family.towers[tower]
        config = self.hf.config
        for part in filter(None, table.config.split(".")):
            config = _entry(config, part)
        blocks = self.blocks(tower)
        widths: dict[str, int] = {}
        lacks: dict[str, frozenset[int]] = {}
        width = 0
        for kind in ("attn", "cross", "mlp"):
            path = getattr(table, kind)
            found = {
                n: block.get_submodule(path) for n, block in enumerate(blocks) if path and _has(block, path)
            }
            missing = frozenset(range(len(blocks))) - set(found)
            if kind == "mlp" and (missing or not found) and _experts(blocks):
                raise ModelError(
                    f"{self.name}: the feed-forward blocks of its {tower} tower are made of experts, which cannot "
                    "be split into neurons; models with plain or gated blocks are supported"
                )
            if path and (not found or (missing and table.cross is None)):
                raise self._misfit(f"no module '{path}' in block {min(missing)} of {tower}")
            if found:
                modules = list(found.values())
                widths[kind], width = (_size(modules[0], side) for side in ("in", "out"))
                if missing:
                    lacks[kind] = missing
        kinds = ["resid_pre", *(k for k in ("attn", "cross", "mlp") if k in widths), "resid"]
        heads: dict[str, int] = {
            kind: _entry(config, table.heads) for kind in ("attn", "cross") if kind in widths
        }
        for kind, many in heads.items():
            if widths[kind] % many:
                raise self._misfit(
                    f"{tower}.{kind} is {widths[kind]} wide, not a multiple of its {many} heads"
                )
        if table.deepstack:
            kinds.append("deepstack")
            lacks["deepstack"] = frozenset(range(table.deepstack(self.hf.config), len(blocks)))
        out: dict[str, int] = {}
        if table.output:
            kinds.append("output")
            wide = getattr(self._module(table.output), "out_features", width)
            out = {} if wide == width else {"output": wide}
        return Shape(len(blocks), tuple(kinds), heads, widths["mlp"], width, lacks, out)


class _Change:
    """One edit, made in every call, or while generating in those that see the prompt."""

    def __init__(self, model: Model, edit: Edit, at: Sequence[int], generating: bool) -> None:
        self.model, self.edit, self.at, self.generating = model, edit, at, generating
        self.longest = 0

    def __call__(self, x: Float[Tensor, "rows pos width"]) -> Tensor:
        if self.generating and x.shape[1] <= self.longest:
            return x
        self.longest = x.shape[1]
        return self.model.edited(x, self.edit, self.at)


def _fits(value: Tensor, onto: Tensor) -> bool:
    """Whether a value can be written over a tensor, repeated where it has one entry."""
    # Every edit asks, and torch.broadcast_shapes takes as long as the edit itself.
    sizes = zip(reversed(value.shape), reversed(onto.shape), strict=False)
    return value.ndim <= onto.ndim and all(one in (1, other) for one, other in sizes)


def _experts(blocks: Sequence[nn.Module]) -> bool:
    return any(name.endswith("experts") for block in blocks for name, _ in block.named_modules())


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def _entry(config: Any, name: str) -> Any:
    """A part of a config, which may be a dictionary."""
    return config[name] if isinstance(config, Mapping) else getattr(config, name)


def _size(module: nn.Module, side: str) -> int:
    """The width of a linear module's input or output (4-bit ones know it, too)."""
    return int(getattr(module, f"{side}_features"))


def _interface(module: nn.Module) -> Callable[..., Any] | None:
    """The eager function of a module that pays attention through transformers' interface."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


@dataclass(frozen=True)
class Plain:
    """The attention function that modules call by themselves, and what it is called there."""

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
        self, module: nn.Module, mask: Any, own: int, keys: int, device: torch.device, **kw: Any
    ) -> Tensor | None:
        """The mask of a call as a dense one, `(tiles or 1, heads or 1, own, keys)`: true where a key is
        seen, or what is added to the scores. None: everything is seen.

        Kernels that get no mask leave out what comes later, where the call or the module says that it is
        causal, and what is farther away than the window of the call; eager attention leaves out nothing.

        Raises `ModelError` for masks of any other form (flash attention's for padding, flex
        attention's blocks).
        """
        if mask is None:
            causal, window = kw.get("is_causal"), kw.get("sliding_window")
            causal = own > 1 and (getattr(module, "is_causal", True) if causal is None else causal)
            if self.function is _interface(module) or not (causal or window):
                return None
            behind = torch.arange(own, device=device)[:, None] - torch.arange(keys, device=device)
            seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
            return (seen & (behind.abs() < window) if window else seen)[None, None]
        if isinstance(mask, Tensor) and mask.ndim == 4:
            return mask[..., :keys].expand(-1, -1, own, -1)
        form = f"one of {mask.ndim} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ModelError(
            f"the attention '{self.name}' of {type(module).__name__} has {form} as its mask, which is not read here; expected "
            "none or one of 4 dimensions, as 'sdpa' and 'eager' have: model.hf.set_attn_implementation('sdpa')"
        )


def _paid(
    plain: Plain,
    module: nn.Module,
    q: Float[Tensor, "tiles heads own width"],
    k: Float[Tensor, "tiles kv_heads keys width"],
    v: Float[Tensor, "tiles kv_heads keys value_width"],
    mask: Any,
    at: Sequence[int],
    **kw: Any,
) -> Float[Tensor, "heads at every"]:
    """The attention of a few queries, by the module's own eager function: with its scale, soft cap, mask
    and precision.

    Tiles look only within themselves; positions count through all of them.
    """
    tiles, heads, own, _ = q.shape
    keys = k.shape[2]
    mask = plain.mask(module, mask, own, keys, q.device, **kw)
    if mask is not None and mask.dtype == torch.bool:  # eager attention adds its mask
        mask = q.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(q.dtype).min)
    by_tile = defaultdict(list)
    for number, position in enumerate(at):
        by_tile[position // own].append((number, position % own))
    eager: Any = _interface(module)
    found = q.new_zeros(heads, len(at), tiles * keys, dtype=torch.float32)
    for tile, some in by_tile.items():
        numbers, rows = map(list, zip(*some, strict=True))
        one = slice(tile, tile + 1)
        seen = None if mask is None else (mask[one] if len(mask) > 1 else mask)[:, :, rows]
        _, paid = eager(module, q[one, :, rows], k[one], v[one], seen, **kw)
        found[:, numbers, tile * keys : (tile + 1) * keys] = paid[0].float()
    return found


@dataclass(eq=False)
class _Turn:
    """Whose turn it is to run a model: one thread's at a time. `told`: that the model was in training."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    taken: bool = False
    told: bool = False


_TURNS: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_FINDING = threading.Lock()


def _turn(hf: nn.Module) -> _Turn:
    """One for each Hugging Face model, whatever `Model`s there are of it; not kept in it, so that it
    can still be copied."""
    with _FINDING:
        return _TURNS.setdefault(hf, _Turn())


def _training(hf: nn.Module) -> list[nn.Module]:
    """The modules of a model that are in training mode.

    Every run asks, so not by `modules()`, which makes all their names as well and takes five times as long.
    """
    todo = [hf]
    for module in todo:
        if module._modules:
            todo += [child for child in module._modules.values() if child is not None]
    return [module for module in todo if module.training]


def load(name: str | Path, *, dtype: str | torch.dtype = "float32", device: str | None = None) -> Model:
    """Load a model and its processor, and check that it fits its family's table.

    `name` is a built-in toy's name, a folder written by `save_pretrained` (of the model and of the
    processor), or a Hugging Face id; only the last may use the network. Weights are read from
    safetensors only, and no code that comes with a checkpoint is run. `device` is the GPU where
    there is one, by default; `auto` spreads the model over all GPUs (with accelerate). `dtype` is one
    of `DTYPES`, or `4bit` for quantized weights (with bitsandbytes: `pip install vlmscope[4bit]`).

    Raises `ModelError` in one line if that cannot be done.

    >>> model = load("toy-blip")
    >>> model.shapes["encoder"].heads
    {'attn': 4, 'cross': 4}
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in (*DTYPES, QUANTIZED):
        known = ", ".join((*DTYPES, QUANTIZED))
        raise ModelError(f"unknown dtype '{dtype}'; expected one of {known}")
    spread = device == "auto"
    place = _device(None if spread else device)
    for package in ["accelerate"] * spread + ["accelerate", "bitsandbytes"] * (dtype == QUANTIZED):
        if not find_spec(package):
            raise ModelError(
                f"{'--device auto' if spread else dtype} needs {package}, which is not "
                "installed; pip install 'vlmscope[4bit]' brings both"
            )
    path = toys().get(str(name), name)
    if not Path(path).exists() and (isinstance(name, Path) or not _HUB_ID.fullmatch(str(name))):
        raise ModelError(
            f"no model '{name}': not a folder, not a Hugging Face id, and not one of the "
            f"built-in toys ({', '.join(toys())})"
        )
    family = _family(*_kind(_config(path)), str(name))
    if family.model is None:
        raise _own_code(family, name)
    if Path(path).is_dir():
        _check_weights(Path(path))
    with _one_line(name):
        options: dict[str, Any] = {"trust_remote_code": False}
        if not (spread and place.type == "cuda"):
            _check_memory(family, path, dtype, place)
        where: dict[str, Any] = {"device_map": "auto"} if spread else {}
        if dtype == QUANTIZED:
            how = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
            where = {"device_map": {"": place}, **where, "quantization_config": how}
        hf, info = family.model.from_pretrained(
            path,
            dtype=DTYPES.get(dtype, torch.bfloat16),
            use_safetensors=True,
            output_loading_info=True,
            **where,
            **options,
        )
        processor = family.processor.from_pretrained(path, **options)
    lost = sorted(info["missing_keys"])
    if lost:
        raise ModelError(
            f"{name}: {len(lost)} weights are missing from the checkpoint, the first is "
            f"'{lost[0]}'; save the whole model with save_pretrained"
        )
    elsewhere = {str(d) for d in getattr(hf, "hf_device_map", {}).values()} & {"cpu", "disk"}
    if elsewhere and place.type == "cuda":
        raise ModelError(
            f"{name} does not fit into the memory of the GPUs in {dtype}: part of it would "
            "be fetched again for every patch; load it in bfloat16 or 4bit"
        )
    model = Model(hf if where else hf.to(place), processor, str(name))
    model.verify()
    return model


def free_memory(device: torch.device) -> int:
    """Bytes of free memory on a device; where the system does not tell, half a gigabyte."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError, ValueError):  # Linux counts what it would give up for a program
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    return 2**29


def _check_memory(family: Family, path: str | Path, dtype: str, place: torch.device) -> None:
    """Refuse weights that do not fit, before the system stops the process."""
    made: Any = family.model
    config = made.config_class.from_pretrained(path)
    with torch.device("meta"):
        weights = sum(one.numel() for one in made(config).parameters())
    bits = 4.5 if dtype == QUANTIZED else torch.finfo(DTYPES[dtype]).bits
    need, free = weights * bits / 8, free_memory(place)
    if need > free:
        raise ModelError(
            f"{path} has {weights / 1e9:.1f} billion weights, {need / 1e9:.1f} GB in {dtype}, and "
            f"{free / 1e9:.1f} GB are free on {place}; load it in bfloat16 or 4bit, or over several "
            "GPUs (device auto)"
        )


_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def tokenizer(name: str | Path) -> Callable[[str], int]:
    """How many tokens a word is for a model, without loading its weights; as `Model.pieces`.

    >>> tokenizer("toy-blip")("circle")
    1
    """
    path = toys().get(str(name), name)
    family = _family(*_kind(_config(path)), str(name))
    if family.processor is None:
        raise _own_code(family, name)
    with _one_line(name):
        own = family.processor.from_pretrained(path, trust_remote_code=False).tokenizer
    return lambda word: _pieces(own, word)


def _pieces(tokenizer: Any, word: str) -> int:
    """Behind a blank, as a word of a prompt stands, where its tokens can be others than by itself."""
    whole, before = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (f"a {word}", "a"))
    return len(whole) - len(before)


def embedder(name: str | Path) -> Callable[[Sequence[str]], Float[Tensor, "words width"]]:
    """Words to vectors of length one, by the mean of the last hidden states of a small text model.

    `name` is a Hugging Face id or a folder, such as `sentence-transformers/all-MiniLM-L6-v2`. Raises
    `ModelError` if it cannot be loaded.
    """
    with _one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        text = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False).eval()

    @torch.inference_mode()
    def embed(words: Sequence[str]) -> Tensor:
        batch = tokenizer(list(words), padding=True, return_tensors="pt")
        hidden = text(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    return embed


def toys() -> dict[str, Path]:
    """The trained toys that ship with the package: name to folder."""
    return {path.parent.name: path.parent for path in sorted(TOYS.glob("*/config.json"))}


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"no device '{device}' here; expected cpu, or cuda where torch sees a GPU"
        ) from error


def _family(architectures: Sequence[str], language: str | None, name: str) -> Family:
    """The family of a checkpoint, by its class and, if that has several, its language model."""
    known = families()
    of_class = [f for f in known if f.architecture in architectures]
    for family in of_class:
        if family.variant in (None, language):
            return family
    what = f"is a {architectures[0]}" if architectures else "does not say what model it is"
    if of_class:
        what += f" with a language model of type '{language}'"
    names = dict.fromkeys(
        f"{f.name} ({f.architecture}{f' with {f.variant}' if f.variant else ''})" for f in known
    )
    raise ModelError(
        f"{name} {what}, which is not supported; docs/add-a-family.md says how to add it; "
        f"supported: {', '.join(names)}"
    )


def _own_code(family: Family, name: str | Path) -> ModelError:
    return ModelError(
        f"{name} is a {family.architecture}, for which transformers has no code; load it with the code "
        "that was published with it, and use vlmscope.Model(hf, processor) in Python"
    )


def _kind(config: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """The classes and the type of the language model that a config.json names."""
    text = config.get("text_config") or {}
    return config.get("architectures") or [], text.get("model_type")


def _config(path: str | Path) -> dict[str, Any]:
    """The checkpoint's config.json, without any of its code."""
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise ModelError(f"{path} has no config.json; expected a folder written by save_pretrained")
    with _one_line(path):
        return dict(json.loads(Path(cached_file(str(path), "config.json") or "").read_text("utf-8")))


def _check_weights(path: Path) -> None:
    if any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise ModelError(
            f"{path} has its weights as pickle only, which can run code when it is opened and is not "
            "loaded; convert it: load it in transformers where you trust it, then save_pretrained"
        )
    raise ModelError(f"{path} has no weights; expected a model.safetensors beside config.json")


@contextmanager
def _one_line(name: str | Path) -> Iterator[None]:
    """Load without a bar of its own; turn what transformers and the hub raise into one line."""
    bar, verbosity = logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # the hub would tell of each of its five tries
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        where = (
            ""
            if Path(name).exists()
            else ("; it needs the network or a copy in the local cache (or give a folder)")
        )
        raise ModelError(f"cannot load {name}: {first}{where}") from error
    finally:
        hub_logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def handles() -> Iterator[Callable[[RemovableHandle], None]]:
    """Collects what registering a hook returns, and removes the hooks at the end."""
    held: list[RemovableHandle] = []
    try:
        yield held.append
    finally:
        for handle in held:
            handle.remove()


BEHIND = ("output_capturing_hook", "given")
"""Names of hooks that see a module's output after ours: transformers' own, and the engine's record of
what blocks gave."""


class _Gain:
    """A sublayer's output times what its block multiplies it by before it is added.

    Where nothing is changed the module's own output stays, bit for bit.
    """

    def __init__(self, point: Point, block: nn.Module, factor: Callable[[Mapping[str, Any]], Any]) -> None:
        self.point, self.block, self.factor = point, block, factor
        self.call: Mapping[str, Any] = {}

    def watch(self) -> RemovableHandle:
        """Remember what the block is called with: the factor may differ by position."""

        def called(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            self.call = kwargs

        return self.block.register_forward_pre_hook(called, with_kwargs=True)

    def read(self, x: Tensor) -> Tensor:
        return x * self.factor(self.call)

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        factor = self.factor(self.call)
        same = value == x * factor
        lost = ~same & ~value.isnan() & (factor == 0)
        if lost.any():
            at = ", ".join(map(str, lost.any(-1).any(0).nonzero()[:5, 0].tolist()))
            raise SiteError(
                f"{self.point.tower}.{self.point.layer}.{self.point.kind}: the model multiplies this by 0 "
                f"before it adds it (position {at}), so nothing but 0 can be written there; name other "
                "positions or layers"
            )
        return torch.where(same, x, value / factor)


class _Gaps:
    """What leaves a tower, with room (zeros) for the padding that is cut away before."""

    def __init__(self, there: Sequence[int], many: int) -> None:
        self.there, self.many = list(there), many

    @classmethod
    def of(cls, layout: Layout) -> _Gaps | None:
        there = [n for n, token in enumerate(layout.tokens) if not token.endswith("[PAD]")]
        return cls(there, len(layout.tokens)) if len(there) < len(layout.tokens) else None

    def read(self, x: Tensor) -> Tensor:
        value = x.new_zeros(x.shape[0], self.many, x.shape[-1])
        value[:, self.there] = x
        return value

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        return value[:, self.there]


class _Deepstack(_Gaps):
    """What a model adds to the image's tokens behind a block, with zeros at all others."""

    def __init__(self, point: Point, image: Sequence[int], many: int) -> None:
        super().__init__(image, many)
        self.point = point

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        elsewhere = value.clone()
        elsewhere[:, self.there] = 0
        if (elsewhere.nan_to_num() != 0).any():
            raise SiteError(
                f"{self.point.tower}.{self.point.layer}.deepstack: the model adds it to the image's tokens "
                "alone, so nothing can be written elsewhere; name the position image"
            )
        return super().write(x, value)

    def given(self, kwargs: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The arguments of the language model, of which one is all that is added, in the layers' order."""
        name = "deepstack_visual_embeds"
        added = kwargs.get(name)
        if added is None:  # no picture, or a step of a generation that sees only what was said last
            return dict(kwargs)
        there = list(added)
        there[self.point.layer] = change(there[self.point.layer])
        return {**kwargs, name: there}


class Access(NamedTuple):
    """How a point is read and written: a module's output, or its input (`before`).

    `flat`: what it handles is laid end to end (image tiles, or patches without a batch). `view`: what
    stands at the point, where that is not what the module handles.
    """

    module: nn.Module
    before: bool = False
    flat: bool = False
    view: _Gain | _Gaps | None = None


@contextmanager
def hooks() -> Iterator[Any]:
    """Registers functions of a module's first input or its output, and removes them at the end.

    Yields `hook(*access, function)`, of an `Access`; `function` gets the hidden states, as `(rows, pos,
    width)` or, if `flat`, as `(1, all positions, width)`, and may return new ones. Modules that return
    a tuple or a Hugging Face output are handled.
    """
    with handles() as held:

        def hook(
            module: nn.Module, before: bool, flat: bool, view: _Gain | _Gaps | None, function: Any
        ) -> None:
            if isinstance(view, _Gain):
                held(view.watch())

            def change(x: Tensor) -> Tensor:
                if not flat and x.ndim == 3 and view is None:
                    return function(x)
                laid = x if not flat and x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
                if view is None:
                    return function(laid).reshape(x.shape)
                return view.write(laid, function(view.read(laid))).reshape(x.shape)

            def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if isinstance(view, _Deepstack):
                    return args, view.given(kwargs, change)
                if args:
                    return (change(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

            def post(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
                if isinstance(out, Tensor):
                    return change(out)
                if isinstance(out, tuple):
                    return (change(out[0]), *out[1:])
                out.last_hidden_state = change(out.last_hidden_state)
                return out

            if before:
                held(module.register_forward_pre_hook(pre, with_kwargs=True))
            else:
                held(module.register_forward_hook(post))
                # transformers records hidden states by a hook of its own, which some families read
                # image features from: it has to see what ours have changed.
                others: Any = module._forward_hooks
                for number, other in list(others.items()):
                    if getattr(other, "__name__", "") in BEHIND:
                        others.move_to_end(number)

        yield hook
