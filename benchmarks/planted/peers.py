"""How well other people's published code finds the circuits that were planted, beside vlmscope's.

    python -m venv peers && peers/bin/pip install torch==2.13.0 "transformer-lens==3.9.0" .
    peers/bin/pip install --no-deps "git+https://github.com/hannamw/EAP-IG@795f560"
    peers/bin/python benchmarks/planted/peers.py [--seeds 5] [--rows FOLDER] [--out FILE.json]

In an environment of their own. The peers read text models, so they are given the decoder of form D as a
`HookedTransformer`, by their own conversion of LLaMA's weights, with nothing folded. A picture's features are
words of it: rows behind the vocabulary, one for each image token of each run. So their code is as it was
published, and its interpolation of the inputs takes words and features at the same fraction, as ours does.
Held for each model: its logits are the same, and so are scores where both ask for the same thing. With
`--rows` a run that was stopped goes on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from measures import FRESH
from mechanisms import MEASURED, RANKED, beside_oracle, decoys_first, edge_scores, node_roles, node_scores
from pictures import batch, scenes
from planting import Planted, Recipe, plant
from rows import Rows, summarized
from scores import ranking
from tables import tables
from torch import Tensor
from torch.overrides import TorchFunctionMode
from truth import Edge, edge_roles

import vlmscope

SAYS = ("head", "neurons", "options")
EFFECTS = (0.01, 0.1, 0.3)
"""The shares of the gap at which parts are ranked; circuits are run at the last."""
KINDS = ("nodes", "edges")
STEPS = 5
"""Points of the line between the inputs, as in MIB and in vlmscope."""
THEIRS = {"EAP": 16, "EAP-IG-inputs": 8, "EAP-IG-activations": 8, "clean-corrupted": 8}
"""Methods for edges of EAP-IG's code, and on how many examples each ranks: as many as ours."""
ROUNDING = {"logits": 1e-5, "eap": 1e-4, "atp": 1e-4, "patches": 1e-4, "exact": 1e-4}
"""How much theirs may differ from ours where both compute the same, as a share of the largest (float32)."""
MISSING = """no {name}: the peers need an environment of their own, which has vlmscope in it, too:
    python -m venv peers && peers/bin/pip install torch==2.13.0 "transformer-lens==3.9.0" .
    peers/bin/pip install --no-deps "git+https://github.com/hannamw/EAP-IG@795f560"
    peers/bin/python benchmarks/planted/peers.py"""


class Peers(NamedTuple):
    """Their modules."""

    lens: Any
    patching: Any
    llama: Any
    graph: Any
    edges: Any
    nodes: Any


def peers() -> Peers:
    """Raises `SystemExit`, which says what to install, where something is not there."""
    names = ("HookedTransformer", "patching", "pretrained.weight_conversions.llama")
    try:
        lens = importlib.import_module("transformer_lens")
        lens.HookedTransformer  # noqa: B018 (which version 4 has no more)
        found = [importlib.import_module(f"transformer_lens.{name}") for name in names[1:]]
        found += [importlib.import_module(f"eap.{name}") for name in ("graph", "attribute", "attribute_node")]
    except ImportError as error:
        raise SystemExit(MISSING.format(name=error.name or "HookedTransformer")) from None
    evaluate = importlib.import_module("eap.evaluate")
    for module in (*found[-2:], evaluate):
        module.tokenize_plus = words_of  # our words are numbers already
    found[0].tqdm = evaluate.tqdm = list  # no bars
    return Peers(lens, *found)


def words_of(_model: Any, rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
    """What their `tokenize_plus` gives: tokens, a mask of ones (all are equally long), lengths."""
    tokens = torch.stack(rows)
    many, length = tokens.shape
    return tokens, torch.ones_like(tokens), torch.full((many,), length), length


class OnCpu(TorchFunctionMode):
    """Their code makes some tensors on a GPU by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Lensed(NamedTuple):
    """The decoder of a planted model as a `HookedTransformer`, and some examples in its words."""

    model: Any
    clean: Tensor
    corrupt: Tensor
    answers: Tensor
    heads: int
    differs: float

    def ld(self, logits: Tensor) -> Tensor:
        """Of each example, at the last token."""
        two = logits[:, -1].gather(1, self.answers)
        return two[:, 0] - two[:, 1]


def embedded(hf: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What enters the first block, and the logits at the last token."""
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        kept.append(kwargs["inputs_embeds"])

    held = hf.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        logits = hf(**inputs).logits[:, -1]
    held.remove()
    return kept[0], logits


def lensed(tools: Peers, made: Planted, many: int) -> Lensed:
    """With the examples that a method of ours has which ranks on so many."""
    given = batch(made.model, scenes(many, FRESH + made.recipe.seed, made.recipe.style))
    hf, text = made.model.hf, made.model.hf.config.text_config
    words, is_image = hf.get_input_embeddings().weight, given.tokens == hf.config.image_token_id
    ids, rows, wanted, known = [], [words], [], len(words)
    for inputs in (given.clean, given.corrupt):
        entered, logits = embedded(hf, inputs)
        rows.append(entered[is_image])
        wanted.append(logits)
        own = given.tokens.clone()
        own[is_image] = torch.arange(known, known + len(rows[-1]))
        known += len(rows[-1])
        ids.append(own)
    config = tools.lens.HookedTransformerConfig(
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        n_ctx=given.tokens.shape[1],
        d_head=text.head_dim,
        n_heads=text.num_attention_heads,
        d_mlp=text.intermediate_size,
        d_vocab=known,
        d_vocab_out=len(words),
        act_fn=text.hidden_act,
        gated_mlp=True,
        normalization_type="RMS",
        eps=text.rms_norm_eps,
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=text.head_dim,
        rotary_base=text.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
        dtype=words.dtype,
        device="cpu",
        default_prepend_bos=False,
    )
    model = tools.lens.HookedTransformer(config)
    llama = SimpleNamespace(model=hf.model.language_model, lm_head=hf.lm_head)
    weights = tools.llama.convert_llama_weights(llama, config)
    weights |= {"embed.W_E": torch.cat(rows), "unembed.b_U": torch.zeros(len(words), dtype=words.dtype)}
    weights = {name: weight.detach().clone() for name, weight in weights.items()}
    as_they_are = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    model.load_and_process_state_dict(weights, **dict.fromkeys(as_they_are, False))
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    with torch.no_grad():
        found = [model(tokens)[:, -1] for tokens in ids]
    size = max(float(logits.abs().max()) for logits in wanted)
    gaps = [float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)]
    answers = torch.stack([given.answer, given.foil], 1)
    return Lensed(model, *ids, answers, text.num_attention_heads, max(gaps) / size)


def of_graph(tools: Peers, lens: Lensed, method: str, *, turned: bool = False) -> dict[Edge, float]:
    """EAP-IG's code: scores of edges by our names; the base is the clean run, or `turned` the corrupt one."""
    graph = tools.graph.Graph.from_model(lens.model)
    base, other = (lens.corrupt, lens.clean) if turned else (lens.clean, lens.corrupt)
    batches = [(list(base), list(other), lens.answers)]

    def loss(logits: Tensor, _clean: Tensor, _lengths: Tensor, _label: Tensor) -> Tensor:
        each = -lens.ld(logits)
        return each if method == "exact" else each.sum()

    with OnCpu():
        tools.edges.attribute(lens.model, graph, batches, loss, method=method, ig_steps=STEPS, quiet=True)
    edges = graph.edges.values()
    found = {(named(edge.parent), named(edge.child, edge.qkv)): float(edge.score) for edge in edges}
    texts = {("embed", target): 0.0 for source, target in found if source == "image"}
    return {edge: -score if turned else score for edge, score in (found | texts).items()}


def of_nodes(tools: Peers, lens: Lensed, method: str) -> dict[str, float]:
    """EAP-IG's code: scores of heads and MLPs."""
    graph = tools.graph.Graph.from_model(lens.model, node_scores=True)
    batches = [(list(lens.clean), list(lens.corrupt), lens.answers)]
    with OnCpu():
        tools.nodes.attribute_node(
            lens.model,
            graph,
            batches,
            lambda logits, *_: -lens.ld(logits).sum(),
            method=method,
            ig_steps=STEPS,
            quiet=True,
        )
    nodes = [node for name, node in graph.nodes.items() if name not in ("input", "logits")]
    return {named(node): float(node.score) for node in nodes}


def named(node: Any, unit: str | None = None) -> str:
    """Our name of a node of their graph: `input` is the picture's, as the text is the same in both runs."""
    if node.name in ("input", "logits"):
        return {"input": "image", "logits": "logits"}[node.name]
    if node.name.startswith("m"):
        return f"decoder.{node.layer}.mlp"
    return f"decoder.{node.layer}.attn.{unit or 'h'}{node.head}"


def by_gradient(lens: Lensed) -> dict[str, float]:
    """Attribution patching as in TransformerLens' demonstration: activations of the clean run less those of
    the corrupt run, times the gradient in the corrupt run."""
    wanted = ("attn.hook_z", "hook_mlp_out")
    values: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}

    def is_wanted(name: str) -> bool:
        return name.endswith(wanted)

    def keep(into: dict[str, Tensor]) -> Callable[..., None]:
        def hook(x: Tensor, hook: Any) -> None:
            into[hook.name] = x.detach()

        return hook

    with torch.no_grad():
        _, clean = lens.model.run_with_cache(lens.clean, names_filter=is_wanted)
    with lens.model.hooks([(is_wanted, keep(values))], [(is_wanted, keep(grads))]):
        lens.ld(lens.model(lens.corrupt)).sum().backward()
    found: dict[str, float] = {}
    for layer in range(lens.model.cfg.n_layers):
        z, mlp = (f"blocks.{layer}.{name}" for name in wanted)
        products = {name: (clean[name] - values[name]) * grads[name] / len(lens.clean) for name in (z, mlp)}
        heads = products[z].sum((0, 1, 3)).tolist()
        found |= {f"decoder.{layer}.attn.h{n}": score for n, score in enumerate(heads)}
        found[f"decoder.{layer}.mlp"] = float(products[mlp].sum())
    return found


@torch.no_grad()
def by_patches(tools: Peers, lens: Lensed) -> dict[str, float]:
    """Activation patching as TransformerLens does it: a forward for each head and MLP."""
    _, clean = lens.model.run_with_cache(lens.clean)
    before = float(lens.ld(lens.model(lens.corrupt)).mean())

    def metric(logits: Tensor) -> Tensor:
        return lens.ld(logits).mean() - before

    def whole(_corrupt: Tensor, _index: Any, value: Tensor) -> Tensor:
        return value

    heads = tools.patching.get_act_patch_attn_head_out_all_pos(lens.model, lens.corrupt, clean, metric)
    mlps = tools.patching.generic_activation_patch(
        lens.model, lens.corrupt, clean, metric, whole, "mlp_out", index_axis_names=("layer",)
    )
    found = {
        f"decoder.{layer}.attn.h{n}": value
        for layer, row in enumerate(heads.tolist())
        for n, value in enumerate(row)
    }
    return found | {f"decoder.{layer}.mlp": value for layer, value in enumerate(mlps.tolist())}


Some = Callable[[int], Lensed]


def methods(tools: Peers, made: Planted, some: Some, kind: str) -> dict[str, Callable[[], Any]]:
    """What ranks parts of a kind, ours first."""
    if kind == "edges":
        found: dict[str, Callable[[], Any]] = {
            method: lambda m=method: edge_scores(made, m) for method in ("eap", "eap-ig", "exact")
        }
        return found | {
            f"EAP-IG: {method}": lambda m=method, n=many: of_graph(tools, some(n), m)
            for method, many in THEIRS.items()
        }
    return {
        "atp": lambda: node_scores(made, "atp"),
        "patches": lambda: node_scores(made, "patches"),
        "TransformerLens: attribution": lambda: by_gradient(some(RANKED["atp"])),
        "TransformerLens: patching": lambda: by_patches(tools, some(RANKED["patches"])),
        "EAP-IG: EAP": lambda: of_nodes(tools, some(16), "EAP"),
        "EAP-IG: EAP-IG-inputs": lambda: of_nodes(tools, some(8), "EAP-IG-inputs"),
    }


def one(
    given: Mapping[str, Callable[[], Any]], made: Planted, kind: str, *, circuits: bool
) -> dict[str, Any]:
    """How well each method ranks, the seconds of CPU that it took, and what circuits of its first carry."""
    roles = edge_roles(made) if kind == "edges" else node_roles(made)
    rankings, row = {}, {}
    for name, score in given.items():
        start = time.process_time()
        rankings[name] = score()
        seconds = {"seconds": time.process_time() - start}
        first = {"decoys_first": decoys_first(rankings[name], roles)}
        row[name] = ranking(rankings[name], roles) | first | seconds
    for name, found in beside_oracle(made, kind, rankings).items() if circuits else ():
        row[name] = row.get(name, {}) | found
    return row


def apart(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> float:
    """The largest difference, as a share of the largest score."""
    assert ours.keys() == theirs.keys()
    return max(abs(ours[part] - theirs[part]) for part in ours) / max(map(abs, ours.values()))


def check(tools: Peers, made: Planted, some: Some) -> dict[str, float]:
    """By how much theirs and ours differ where both compute the same: the corrupt run is the base."""
    lens = some(RANKED["eap"])
    return {
        "logits": lens.differs,
        "eap": apart(edge_scores(made, "eap"), of_graph(tools, lens, "EAP", turned=True)),
        "atp": apart(node_scores(made, "atp"), by_gradient(lens)),
        "patches": apart(node_scores(made, "patches"), by_patches(tools, lens)),
    }


def measure(tools: Peers, recipe: Recipe) -> dict[str, Any]:
    """All of one model: its rows of nodes and edges, and what is held."""
    made = plant(recipe)
    some = cache(partial(lensed, tools, made))
    last = recipe.effect == EFFECTS[-1]
    found = {kind: one(methods(tools, made, some, kind), made, kind, circuits=last) for kind in KINDS}
    return found | {"check": _held(recipe, check(tools, made, some))}


def exact(tools: Peers) -> dict[str, float]:
    """All edges of one model patched exactly, a forward of two examples for each in EAP-IG's code."""
    made = plant(Recipe("D", 0, effect=EFFECTS[-1]))
    lens = lensed(tools, made, RANKED["exact"])
    start = time.process_time()
    theirs = of_graph(tools, lens, "exact", turned=True)
    between = time.process_time()
    ours = edge_scores(made, "exact")
    times = {"seconds of theirs": between - start, "seconds of ours": time.process_time() - between}
    return _held(made.recipe, {"exact": apart(ours, theirs)}) | times


def _held(recipe: Recipe, found: dict[str, float]) -> dict[str, float]:
    if odd := {name: value for name, value in found.items() if value > ROUNDING[name]}:
        raise RuntimeError(f"{recipe}: theirs and ours differ by {odd}; what is compared is not the same")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="models of each cell")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no model after so many")
    parser.add_argument("--rows", type=Path, help="keep each model's figures here, and go on from these")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    tools = peers()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.rows:
        arguments.rows.mkdir(parents=True, exist_ok=True)
    file = arguments.rows and arguments.rows / "peers.jsonl"
    rows = Rows(file, time.monotonic() + 60 * arguments.minutes)
    cells: dict[str, list[dict[str, Any]]] = {}
    differences: dict[str, float] = {}
    for seed, say in ((seed, say) for seed in range(arguments.seeds) for say in SAYS):
        for effect in EFFECTS:
            recipe = Recipe("D", seed, effect=effect, say=say)
            found = rows.of(f"{seed} {say} {effect:g}", partial(measure, tools, recipe))
            for kind in KINDS if found else ():
                cells.setdefault(f"D-{say} {kind} {effect:g}", []).append(found[kind])
            for name, value in found["check"].items() if found else ():
                differences[name] = max(value, differences.get(name, 0.0))
        print(f"seed {seed}, {say}", file=sys.stderr, flush=True)
    result = {
        "benchmark": "planted, peers",
        "machine": f"{platform.machine()}, 1 thread, CPU",
        "vlmscope": vlmscope.__version__,
        "versions": {name: version(name) for name in ("torch", "transformers", "transformer-lens", "eap")},
        "examples": {"ours": RANKED, "EAP-IG": THEIRS, "circuits": MEASURED},
        "differences": differences,
        "exact": rows.of("exact", partial(exact, tools)),
        "peers": summarized(cells),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(tables(result)), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
