"""Specifications of `notice` that are none: values of other types, keys that are not, bytes that are no TOML.

A good specification is changed in a value, in a line or in its bytes. One that says the same as before has to
give the same run; one that is another good one is left out (`is_good`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import good
import tomli_w
from frame import Case

SPEC: dict[str, Any] = {
    "model": "toy-blip",
    "data": ["states"],
    "corrupt": ["image"],
    "sites": ["encoder.1.cross.h*@answer"],
    "limit": 1,
    "seed": 1,
    "select": False,
    "position": "answer",
    "function_examples": 5,
    "dtype": "float32",
    "device": "cpu",
}
ODD = (
    "[]",
    '""',
    "true",
    "0",
    "-1",
    "1.5",
    "nan",
    "inf",
    "{a = 1}",
    "1979-05-27",
    "07:32:00",
    "[[]]",
    "[1]",
    "{}",
)
"""As TOML; some are right for some keys."""
VALUES: dict[str, tuple[str, ...]] = {
    "model": (
        '"toy-blp"',
        '"a\\u0000b"',
        '["toy-blip"]',
        '"\\u001b[2J"',
        f'"{"x" * 5000}"',
        '"no/such"',
        '"."',
    ),
    "data": (
        *(
            '["states", "states"]',
            '"stats"',
            '["states", 1]',
            '["gone.csv"]',
            '["states.csv", "states"]',
            '[""]',
        ),
        '["."]',
    ),
    "corrupt": ('"sound"', '["image", "image"]', '["Image"]', '[["image"]]', '"image text"', '["image", ""]'),
    "sites": (
        *(
            '"x"',
            '["encoder.0.resid"]',
            '["encoder.0.resid@answer"]',
            '["encoder.9.cross.h0@answer"]',
            '[""]',
        ),
        '"encoder.1.cross.h0@verb"',
    ),
    "limit": (
        '"3"',
        "3.0",
        "1_000_000_000_000",
        "9" * 5000,
        "0x" + "f" * 5000,
        "1e3",
        "-9223372036854775808",
    ),
    "seed": ('"1"', "4294967296", "9" * 5000, "0x" + "f" * 5000, "1.0", "18446744073709551616"),
    "select": ("1", '"true"', '"yes"', "1.0", "[true]"),
    "position": ("3", '"verb"', '["answer"]', '"answr"', '"\\u202e"', '" "'),
    "function_examples": ("1", '"5"', "2.5", "9" * 5000),
    "dtype": ('"float8"', "32", '["float32"]', '"Float32"', '"torch"'),
    "device": ('"tpu9"', '["cpu"]', '"cuda:99"', '"CPU"', '"meta"'),
}
DEEP = "[" * 20_000 + "]" * 20_000
FIRST: tuple[bytes, ...] = (
    b"",
    b"# nothing",
    b"\x00",
    b"\xff\xfe",
    "model = 'toy-blip'".encode("utf-16"),
    b'\xef\xbb\xbfmodel = "toy-blip"\ndata = ["states"]',
    b'model = "toy-blip"\nmodel = "toy-blip"\ndata = "states"',
    b'[model]\nname = "toy-blip"\n[data]',
    b'model.name = "toy-blip"\ndata = "states"',
    b'[[data]]\nname = "states"\n[[data]]',
    f"data = {DEEP}".encode(),
    f"model = {'{a=' * 5000}1{'}' * 5000}".encode(),
    f"{'a.' * 20_000}a = 1".encode(),
    b"#" * 10_000_000,
    b'model = "' + b"x" * 1_000_000 + b'"',
    b"limti = 3",
    b"limit = 3",
    b'{"model": "toy-blip", "data": ["states"]}',
    b"model: toy-blip\ndata: [states]\n",
    b'model = """\n',
    b'model = "\\ud800"',
    b'"mo\\u001b[2Jdel" = 1',
    b"\n".join(b"k%d = 1" % n for n in range(5000)),
)


def is_good(content: dict[str, Any]) -> bool:
    """Whether a specification may be run after all, as far as types and ranges say it."""
    whole = {"limit": (1, 10**6), "seed": (0, 2**32 - 1), "function_examples": (2, 10**6)}
    for key, value in content.items():
        if key in whole:
            right = type(value) is int and whole[key][0] <= value <= whole[key][1]
        elif key == "select":
            right = isinstance(value, bool)
        else:
            kept = SPEC.get(key)
            right = value == kept or [value] == kept or (key == "sites" and value == [])
            right = right or (key == "corrupt" and value in (["text"], ["noise"], "text", "noise"))
        if not right:
            return False
    return bool(content.get("model") and content.get("data"))


def by_value(random: Random, text: str) -> str:
    key = random.choice(list(VALUES))
    value = random.choice((*ODD, *VALUES[key], *VALUES[key]))
    lines = [line for line in text.splitlines() if not line.startswith(f"{key} ")]
    return "\n".join([*lines, f"{key} = {value}", ""])


def by_line(random: Random, text: str) -> str:
    lines = text.splitlines()
    at = random.randrange(len(lines))
    key, _, value = lines[at].partition(" = ")
    ways: list[Callable[[], list[str]]] = [
        lambda: [*lines[: at + 1], *lines[at:]],
        lambda: [line for line in lines if line != lines[at]],
        lambda: [*lines[:at], f"{key[:-1]} = {value}", *lines[at + 1 :]],
        lambda: [*lines[:at], f"{key.upper()} = {value}", *lines[at + 1 :]],
        lambda: [*lines[:at], f"{key.replace('_', '-')}s = {value}", *lines[at + 1 :]],
        lambda: [*lines[:at], f"{key}: {value}", *lines[at + 1 :]],
        lambda: [*lines[:at], f"{key} = '{value}'", *lines[at + 1 :]],
        lambda: [*lines[:at], f"{key} = [{value}]", *lines[at + 1 :]],
        lambda: [*lines[:at], f"[notice.{key}]", *lines[at:]],
        lambda: [*lines[:at], f"{key} =", *lines[at + 1 :]],
        lambda: [*lines[:at], f"{key}.x = 1", *lines[at:]],
        lambda: [*lines[:at], f"# {lines[at]}", *lines[at:]],
        lambda: [*lines, "", "extra = 1"],
    ]
    return "\n".join([*random.choice(ways)(), ""])


def by_byte(random: Random, content: bytes) -> bytes:
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(content))
        one = bytes([random.randrange(256)])
        new = random.choice((b"", one, content[at : at + 1] * 2, b"\x00", b"\r\n", b'"'))
        content = content[:at] + new + content[at + 1 :]
    return content[: random.choice((len(content), len(content), random.randrange(1, len(content))))]


def same(folder: Path, out: str) -> bool:
    """Whether the run kept the good specification, and patched what that asks for: 4 heads of an example."""
    kept = tomllib.loads((folder / "out" / "notice.toml").read_text("utf-8"))
    return kept == SPEC and "4 patches each" in out


def changed(random: Random, text: str) -> bytes:
    """A specification that is no longer the good one, or says the same."""
    while True:
        way = random.choice((by_value, by_value, by_line, by_byte))
        made = way(random, text.encode()) if way is by_byte else way(random, text).encode()
        there = read(made)
        if not is_good(there) or there == SPEC:
            return made


def read(content: bytes) -> dict[str, Any]:
    """What TOML it is; nothing for none."""
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}


def cases(random: Random, top: Path) -> Iterator[Case]:
    first = iter(FIRST)
    one_line = [tomli_w.dumps({key: value}).replace("\n", " ").strip() for key, value in SPEC.items()]
    text = "\n".join([*one_line, ""])
    for folder in good.folders(top):
        content = next(first, None) or changed(random, text)
        (folder / "spec.toml").write_bytes(content)
        lines = content.decode("utf-8", "backslashreplace").splitlines()
        what = f"{' / '.join(line for line in lines if line not in one_line)!r:.100}"
        words = ["notice", "--spec", "spec.toml", "--out", "out"]
        if read(content) == SPEC:
            yield Case(f"{what}, the same", words, folder, ("out",), partial(same, folder))
        else:
            yield Case(what, words, folder)
