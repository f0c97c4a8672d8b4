"""Expressions that are no sites, or that name what a model or an example does not have.

A good expression is changed, in its parts or in its characters. What comes out is judged by a grammar of its
own (`meant`), written for the model and the example of the cases: what it takes is no wrong input, and is
left out, unless it says the same as the good one; then the run has to have the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import good
import pandas as pd
import tomli_w
from frame import Case

from vlmscope import read_run, sweep
from vlmscope.checkpoint import load
from vlmscope.data import examples

LAYERS, HEADS, NEURONS = 3, 4, 256
KINDS = {
    "vision": ("resid_pre", "attn", "resid_mid", "mlp", "resid", "output"),
    "encoder": ("resid_pre", "attn", "cross", "resid_mid", "mlp", "resid"),
    "decoder": ("resid_pre", "attn", "cross", "resid_mid", "mlp", "resid"),
}
LENGTH = {"vision": 37, "encoder": 9, "decoder": 1}
"""Of the towers of toy-blip, for the first example of `states`."""
ROLES = {"answer": 4, "foil": 6, "noun": 3}
PLACES = {
    "vision": ["all", "image", "3", "-1", "image[2,3]", "0-1"],
    "encoder": ["answer", "noun", "last", "*", "2-4", "text", "-2", "answer*"],
    "decoder": ["last", "readout", "0"],
}
UNITS = {"h": HEADS, "q": HEADS, "p": HEADS, "k": HEADS, "v": HEADS, "n": NEURONS}
_SITE = re.compile(
    r"(?P<tower>[a-z]+)\.(?P<layers>\*|[0-9]+(-[0-9]+)?)(/(?P<window>[0-9]*[13579]))?\.(?P<kind>[a-z_]+)"
    r"(\.(?P<part>[hqkvpn])(?P<units>\*|[0-9]+|\[[0-9]+(,[0-9]+)*\]))?@(?P<at>[a-z]+\*?|image\[[0-9]+,[0-9]+\]|"
    r"-?[0-9]+|[0-9]+-[0-9]+|\*)",
    re.ASCII,
)
FIRST = (
    *("", " ", "\0", "\n", "@", ".", "*", "+", " + ", "encoder", "encoder.0.resid", "encoder.0.resid@"),
    *("encoder.².resid@answer", "encoder.0.resid@²", "encoder.٣.resid@answer", "encoder.0.attn.h²@answer"),
    *("encoder.0.attn.h１@answer", "encoder.1000000000000.resid@answer", "encoder.0.resid@1000000000000"),
    *(
        "encoder.0-999999999.resid@answer",
        "encoder.0.resid@0-999999999",
        f"encoder.{'9' * 5000}.resid@answer",
    ),
    *(
        f"encoder.0.resid@{'9' * 5000}",
        f"encoder.0/{'9' * 5000}.resid@answer",
        "encoder.0.mlp.n1000000000@answer",
    ),
    "encoder.0.mlp.n[" + ",".join(map(str, range(100_000))) + "]@answer",
    "encoder.0.mlp.n[" + ",".join(["1"] * 500_000) + "]@answer",
    " + ".join(["encoder.0.resid@answer"] * 10_000),
    " + ".join(f"encoder.{n}.resid@answer" for n in range(4_000)),
    *("x" * 1_000_000, "encoder.0.resid@" + "a" * 1_000_000, "." * 100_000, "@" * 100_000, "+" * 100_000),
    *(
        "encoder.0.resid@answer<image",
        "encoder.0.attn@last<last",
        "encoder.0.attn.h1@last<",
        "encoder.0.attn@<last",
    ),
    *("encoder.0.resid@answer + encoder.*.resid@answer", "encoder.0.resid@* + encoder.1.resid@answer"),
    *(
        "encoder.0.resid@answer+encoder.1.resid@answer",
        "encoder.0.resid@answer +",
        "+ encoder.0.resid@answer",
    ),
    *(
        "encoder.0/2.resid@answer",
        "encoder.0/.resid@answer",
        "encoder.-1.resid@answer",
        "encoder.1-0.resid@answer",
    ),
    *("vision.0.output@all", "vision.*/3.output@all", "decoder.0.resid@noun", "encoder.0.resid@readout"),
    *("encoder.0.attn.h[]@answer", "encoder.0.attn.h[0,]@answer", "encoder.0.attn.h[0;1]@answer"),
    *(
        "encoder.0.resid.h0@answer",
        "encoder.0.cross.k0@answer",
        "encoder.0.mlp.h0@answer",
        "encoder.0.attn.x0@answer",
    ),
    *("ENCODER.0.resid@answer", "encoder.0.Resid@answer", "encoder.0.resid@Answer", "encodér.0.resid@answer"),
    *(
        "encoder.0.resid@image",
        "encoder.0.resid@image[0,0]",
        "vision.0.resid@image[6,6]",
        "vision.0.resid@text",
    ),
    *("encoder.0.resid@-10", "encoder.0.resid@9", "encoder.0.resid@answer*5", "encoder.0.resid@**", "$(id)"),
    *(
        "encoder.0.resid@answer\x1b[2J",
        "encoder.0.resid@\u202e",
        "encoder.0.resid@answer;encoder.1.resid@answer",
    ),
)


def meant(text: str) -> set[tuple[Any, ...]] | None:
    """The patches that an expression of one place names: layers, kind, units, positions; None for no site."""
    found = _SITE.fullmatch(text.strip())
    if not found or found["kind"] not in KINDS.get(found["tower"], ()):
        return None
    tower, kind, part, at = found["tower"], found["kind"], found["part"] or "", found["at"]
    layers = _numbers(found["layers"], LAYERS)
    window = int((found["window"] or "1")[:9])
    several = {"attn": "hqkvp", "cross": "hqp", "mlp": "n"}.get(kind, "")
    units = _numbers((found["units"] or "").strip("[]"), UNITS.get(part, 0)) if part else []
    if layers is None or units is None or (part and part not in several):
        return None
    if kind == "output" and (window > 1 or (found["layers"] != "*" and layers != [LAYERS - 1])):
        return None
    where = _positions(tower, at)
    if where is None:
        return None
    sets = [tuple(sorted(set(units)))] if "[" in (found["units"] or "") else [(n,) for n in units] or [()]
    layers = [LAYERS - 1] if kind == "output" else layers
    near = [tuple(m for m in range(LAYERS) if abs(m - n) <= window // 2) for n in layers]
    return {(tower, n, kind, part, unit, place) for n in near for unit in sets for place in where}


def _numbers(text: str, many: int) -> list[int] | None:
    if text == "*":
        return list(range(many))
    found: list[int] = []
    for one in text.split(","):
        first, _, last = one.partition("-")
        if len(first) > 9 or len(last) > 9 or not int(first) <= int(last or first) < many:
            return None
        found += range(int(first), int(last or first) + 1)
    return found


def _positions(tower: str, at: str) -> list[tuple[int, ...]] | None:
    many, image = LENGTH[tower], tower == "vision"
    names = {"all": range(many), "last": [many - 1], "image": range(1, 37) if image else []}
    names |= {"text": [] if image else range(many), "readout": [0] if tower == "decoder" else []}
    names |= {role: [n] for role, n in ROLES.items() if tower == "encoder"}
    if at == "*":
        return [(n,) for n in range(many)]
    if cell := re.fullmatch(r"image\[([0-9]{1,9}),([0-9]{1,9})\]", at):
        row, column = int(cell[1]), int(cell[2])
        return [(1 + 6 * row + column,)] if image and row < 6 and column < 6 else None
    if re.fullmatch("-?[0-9]+", at):
        return [(int(at) % many,)] if len(at) < 10 and -many <= int(at) < many else None
    if "-" in at:
        numbers = _numbers(at, many)
        return None if numbers is None else [(n,) for n in numbers]
    found = names.get(at.removesuffix("*"))
    if not found:
        return None
    return [(n,) for n in found] if at.endswith("*") else [tuple(found)]


def expression(random: Random) -> str:
    """A good one."""
    tower = random.choice(list(KINDS))
    kind = random.choice(KINDS[tower])
    layers = random.choice(["*", "0", "1", "2", "0-1", "1/3", "*/3"])
    if kind == "output":
        layers = random.choice(["*", "2"])
    part = random.choice(["", *{"attn": "hqkvp", "cross": "hqp", "mlp": "n"}.get(kind, "")])
    many = UNITS.get(part, 0)
    unit = random.choice([f"{random.randrange(many)}", "[0,3]"]) if part else ""
    at = random.choice(PLACES[tower])
    return f"{tower}.{layers}.{kind}{'.' * bool(part)}{part}{unit}@{at}"


def changed(random: Random, text: str) -> str:
    """A few characters or a part of an expression changed; some of these say the same."""
    ways: list[Callable[[], str]] = [
        lambda: _at(random, text, lambda c: ""),
        lambda: _at(random, text, lambda c: c + c),
        lambda: _at(random, text, lambda c: random.choice("09*@.+-/[],<xhn ²３\0\n\x1b\u202eé") + c),
        lambda: _at(random, text, lambda c: random.choice("0129*@.+-/[],<xhn²３\0")),
        lambda: _at(random, text, str.swapcase),
        lambda: re.sub("[0-9]+", lambda n: str(int(n[0]) + random.choice([1, 3, 10, 10**6, 10**12])), text),
        lambda: re.sub("[0-9]+", lambda n: "0" + n[0], text),
        lambda: re.sub("[0-9]", lambda n: chr(ord("０") + int(n[0])), text),
        lambda: ".".join(random.sample(text.split("."), len(text.split(".")))),
        lambda: text.replace("@", random.choice(["@@", " @ ", "", "@ ", "#"])),
        lambda: random.choice(" \t") + text + random.choice([" ", "\t", "", "\n"]),
        lambda: text[: random.randrange(len(text))],
        lambda: (
            text + random.choice(["<image", "<last", "<", "*", "]", " + ", " + x", "@answer", "." * 99, "\0"])
        ),
        lambda: re.sub(r"\.([hqkvpn])([0-9]+)@", r".\1[\2,\2]@", text),
        lambda: re.sub(r"^(\w+)\.([0-9]+)\.", r"\1.\2-\2.", text),
        lambda: re.sub(r"^(\w+)\.([0-9]+|\*)\.", r"\1.\2/1.", text),
    ]
    return random.choice(ways)()


def _at(random: Random, text: str, change: Callable[[str], str]) -> str:
    at = random.randrange(len(text))
    return text[:at] + change(text[at]) + text[at + 1 :]


@cache
def rows(text: str) -> pd.DataFrame:
    """The rows of a good expression."""
    return _plain(sweep(load("toy-blip"), examples("states", limit=1), text))


def _plain(effects: pd.DataFrame) -> pd.DataFrame:
    kept = effects.drop(columns=["site", "unit", "slot"])
    return kept.sort_values(list(kept), ignore_index=True)


def same(folder: Path, text: str, out: str) -> bool:
    """Whether a run has the rows of the good expression."""
    found = _plain(read_run(folder / "out").effects())
    return found.equals(rows(text)) and out.startswith(f"{len(found)} patches")


def cases(random: Random, top: Path) -> Iterator[Case]:
    first, folders = iter(FIRST), good.folders(top)
    while True:
        wrong, right = next(first, None), None
        if wrong is None:
            text = expression(random)
            assert meant(text), text
            wrong = changed(random, text)
            if meant(wrong) is not None:
                if meant(wrong) != meant(text) or wrong == text:
                    continue  # another good one
                right = text
        folder = next(folders)
        what = repr(wrong if len(wrong) < 80 else f"{wrong[:40]}… ({len(wrong)} characters)")
        if right is not None:
            line = good.with_value(good.line("sweep"), "--sites", wrong)
            yield Case(f"{what}, as {right}", line, folder, ("out",), partial(same, folder, right))
            continue
        command = random.choice(("sweep", "sweep", "sweep", "heads", "notice", "--patch", "--edit"))
        if command == "notice":
            (folder / "spec.toml").write_text(tomli_w.dumps({"sites": [wrong]}), "utf-8")
            line = "notice --model toy-blip --data states --limit 2 --spec spec.toml --out out".split()
        elif command.startswith("--"):
            line = [*"generate --model toy-blip --image a.png --prompt what? --other a.png".split(), command]
            line.append(wrong if command == "--patch" else f"{wrong} scale 0")
        else:
            line = good.with_value(good.line(command), "--sites", wrong)
        yield Case(f"{command} {what}", line, folder)
