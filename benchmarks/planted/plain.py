"""Runs of many examples at once in plain torch: what vlmscope's figures are held against.

Nothing here uses vlmscope's engine, hooks or flows: a head is columns of what enters an output projection,
and a pre-hook of that module writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from pictures import Batch
from torch import Tensor, nn

Part = str
"""Such as encoder.1.cross.h3 or decoder.3.mlp.n17, as in vlmscope's sites."""


class Attention(NamedTuple):
    """The four projections of a layer's attention."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear


def attention(hf: Any, tower: str, layer: int, kind: str) -> Attention:
    if not hasattr(hf, "text_encoder"):
        own = hf.model.language_model.layers[layer].self_attn
        return Attention(own.q_proj, own.k_proj, own.v_proj, own.o_proj)
    blocks = hf.text_encoder.encoder if tower == "encoder" else hf.text_decoder.bert.encoder
    block = blocks.layer[layer]
    own = block.crossattention if kind == "cross" else block.attention
    return Attention(own.self.query, own.self.key, own.self.value, own.output.dense)


def module(hf: Any, part: Part) -> tuple[nn.Linear, int]:
    """The linear layer that a head or neuron enters, and its number."""
    tower, layer, kind, unit = part.split(".")
    if kind == "mlp" and hasattr(hf, "text_encoder"):
        return hf.text_encoder.encoder.layer[int(layer)].output.dense, int(unit[1:])
    if kind == "mlp":
        return hf.model.language_model.layers[int(layer)].mlp.down_proj, int(unit[1:])
    return attention(hf, tower, int(layer), kind).out, int(unit[1:])


def heads_of(hf: Any) -> list[Part]:
    """All heads that are scored: those that are read at the noun, or where the answer is said."""
    text, in_c = hf.config.text_config, hasattr(hf, "text_encoder")
    groups = [("encoder", "attn"), ("encoder", "cross"), ("decoder", "cross")]
    return [
        f"{tower}.{layer}.{kind}.h{head}"
        for tower, kind in (groups if in_c else [("decoder", "attn")])
        for layer in range(text.num_hidden_layers)
        for head in range(text.num_attention_heads)
    ]


def columns(hf: Any, part: Part) -> tuple[nn.Linear, slice]:
    """The linear layer and those of its inputs that are the part's."""
    where, number = module(hf, part)
    heads = hf.config.text_config.num_attention_heads
    width = 1 if part.split(".")[2] == "mlp" else where.in_features // heads
    return where, slice(number * width, (number + 1) * width)


def position(part: Part, batch: Batch) -> int:
    """Where a part is read and patched: the noun in the question encoder, the last token elsewhere."""
    return batch.noun_at if part.startswith("encoder") else -1


@contextmanager
def hooked(hooks: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor | None]]]) -> Iterator[None]:
    """Within this context each module's input first passes its function; None leaves it as it is."""

    def before(change: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
            new = change(args[0])
            return None if new is None else (new, *args[1:])

        return hook

    held = [where.register_forward_pre_hook(before(change)) for where, change in hooks]
    try:
        yield
    finally:
        for one in held:
            one.remove()


def logits(hf: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Of the next token, a row an example."""
    if not hasattr(hf, "text_encoder"):
        if "past_key_values" not in inputs:
            return hf(**inputs, logits_to_keep=1).logits[:, -1]
        found = hf(**inputs, logits_to_keep=1, use_cache=True).logits[:, -1]
        inputs["past_key_values"].crop(-inputs["input_ids"].shape[1])
        return found
    text = inputs.get("text")
    if text is None:
        text = _encoded(hf, inputs)
    return hf.text_decoder(
        input_ids=inputs["decoder_input_ids"],
        encoder_hidden_states=text,
        encoder_attention_mask=inputs["attention_mask"],
        use_cache=False,
    ).logits[:, -1]


def _encoded(hf: Any, inputs: Mapping[str, Any]) -> Tensor:
    image = inputs.get("image")
    if image is None:
        image = hf.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
    return hf.text_encoder(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        encoder_hidden_states=image,
        encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long),
    ).last_hidden_state


def seen(hf: Any, inputs: Mapping[str, Tensor], tail: int = 1) -> dict[str, Any]:
    """The inputs with what no patch changes: what the vision tower makes of the pictures (form C), or the
    keys and values of all tokens but the last, or so many, at which everything is patched (form D)."""
    if hasattr(hf, "text_encoder"):
        return dict(inputs) | {
            "image": hf.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
        }
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    before = {"input_ids": ids[:, :-tail], "attention_mask": mask[:, :-tail]}
    found = hf(**before, pixel_values=inputs["pixel_values"], logits_to_keep=1, use_cache=True)
    return {"input_ids": ids[:, -tail:], "attention_mask": mask, "past_key_values": found.past_key_values}


def difference(found: Tensor, batch: Batch) -> Tensor:
    """LD = logit(answer) − logit(foil) of each example."""
    each = torch.arange(len(found))
    return found[each, batch.answer] - found[each, batch.foil]


class _EnoughError(Exception):
    """All that was asked for has been seen."""


def keep(hf: Any, inputs: Mapping[str, Any], modules: Sequence[nn.Module]) -> tuple[Tensor, list[Tensor]]:
    """The logits, and what entered each of the modules."""
    kept: dict[int, Tensor] = {}

    def keeper(n: int) -> Callable[[Tensor], None]:
        return lambda x: kept.__setitem__(n, x)

    with hooked([(one, keeper(n)) for n, one in enumerate(modules)]):
        found = logits(hf, inputs)
    return found, [kept[n] for n in range(len(modules))]


def entering(hf: Any, inputs: Mapping[str, Any], modules: Sequence[nn.Module]) -> list[Tensor]:
    """What enters each of the modules; the run ends there."""
    kept: dict[int, Tensor] = {}

    def keeper(n: int) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            kept[n] = x
            if len(kept) == len(modules):
                raise _EnoughError

        return take

    with suppress(_EnoughError), torch.no_grad(), hooked([(one, keeper(n)) for n, one in enumerate(modules)]):
        logits(hf, inputs)
    return [kept[n] for n in range(len(modules))]


class Runs:
    """The clean and the corrupt runs of a batch, with what entered output projections where they are read."""

    def __init__(self, hf: Any, batch: Batch, parts: Sequence[Part]) -> None:
        self.hf, self.batch = hf, batch
        where = {id(columns(hf, part)[0]): (columns(hf, part)[0], part) for part in parts}
        self.at = {name: position(part, batch) for name, (_, part) in where.items()}
        self.kept: dict[str, dict[int, Tensor]] = {"clean": {}, "corrupt": {}}
        self.encoded: dict[Any, Tensor] = {}
        with torch.inference_mode():
            self.inputs = {"clean": seen(hf, batch.clean), "corrupt": seen(hf, batch.corrupt)}
        self.encoder = [one for one, part in where.values() if part.startswith("encoder")]
        self.decoder = [one for one, part in where.values() if part.startswith("decoder")]
        if self.encoder:
            self._keep(self.encoder, self.inputs)
        self.again()

    def again(self) -> None:
        """Run anew: weights of the decoder have changed that what is kept (`seen`) does not depend on."""
        inputs = {run: self._read(run, [], None) for run in self.inputs}
        self.clean, self.corrupt = self._keep(self.decoder, inputs)

    def _keep(self, modules: Sequence[nn.Module], inputs: Mapping[str, Any]) -> list[Tensor]:
        """The logits of both runs; what enters the modules is kept."""
        found = []
        for run, given in inputs.items():
            with torch.inference_mode():
                last, kept = keep(self.hf, given, modules)
            found.append(last)
            self.kept[run] |= {id(m): x[:, self.at[id(m)]] for m, x in zip(modules, kept, strict=True)}
        return found

    def _read(self, run: str, parts: Sequence[Part], value: str | None) -> dict[str, Any]:
        """The inputs of a run with what the decoder of form C reads; under hooks, where parts are patched."""
        if not hasattr(self.hf, "text_encoder"):
            return self.inputs[run]
        name = (run, value, *(part for part in parts if part.startswith("encoder")))
        if name not in self.encoded:
            with torch.inference_mode():
                self.encoded[name] = _encoded(self.hf, self.inputs[run])
        return self.inputs[run] | {"text": self.encoded[name]}

    @property
    def ld_clean(self) -> Tensor:
        return difference(self.clean, self.batch)

    @property
    def ld_corrupt(self) -> Tensor:
        return difference(self.corrupt, self.batch)

    @property
    def gap(self) -> float:
        """The mean of LD(clean) − LD(corrupt)."""
        return float((self.ld_clean - self.ld_corrupt).mean())

    def patched(self, parts: Sequence[Part], run: str = "corrupt", value: str | None = "clean") -> Tensor:
        """LD of one run with the parts' values from the other (`clean`, `corrupt`), their mean over the
        examples of the run (`mean`), or zero (None), minus LD of that run."""
        hooks = []
        for part in parts:
            where, cut = columns(self.hf, part)
            at = position(part, self.batch)
            if value is None:
                new: Any = 0.0
            elif value == "mean":
                new = self.kept[run][id(where)][:, cut].mean(0)
            else:
                new = self.kept[value][id(where)][:, cut]
            hooks.append((where, _writer(at, cut, new)))
        with torch.inference_mode(), hooked(hooks):
            found = logits(self.hf, self._read(run, parts, value))
        return difference(found, self.batch) - (self.ld_corrupt if run == "corrupt" else self.ld_clean)

    def share(self, parts: Sequence[Part], run: str = "corrupt", value: str | None = "clean") -> float:
        """The mean of `patched`, as a share of the gap."""
        return float(self.patched(parts, run, value).mean()) / self.gap


def _writer(at: int, cut: slice, new: Any) -> Callable[[Tensor], Tensor]:
    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, at, cut] = new
        return x

    return write
