"""From an example to the tensors of its runs, and the tokens that are scored."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from PIL import Image

from vlmscope.data.example import Example, Picture, Span, check_text, find_roles
from vlmscope.data.images import open_image
from vlmscope.data.masks import covered, object_of
from vlmscope.errors import ExampleError, shown
from vlmscope.layout import Layout, grid
from vlmscope.models.inputs import Inputs, Pair
from vlmscope.runs.network import Network
from vlmscope.runs.sinks import sinks

_WORD = "\0"
"""What the name of a word's own role begins with, which no column of a CSV file can."""
_QUESTION = "\0question"
"""The role of all that a person wrote, while a prompt is made to tensors."""


def encode(
    network: Network,
    images: Sequence[Picture],
    prompt: str,
    roles: Mapping[str, Any] = {},
    fed: Sequence[int] = (),
    read: int = 1,
) -> Inputs:
    """The tensors of one run; `fed` are tokens behind the prompt, the `read` last positions are scored."""
    check_words(network, "the prompt", prompt)
    pictures = [open_image(image) for image in images]
    given = partial(network.family.encode, network.hf, network.processor, pictures, prompt)
    try:
        inputs = given({**roles, **_question(network, prompt)}, fed)
    except ExampleError:  # where not all of its tokens are found, a prompt has no `question`
        inputs = given(roles, fed)
    tensors = {k: v.to(network.device) for k, v in inputs.tensors.items()}
    layout = dict(inputs.layout)
    for tower, there in inputs.layout.items():
        own = {name: at for name, at in there.roles.items() if name != _QUESTION}
        layout[tower] = replace(there, roles=own, question=there.roles.get(_QUESTION, ()))
    there = layout[network.speaker]
    there = replace(there, readout=len(there.tokens) - read, fed=len(fed))
    run = Inputs(tensors, {**layout, network.speaker: there})
    there = replace(there, sinks=cache(partial(sinks, network, run)))
    return Inputs(tensors, {**layout, network.speaker: there})


def _question(network: Network, prompt: str) -> dict[str, Span]:
    """Where the words of a prompt stand: behind its images, or else before them."""
    mark = network.mark
    end = prompt.rfind(mark) + len(mark) if mark and mark in prompt else 0
    if end and not prompt[end:].strip():
        return {_QUESTION: (0, prompt.find(mark))} if prompt[: prompt.find(mark)].strip() else {}
    return {_QUESTION: (end, len(prompt))} if prompt[end:].strip() else {}


class Objects(Mapping[str, tuple[int, ...]]):
    """The positions of the image that each mask of an example covers, found when they are asked for;
    `object` is the answer's."""

    def __init__(self, network: Network, example: Example, layout: Layout) -> None:
        self.network, self.example, self.layout = network, example, layout

    def __getitem__(self, name: str) -> tuple[int, ...]:
        mask = (object_of(self.example) if name == "object" else name) or ""
        self.example.masks[mask]
        view = self.network.family.view(self.network.processor, open_image(self.example.clean_image))
        found = covered(self.example, mask, grid(self.layout), view)
        return tuple(n for n, at in self.layout.cells.items() if found[at])

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*(["object"] if object_of(self.example) else []), *self.example.masks]))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _with_objects(network: Network, example: Example, inputs: Inputs) -> Inputs:
    """The inputs with what the example's masks cover, in the towers that have a grid of patches."""
    layout = {
        tower: replace(there, objects=Objects(network, example, there)) if there.cells else there
        for tower, there in inputs.layout.items()
    }
    return Inputs(inputs.tensors, layout)


def check_words(network: Network, what: str, text: str) -> None:
    """Refuse words that are none to the model: nothing to read, or tokens that only its template writes.

    A prompt that holds the image's placeholder is the whole text that the model reads, so it may hold the
    template's tokens, but not those that the processor puts in the placeholder's place. Raises
    `ExampleError`, which begins with `what`.
    """
    check_text(what, text)
    if text and not any(unicodedata.category(c)[0] in "LNPS" for c in text):
        raise ExampleError(f"{what} {shown(text)} has nothing to read in it; write words")
    tokenizer, config, mark = network.processor.tokenizer, network.hf.config, network.mark
    image = getattr(config, "image_token_id", None)
    special = {getattr(network.processor, "video_token", None)}
    special |= {tokenizer.convert_ids_to_tokens(image)} if image is not None else {None}
    is_prompt = what == "the prompt"
    if not (is_prompt and mark and mark in text):
        special |= {*tokenizer.all_special_tokens, mark}
    if typed := next(
        (one for one in sorted(filter(None, special - {mark * is_prompt})) if one in text), None
    ):
        whole = (
            f", or write the whole text that the model reads, with {mark} in it" if mark and is_prompt else ""
        )
        raise ExampleError(
            f"{what} holds '{typed}', which is no word but a token of its own; take it out{whole}"
        )


def prepare(network: Network, example: Example, whole: bool = False) -> Pair:
    """The clean and the corrupt run of an example, and the tokens that are scored.

    What the example leaves out of the corrupt run (image or prompt) is as in the clean one. The first token
    in which answer and foil differ is scored, behind what they share; with `whole` all tokens of the answer
    are, and no foil is needed.

    Raises `ExampleError` if an image cannot be read, the prompts do not align token for token, or an option
    is empty, unknown to the tokenizer, or the same as the other."""
    prompt, many = example.clean_prompt, 1 + len(example.more_images)
    foil: int | None = None
    if whole:
        answers = tuple(option_of(network, prompt, "answer", example.answer, many)[:-1])
        fed = list(answers[:-1])
    else:
        fed, answer, foil = _options(network, example, many)
        answers = (answer,)
    other = prompt if example.corrupt_prompt is None else example.corrupt_prompt
    images, read = [example.clean_image, *example.more_images], len(answers)
    if example.corrupt_image is None and other == prompt:
        clean = _with_objects(network, example, encode(network, images, prompt, example.roles, fed, read))
        return Pair(clean, clean, answers[0], foil, (), answers)
    words = [_words(network, text) for text in (prompt, other)]
    clean = encode(network, images, prompt, {**example.roles, **words[0]}, fed, read)
    images[0] = example.corrupt_image or example.clean_image
    corrupt = encode(network, images, other, words[1], fed, read)
    clean = _with_objects(network, example, _aligned(clean, corrupt, prompt.split(), other.split()))
    tensors, pixels = dict(corrupt.tensors), network.family.pixels
    if example.corrupt_image is None:  # the same tensor, so that nobody encodes it twice
        tensors[pixels] = clean.tensors[pixels]
    layout = {  # the prompts align: roles stand where they stood
        tower: replace(there, tokens=corrupt.layout[tower].tokens) for tower, there in clean.layout.items()
    }
    return Pair(clean, Inputs(tensors, layout), answers[0], foil, (), answers)


def option_of(network: Network, prompt: str, what: str, text: str, images: int) -> list[int]:
    """The tokens of an answer, a foil or another word as it would follow the prompt.

    Its end belongs to it, and tells "red" from "red wine". Raises `ExampleError`, which calls it `what`, for
    one that is no word to the model.
    """
    if not text.strip():
        instead = ", or score the whole answer (metric logprob)" if what == "foil" else ""
        raise ExampleError(f"the {what} {shown(text)} is empty; give it a word{instead}")
    check_words(network, f"the {what}", text)
    tokens = network.family.options(network.processor, prompt, text, images)
    if not tokens[:-1]:
        raise ExampleError(
            f"the {what} {shown(text)} is nothing to the model's tokenizer; choose another word"
        )
    unknown = network.processor.tokenizer.unk_token_id
    if unknown is not None and unknown in tokens[:-1]:  # OPT's end token is this, too
        raise ExampleError(
            f"the {what} {shown(text)} is unknown to the model's tokenizer; choose another word"
        )
    return tokens


def _options(network: Network, example: Example, images: int) -> tuple[list[int], int, int]:
    """What answer and foil share at their beginning, and the tokens in which they differ first."""
    options = (("answer", example.answer), ("foil", example.foil))
    answer, foil = (option_of(network, example.clean_prompt, *option, images) for option in options)
    same = next((n for n, (a, b) in enumerate(zip(answer, foil, strict=False)) if a != b), None)
    if same is None:
        both = f"answer {shown(example.answer)} and foil {shown(example.foil)}"
        raise ExampleError(f"{both} are the same tokens; choose another foil")
    return answer[:same], answer[same], foil[same]


def _words(network: Network, prompt: str) -> dict[str, Span]:
    """The words of a prompt as roles, which `_aligned` takes out again; the image's mark is none."""
    words = enumerate(re.finditer(r"\S+", prompt))
    return {f"{_WORD}{n}": m.span() for n, m in words if not network.mark or network.mark not in m[0]}


def _aligned(clean: Inputs, corrupt: Inputs, words: Sequence[str], others: Sequence[str]) -> Inputs:
    """The clean run without the words' roles; places of the two must correspond, patch by patch, word by
    word."""
    misaligned = "the prompts do not align token for token"
    if len(words) != len(others):
        raise ExampleError(
            f"{misaligned}: the clean one has {len(words)} words, the corrupt one {len(others)}; "
            "choose other words"
        )
    layout = {}
    for tower, there in clean.layout.items():
        here = corrupt.layout[tower]
        if sorted(there.cells.values()) != sorted(here.cells.values()):
            sizes = [" x ".join(map(str, grid(x))) for x in (there, here)]
            raise ExampleError(
                f"the clean image has a grid of {sizes[0]} patches, the corrupt one of {sizes[1]}, so their "
                "positions do not correspond; resize the corrupt image to the clean one's size"
            )
        for name, at in there.roles.items():
            if name.startswith(_WORD) and at != (then := here.roles.get(name, ())):
                n = int(name.removeprefix(_WORD))
                raise ExampleError(
                    f"{misaligned}: word {n + 1} is {shown(words[n])} ({len(at)} tokens) in the clean one, "
                    f"{shown(others[n])} ({len(then)} tokens) in the corrupt one; choose other words"
                )
        if len(there.tokens) != len(here.tokens):
            raise ExampleError(
                f"the clean run has {len(there.tokens)} positions in the {tower} tower, the corrupt one "
                f"{len(here.tokens)}, so they do not correspond; choose other words or images"
            )
        own = {name: at for name, at in there.roles.items() if not name.startswith(_WORD)}
        layout[tower] = replace(there, roles=own)
    return Inputs(clean.tensors, layout)


def layouts(network: Network) -> Mapping[str, Layout]:
    """What stands at each position of each tower, for a blank picture and a short question."""
    prompt = "is this circle red or blue?"
    roles = find_roles(prompt, {"answer": "red", "foil": "blue", "noun": "circle"})
    return encode(network, [Image.new("RGB", (64, 64))], prompt, roles).layout
