"""What was planted, as tables: the parts, and which of them reads what which other one wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd
from plain import Part
from planting import APART, DECOYS, TRUE, Planted

Edge = tuple[str, str]
"""A writer of the stream and a reader of it, as `vlmscope.edges` calls them."""
LOOKING = ("reader", "suppressor", "backup", "blind", "carrier")
"""They look for the object of the noun."""
SAYS = {"mover": "value", "neuron": "input", "selector": "query"}
"""By what those that read the readers' directions read them."""


def parts(made: Planted) -> pd.DataFrame:
    """A row a planted part: its role, and whether it counts as true, as false, or is left out (`apart`)."""
    counts = {**dict.fromkeys(TRUE, "true"), **dict.fromkeys((*APART, "idle"), "apart")}
    rows = [(part, role, counts.get(role, "false")) for part, role in made.roles.items()]
    return pd.DataFrame(rows, columns=["part", "role", "counts"])


def edges(made: Planted) -> pd.DataFrame:
    """A row for each pair of parts of which the second reads what the first wrote: `writer`, `reader`, and
    `via` the reader's query, value or (of a neuron) input. Between all other parts there is what noise
    makes."""
    found = [edge for edge in _edges(made) if _before(made, *edge[:2])]
    return pd.DataFrame(sorted(set(found)), columns=["writer", "reader", "via"])


def edge_roles(made: Planted) -> dict[Edge, str]:
    """Form D: what each planted edge of the graph is for, by the role of the part whose work it is.

    From the picture to the values of what looks at objects, which read the color; between parts as `edges`
    has them; and from what speaks to the logits. The carrier's, the backup's and the locator's edges are left
    out as these are, and so is what tells the object or the word that is looked at: the picture to keys, the
    text to the selector's keys and values. An edge of a decoy is one.
    """
    units = {"query": "q", "value": "v"}
    found: dict[Edge, str] = {}

    def head(part: Part, unit: str) -> str:
        place, _, number = part.rpartition(".h")
        return f"{place}.{unit}{number}"

    def writes(part: Part) -> str:
        return part.rpartition(".")[0] if ".mlp." in part else part

    for part in made.having(*DECOYS):
        for unit in "qkv":
            found |= {(source, head(part, unit)): made.roles[part] for source in ("image", "embed")}
        found[part, "logits"] = made.roles[part]
    for writer, reader, via in edges(made)[["writer", "reader", "via"]].itertuples(index=False, name=None):
        of_reader = made.roles[writer] != "locator" and made.roles[reader] in ("carrier", "backup")
        role = made.roles[reader if of_reader or made.roles[reader] in DECOYS else writer]
        target = writes(reader) if via == "input" else head(reader, units[via])
        found[writes(writer), target] = role
    speaking = made.speaking("mover", "neuron", "selector", "carrier", "idle")
    for part in made.having(*LOOKING, "idle"):
        if part not in speaking:
            found["image", head(part, "v")] = made.roles[part]
            found["image", head(part, "k")] = "locator"
    for part in made.having("selector"):
        found |= {("embed", head(part, unit)): "locator" for unit in "kv"}
    for part in speaking:
        found[writes(part), "logits"] = made.roles[part]
    return found


def trained_edge_roles(made: Planted, every: Iterable[Edge]) -> dict[Edge, str]:
    """Form D of `training`: true are the edges from the picture to the reader's values and from the reader to
    the logits, false the same of the other heads of its layer and those behind it.

    All others are left out: the causal model says nothing of MLPs, nor of what becomes of the picture's
    tokens before the reader's layer; and most edges carry nothing in any model, so that even one without
    training ranks these two before them (AUROC .98).
    """
    [reader] = made.having("reader")
    place, _, number = reader.rpartition(".h")
    layer = int(place.split(".")[1])
    true = {("image", f"{place}.v{number}"), (reader, "logits")}

    def is_compared(source: str, target: str) -> bool:
        head = target if source == "image" and ".v" in target else ""
        head = source if target == "logits" else head
        return ".attn." in head and int(head.split(".")[1]) >= layer

    left_out = {edge: "locator" for edge in every if not is_compared(*edge)}
    return left_out | dict.fromkeys(true, "reader")


def save(made: Planted, folder: Path) -> None:
    """Both tables, as parts.csv and edges.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    parts(made).to_csv(folder / "parts.csv", index=False)
    edges(made).to_csv(folder / "edges.csv", index=False)


def _edges(made: Planted) -> Iterator[tuple[Part, Part, str]]:
    def between(
        writers: tuple[str, ...], readers: tuple[str, ...], via: str
    ) -> Iterator[tuple[Part, Part, str]]:
        for writer in made.having(*writers):
            yield from ((writer, reader, via) for reader in made.having(*readers))

    in_c = made.recipe.form == "C"
    speaking = set(made.speaking("carrier"))
    for writer, reader, via in between(("locator",), LOOKING, "query"):
        if reader not in speaking:
            yield writer, reader, via
    yield from between(("reader",), ("backup",), "query")
    for writer in made.having("carrier"):
        if writer not in speaking:
            yield from ((writer, reader, "value") for reader in speaking)
    for role, via in SAYS.items():
        # In form C the selector is in the decoder, where a mover takes the color.
        of_mover = in_c and role == "selector"
        yield from between(("mover",) if of_mover else ("reader", "suppressor", "backup"), (role,), via)
    yield from between(("reader",), ("fetcher",), "value")
    yield from between(("fetcher",), ("matcher",), "input")
    yield from between(("matcher",), ("copier",), "value")


def _before(made: Planted, writer: Part, reader: Part) -> bool:
    """Whether the reader comes behind the writer."""
    order = {"attn": 0, "cross": 1, "mlp": 2}

    def place(part: Part) -> tuple[bool, int, int]:
        tower, layer, kind, _ = part.split(".")
        return tower == "decoder", int(layer), order[kind]

    return place(writer) < place(reader)
