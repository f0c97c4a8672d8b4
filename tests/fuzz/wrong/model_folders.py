"""Folders of models that are damaged, or made to do harm."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from frame import Case, answer
from PIL import Image

from vlmscope.checkpoint.folder import TOYS

COMMAND = ["generate", "--model", "model", "--image", "a.png", "--prompt", "describe this picture."]
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**9, 10**30, 1.5, "x", "", [], [1], {}, {"a": 1}, "\x1b[31mred", "x" * 5000),
)
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json")
TEMPLATES = (
    *(
        "{% for",
        "{{ 1 / 0 }}",
        "{{ messages[9] }}",
        "{{ raise_exception('no\\n\\x1b[31m') }}",
        "{{ x.y.z }}",
        "",
    ),
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ 'a' * 10**12 }}",
)


def cases(random: Random, top: Path) -> Iterator[Case]:
    for number in itertools.count():
        toy = "toy-llava" if number < len(TEMPLATES) else random.choice(["toy-blip", "toy-llava"])
        folder = top / f"case-{number}" / "here"
        make(folder, toy)
        good = said(toy, top)
        if number < len(TEMPLATES):
            (folder / "model" / "chat_template.jinja").write_text(TEMPLATES[number])
            what = f"template {TEMPLATES[number][:40]!r}"
        else:
            what = damage(random, folder / "model")
        yield Case(f"{toy}: {what}", COMMAND, folder, right=lambda out, good=good: out == good)


def make(folder: Path, toy: str) -> None:
    folder.mkdir(parents=True)
    shutil.copytree(TOYS / toy, folder / "model")
    Image.new("RGB", (48, 48), "red").save(folder / "a.png")


@cache
def said(toy: str, top: Path) -> str:
    """What the command says of the model that nothing was done to."""
    folder = top / f"good-{toy}" / "here"
    make(folder, toy)
    given = answer(Case("good", COMMAND, folder), top / "scratch")
    assert given.status == 0, given
    return given.out


def damage(random: Random, model: Path) -> str:
    """Do one thing to one file of a model; says what."""
    file = random.choice(sorted(model.iterdir()))
    how = random.choice("missing empty cut flipped swapped json json json json weights weights odd".split())
    content = file.read_bytes()
    if how == "json" and file.suffix == ".json":
        whole = json.loads(content)
        what = mutate(random, whole)
        file.write_text(json.dumps(whole))
        return f"{file.name}: {what}"
    if how == "missing":
        if file.name not in NEEDED:
            file = model / random.choice(NEEDED)
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut":
        file.write_bytes(content[: random.randrange(len(content))])
    elif how == "flipped" and file.suffix != ".jinja":  # another template is a template
        # Of the weights only what is no number: another number is another model.
        until = 8 + struct.unpack("<Q", content[:8])[0] if file.suffix == ".safetensors" else len(content)
        place = random.randrange(until)
        file.write_bytes(content[:place] + bytes([random.randrange(256)]) + content[place + 1 :])
    elif how == "swapped" and file.name != "generation_config.json":  # any object is one
        file.write_bytes(random.choice(sorted(model.iterdir())).read_bytes())
    elif how == "odd":
        file.unlink()
        kind = random.choice("pipe folder link zero".split())
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
        else:
            file.symlink_to("/dev/zero" if kind == "zero" else file.name)
        return f"{file.name}: {kind}"
    else:
        return weights(random, model / "model.safetensors")
    return f"{file.name}: {how}"


def mutate(random: Random, whole: Any) -> str:
    """Put something odd in the place of one value of a JSON document."""
    path = []
    while True:
        keys = list(whole) if isinstance(whole, dict) else list(range(len(whole)))
        # A list of layers is a good value there, and makes another model.
        key = random.choice([key for key in keys if key != "vision_feature_layer"])
        path.append(str(key))
        inner = whole[key]
        if isinstance(inner, dict | list) and inner and random.random() < 0.8:
            whole = inner
            continue
        whole[key] = value = random.choice(ODD)
        return f"{'.'.join(path)} = {str(value)[:30]!r} instead of {str(inner)[:30]!r}"


def weights(random: Random, file: Path) -> str:
    """Change what the weights are said to be."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = random.choice(sorted(tensors))
    how = random.choice("gone nan shape transposed type".split())
    if how == "gone":
        del tensors[name]
    elif how == "nan":
        tensors[name] = torch.full_like(tensors[name], torch.nan)
    elif how == "shape":
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]]).contiguous()
    elif how == "transposed":
        tensors[name] = tensors[name][..., :-1].contiguous()
    else:
        tensors[name] = tensors[name].to(torch.complex64)
    save_file(tensors, file, {"format": "pt"})
    return f"{name}: {how}"
