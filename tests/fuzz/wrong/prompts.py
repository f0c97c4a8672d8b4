"""Prompts and answers: special tokens, characters that no text has, blanks, and more than a model reads."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

from frame import Case
from hypothesis import strategies as st
from sets import EXAMPLE, IMAGE, TEXT, changed, drawn, fill, folders, one, rows, same
from tokenizers import Tokenizer

import vlmscope.toys

SPECIAL = {
    "toy-blip": "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] [ENC]".split(),
    "toy-llava": "<pad> <unk> <s> </s> <image>".split(),
}
ODD = ["\x00", "\x01", "\x07", "\x1b[31m", "\x7f", "\x9b2J", "\udcff", "\ud800", "\x08" * 50]
QUESTION = rows()[0]["clean_prompt"]
SAID = ["--image", "clean-0.png", "--prompt"]


def within(text: str, random: Random, what: str) -> str:
    """A text with something between two of its words, or at an end."""
    words = text.split()
    words.insert(random.randrange(len(words) + 1), what)
    return random.choice(("", " ")).join(words) if random.random() < 0.2 else " ".join(words)


def alone(random: Random, model: str, prompt: str) -> list[str]:
    """A command that is given a prompt on its command line."""
    if random.random() < 0.6:
        return ["generate", "--model", model, *SAID, prompt]
    return ["neurons", "find", "--model", "toy-llava", "--top", "3", "--out", "out", *SAID, prompt]


def model_of(argv: list[str]) -> str:
    return argv[argv.index("--model") + 1]


@functools.cache
def tokenizer(model: str) -> Tokenizer:
    folder = Path(vlmscope.toys.__file__).parent / model
    return Tokenizer.from_str(json.dumps(json.loads((folder / "tokenizer.json").read_text("utf-8"))))


def numbers(out: str) -> list[int]:
    """The token ids of the encoder, as `models --example` prints them."""
    part = out.split("encoder: ")[1].split("decoder: ")[0]
    header, *lines = part.splitlines()[1:]
    end = header.index("slot")
    return [int(line[:end].split()[-1]) for line in lines if line.strip()]


def read_as(prompt: str) -> Callable[[str], bool]:
    """Whether a model was given exactly the tokens of a prompt, by the tokenizer's own file."""
    return lambda out: numbers(out) == tokenizer("toy-blip").encode(prompt).ids


def long(random: Random) -> tuple[str, list[str], dict[str, str]]:
    """More than a model reads."""
    word = random.choice(["red ", "x", "\U0001f600", "a\u0301", "? ", "\u202e"])
    size = random.choice([200, 5_000, 130_000])
    text = word * (size // len(word))
    if random.random() < 0.5:
        model = random.choice(["toy-blip", "toy-llava"])
        return f"{size} characters", alone(random, model, text), {}
    column = random.choice(["clean_prompt", "corrupt_prompt"])
    argv = EXAMPLE if column != "corrupt_prompt" else TEXT
    return f"{size} characters in {column}", argv, {column: text}


def fits(argv: list[str]) -> Callable[[str], bool]:
    """Whether a prompt of a command is read by its model: few tokens, of whatever many characters."""
    if argv[0] != "generate":
        return lambda out: False
    model, room = model_of(argv), {"toy-blip": 32, "toy-llava": 120}
    return lambda out: len(tokenizer(model).encode(argv[-1]).ids) <= room[model]


def options(random: Random) -> tuple[str, dict[str, str]]:
    """Answers that cannot be told apart, or not said."""
    shared = "red " * random.choice([32, 60, 200])
    every = {
        "60 words in common": {"correct_answer": shared + "red", "incorrect_answer": shared + "blue"},
        "an unknown answer": {"correct_answer": "日本"},
        "an unknown foil": {"incorrect_answer": "Ω"},
        "an answer of 131,000 letters": {"correct_answer": "x" * 131_000},
        "a foil of 131,000 letters": {"incorrect_answer": "yellow " * 18_000},
        "the same tokens": {
            "correct_answer": "yellow",
            "incorrect_answer": "ye\u0301llow".replace("e\u0301", "é"),
        },
        "an answer of marks": {"correct_answer": "\u0301\u0302"},
        "an answer that is turned": {"correct_answer": "\u202e\u202d"},
        "an answer of no width": {"correct_answer": "\u200b\u200d"},
        "an answer of blanks": {"correct_answer": "\u00a0\u3000"},
        "a foil of blanks": {"incorrect_answer": "\u00a0\u2003"},
        "an answer with marks": {"correct_answer": "yellow" + "\u0301" * 500},
    }
    what = random.choice(list(every))
    return what, every[what]


def cases(random: Random, top: Path) -> Iterator[Case]:
    place = folders(top)

    def folder(content: bytes | None = None) -> Path:
        found = next(place)
        fill(found, content)
        return found

    while True:
        for model, tokens in SPECIAL.items():
            for token in tokens:
                prompt = within(QUESTION, random, token)
                argv = alone(random, model, prompt)
                if model_of(argv) != model or (token == "<image>" and prompt.count(token) == 1):
                    prompt = within(prompt, random, "<image>" if model_of(argv) == "toy-llava" else "[SEP]")
                    prompt = within(prompt, random, "<image>") if model_of(argv) == "toy-llava" else prompt
                    argv[-1] = prompt
                yield Case(f"{token} in a prompt", argv, folder(), may_change=())
                if model == "toy-blip":
                    column = random.choice(["clean_prompt", "correct_answer", "incorrect_answer"])
                    cell = within(rows()[0][column], random, token)
                    yield Case(f"{token} in {column}", EXAMPLE, folder(changed(0, **{column: cell})))
        for character in ODD:
            prompt = within(QUESTION, random, character)
            if "\0" in prompt or "\ud800" in prompt:
                continue
            argv = alone(random, random.choice(list(SPECIAL)), prompt)
            yield Case(f"{character!r} in a prompt", argv, folder())
        for blanks in (" ", "\t\n", "\u00a0", "\u3000\u2003"):
            argv = alone(random, random.choice(list(SPECIAL)), blanks)
            yield Case(f"a prompt of {blanks!r}", argv, folder())
        for _ in range(8):
            what, argv, cells = long(random)
            content = one(**cells) if cells else None
            free = ("out",) if argv is TEXT else ()
            yield Case(what, argv, folder(content), may_change=free, right=fits(argv))
        for _ in range(8):
            what, cells = options(random)
            marked = (
                what == "an answer with marks"
            )  # which the tokenizer leaves out: the numbers are the same
            argv = IMAGE if marked else random.choice((EXAMPLE, IMAGE))
            there = folder(one(**cells))
            case = Case(what, argv, there, may_change=("out",) if argv is IMAGE else ())
            if marked:
                case = replace(case, right=same(there, argv, lambda good: fill(good, one()), "one"))
            yield case
        texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=10)
        for text in drawn(texts, random, 15):
            prompt = f"is {text} this cross yellow or green?"
            there = folder(changed(0, clean_prompt=prompt))
            yield Case(f"a prompt with {text!r}", EXAMPLE, there, right=read_as(prompt))
        for text in drawn(texts, random, 5):
            there = folder(changed(0, kind=text))
            yield Case(f"a group {text!r}", IMAGE, there, may_change=("out",), right=same(there, IMAGE))
