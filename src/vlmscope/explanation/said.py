"""What a model says about a picture, word by word, and the runs in which its words are scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from PIL import Image, ImageFilter, ImageStat

from vlmscope.errors import ExampleError, shown
from vlmscope.models.inputs import Inputs, Pair
from vlmscope.neurons.captions import Caption, generate_caption
from vlmscope.patching.trace import Images
from vlmscope.runs.model import Model
from vlmscope.runs.prepare import encode
from vlmscope.sites import Site

Reference = Literal["blur", "mean"]
At = Literal["features", "pixels"]
BLUR = 8
"""The blur's standard deviation is this part of the longer side."""
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")


class Word(NamedTuple):
    """A word that was said: where it stands in the answer, and the numbers of its tokens there."""

    text: str
    span: tuple[int, int]
    tokens: tuple[int, ...]


def blank(picture: Image.Image, reference: Reference) -> Image.Image:
    """What a picture is compared with: its own blur, or its mean color.

    >>> blank(Image.new("RGB", (8, 8), (10, 20, 30)), "mean").getpixel((0, 0))
    (10, 20, 30)
    """
    if reference == "blur":
        return picture.filter(ImageFilter.GaussianBlur(max(picture.size) / BLUR))
    red, green, blue = (round(each) for each in ImageStat.Stat(picture).mean)
    return Image.new("RGB", picture.size, (red, green, blue))


@dataclass(frozen=True, eq=False)
class Said:
    """A picture, a prompt, the model's own answer and the `words` of it that are explained.

    `blank` is the picture that it is compared with, `at` says what of a cell is replaced by what that has;
    `images` keeps what the vision tower gives.
    """

    model: Model
    picture: Image.Image
    blank: Image.Image
    prompt: str
    caption: Caption
    words: Sequence[Word]
    at: At = "features"
    images: Images = field(default_factory=Images)

    def inputs(self, picture: Image.Image, first: int, last: int) -> Inputs:
        """The run in which the tokens from `first` to `last` of the answer are predicted: fed are those
        before the last."""
        ids = self.caption.ids
        return encode(self.model, [picture], self.prompt, {}, ids[:last], last - first + 1)

    @property
    def first(self) -> int:
        """The number of the first token that is scored."""
        return min(n for word in self.words for n in word.tokens)

    @cached_property
    def pair(self) -> Pair:
        """The picture, and the one that it is compared with; all tokens from the first word's to the last's
        are scored."""
        first, last = self.first, max(n for word in self.words for n in word.tokens)
        answers = self.caption.ids[first : last + 1]
        clean, other = (self.inputs(one, first, last) for one in (self.picture, self.blank))
        return Pair(clean, other, answers[0], None, (), tuple(answers))

    def word(self, number: int) -> Pair:
        """One word's own run, which ends with what predicts its last token."""
        tokens = self.words[number].tokens
        inputs = self.inputs(self.picture, tokens[0], tokens[-1])
        answers = tuple(self.caption.ids[tokens[0] : tokens[-1] + 1])
        return Pair(inputs, inputs, answers[0], None, (), answers)


def features(model: Model, at: At = "features") -> tuple[Site, ...]:
    """Where the language model reads the features of the picture (`Network.image_sites`), or where its pixels
    enter the vision tower."""
    return (Site("vision", 0, "resid_pre", position="image"),) if at == "pixels" else model.image_sites


def say(
    model: Model,
    picture: Image.Image,
    reference: Reference,
    prompt: str,
    wanted: Sequence[str],
    length: int,
    at: At = "features",
) -> Said:
    """The model's own answer, of at most so many tokens, and the words of it that are wanted (all, if none
    is named). Raises `ExampleError` where nothing is said, or another word is wanted."""
    caption = generate_caption(model, model.inputs(picture, prompt), length=length)
    words = words_of(caption)
    if not words:
        text = f"{model.name} says {shown(caption.text)}, which has no word to explain; ask something else"
        raise ExampleError(text)
    if getattr(model.hf.config, "image_token_id", None) in caption.ids:
        raise ExampleError(
            f"{model.name} says a token that stands for a picture, so its answer cannot be read again"
        )
    asked = [word.casefold() for word in wanted]
    for word in wanted:
        if word.casefold() not in {one.text.casefold() for one in words}:
            raise ExampleError(
                f"the word {shown(word)} was not said; name one of {shown(caption.text.strip(), 200)}"
            )
    chosen = [one for one in words if not asked or one.text.casefold() in asked]
    return Said(model, picture, blank(picture, reference), prompt, caption, chosen, at)


def words_of(caption: Caption) -> list[Word]:
    """The words of an answer; a token that is in two is the first one's."""
    found, taken = list[Word](), set[int]()
    for match in _WORD.finditer(caption.text):
        tokens = [
            n
            for n, (start, end) in enumerate(caption.spans)
            if n not in taken and caption.text[max(start, match.start()) : min(end, match.end())].strip()
        ]
        if tokens:
            taken |= {*tokens}
            found.append(Word(match[0], match.span(), tuple(range(tokens[0], tokens[-1] + 1))))
    return found
