"""A vision-language model that can be run with edits and looked into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging

from vlmscope import files
from vlmscope.data.example import Box, Example, Picture
from vlmscope.data.images import open_image
from vlmscope.errors import StoreError
from vlmscope.layout import Layout
from vlmscope.models.inputs import Edit, Inputs, Logits, Pair
from vlmscope.runs import attention, forward, prepare, verify
from vlmscope.runs.network import Network
from vlmscope.sites import Sites

MANIFEST, FORMAT = "vlmscope.json", "vlmscope-checkpoint-1"
"""What a saved checkpoint has beside the files of transformers: the list of them."""


class Model(Network):
    """A vision-language model that can be run with edits and looked into.

    `hf` is the Hugging Face model, `shapes` says which sites each tower has. Make one with
    `vlmscope.load`, or from objects you have: `Model(hf, processor)`; then call `verify`, as `load`
    does. A processor is whatever the family's `encode` takes: it has a `tokenizer`.

    Several threads may use one model: their runs wait for each other (`alone`). All runs are in
    evaluation mode; a model that is being trained is back in training mode behind them.

    Raises `ModelError` if the model is of no supported family or does not fit its family's table.

    >>> from vlmscope.checkpoint import load
    >>> load("toy-blip")
    Model 'toy-blip': BLIP-VQA, float32 on cpu; vision 3 layers, encoder 3 layers, decoder 3 layers
    """

    def __repr__(self) -> str:
        towers = ", ".join(f"{tower} {shape.layers} layers" for tower, shape in self.shapes.items())
        return f"Model '{self.name}': {self.family.name}, {self.precision} on {self.device}; {towers}"

    def verify(self, fits: bool = False) -> None:
        """Check that the model fits its family's table (`runs.verify`); `ModelError` names what does not."""
        verify.verify(self, fits)

    def prepare(self, example: Example, whole: bool = False) -> Pair:
        """The clean and the corrupt run of an example, and the tokens that are scored (`runs.prepare`)."""
        return prepare.prepare(self, example, whole)

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
        return prepare.encode(self, [] if image is None else [image, *more], prompt, {}, fed)

    def layouts(self) -> Mapping[str, Layout]:
        """What stands at each position of each tower, for a blank picture and a short question."""
        return prepare.layouts(self)

    def run(self, inputs: Inputs, edits: Iterable[Edit] = ()) -> Logits:
        """The logits at the read-out position, with the edits made as the model computes.

        Without edits this is a plain forward of the Hugging Face model, bit for bit.
        """
        return forward.forward(self, inputs, edits).logits[-1]

    def capture(
        self, inputs: Inputs, sites: Sites, edits: Iterable[Edit] = ()
    ) -> dict[str, Float[Tensor, "pos width"]]:
        """The activations at sites, by site; one row a position that the site names.

        The width is that of the kind, of one head (of all heads of a set), or 1 for a neuron.
        """
        return forward.capture(self, inputs, sites, edits)

    def attention(
        self, inputs: Inputs, tower: str, kind: str, at: Sequence[int] | str
    ) -> Float[Tensor, "layers heads at keys"]:
        """What every head of a tower's `attn` or `cross` pays attention to, from the positions `at`
        (`runs.attention`)."""
        return attention.attention(self, inputs, tower, kind, at)

    def answer(self, inputs: Inputs, edits: Iterable[Edit] = ()) -> str:
        """What the model answers: its own greedy generation, as text."""
        ids = forward.generate(self, inputs, edits)
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def copied(self, source: Inputs, inputs: Inputs, sites: Sites) -> list[Edit]:
        """Edits of `inputs` that copy the activations at sites from another run (`runs.forward`)."""
        return forward.copied(self, source, inputs, sites)

    def view(self, image: Image.Image) -> Box:
        """The part of a picture that the grid of patches covers: left, top, right, bottom in pixels.

        LLaVA 1.5 cuts out the middle of a picture; where its processor pads, the part is larger than the
        picture.
        """
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
