"""What the pipeline is to compute: one value, in a file of its own."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from vlmscope import files
from vlmscope.data import is_file
from vlmscope.data.hub import HUB
from vlmscope.errors import MOST, SEED, VlmscopeError, nearest, shown, whole
from vlmscope.files import is_plain_name
from vlmscope.models.dtypes import DTYPES
from vlmscope.sites import parse

LARGEST_SPEC = 2**20
"""Bytes of the largest specification that is read."""
_TEXTS = re.compile(
    r'"""(?:\\.|[^\\])*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL
)
"""TOML's strings and comments."""


@dataclass(frozen=True)
class Spec:
    """Everything that decides what the pipeline computes; `save` and `from_toml` keep it in a file.

    `data` are names of built-in sets, CSV files, or `hf://` sets, whose `columns` may be mapped. `sites` are
    patched (by default every module and every head of the text towers, at every text token); `select` keeps
    only examples that the model answers rightly and whose answer follows the corruption; `position` is where
    heads are read out (see `circuits.find`); what heads do is measured on the first `function_examples` that
    are kept; with `edges`, circuits of edges are measured, too, where the model has some.

    >>> Spec("toy-blip", ("states",), limit=5).corrupt
    ('image', 'text')
    """

    model: str
    data: tuple[str, ...]
    corrupt: tuple[str, ...] = ("image", "text")
    sites: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0
    select: bool = True
    position: str | None = None
    function_examples: int = 200
    edges: bool = False
    dtype: str = "float32"
    device: str | None = None
    columns: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, str(field.type), getattr(self, field.name))
        for kind in self.corrupt:
            if kind not in ("image", "text", "noise"):
                raise VlmscopeError(
                    f"notice: unknown corruption {shown(kind)}; expected image, text or noise"
                )
        names = [name_of(one) for one in self.data]
        if twice := [name for name in names if names.count(name) > 1]:
            raise VlmscopeError(f"notice: two data sets are called {shown(twice[0])}; rename one's file")
        if self.columns is not None and not any(one.startswith(HUB) for one in self.data):
            raise VlmscopeError(f"notice: columns are of {HUB} sets, and none is named; leave them out")
        if len({*self.corrupt}) < len(self.corrupt):
            raise VlmscopeError("notice: a corruption is named twice; name each once")
        if self.dtype not in DTYPES:
            raise VlmscopeError(
                f"notice: unknown dtype {shown(self.dtype)}; expected one of {', '.join(DTYPES)}"
            )
        parse(self.sites)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], **changes: Any) -> Spec:
        """Read a specification; `changes` that are not None take the place of what it says.

        Paths of CSV files are relative to the file. Raises `VlmscopeError` for what is no TOML, an
        unknown key (naming the nearest known one) or a value of another type.
        """
        path = Path(path)
        try:
            text = files.read(path, "a TOML file", VlmscopeError, LARGEST_SPEC).decode("utf-8")
            if _TEXTS.sub("", text).count(".") > 100:  # a key of thousands of parts takes minutes
                raise ValueError("it has dotted keys")
            content = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise VlmscopeError(
                f"{path}: not a TOML file ({error}); expected lines of KEY = VALUE"
            ) from error
        known = [field.name for field in fields(cls)]
        if odd := [key for key in content if key not in known]:
            hint = f"expected some of {', '.join(known)}{nearest(odd[0], known)}"
            raise VlmscopeError(f"{path}: unknown key {shown(odd[0])}; {hint}")
        several = [field.name for field in fields(cls) if str(field.type).startswith("tuple")]
        given: dict[str, Any] = {
            key: tuple([value] if isinstance(value, str) else value)
            if key in several and isinstance(value, str | list)
            else value
            for key, value in content.items()
        }
        given |= {name: value for name, value in changes.items() if value is not None}
        if "data" not in changes or changes["data"] is None:
            names = given.get("data", ())
            if isinstance(names, tuple):
                given["data"] = tuple(
                    str(path.parent / d) if isinstance(d, str) and d and is_file(d) else d for d in names
                )
        if missing := [name for name in ("model", "data") if not given.get(name)]:
            raise VlmscopeError(f"{path}: no {missing[0]}; add it, or give --{missing[0]}")
        try:
            return cls(**given)
        except VlmscopeError as error:
            raise type(error)(f"{path}: {str(error).removeprefix('notice: ')}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the specification as TOML; paths of CSV files become absolute. Replaces no other file."""
        content = {k: v for k, v in asdict(self._absolute()).items() if v not in (None, ())}
        text = tomli_w.dumps(content).encode("utf-8")
        if not files.is_kept(Path(path), lambda: text):
            files.write(Path(path), text)

    def _absolute(self) -> Spec:
        return replace(self, data=tuple(str(Path(d).resolve()) if is_file(d) else d for d in self.data))


def _check(name: str, kind: str, value: object) -> None:
    """Refuse a value that is not what a field of `Spec` takes."""
    if value is None and kind.endswith("None"):
        return
    if kind.startswith("int"):
        least, most = {"seed": (0, SEED), "function_examples": (2, MOST)}.get(name, (1, MOST))
        whole(value, f"notice: {name}", least, most)
        return
    several = kind.startswith("tuple")
    right = isinstance(value, bool)
    if not kind.startswith("bool"):
        texts = value if several and isinstance(value, tuple) else [None] if several else [value]
        right = all(isinstance(text, str) and text.strip() and text.isprintable() for text in texts)
        right = right and (name == "sites" or bool(texts))
    words = "true or false" if kind.startswith("bool") else "a list of texts" if several else "a text"
    if not right:
        raise VlmscopeError(f"notice: {name} is {shown(value)}; expected {words}")


def name_of(data: str) -> str:
    """What a data set is called in the results: a built-in set's name, or that of the CSV file or set.

    Raises `VlmscopeError` for a file whose name is none for the folders of results.

    >>> name_of("data/mine.csv"), name_of("hf://owner/name:train")
    ('mine', 'name-train')
    """
    name = Path(data).stem if is_file(data) else Path(data).name.replace(":", "-")
    if not is_plain_name(name):
        raise VlmscopeError(f"{data}: would be called {shown(name)} in the results; rename the file")
    return name
