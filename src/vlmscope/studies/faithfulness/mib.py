"""Importance files as in the repository of MIB (arXiv 2504.13151): JSON with `cfg`, `nodes` and `edges`.

Its nodes are those of one decoder: `input`, `a3.h1` (a head), `m3` (an MLP), `logits`. Here these are the
heads and MLPs of the tower that says the words; the others are no parts of a circuit. Its edges are
`a0.h1->m2`, `m0->a3.h1<q>`; what `input` writes is here of two writers, `embed` and `image`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlmscope import stored
from vlmscope.errors import ModelError, StoreError, shown
from vlmscope.patching.graph import Edge, check_tower
from vlmscope.runs.network import Network
from vlmscope.studies.faithfulness.parts import Edges, named

WAY_OUT = "write it anew, in the format of MIB's repository"
_NAME = re.compile(r"a([0-9]{1,3})\.h([0-9]{1,4})|m([0-9]{1,3})")
_PART = re.compile(r"([a-z]+)\.([0-9]+)\.(?:attn\.h([0-9]+)|mlp)")
_SHAPE = {
    "cfg": {"n_layers": int, "n_heads": int},
    "nodes": {str: {"in_graph": bool, "score?": float}},
    "edges": {str: {"score?": float, "in_graph": bool}},
}


class Importances(NamedTuple):
    """Scores by our names for the parts; the circuit, where a file has no scores but says what is in it; and
    the edges, where these are the parts."""

    scores: dict[str, float]
    circuit: frozenset[str] | None = None
    edges: Edges | None = None


def read(file: Path, model: Network) -> Importances:
    """The scores of the heads and MLPs in a file, or, where it has none of these, of edges.

    A node with neither a number as its score nor a part in any circuit computes freely, as in MIB; an edge
    without a number has the score 0. Raises `StoreError` for what is no such file, for a model of another
    shape, and names that are no nodes or edges of it; `ModelError` for edges of a model that has none.
    """
    content = stored.manifest(file, _SHAPE, WAY_OUT)
    tower = model.speaker
    shape, cfg, nodes = model.shapes[tower], content["cfg"], content["nodes"]
    ours = {"n_layers": shape.layers, "n_heads": shape.heads.get("attn", 0), "d_model": shape.width}
    for name, many in ours.items():
        if cfg.get(name, many) != many:
            raise StoreError(
                f"{file}: scores of another model: {name} is {shown(cfg[name])} there and {many} in the "
                f"{tower} of {model.name}; name the model that they are of"
            )
    known = {
        _name(model, f"{tower}.{n}.attn.h{h}") for n in shape.having("attn") for h in range(ours["n_heads"])
    }
    known |= {_name(model, f"{tower}.{n}.mlp") for n in shape.having("mlp")}
    if odd := [name for name in nodes if name not in known and name not in ("input", "logits")]:
        raise StoreError(
            f"{file}: {shown(odd[0])} is no node of {model.name}; expected input, logits, heads a0.h0 to "
            f"a{shape.layers - 1}.h{ours['n_heads'] - 1} and MLPs m0 to m{shape.layers - 1}"
        )
    of_nodes = {name: node for name, node in nodes.items() if name in known}
    scores = {_part(tower, name): float(node["score"]) for name, node in of_nodes.items() if "score" in node}
    scores = {name: score for name, score in scores.items() if not math.isnan(score)}
    if scores:
        return Importances(scores)
    if not all(math.isnan(edge.get("score", math.nan)) for edge in content["edges"].values()):
        return _edge_scores(file, model, content["edges"])
    kept = frozenset(_part(tower, name) for name, node in of_nodes.items() if node["in_graph"])
    if not kept:
        raise StoreError(f"{file}: no head or MLP has a score or is in the circuit; {WAY_OUT}")
    return Importances({_part(tower, name): float(node["in_graph"]) for name, node in of_nodes.items()}, kept)


def _edge_scores(file: Path, model: Network, given: Mapping[str, Any]) -> Importances:
    """All edges of the decoder, and the scores of those that have one."""
    parts, known = dict[str, tuple[Edge, ...]](), dict[str, str]()
    for name, edges in _edges(model):
        known[name] = named(name.partition("->")[0] if len(edges) > 1 else edges[0].source, edges[0].target)
        parts[known[name]] = edges
    if odd := [name for name in given if name not in known]:
        raise StoreError(
            f"{file}: {shown(odd[0])} is no edge of {model.name}; expected a writer and a reader behind it, "
            f"such as {next(iter(known))} and {list(known)[-1]}"
        )
    scores = dict.fromkeys(parts, 0.0)
    for name, edge in given.items():
        score = float(edge.get("score", math.nan))
        scores[known[name]] = 0.0 if math.isnan(score) else score
    tower = model.speaker
    return Importances(scores, edges=Edges(tower, model.shapes[tower], parts))


def written(
    model: Network, scores: Mapping[str, float], circuit: Collection[str] = (), edges: Edges | None = None
) -> str:
    """Scores of parts as a file of MIB's; `circuit` are those that it says are in the graph. Where parts are
    `edges`, `input` has the sum of the scores of what enters the decoder, and is in where all of that is.

    Raises `ModelError` for a part that has no name there: of another tower, cross-attention, a neuron.

    >>> from vlmscope.checkpoint import load
    >>> text = written(load("toy-llava"), {"decoder.0.attn.h1": 0.5}, ["decoder.0.attn.h1"])
    >>> json.loads(text)["nodes"]["a0.h1"]
    {'in_graph': True, 'score': 0.5}
    """
    tower = model.speaker
    shape = model.shapes[tower]
    nodes: dict[str, Any] = {"input": {"in_graph": True}}
    own: dict[str, Any] = {}
    if edges is None:
        for part, score in scores.items():
            nodes[_name(model, part)] = {"in_graph": part in circuit, "score": float(score)}
    else:
        own = _written_edges(model, scores, circuit, edges)
        ends = [name.partition("<")[0] for edge in own if own[edge]["in_graph"] for name in edge.split("->")]
        every = dict.fromkeys(name.partition("->")[0] for name in own)
        nodes |= {name: {"in_graph": name in ends} for name in every}
    nodes["logits"] = {"in_graph": True}
    cfg = {
        "n_layers": shape.layers,
        "n_heads": shape.heads.get("attn", 0),
        "parallel_attn_mlp": False,
        "d_model": shape.width,
    }
    return json.dumps({"cfg": cfg, "nodes": nodes, "edges": own}) + "\n"


def _written_edges(
    model: Network, scores: Mapping[str, float], circuit: Collection[str], edges: Edges
) -> dict[str, Any]:
    if edges.tower != model.speaker:
        raise ModelError(f"edges of the {edges.tower} have no names in MIB's files; leave them out")
    part_of = {edge: name for name, some in edges.each.items() for edge in some}
    own: dict[str, Any] = {}
    for name, some in _edges(model):
        parts = list(dict.fromkeys(part_of[edge] for edge in some if edge in part_of))
        score = sum(float(scores[part]) for part in parts)
        own[name] = {"score": score, "in_graph": bool(parts) and all(part in circuit for part in parts)}
    return own


def _edges(model: Network) -> Iterator[tuple[str, tuple[Edge, ...]]]:
    """The edges of a decoder by MIB's names, from the bottom up."""
    tower = model.speaker
    check_tower(model, tower)
    shape = model.shapes[tower]
    if "cross" in shape.kinds or shape.having("deepstack") or shape.groups not in (None, shape.heads["attn"]):
        raise ModelError(
            f"{model.name}: MIB's files have no names for edges of cross-attention, of what is added between "
            "blocks, and of keys and values that heads share; name a folder of edges instead"
        )
    writers = ["input"]

    def into(reader: str) -> Iterator[tuple[str, tuple[Edge, ...]]]:
        end, _, part = reader.rstrip(">").partition("<")
        target = end if end == "logits" else _part(tower, end)
        target = target if not part else ".".join([target.rpartition(".h")[0], part + end.partition("h")[2]])
        for writer in writers:
            sources = ("embed", "image") if writer == "input" else (_part(tower, writer),)
            yield f"{writer}->{reader}", tuple(Edge(source, target) for source in sources)

    for layer in range(shape.layers):
        heads = [f"a{layer}.h{head}" for head in range(shape.heads["attn"])]
        for part in "qkv":
            for head in heads:
                yield from into(f"{head}<{part}>")
        writers += heads
        yield from into(f"m{layer}")
        writers.append(f"m{layer}")
    yield from into("logits")


def _name(model: Network, part: str) -> str:
    found = _PART.fullmatch(part)
    if found is None or found[1] != model.speaker:
        raise ModelError(
            f"{shown(part)} has no name in MIB's files, which are of the heads and MLPs of the "
            f"{model.speaker} alone; leave it out"
        )
    return f"a{found[2]}.h{found[3]}" if found[3] else f"m{found[2]}"


def _part(tower: str, name: str) -> str:
    found = _NAME.fullmatch(name)
    assert found is not None
    return f"{tower}.{found[3]}.mlp" if found[3] else f"{tower}.{found[1]}.attn.h{found[2]}"
