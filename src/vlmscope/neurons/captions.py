"""Captions: what a model says about a picture, and its neurons as it predicts each token."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmscope.data.example import Example
from vlmscope.errors import ExampleError, ModelError
from vlmscope.models.inputs import Inputs
from vlmscope.neurons.results import Found
from vlmscope.neurons.weight_edit import base_fingerprint
from vlmscope.progress import progress
from vlmscope.runs.access import hook
from vlmscope.runs.forward import SPEECH, forward, generate
from vlmscope.runs.hooks import Hooks
from vlmscope.runs.model import Model
from vlmscope.runs.network import upcast
from vlmscope.runs.prepare import check_words
from vlmscope.sites import Point

LENGTH = 40
"""The most tokens that a caption is generated with."""

Variant = Literal["input", "gate"]
"""What counts as a neuron's activation: the input of the down projection, or the gate's output alone."""


@dataclass(frozen=True, eq=False)
class Caption:
    """What a model says about a picture, and its neurons as it predicts each token.

    `ids` are the tokens and `text` all of them as text, of which `spans` are each token's characters.
    `start` is the position that predicts the first of them, in the tower that says the words.
    `activations` is `(tokens, layers, neurons)`, in float32 or more; layers are those that have neurons.
    """

    inputs: Inputs
    ids: tuple[int, ...]
    text: str
    spans: tuple[tuple[int, int], ...]
    start: int
    activations: Float[Tensor, "tokens layers neurons"]

    def find(self, word: str) -> list[int]:
        """The numbers of the tokens that say a word, wherever it stands as a whole word.

        Raises `ExampleError` if it is not there, or a token holds it with parts of other words.
        """
        numbers = []
        for first, last in (match.span() for match in whole_word(word).finditer(self.text)):
            for number, (a, b) in enumerate(self.spans):
                inside = self.text[max(a, first) : min(b, last)]
                outside = self.text[a : max(a, first)] + self.text[min(b, last) : b]
                if not inside.strip():
                    continue
                if re.search(r"\w", outside):
                    raise ExampleError(
                        f"the word '{word}' is not made of whole tokens in the caption '{self.text}': "
                        f"token {number + 1} is '{self.text[a:b]}'; ask for that word instead"
                    )
                numbers.append(number)
        if not numbers:
            raise ExampleError(f"the word '{word}' is not in the caption '{self.text}'; use one that is")
        return numbers


def whole_word(word: str) -> re.Pattern[str]:
    """Finds a word where it stands as a whole word, in small or capital letters."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)


def spoken(model: Model, caption: Caption) -> str:
    """What `Model.answer` would have said."""
    return str(model.processor.tokenizer.decode(caption.ids[:SPEECH], skip_special_tokens=True).strip())


def inputs_of(model: Model, example: Example, prompt: str | None, ids: Sequence[int] = ()) -> Inputs:
    """What a model is given to caption an example's picture, with `ids` behind the prompt."""
    return model.inputs(example.clean_image, prompt or example.clean_prompt, example.more_images, ids)


def imageless(model: Model, prompt: str) -> Inputs | None:
    """A prompt without a picture; None where the model takes no such."""
    try:
        return model.inputs(None, prompt)
    except ExampleError:
        return None


def generate_caption(
    model: Model, inputs: Inputs, *, variant: Variant = "input", length: int = LENGTH
) -> Caption:
    """The caption that a model generates, with its neurons recorded on the way: nothing is computed twice."""
    with _recording(model, inputs, variant, slice(-1, None)) as rows:
        ids = generate(model, inputs, most=length).tolist()
    return _caption(model, inputs, ids, rows)


def given_caption(
    model: Model, example: Example, text: str, *, prompt: str | None = None, variant: Variant = "input"
) -> Caption:
    """A given text as the caption of an example's picture, fed behind the prompt in one forward.

    Raises `ExampleError` if the text is empty or holds tokens that the model does not know.
    """
    ids = tokenized(model, example, text, prompt)
    if len(ids) < 2 or model.processor.tokenizer.unk_token_id in ids[:-1]:
        raise ExampleError(f"the caption '{text}' is empty, or unknown in part to the model's tokenizer")
    return _told(model, example, prompt, ids, variant)[0]


def _told(
    model: Model, example: Example, prompt: str | None, ids: Sequence[int], variant: Variant
) -> tuple[Caption, Tensor]:
    plain, fed = (inputs_of(model, example, prompt, behind) for behind in ((), ids[:-1]))
    return forced_caption(model, plain, fed, ids, variant=variant)


def forced_caption(
    model: Model, plain: Inputs, fed: Inputs, ids: Sequence[int], *, variant: Variant = "input"
) -> tuple[Caption, Float[Tensor, "tokens vocabulary"]]:
    """The caption `ids` by teacher forcing, and the logits that predict each of its tokens.

    `plain` ends with the prompt; in `fed` all but the last token stand behind it.
    """
    with _recording(model, fed, variant, slice(-len(ids), None)) as rows:
        logits = forward(model, fed, positions=None).logits
    return _caption(model, plain, ids, rows), logits[-len(ids) :]


@contextmanager
def _recording(
    model: Model, inputs: Inputs, variant: Variant, at: slice
) -> Iterator[dict[int, list[Tensor]]]:
    """Within this context each run appends the neurons at some positions, by layer."""
    rows: dict[int, list[Tensor]] = {layer: [] for layer in model.shapes[model.speaker].having("mlp")}
    with model.alone(), Hooks() as hooks:
        for layer, found in rows.items():
            keep = partial(_keep, found, at)
            if variant == "input":
                hook(hooks, model, Point(model.speaker, layer, "mlp", "n"), inputs, keep)
            else:
                hooks.on_hidden(_gate(model, layer), keep)
        yield rows


def image_range(model: Model, inputs: Inputs) -> Float[Tensor, "2 layers neurons"] | None:
    """Each neuron's highest and lowest activation over the image's tokens; None where there are none."""
    at, layers = list(inputs.layout[model.speaker].cells), model.shapes[model.speaker].having("mlp")
    found: dict[int, Tensor] = {}

    def keep(layer: int, x: Tensor) -> Tensor:
        low, high = x[0, at].aminmax(dim=0)
        found[layer] = torch.stack([high, low]).float().cpu()
        return x

    with model.alone(), Hooks() as hooks:
        for layer in layers if at else ():
            hook(hooks, model, Point(model.speaker, layer, "mlp", "n"), inputs, partial(keep, layer))
        if at:
            forward(model, inputs)
    return torch.stack([found[layer] for layer in layers], 1) if at else None


def _keep(rows: list[Tensor], at: slice, x: Tensor) -> Tensor:
    rows.append(x[0, at].clone())
    return x


def _gate(model: Model, layer: int) -> nn.Module:
    """The module whose output are a layer's gates."""
    gate = model.family.towers[model.speaker].gate
    try:
        return model.blocks(model.speaker)[layer].get_submodule(gate or "-")
    except AttributeError as error:
        raise ModelError(
            f"{model.name}: the neurons of {model.family.name} have no gate; leave the variant out"
        ) from error


def _caption(
    model: Model, inputs: Inputs, ids: Sequence[int], rows: Mapping[int, Sequence[Tensor]]
) -> Caption:
    """A caption of tokens and of the neurons by layer; those of a layer that the run passes over are zero."""
    found = {layer: torch.cat(list(parts)).to(model.device) for layer, parts in rows.items() if parts}
    ids = ids[: min(map(len, found.values()))]
    nothing = torch.zeros_like(next(iter(found.values())))
    activations = torch.stack([found.get(layer, nothing)[: len(ids)] for layer in rows], 1)
    spans, text = [], ""
    for number in range(len(ids)):
        longer = model.processor.tokenizer.decode(ids[: number + 1], skip_special_tokens=True)
        spans.append((len(text), len(longer)))
        text = longer
    start = len(inputs.layout[model.speaker].tokens) - 1
    return Caption(inputs, tuple(ids), text, tuple(spans), start, upcast(activations))


def packed(model: Model, caption: Caption) -> Caption:
    """A caption that takes the room in the computer's memory that the model's own precision asks for."""
    return replace(caption, activations=caption.activations.to("cpu", model.dtype))


def tokenized(model: Model, example: Example, text: str, prompt: str | None) -> list[int]:
    """A text's tokens as they follow the prompt, and the one that ends it."""
    check_words(model, "the caption", text)
    asked, images = prompt or example.clean_prompt, 1 + len(example.more_images)
    return model.family.options(model.processor, asked, text, images)


def caption_pictures(
    model: Model,
    examples: Sequence[Example],
    prompt: str | None = None,
    *,
    found: Found | None = None,
    variant: Variant = "input",
) -> Iterator[Caption]:
    """The captions of examples' pictures, one after the other: those that are `known`, else by generation."""
    asked = [(example, prompt) for example in examples]
    for example, caption in zip(examples, known(model, asked, found, variant), strict=True):
        yield caption or generate_caption(model, inputs_of(model, example, prompt), variant=variant)


def known(
    model: Model,
    asked: Sequence[tuple[Example, str | None]],
    found: Found | None,
    variant: Variant = "input",
    what: str = "captions",
) -> Iterator[Caption | None]:
    """For pictures and what is asked about them the captions that `found` has of this model, or None.

    Of one that was read from a folder only the text is known: it is fed in one forward, and taken if each of
    its tokens is what the model would have said there. With other edits the model may say something else.
    Raises `ModelError` if the captions are of other weights.
    """
    held: Mapping[tuple[Example, str], Caption] = {}
    texts: dict[tuple[str, str], str] = {}
    if found is not None:
        fingerprint = base_fingerprint(model)
        if found.about["weights"] != fingerprint:
            raise ModelError(
                f"the neurons were found in another model or revision than {model.name} "
                f"({str(found.about['weights'])[:8]}…, not {fingerprint[:8]}…); give those of this one"
            )
        if found.about.get("on", []) == list(model.edits):
            columns = (found.captions[name] for name in ("example", "prompt", "caption"))
            held = found.held if variant == "input" else {}
            texts = {(example, prompt): text for example, prompt, text in zip(*columns, strict=True)}
    with progress(len(asked), what=what) as step:
        for number, (example, prompt) in enumerate(asked, start=1):
            words = prompt or example.clean_prompt
            caption, text = held.get((example, words)), texts.get((example.id, words))
            if caption is None and text:
                ids = tokenized(model, example, text, prompt)
                caption, logits = _told(model, example, prompt, ids, variant)
                if len(ids) > LENGTH or logits.argmax(-1).tolist() != ids:
                    caption = None
            yield caption
            step(0, number)


def nouns(text: str, tagger: str) -> list[str]:
    """The nouns of a text, by a spaCy pipeline (`ModelError` without it); `ExampleError` if it has none."""
    found = list(dict.fromkeys(t.text for t in spacy_pipeline(tagger)(text) if t.pos_ in ("NOUN", "PROPN")))
    if not found:
        raise ExampleError(f"the caption '{text}' has no noun; name the words")
    return found


@lru_cache(1)
def spacy_pipeline(tagger: str) -> Callable[[str], Any]:
    """A spaCy pipeline, loaded once."""
    try:
        import spacy

        return spacy.load(tagger)
    except ImportError as error:
        raise ModelError(
            "picking nouns needs spaCy; pip install 'vlmscope[nouns]', or name the words"
        ) from error
    except OSError as error:
        raise ModelError(
            f"no spaCy pipeline '{tagger}'; python -m spacy download en_core_web_sm gets one, "
            "or name the words"
        ) from error
