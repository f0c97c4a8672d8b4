"""A vision-language model that can be run with edits and looked into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers.utils import logging

from vlmscope import files
from vlmscope.data.example import Box, Picture
from vlmscope.data.images import open_image
from vlmscope.errors import StoreError, VlmscopeError, shown
from vlmscope.models.inputs import Edit, Inputs, Logits
from vlmscope.runs import forward as running
from vlmscope.runs import prepare as preparing
from vlmscope.runs.network import Network
from vlmscope.sites import Point, Site

MANIFEST, FORMAT = "vlmscope.json", "vlmscope-checkpoint-1"
"""What a saved checkpoint has beside the files of transformers: the list of them."""


class Model(Network):
    """A vision-language model that can be run with edits and looked into.

    `hf` is the Hugging Face model, `shapes` says which sites each tower has. Make one with `vlmscope.load`,
    or from objects you have: `Model(hf, processor)`, and `verify` as `load` does; a processor is whatever the
    family's `encode` takes. Threads wait for each other's runs, which are in evaluation mode.

    Raises `ModelError` if the model is of no supported family or does not fit its family's table.

    >>> from vlmscope.checkpoint import load
    >>> load("toy-blip")
    Model 'toy-blip': BLIP-VQA, float32 on cpu; vision 3 layers, encoder 3 layers, decoder 3 layers
    """

    def __repr__(self) -> str:
        towers = ", ".join(f"{tower} {shape.layers} layers" for tower, shape in self.shapes.items())
        return f"Model '{self.name}': {self.family.name}, {self.precision} on {self.device}; {towers}"

    prepare = preparing.prepare
    layouts = preparing.layouts
    capture = running.capture
    copied = running.copied
    attention = running.attention

    def inputs(
        self, image: Picture | None, prompt: str, more: Sequence[Picture] = (), fed: Sequence[int] = ()
    ) -> Inputs:
        """The tensors of one run on a picture (or `more`) and a prompt, with nothing to be scored.

        Without a picture (None) a model that takes such prompts gets the words alone. `fed` are tokens that
        the model is taken to have generated behind the prompt.

        >>> from vlmscope.checkpoint import load
        >>> model = load("toy-llava")
        >>> inputs = model.inputs(Image.new("RGB", (48, 48), "white"), "describe this picture.")
        >>> len(inputs.layout["decoder"].cells)
        36
        """
        return preparing.encode(self, [] if image is None else [image, *more], prompt, {}, fed)

    def run(self, inputs: Inputs, edits: Iterable[Edit] = ()) -> Logits:
        """The logits at the read-out position, with the edits made as the model computes.

        Without edits this is a plain forward of the Hugging Face model, bit for bit.
        """
        return running.forward(self, inputs, edits).logits[-1]

    def answer(self, inputs: Inputs, edits: Iterable[Edit] = ()) -> str:
        """What the model answers: its own greedy generation, as text, behind all that the inputs hold.

        Those of a pair hold what both options begin with, too; those of `inputs` the prompt alone.
        """
        ids = running.generate(self, inputs, edits)
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def view(self, image: Image.Image) -> Box:
        """The part of a picture that the grid of patches covers: left, top, right, bottom in pixels (LLaVA
        1.5 cuts out the middle); larger than the picture where the processor pads."""
        return self.family.view(self.processor, image)

    def cropped(self, picture: Picture) -> Image.Image:
        """A picture as the grid of patches covers it, for drawing over it."""
        image = open_image(picture)
        left, top, right, bottom = (round(x) for x in self.view(image))
        return image.crop((left, top, right, bottom))

    def save(self, folder: str | Path) -> None:
        """Write model and processor as a checkpoint that plain transformers, and `load`, read.

        Everything is written beside the folder first and then renamed; `vlmscope.json` lists what is written.
        Raises `StoreError` if that cannot be, or the folder has files of these names that are not listed.
        """
        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            with files.beside(Path(folder)) as place:
                self.hf.save_pretrained(place)
                self.processor.save_pretrained(place)
                made = {str(file.relative_to(place)): file for file in place.rglob("*") if file.is_file()}
                files.save(folder, MANIFEST, {"format": FORMAT, "model": self.name}, made)
        except SafetensorError as error:
            raise StoreError(
                f"{folder}: cannot be written ({error}); free some space or choose another place"
            ) from error
        finally:
            if bar:
                logging.enable_progress_bar()

    @staticmethod
    def claim(folder: str | Path) -> None:
        """Refuse, before anything is computed, a folder that `save` could not write (`StoreError`)."""
        files.claim(folder, MANIFEST, FORMAT, ["config.json", "model.safetensors"])

    def verify(self, fits: bool = False) -> None:
        """Check that the model fits its family's table; raises `ModelError` naming what does not.

        Every path resolves, head counts and widths divide, an activation set to NaN at each kind of site in
        each tower reaches the logits (a NaN shows the connection whatever the weights are), and what the
        sublayers add makes up what a block does. With `fits` that is known, and only whether the weights give
        NaN is looked at.
        """
        if self.family.blank is None:
            inputs = self.inputs(Image.new("RGB", (64, 64)), "a")
        else:
            blank = self.family.blank(self.hf)
            inputs = Inputs({k: v.to(self.device) for k, v in blank.tensors.items()}, blank.layout)
        if running.forward(self, inputs).logits.isnan().any():
            raise self.misfit("a run without edits gives NaN")
        if fits:
            return
        for tower, shape in self.shapes.items():
            for kind in shape.kinds:
                for part in ["", *["h"] * (kind in shape.heads), *["n"] * (kind == "mlp")]:
                    site = Site(tower, shape.having(kind)[-1], kind, part, (0,) * bool(part))
                    if not running.forward(self, inputs, [Edit(site, "set", torch.nan)]).logits.isnan().any():
                        raise self.misfit(f"an edit at {site} does not reach the logits")
            if not self.family.towers[tower].normed:
                self._check_sums(tower, inputs)

    def _check_sums(self, tower: str, inputs: Inputs) -> None:
        """A block's input and what its sublayers add, in one layer of each sort, are its output."""
        shape = self.shapes[tower]
        kinds = [kind for kind in shape.kinds if kind not in ("deepstack", "output", "resid_mid")]
        sorts = {tuple(k for k in kinds if n in shape.having(k)): n for n in range(shape.layers)}
        points = {n: [Point(tower, n, kind) for kind in kinds] for kinds, n in sorts.items()}
        found = running.forward(self, inputs, keep=[point for own in points.values() for point in own]).values
        for layer, own in points.items():
            *parts, whole = (found[point] for point in own)
            wide = torch.promote_types(whole.dtype, torch.float32)
            added = torch.stack([part.to(wide) for part in parts])
            rounding = 8 * torch.finfo(whole.dtype).eps * added.abs().sum(0)
            if ((added.sum(0) - whole).abs() > rounding).any():
                names = ", ".join(point.kind for point in own[1:-1])
                raise self.misfit(
                    f"{names} do not add up to what block {layer} of {tower} does, so something stands "
                    "between them and the residual stream; name it (docs/add-a-family.md, `behind`)"
                )


def check_model(model: object) -> None:
    """Raises `VlmscopeError` for what is no model."""
    if not isinstance(model, Model):
        raise VlmscopeError(f"the model is {shown(model)}; expected a Model, as vlmscope.load gives it")
