"""Where transformers' modeling files put what: read from them, and from nothing of vlmscope.

A `Tower` has the blocks of one tower in their order. `Added` is what a sublayer adds to the residual
stream: the output of a module, times a number or a parameter of the block where its forward has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from torch import Tensor, nn


@dataclass(frozen=True)
class Added:
    path: str
    times: Callable[[nn.Module, Mapping[str, Any]], Tensor | float] = lambda block, called: 1.0


@dataclass(frozen=True)
class Block:
    """Paths inside a block: what its sublayers add, where its heads and its neurons lie side by side,
    and the modules that pay attention."""

    added: Mapping[str, Added]
    heads: Mapping[str, str]
    neurons: str
    pays: Mapping[str, str]


@dataclass(frozen=True)
class Tower:
    blocks: Sequence[nn.Module]
    kinds: Sequence[Block]
    prenorm: bool
    heads: int

    def rows(self, hidden: Tensor) -> Tensor:
        """The hidden states of a tower, one row a position: sequences of a batch lie end to end."""
        return hidden.reshape(-1, hidden.shape[-1])


def llama_block(attn: Added | None = None, mlp: Added | None = None) -> Block:
    return Block(
        {"attn": attn or Added("self_attn"), "mlp": mlp or Added("mlp")},
        {"attn": "self_attn.o_proj"},
        "mlp.down_proj",
        {"attn": "self_attn"},
    )


LLAMA = llama_block()
# Gemma 2 and 3 have norms behind the sublayers, before the sum.
GEMMA2 = llama_block(Added("post_attention_layernorm"), Added("post_feedforward_layernorm"))
GRANITE = llama_block(
    Added("self_attn", lambda block, called: block.residual_multiplier),
    Added("mlp", lambda block, called: block.residual_multiplier),
)
CLIP = Block(
    {"attn": Added("self_attn"), "mlp": Added("mlp")},
    {"attn": "self_attn.out_proj"},
    "mlp.fc2",
    {"attn": "self_attn"},
)
BLIP = Block(CLIP.added, {"attn": "self_attn.projection"}, "mlp.fc2", {"attn": "self_attn"})
OPT = Block(
    {"attn": Added("self_attn"), "mlp": Added("fc2")},
    {"attn": "self_attn.out_proj"},
    "fc2",
    {"attn": "self_attn"},
)


def bert(output: str, pays: str) -> Block:
    """BERT's blocks: the norms stand behind the sums."""
    return Block(
        {
            "attn": Added("attention.output.dense"),
            "cross": Added("crossattention.output.dense"),
            "mlp": Added(f"{output}.dense"),
        },
        {"attn": "attention.output.dense", "cross": "crossattention.output.dense"},
        f"{output}.dense",
        {"attn": f"attention.{pays}", "cross": f"crossattention.{pays}"},
    )


def t5_block(decoder: bool) -> Block:
    last = "layer.2" if decoder else "layer.1"
    added = {"attn": Added("layer.0.SelfAttention"), "mlp": Added(f"{last}.DenseReluDense")}
    heads = {"attn": "layer.0.SelfAttention.o"}
    pays = {"attn": "layer.0.SelfAttention"}
    if decoder:
        added["cross"] = Added("layer.1.EncDecAttention")
        heads["cross"] = "layer.1.EncDecAttention.o"
        pays["cross"] = "layer.1.EncDecAttention"
    return Block(added, heads, f"{last}.DenseReluDense.wo", pays)


def qwen_vision(down: str) -> Block:
    return Block({"attn": Added("attn"), "mlp": Added("mlp")}, {"attn": "attn.proj"}, down, {"attn": "attn"})


INTERNVL = Block(
    {
        "attn": Added("attention", lambda block, called: block.lambda_1),
        "mlp": Added("mlp", lambda block, called: block.lambda_2),
    },
    {"attn": "attention.projection_layer"},
    "mlp.fc2",
    {"attn": "attention"},
)
MLLAMA_VISION = Block(
    {"attn": Added("self_attn"), "mlp": Added("mlp")},
    {"attn": "self_attn.o_proj"},
    "mlp.fc2",
    {"attn": "self_attn"},
)
MLLAMA_GLOBAL = Block(
    {
        "attn": Added("self_attn", lambda block, called: block.gate_attn.tanh()),
        "mlp": Added("mlp", lambda block, called: block.gate_ffn.tanh()),
    },
    {"attn": "self_attn.o_proj"},
    "mlp.fc2",
    {"attn": "self_attn"},
)
MLLAMA_CROSS = Block(
    {
        "cross": Added("cross_attn", lambda block, called: block.cross_attn_attn_gate.tanh()),
        # Rows of the text that see no picture get nothing from the MLP.
        "mlp": Added(
            "mlp",
            lambda block, called: (
                block.cross_attn_mlp_gate.tanh() * called["full_text_row_masked_out_mask"][:, 0]
            ),
        ),
    },
    {"cross": "cross_attn.o_proj"},
    "mlp.down_proj",
    {"cross": "cross_attn"},
)


def towers(case: Case, hf: Any) -> dict[str, Tower]:
    """The towers of a case's model, of `hf` or of a copy of it."""
    name = case.name

    def same(blocks: Any, kind: Block, heads: int, prenorm: bool = True) -> Tower:
        return Tower(list(blocks), [kind] * len(blocks), prenorm, heads)

    if name.startswith("blip-"):
        found = {"vision": same(hf.vision_model.encoder.layers, BLIP, 2)}
        text = bert("output", "self")
        if name == "blip-vqa":
            found["encoder"] = same(hf.text_encoder.encoder.layer, text, 2, False)
        found["decoder"] = same(hf.text_decoder.bert.encoder.layer, text, 2, False)
        return found
    if name.startswith(("blip2", "instructblip")):
        found = {"vision": same(hf.vision_model.encoder.layers, BLIP, 2)}
        query = bert("output_query", "attention")
        found["qformer"] = same(hf.qformer.encoder.layer, query, 2, False)
        if name.endswith("t5"):
            found["encoder"] = same(hf.language_model.encoder.block, t5_block(False), 4)
            found["decoder"] = same(hf.language_model.decoder.block, t5_block(True), 4)
        elif name.endswith("opt"):
            found["decoder"] = same(hf.language_model.model.decoder.layers, OPT, 4)
        else:
            found["decoder"] = same(hf.language_model.model.layers, LLAMA, 4)
        return found

    inner = hf.model
    if name == "mllama":
        vision = inner.vision_model
        blocks = [*vision.transformer.layers, *vision.global_transformer.layers]
        kinds = [MLLAMA_VISION] * len(vision.transformer.layers) + [MLLAMA_GLOBAL] * len(
            vision.global_transformer.layers
        )
        layers = inner.language_model.layers
        return {
            "vision": Tower(blocks, kinds, True, 2),
            "decoder": Tower(
                list(layers),
                [MLLAMA_CROSS if hasattr(one, "cross_attn") else LLAMA for one in layers],
                True,
                4,
            ),
        }
    if name.startswith("qwen"):
        down = {"qwen2-vl": "mlp.fc2", "qwen2.5-vl": "mlp.down_proj", "qwen3-vl": "mlp.linear_fc2"}
        vision = same(inner.visual.blocks, qwen_vision(down[name]), 2)
    elif name == "internvl":
        vision = same(inner.vision_tower.encoder.layer, INTERNVL, 2)
    elif name in ("idefics3", "smolvlm"):
        vision = same(inner.vision_model.encoder.layers, CLIP, 2)
    else:
        vision = same(inner.vision_tower.encoder.layers, CLIP, 2)
    layers = inner.text_model.layers if name in ("idefics3", "smolvlm") else inner.language_model.layers
    kind = {"gemma3": GEMMA2, "paligemma2": GEMMA2, "llava-next-granite": GRANITE}.get(name, LLAMA)
    return {"vision": vision, "decoder": same(layers, kind, 4)}


def tensor(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def with_tensor(out: Any, new: Tensor) -> Any:
    return (new, *out[1:]) if isinstance(out, tuple) else new


def first(args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The tensor that a module is called with, by place or by name."""
    return args[0] if args else named["hidden_states"]


@contextmanager
def hooked() -> Iterator[Callable[[Any], None]]:
    """Hooks that are taken off at the end, whatever happens."""
    with ExitStack() as stack:
        yield lambda handle: stack.callback(handle.remove) and None


def forward(case: Case, tensors: Mapping[str, Tensor], hf: Any = None) -> Tensor:
    """The logits at the last position, of Hugging Face's own forward."""
    hf = case.hf if hf is None else hf
    if case.name != "blip-vqa":
        return hf(**tensors).logits[0, -1]
    found: list[Tensor] = []  # its forward gives no logits
    with hooked() as keep:
        keep(hf.text_decoder.register_forward_hook(lambda m, a, out: found.append(out.logits)))
        hf(**tensors)
    return found[0][0, -1]


@dataclass
class Seen:
    """What one block of a tower read, gave, and what its sublayers added, a row a position."""

    before: Tensor
    after: Tensor
    added: dict[str, Tensor]


def watch(case: Case, tensors: Mapping[str, Tensor], tower: str) -> list[Seen]:
    """One plain forward, watched block by block."""
    part = towers(case, case.hf)[tower]
    before: list[Tensor] = []
    after: list[Tensor] = []
    added: list[dict[str, Tensor]] = [{} for _ in part.blocks]
    called: list[Mapping[str, Any]] = []

    def begin(m: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        before.append(part.rows(first(args, named)))
        called.append(named)

    with hooked() as keep:
        for number, (block, kind) in enumerate(zip(part.blocks, part.kinds, strict=True)):
            keep(block.register_forward_pre_hook(begin, with_kwargs=True))
            keep(block.register_forward_hook(lambda m, args, out: after.append(part.rows(tensor(out)))))
            for name, one in kind.added.items():
                if not has(block, one.path):
                    continue

                def note(
                    m: Any, args: Any, out: Any, *, number=number, name=name, one=one, block=block
                ) -> None:
                    added[number][name] = part.rows(tensor(out) * one.times(block, called[-1]))

                keep(block.get_submodule(one.path).register_forward_hook(note))
        forward(case, tensors)
    return [Seen(*three) for three in zip(before, after, added, strict=True)]


def has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def halved(
    case: Case, tensors: Mapping[str, Tensor], tower: str, layer: int, kind: str, rows: int | None = None
) -> Tensor:
    """The logits where what one sublayer adds is halved (at its first `rows`), by a plain hook."""
    part = towers(case, case.hf)[tower]
    module = part.blocks[layer].get_submodule(part.kinds[layer].added[kind].path)

    def halve(m: nn.Module, args: Any, out: Any) -> Any:
        value = tensor(out).clone()
        value[..., slice(rows), :] *= 0.5
        return with_tensor(out, value)

    with hooked() as keep:
        keep(module.register_forward_hook(halve))
        return forward(case, tensors)


def double(case: Case, inputs: Any) -> dict[str, Tensor]:
    return case.double(inputs.tensors)


def close(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Equal to `tolerance` of the largest number; infinities have to be the same."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)}, not {tuple(want.shape)}"
    got, want = (torch.nan_to_num(got.double(), neginf=0.0), torch.nan_to_num(want.double(), neginf=0.0))
    worst = (got - want).abs().max().item() if want.numel() else 0.0
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    assert worst <= tolerance * scale, f"{what}: differs by {worst:.3g} of {scale:.3g}"
