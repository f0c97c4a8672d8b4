"""Edits of weights that are none: damaged files, and whole ones with what no edit has, under a right digest.

Some are listed (`neurons edits`), some are to be made on (`neurons edit --on`). Beside them stand folders of
found neurons (`--found`) that are damaged, or of something else.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import good
import torch
from frame import Case
from safetensors.torch import save
from torch import Tensor

from vlmscope.neurons import WeightEdit

Parts = tuple[dict[str, Tensor], dict[str, str]]
NAN, INF = float("nan"), float("inf")


@cache
def parts(file: Path) -> Parts:
    """The tensors and the metadata of the good edit."""
    made = WeightEdit.load(file)
    tensors = {}
    for layer, (neurons, added) in made.columns.items():
        tensors |= {f"layer.{layer}.neurons": neurons, f"layer.{layer}.added": added}
    about = json.dumps(dict(made.about), sort_keys=True)
    metadata = {"format": "pt", "vlmscope": "edit", "model": made.model, "about": about, "on": ""}
    return tensors, metadata | {"sha256": digest(tensors, metadata)}


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """As whoever forges an edit would compute it."""
    words = [metadata.get("model", ""), metadata.get("about", ""), *metadata.get("on", "").split()]
    found = hashlib.sha256("\n".join(words).encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def forged(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    metadata = {**metadata}
    if "sha256" in metadata:
        metadata["sha256"] = digest(tensors, metadata)
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def with_tensors(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Parts], bytes]:
    """Another edit's neurons and columns in layer 2."""

    def make(given: Parts) -> bytes:
        neurons, added = change(given[0]["layer.2.neurons"].clone(), given[0]["layer.2.added"].clone())
        return forged({"layer.2.neurons": neurons, "layer.2.added": added}, given[1])

    return make


def with_metadata(**change: Any) -> Callable[[Parts], bytes]:
    """Other metadata; None leaves them out."""

    def make(given: Parts) -> bytes:
        metadata = {name: value for name, value in {**given[1], **change}.items() if value is not None}
        return forged(given[0], metadata)

    return make


def with_names(*names: str) -> Callable[[Parts], bytes]:
    """Tensors of other names."""
    return lambda given: forged(dict(zip(names, given[0].values(), strict=False)), given[1])


def put(at: int | tuple[int, int], value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[at] = value
        return tensor

    return change


FORGED: dict[str, Callable[[Parts], bytes]] = {
    "negative": with_tensors(lambda n, a: (put(0, -1)(n), a)),
    "double": with_tensors(lambda n, a: (n.fill_(1), a)),
    "nan": with_tensors(lambda n, a: (n, put((0, 0), NAN)(a))),
    "inf": with_tensors(lambda n, a: (n, put((3, 1), -INF)(a))),
    "int32 neurons": with_tensors(lambda n, a: (n.int(), a)),
    "float neurons": with_tensors(lambda n, a: (n.float(), a)),
    "bool neurons": with_tensors(lambda n, a: (n.bool(), a)),
    "whole columns": with_tensors(lambda n, a: (n, a.long())),
    "complex columns": with_tensors(lambda n, a: (n, a.to(torch.complex64))),
    "turned": with_tensors(lambda n, a: (n, a.T)),
    "flat": with_tensors(lambda n, a: (n, a.flatten())),
    "deep": with_tensors(lambda n, a: (n, a[None])),
    "scalar": with_tensors(lambda n, a: (n[0], a)),
    "neurons in two rows": with_tensors(lambda n, a: (n[None], a)),
    "one column": with_tensors(lambda n, a: (n, a[:, :1])),
    "one neuron": with_tensors(lambda n, a: (n[:1], a)),
    "empty": with_tensors(lambda n, a: (n[:0], a[:, :0])),
    "no width": with_tensors(lambda n, a: (n, a[:0])),
    "no tensors": lambda given: forged({}, given[1]),
    "no model": with_metadata(model=None),
    "no about": with_metadata(about=None),
    "no on": with_metadata(on=None),
    "no digest": with_metadata(sha256=None),
    "another file": with_metadata(vlmscope="run"),
    "no mark": with_metadata(vlmscope=None),
    "about is no JSON": with_metadata(about="{"),
    "about is a list": with_metadata(about="[]"),
    "about is a number": with_metadata(about="1"),
    "about has a list": with_metadata(about='{"from": ["red"]}'),
    "about is deep": with_metadata(about="[" * 50_000 + "]" * 50_000),
    "about has numbers": with_metadata(about='{"from": NaN}'),
    "model steers": with_metadata(model="\x1b[2J"),
    "model is short": with_metadata(model="abc"),
    "on is odd": with_metadata(on="abc \x1b[31m"),
    "names": with_names("layer.2.neurons", "layer.2.addet"),
    "names without numbers": with_names("layer.x.neurons", "layer.x.added"),
    "unicode names": with_names("layer.².neurons", "layer.².added"),
    "negative layer": with_names("layer.-1.neurons", "layer.-1.added"),
    "padded layer": with_names("layer.02.neurons", "layer.02.added"),
    "huge layer": with_names(f"layer.{'9' * 5000}.neurons", f"layer.{'9' * 5000}.added"),
    "no columns": with_names("layer.2.neurons"),
    "two layers": with_names("layer.2.neurons", "layer.3.added"),
    "more": lambda given: forged({**given[0], "more": torch.ones(1)}, given[1]),
    "changed": lambda given: save({**given[0], "layer.2.added": given[0]["layer.2.added"] * 2}, given[1]),
    "changed words": lambda given: save(given[0], {**given[1], "about": '{"from": "cat"}'}),
    "huge header": lambda given: struct.pack("<Q", 2**63) + b"{}",
    "large header": lambda given: struct.pack("<Q", 200_000_000) + b"{" + b" " * 1000,
    "nothing": lambda given: b"",
    "short": lambda given: b"\x08\x00",
    "json": lambda given: b'{"model": 1}',
    "header is a list": lambda given: struct.pack("<Q", 2) + b"[]",
    "header is deep": lambda given: struct.pack("<Q", 40_000) + b"[" * 40_000,
    "pickle": lambda given: b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n.",
}
UNFIT: dict[str, Callable[[Parts], bytes]] = {
    "no such neuron": with_tensors(lambda n, a: (put(1, 256)(n), a)),
    "a huge neuron": with_tensors(lambda n, a: (put(1, 2**62)(n), a)),
    "no such layer": with_names("layer.4.neurons", "layer.4.added"),
    "narrow": with_tensors(lambda n, a: (n, a[:5])),
    "another model": with_metadata(model="0" * 64),
    "on another": with_metadata(on="0" * 64),
}
"""Whole edits that the model of the cases cannot have."""


def damaged(random: Random, content: bytes) -> bytes:
    """Bytes flipped, cut off, doubled or left out."""
    at = random.choice((random.randrange(len(content)), random.randrange(400)))
    ways: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :],
        lambda: content[:at] + content[at + 1 :],
        lambda: content[:at] + random.randbytes(random.choice((1, 8, 99))) + content[at:],
        lambda: content[:at] + bytes(8) + content[at + 8 :],
        lambda: content + bytes(random.choice((1, 100))),
        lambda: content[at:],
    ]
    return random.choice(ways)()


def spoiled(random: Random, found: Path) -> str:
    """A folder of found neurons, one of whose files is not what it was; what was done."""
    file, about = random.choice(sorted(found.iterdir())), found / "neurons.json"
    content, said = file.read_bytes(), json.loads(about.read_text())
    bytes_of: dict[str, bytes] = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "zeros": bytes(len(content)),
        "no text": b"\xff\xfe\x00" + content,
    }
    texts = ["[]", "{}", "null", "{" * 50_000, '{"what": "find"}', "1"]
    texts += [json.dumps({**said, "what": what}) for what in ("describe", "x", 3, None, ["find"])]
    texts += [json.dumps({**said, "weights": weights}) for weights in ("0" * 64, 3, None)]
    if random.random() < 0.5:
        text = random.choice(texts)
        about.write_text(text)
        return f"neurons.json is {text[:100]}"
    what = random.choice(["gone", *bytes_of])
    file.unlink()
    if what in bytes_of:
        file.write_bytes(bytes_of[what])
    return f"{file.name} is {what}"


def cases(random: Random, top: Path) -> Iterator[Case]:
    first = iter([*FORGED, *UNFIT])
    for folder in good.folders(top):
        file = folder / "edit.safetensors"
        given, content, shown = parts(file), file.read_bytes(), f"{WeightEdit.load(file)}"
        name, listed = next(first, None), ["neurons", "edits", "edit.safetensors"]
        if name is None and random.random() < 0.2:
            what = spoiled(random, folder / "found")
            line = "neurons describe --model toy-llava --data states --limit 40 --word red --no-measures"
            yield Case(f"--found: {what}", [*line.split(), "--found", "found", "--out", "out"], folder)
        elif name is None:
            file.write_bytes(damaged(random, content))
            line = f"edit.safetensors ({given[1]['sha256'][:8]}): {shown}\n"
            yield Case("damaged", listed, folder, right=lambda out, line=line: out == line)  # type: ignore[misc]
        else:
            file.write_bytes((FORGED | UNFIT)[name](given))
            on = name in UNFIT or random.random() < 0.3
            yield Case(f"{name}{' --on' * on}", good.line("neurons edit") if on else listed, folder)
