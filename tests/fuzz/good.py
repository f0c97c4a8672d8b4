"""Good command lines, and what they read: what the wrong ones are made from.

Each command has one line that works (`LINES`), in a folder of `folders`, where what it names lies. An option
that a command gets later needs no entry: the generators read the options from the application itself.
"""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from typer import Typer

from vlmscope import neurons, sweep
from vlmscope.checkpoint import load
from vlmscope.cli.main import app
from vlmscope.data import examples
from vlmscope.neurons import WeightEdit

BLIP = "--model toy-blip --data states --limit 1"
LLAVA = "--model toy-llava --data states --limit 2 --prompt what?"
LINES = {
    "demo": "--limit 1 --out out",
    "sweep": f"{BLIP} --sites encoder.0.resid@answer --corrupt image --out out",
    "notice": "--spec spec.toml --out out",
    "tracing": f"{BLIP} --repeats 1 --windows 1 --kinds resid --out out",
    "knockout": "--model toy-llava --data states --limit 1 --sites decoder.1/3.attn@last<image --out out",
    "circuits": "run --out out",
    "heads": "--model toy-blip --data states --limit 4 --sites encoder.1.cross.h0@answer --out out",
    "lens": "--model toy-llava --image a.png --prompt what? --sites decoder.*.resid@readout --out out",
    "explain": "--model toy-llava --image a.png --prompt what? --region 0,0,24,24 --out out.html",
    "attribute": "--model toy-llava --data states --limit 1 --sites decoder.*.mlp@readout --out out",
    "edges": "--model toy-llava --data states --limit 1 --corrupt image --out out",
    "faithfulness": "--model toy-llava --data states --limit 4 --scores scores.json --outside zero --draws 1 "
    "--out out",
    "plan": f"{BLIP} --sites encoder.0.resid@answer --corrupt image --out out --slurm job.sh",
    "merge": "first second --out out",
    "data": "folder --root root --out out.csv",
    "data inpaint": f"{BLIP} --fill mean --out out.csv",
    "generate": "--model toy-llava --image a.png --prompt what? --edit 'decoder.2.mlp@all scale 0'",
    "report": "run --out out.html",
    "models": "toy-blip",
    "steer": "--model toy-blip --data states --limit 4 --sites encoder.0.resid@last --corrupt image "
    "--random 2 --said 1 --out out",
    "probe": "--model toy-blip --data states --limit 24 --sites encoder.0.resid@last --label kind "
    "--shuffles 2 --out out",
    "neurons find": "--model toy-llava --image a.png --prompt what? --caption 'a red star' --word red "
    "--out out",
    "neurons describe": f"{LLAVA} --neuron 1.2 --no-measures --out out",
    "neurons perturb": "--model toy-llava --data states --limit 50 --word red --found found --out out",
    "neurons edit": "--model toy-llava --data states --limit 6 --prompt 'describe this picture.' --from red "
    "--to blue --neurons 5 --solver closed --on edit.safetensors --out out.safetensors",
    "neurons edits": "edit.safetensors",
}


class Option(NamedTuple):
    """An option or argument of a command: its flag (none for an argument), and the type that it takes."""

    name: str
    flag: str
    kind: Any
    several: bool


def commands(typer: Typer = app, above: str = "") -> Iterator[tuple[str, list[Option]]]:
    """Every command, as it is typed, with all of its options."""
    for command in typer.registered_commands:
        parameters = command.callback.__signature__.parameters.values()
        yield f"{above}{command.name}", [_option(parameter) for parameter in parameters]
    for group in typer.registered_groups:
        yield from commands(group.typer_instance, f"{group.name} ")


def _option(parameter: Any) -> Option:
    kind, look = parameter.annotation.__args__[0], parameter.annotation.__metadata__[0]
    while type(None) in getattr(kind, "__args__", ()):
        (kind,) = (one for one in kind.__args__ if one is not type(None))
    several = getattr(kind, "__origin__", None) is list
    flags = [flag for flag in (look.default, *(look.param_decls or ())) if str(flag).startswith("--")]
    flag = flags[0] if flags else f"--{parameter.name.replace('_', '-')}"
    flag = "" if type(look).__name__ == "ArgumentInfo" else flag
    return Option(parameter.name, flag, kind.__args__[0] if several else kind, several)


def line(command: str) -> list[str]:
    """The words of a good line."""
    return [*command.split(), *shlex.split(LINES[command])]


def with_value(words: list[str], flag: str, value: str) -> list[str]:
    """A line whose option has another value; without a flag, the line's first argument."""
    if not flag:
        first = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
        at = 1 if words[0] != "neurons" else 2
        return [*words[:at], value, *words[first:]]
    if flag not in words:
        return [*words, flag, value]
    at = words.index(flag)
    end = next((n for n in range(at + 1, len(words)) if words[n].startswith("--")), len(words))
    return [*words[: at + 1], value, *words[end:]]


@cache
def _made(top: Path) -> Path:
    """What the good lines read, made once."""
    folder = top / "good"
    folder.mkdir()
    Image.new("RGB", (48, 48), "red").save(folder / "a.png")
    (folder / "spec.toml").write_text(
        'model = "toy-blip"\ndata = ["states"]\ncorrupt = ["image"]\nlimit = 1\nseed = 1\n'
        'sites = ["encoder.1.cross.h*@answer"]\nselect = false\n'
    )
    nodes = {name: {"in_graph": True, "score": 1.0} for name in ("a2.h1", "a3.h0", "a3.h1")}
    cfg = {"n_layers": 4, "n_heads": 4}
    (folder / "scores.json").write_text(json.dumps({"cfg": cfg, "nodes": nodes, "edges": {}}))
    for label, color in (("cat", "red"), ("owl", "blue")):
        (folder / "root" / label).mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (24, 24), color).save(folder / "root" / label / f"{n}.png")
    blip, two = load("toy-blip"), examples("states", limit=2)
    sweep(blip, two, "encoder.*.cross.h*@answer", out=folder / "run")
    for number, name in enumerate(("first", "second"), 1):
        sweep(blip, two, "encoder.1.cross.h0@answer", out=folder / name, shard=(number, 2))
    toy = load("toy-llava")
    neurons.find(toy, examples("states", limit=50), ["red"], prompt="describe this picture.").save(
        folder / "found"
    )
    columns = {2: (torch.tensor([1, 5]), torch.ones(96, 2) / 100)}
    WeightEdit(columns, toy.fingerprint(), {"from": "red", "to": "blue"}).save(folder / "edit.safetensors")
    return folder


def folders(top: Path) -> Iterator[Path]:
    """Folders in which every good line can be run, one a case."""
    for number in itertools.count():
        folder = top / f"case-{number}" / "here"
        shutil.copytree(_made(top), folder)
        yield folder
