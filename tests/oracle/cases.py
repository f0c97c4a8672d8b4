"""What transformers' own documentation does with a model of each class, for pictures and a prompt.

A `Case` knows nothing of vlmscope: it asks the processor, in the way that the class's documentation
does, what a model is given (`read`, `run`), and which tokens stand where an answer is taught (`taught`).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from families import text
from PIL import Image

import vlmscope


def picture(seed: int, width: int = 24, height: int = 24) -> Image.Image:
    dots = random.Random(seed).randbytes(3 * width * height)
    return Image.frombytes("RGB", (width, height), dots)


ONE, OTHER = picture(1, 28, 16), picture(2, 28, 16)
"""Two pictures of one size: a clean and a corrupt one."""
SECOND = picture(3, 16, 36)
"""A further picture, of another size."""
PROMPT = "is the circle red or blue?"
PINPOINTS = [[12, 24], [24, 12], [24, 24]]
"""The sizes that pictures are scaled to before they are cut into tiles of 12 pixels."""


def shaken(hf: torch.nn.Module, seed: int = 0) -> Any:
    """Weights so large that every part of the model counts, norms and biases included."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.5)
            elif name.endswith("gate") or "gate_" in name.rpartition(".")[2]:
                weight.fill_(0.7)
            else:
                weight.add_(0.2 * torch.randn_like(weight))
    return hf.double().eval()


class Spy:
    """A tokenizer that remembers what text it was last given for the model, and what it made of it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.texts, self.made = tokenizer, [], []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: Any, *args: Any, **named: Any) -> Any:
        made = self.tokenizer(text, *args, **named)
        self.texts.append(text if isinstance(text, str) else text[0])
        self.made.append(made.encodings[0])
        return made


@dataclass
class Case:
    """One model with its processor, and how its documentation calls them.

    `ids` names the tensor of the tokens that the tower that predicts reads; `image` is the id of the
    image's tokens in `input_ids`, where the image has any there. `cut_off` tokens at the end are left
    away before the model is called.
    """

    name: str
    hf: Any
    processor: Any
    several: bool = False
    ids: str = "input_ids"
    image: int | None = None
    cut_off: int = 0

    @cached_property
    def model(self) -> vlmscope.Model:
        return vlmscope.Model(self.hf, self.processor, self.name)

    @cached_property
    def eager(self) -> Any:
        """The same weights with Hugging Face's own eager attention."""
        other = copy.deepcopy(self.hf)
        other.set_attn_implementation("eager")
        return other

    def text(self, images: Sequence[Image.Image], prompt: str) -> str:
        """The text that the processor is given."""
        return prompt

    def blank(self, images: Sequence[Image.Image], prompt: str) -> str:
        """What stands between that text and an answer."""
        return "" if self.text(images, prompt)[-1:].isspace() else " "

    def call(self, images: Sequence[Image.Image], text: str) -> Mapping[str, Any]:
        return self.processor(images=list(images), text=text, return_tensors="pt")

    def read(self, images: Sequence[Image.Image], prompt: str) -> dict[str, torch.Tensor]:
        """The tensors that the documentation's call gives."""
        return dict(self.call(images, self.text(images, prompt)))

    def run(self, images: Sequence[Image.Image], prompt: str) -> dict[str, torch.Tensor]:
        """The tensors that generation's first forward is called with."""
        return self.read(images, prompt)

    def taught(self, images: Sequence[Image.Image], prompt: str, answer: str) -> list[int]:
        """All tokens of the tower that predicts, with the answer behind the prompt."""
        text = self.text(images, prompt) + self.blank(images, prompt) + answer
        return self.call(images, text)["input_ids"][0].tolist()

    def asked(self, images: Sequence[Image.Image], prompt: str) -> list[int]:
        """The same without an answer."""
        return self.run(images, prompt)[self.ids][0].tolist()

    def spied(self, images: Sequence[Image.Image], prompt: str) -> tuple[str, Any, int]:
        """The text that the tokenizer got, its tokens with their places in it, and how many tokens of
        the image the processor put before them."""
        plain = self.processor.tokenizer
        self.processor.tokenizer = spy = Spy(plain)
        try:
            ids = self.read(images, prompt)["input_ids"][0].tolist()
        finally:
            self.processor.tokenizer = plain
        text, made = next((one, made) for one, made in zip(spy.texts, spy.made, strict=True) if prompt in one)
        before = len(ids) - len(made.ids)
        assert ids[before:] == list(made.ids)
        return text, made, before

    def double(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors as a model in float64 takes them, without what only a loss is for."""
        return {
            name: one.double() if one.is_floating_point() else one
            for name, one in tensors.items()
            if name != "labels"
        }


@dataclass
class Chat(Case):
    """A processor with a chat template."""

    several: bool = True

    def talk(self, images: Sequence[Image.Image], prompt: str) -> list[dict[str, Any]]:
        parts = [{"type": "image", "image": one} for one in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]

    def text(self, images: Sequence[Image.Image], prompt: str) -> str:
        return self.processor.apply_chat_template(self.talk(images, prompt), add_generation_prompt=True)

    def blank(self, images: Sequence[Image.Image], prompt: str) -> str:
        """Read off what the template itself writes before an assistant's words, where it can be."""
        said = {"role": "assistant", "content": [{"type": "text", "text": "WORDS"}]}
        whole = self.processor.apply_chat_template([*self.talk(images, prompt), said])
        start = self.text(images, prompt)
        if not whole.startswith(start):
            return super().blank(images, prompt)
        return whole[len(start) : whole.index("WORDS")]

    def read(self, images: Sequence[Image.Image], prompt: str) -> dict[str, torch.Tensor]:
        return dict(
            self.processor.apply_chat_template(
                self.talk(images, prompt),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )

    def call(self, images: Sequence[Image.Image], text: str) -> Mapping[str, Any]:
        start = self.processor.tokenizer.bos_token
        written = start is not None and text.startswith(start)
        return self.processor(
            images=[list(images)], text=text, return_tensors="pt", add_special_tokens=not written
        )


@dataclass
class PaliGemma(Case):
    several: bool = True

    def text(self, images: Sequence[Image.Image], prompt: str) -> str:
        return "<image>" * len(images) + prompt

    def call(self, images: Sequence[Image.Image], text: str, **more: Any) -> Mapping[str, Any]:
        return self.processor(images=[list(images)], text=text, return_tensors="pt", **more)

    def taught(self, images: Sequence[Image.Image], prompt: str, answer: str) -> list[int]:
        made = self.call(images, self.text(images, prompt), suffix=answer)
        return made["input_ids"][0].tolist()


@dataclass
class Single(Case):
    """One picture and plain text."""

    def call(self, images: Sequence[Image.Image], text: str) -> Mapping[str, Any]:
        return self.processor(images=images[0], text=text, return_tensors="pt")


@dataclass
class EncoderDecoder(Single):
    """The answer is taught to a decoder of its own, from its start token on."""

    ids: str = "decoder_input_ids"
    start: int = 0

    def run(self, images: Sequence[Image.Image], prompt: str) -> dict[str, torch.Tensor]:
        return {**self.read(images, prompt), "decoder_input_ids": torch.tensor([[self.start]])}

    def taught(self, images: Sequence[Image.Image], prompt: str, answer: str) -> list[int]:
        made = self.processor.tokenizer(answer)["input_ids"]
        if made[0] == self.processor.tokenizer.cls_token_id:
            made = made[1:]  # BLIP's decoder begins with a start token of its own in its place
        return [self.start, *made]


@dataclass
class Captioning(Single):
    """BLIP's `generate` puts its start token over `[CLS]` and takes the `[SEP]` off."""

    start: int = 0
    cut_off: int = 1

    def cut(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids[:, :-1].clone()
        ids[:, 0] = self.start
        return ids

    def run(self, images: Sequence[Image.Image], prompt: str) -> dict[str, torch.Tensor]:
        made = self.read(images, prompt)
        return {
            **made,
            "input_ids": self.cut(made["input_ids"]),
            "attention_mask": made["attention_mask"][:, :-1],
        }

    def taught(self, images: Sequence[Image.Image], prompt: str, answer: str) -> list[int]:
        made = self.call(images, f"{self.text(images, prompt)} {answer}")
        return [*self.cut(made["input_ids"])[0].tolist(), self.processor.tokenizer.sep_token_id]


def numbers(tokenizer: Any) -> dict[str, Any]:
    """The special tokens' numbers, as a config has them."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def words(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return text(len(tokenizer), **numbers(tokenizer), **more)
