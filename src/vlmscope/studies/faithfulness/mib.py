"""Importance files as in the repository of MIB (arXiv 2504.13151): JSON with `cfg`, `nodes` and `edges`.

Its nodes are those of one decoder: `input`, `a3.h1` (a head), `m3` (an MLP), `logits`. Here these are the
heads and MLPs of the tower that says the words; the others are no parts of a circuit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlmscope import stored
from vlmscope.errors import ModelError, StoreError, shown
from vlmscope.runs.network import Network

WAY_OUT = "write it anew, in the format of MIB's repository"
_NAME = re.compile(r"a([0-9]{1,3})\.h([0-9]{1,4})|m([0-9]{1,3})")
_PART = re.compile(r"([a-z]+)\.([0-9]+)\.(?:attn\.h([0-9]+)|mlp)")
_SHAPE = {
    "cfg": {"n_layers": int, "n_heads": int},
    "nodes": {str: {"in_graph": bool, "score?": float}},
    "edges": {str: {"score?": float, "in_graph": bool}},
}


def read(file: Path, model: Network) -> tuple[dict[str, float], frozenset[str] | None]:
    """The scores of the heads and MLPs of a file, by our names for them; and the circuit, where the file has
    none but says which nodes are in it.

    A node with neither a number as its score nor a part in any circuit computes freely, as in MIB. Raises
    `StoreError` for what is no such file, for a model of another shape, names that are no nodes of it, and
    scores of edges or of a node's neurons alone.
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
    named = {name: node for name, node in nodes.items() if name in known}
    scores = {_part(tower, name): float(node["score"]) for name, node in named.items() if "score" in node}
    scores = {name: score for name, score in scores.items() if not math.isnan(score)}
    if scores:
        return scores, None
    if any("score" in edge for edge in content["edges"].values()):
        raise StoreError(
            f"{file}: has scores of edges and none of nodes; circuits here are of nodes: expected a score of "
            "each node (MIB's --level node)"
        )
    kept = frozenset(_part(tower, name) for name, node in named.items() if node["in_graph"])
    if not kept:
        raise StoreError(f"{file}: no head or MLP has a score or is in the circuit; {WAY_OUT}")
    return {_part(tower, name): float(node["in_graph"]) for name, node in named.items()}, kept


def written(model: Network, scores: Mapping[str, float], circuit: Collection[str] = ()) -> str:
    """Scores of parts as a file of MIB's; `circuit` are those that it says are in the graph.

    Raises `ModelError` for a part that has no name there: of another tower, cross-attention, a neuron.

    >>> from vlmscope.checkpoint import load
    >>> text = written(load("toy-llava"), {"decoder.0.attn.h1": 0.5}, ["decoder.0.attn.h1"])
    >>> json.loads(text)["nodes"]["a0.h1"]
    {'in_graph': True, 'score': 0.5}
    """
    tower = model.speaker
    shape = model.shapes[tower]
    nodes: dict[str, Any] = {"input": {"in_graph": True}}
    for part, score in scores.items():
        nodes[_name(model, part)] = {"in_graph": part in circuit, "score": float(score)}
    nodes["logits"] = {"in_graph": True}
    cfg = {
        "n_layers": shape.layers,
        "n_heads": shape.heads.get("attn", 0),
        "parallel_attn_mlp": False,
        "d_model": shape.width,
    }
    return json.dumps({"cfg": cfg, "nodes": nodes, "edges": {}}) + "\n"


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
