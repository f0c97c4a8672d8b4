"""What no command can take: values of options, options, words and commands that are none.

Commands and their options are read from the application, so that what is new is tried, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import get_args

import good
from frame import Case
from good import Option

LONG = "x" * 5000
NUMBERS = (
    *(
        "-1",
        "9" * 5000,
        "1" + "0" * 12,
        "3.²",
        "²",
        "３",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "",
        " ",
        "0x10",
        "x",
    ),
    *("10**12", "1_0", "1 2", "1;2", "1,2", "\x1b[31m1", "1\0", "--1", "+-1", "1.5.2", LONG, "½", "∞"),
)
FRACTIONS = ("1.5", "1e3", "5.", "1e-400")
"""Numbers, but no whole ones."""
TEXTS = ("\0", "a\0b", "\udc80", "")
FILES = ("gone", "gone/gone", "root", "a.png/x", "", "\0", LONG, "https://example.com/x", "pipe", "loop")
FOLDERS = (
    "gone",
    "a.png",
    "a.png/x",
    "",
    "\0",
    LONG,
    "https://example.com/x",
    "pipe",
    "/dev/zero",
    "root",
    "loop",
)
PLACES = ("a.png", "a.png/x", "spec.toml", "", "\0", LONG, "device", "pipe", "root", "loop")
"""Where nothing can be written, or something else lies. No device by its own name: it would be replaced."""
MODELS = (
    *(
        "toy-blp",
        "toyblip",
        "BLIP-VQA",
        "LLaVA",
        "states",
        "a.png",
        "root",
        "gone/",
        "./gone",
        "..",
        "../..",
        "/",
    ),
    *(
        "https://huggingface.co/a/b",
        "a/b/c",
        "-x",
        "a b",
        LONG,
        "nobody/nothing",
        "spec.toml",
        "found",
        "~",
        "*",
    ),
)
SETS = (
    *("stats", "sates", "state", "colours", "toy-blip", "root", "a.png", "gone.csv", "..", "/", "pipe"),
    *("/dev/zero", LONG),
)
SITES = ("encoder", "encoder.9.resid@answer", "encoder.0.resid", "encoder.0.resid@verb", "*", "@", LONG)
WORDS = ("xylophone", "two words", LONG)
WRONG: dict[str, tuple[str, ...]] = {
    "model": MODELS,
    "data": SETS,
    "device": ("tpu9", "cuda:99", "CPU", "gpu", "cpu:x", LONG, "cuda:-1", "meta", "mps", "0"),
    "sites": SITES,
    "patch": (*SITES, "decoder.0.resid@last + decoder.0.resid"),
    "edit": (
        *("decoder.2.mlp@all", "decoder.2.mlp@all scale", "decoder.2.mlp@all scale x", "scale 0", LONG),
        *("decoder.2.mlp@all double 2", "decoder.2.mlp@all scale nan", "decoder.2.mlp@all set inf"),
        *("decoder.*.mlp@all scale 0", "decoder.2.mlp.n*@all scale 0", "decoder.2.mlp@* scale 0 0"),
        *("decoder.2.mlp@all scale 1e999", "decoder.9.mlp@all scale 0", "decoder.2.mlp@all scale ３"),
        *("decoder.2.mlp@all + decoder.3.mlp scale 0", "decoder.2.mlp@noun set 1"),
    ),
    "position": ("verb", "answr", LONG, "*", "1-2", "image[9,9]"),
    "corrupt": ("sound", "Image", "image,text", LONG, "noise image"),
    "word": WORDS,
    "source": WORDS,
    "neuron": (
        *("3.²", "3", "3.", ".3", "99.1", "1.99999999", "-1.2", "1.-2", "a.b", "L3.N", "９.1", "1.2.3"),
        "9" * 5000 + ".1",
    ),
    "kinds": ("residd", "cross attn", "output", LONG),
    "figures": ("png8", "SVG", "svg,pdf", "../x", LONG),
    "name": ("folders", "coco", "../folder", "svo_probes", LONG),
    "example": (
        *("states", "states:", ":0", "states:99999999999", "states:-1", "states:²", "stats:0", "gone.csv:0"),
        LONG,
    ),
    "tagger": ("gone", "../..", "os", LONG),
    "embedding": ("gone", "../..", "a.png", LONG),
    "windows": ("2", "0", "4"),
    "top": ("0", "99999"),
}
"""By the name of an option, what has the right type and still is wrong."""
OUT = ("out", "export")
BESIDE = ("tracing", "circuits", "heads", "lens", "steer", "probe")
BESIDE += ("neurons find", "neurons describe", "neurons perturb")
"""Commands whose files may stand beside others in a folder."""
INPUTS = {"image": FILES, "other": FILES, "spec": FILES, "on": FILES, "files": FILES}


def values(option: Option, command: str) -> tuple[str, ...]:
    """Wrong values of an option."""
    found = WRONG.get(option.name, ())
    if (command, option.name) == ("steer", "word"):  # any that its model can spell
        found = (LONG,)
    if (command, option.name) == ("neurons find", "top"):
        found = ()
    if option.kind is int:
        return (*found, *NUMBERS, *FRACTIONS)
    if option.kind is float:
        return (*found, *(number for number in NUMBERS if number != "1" + "0" * 12))
    if option.kind is Path and option.name == "out" and command in BESIDE:
        return (*found, *(place for place in PLACES if place != "root"))
    if option.kind is Path:
        return (*found, *(PLACES if option.name in OUT else INPUTS.get(option.name, FOLDERS)))
    if choices := get_args(option.kind):
        near = [choices[0][:-1], choices[0].upper(), f"{choices[0]},{choices[-1]}", f" {choices[0]}"]
        return (*found, *near, "", LONG, "\x1b[2J", "\0")
    return (*found, *(text for text in TEXTS if text or option.name not in ("prompt", "wording")))


def broken(random: Random, words: list[str], options: list[Option]) -> list[str]:
    """A line that no command has: flags twice, without a value, with one too many, misspelt; stray words."""
    flags = [n for n, word in enumerate(words) if word.startswith("--")]
    several = {option.flag for option in options if option.several}
    singles = [n for n in flags if words[n] not in several and words[n] != "--no-measures"]
    at = random.choice(flags) if flags else 0
    ways: list[Callable[[], list[str]]] = [
        lambda: [*words, "--no-such-option"],
        lambda: [*words, "-x"],
        lambda: [*words, f"--{LONG}"],
        lambda: [*words, "--\x1b[2J"],
        lambda: [*words, "--limt", "3"],
        lambda: ["swep", *words[1:]],
        lambda: [LONG, *words[1:]],
        lambda: ["", *words[1:]],
        lambda: ["neurons", "finds"],
        lambda: ["--verson"],
        lambda: [words[0][:-1], *words[1:]],
        lambda: [words[0].upper(), *words[1:]],
        lambda: words[: flags[0]] if flags and words[0] not in ("models", "demo") else ["sweep"],
    ]
    if flags and words[at] != "--no-measures":
        ways += [
            lambda: [*words[: at + 1], "--seed", "1"],
            lambda: [*words[:at], *words[at + 2 :], words[at]],
            lambda: [*words[:at], words[at][:-1], *words[at + 1 :]],
            lambda: [*words[:at], words[at][1:], *words[at + 1 :]],
            lambda: [*words[:at], words[at].upper(), *words[at + 1 :]],
        ]
        if singles:
            one = random.choice(singles)
            ways += [
                lambda: [*words, *words[one : one + 2]],
                lambda: [*words[:one], *words[one : one + 2], *words[one:]],
                lambda: [*words[: one + 2], "stray", *words[one + 2 :]],
            ]
    for option in options:
        if option.kind is bool:
            ways.append(lambda flag=option.flag: [*words, f"{flag}=1"])  # type: ignore[misc]
    return random.choice(ways)()


def cases(random: Random, top: Path) -> Iterator[Case]:
    commands = dict(good.commands())
    listed = iter(first(commands))
    for folder in good.folders(top):
        os.mkfifo(folder / "pipe")
        (folder / "loop").symlink_to("loop")
        (folder / "device").symlink_to(os.devnull)
        given = next(listed, None)
        if given is None:
            command = random.choice(list(commands))
            options = [option for option in commands[command] if option.kind is not bool]
            option = random.choice(options)
            there = good.line(command)
            wrong = random.choice([value for value in values(option, command) if value not in there])
            words = good.with_value(good.line(command), option.flag, wrong)
            if random.random() < 0.3:
                words = broken(random, good.line(command), commands[command])
        else:
            words = given
        yield Case(" ".join(word if len(word) < 60 else f"{word[:9]}…" for word in words), words, folder)


def first(commands: dict[str, list[Option]]) -> Iterator[list[str]]:
    """What was once answered wrongly."""
    sweep = good.line("sweep")
    for flag, value in (
        *(("--noise-scale", "nan"), ("--noise-scale", "inf"), ("--draws", "1" + "0" * 12), ("--seed", "-1")),
        *(
            ("--limit", "0"),
            ("--limit", "-5"),
            ("--seed", "9" * 5000),
            ("--check", "-1"),
            ("--dtype", "8bit"),
        ),
        *(("--model", "toy-blp"), ("--data", "stats"), ("--out", "a.png"), ("--device", "nonsense")),
    ):
        yield good.with_value(good.with_value(sweep, "--corrupt", "noise"), flag, value)
    yield [*good.line("neurons describe"), "--neuron", "3.²"]
    yield [*sweep, "--limit", "2"]
    yield ["models", "toy-blip", "states:0"]
