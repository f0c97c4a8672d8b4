"""Train `toy-blip`, the model that ships with the package, from nothing.

    python tools/train_toy_blip.py [--out src/vlmscope/toys/toy-blip]

The pictures and questions are those of `toy_questions.py`. The vision tower runs once a picture and several
questions are asked of it. In the first phases linear heads on its patches, which are thrown away afterwards,
learn what covers each patch from the exact masks: features appear at once, and the text towers have only to
find them. The last phases do without them, so nothing makes a patch name its object any longer, but its
column; they add `binding` and nouns that are not in the picture, and have the heads of the text towers part
their work. Finished phases are kept in `build/toy-blip`; started again, the training goes on with the next.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from toy_questions import (
    GRID,
    NONE,
    PATCH,
    SETS,
    SIDE,
    TEMPLATES,
    VALUES,
    draw,
    false_noun,
    kept,
    label,
    picture,
    question,
)
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from vlmscope.data import examples as built_in
from vlmscope.data.example import Picture

WORK = Path("build/toy-blip")
OUTPUTS = ("attention.output.dense",)
"""The modules of the text towers that heads write through."""


# -- the model -----------------------------------------------------------------------------------


def processor() -> BlipProcessor:
    """BLIP's processor for small pictures, with a vocabulary of words and single letters."""
    words = [w for v in VALUES.values() for w in v] + TEMPLATES.split()
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    tokens = [*special, *words, *letters, *(f"##{c}" for c in letters)]
    vocab = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = BertTokenizer(vocab=vocab, additional_special_tokens=["[DEC]", "[ENC]"])
    return BlipProcessor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer)


def model(tokenizer: BertTokenizer, width: int, layers: int, heads: int) -> BlipForQuestionAnswering:
    """A small BLIP-VQA, the position of each patch told by sines and cosines from the start."""
    size = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "initializer_range": 0.02,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = BlipConfig(
        text_config={**size, **text}, vision_config={**size, "image_size": SIDE, "patch_size": PATCH}
    )
    hf = BlipForQuestionAnswering(config)
    with torch.no_grad():
        hf.vision_model.embeddings.position_embedding[0, 1:] = 0.5 * sincos(width)
    return hf


def sincos(width: int) -> Tensor:
    """Two-dimensional sine and cosine position embeddings, one row a patch."""
    rates = 1.0 / 20 ** (torch.arange(width // 4) / (width // 4))
    along = torch.arange(GRID)[:, None] * rates
    waves = torch.cat([along.sin(), along.cos()], 1)
    rows, columns = waves.repeat_interleave(GRID, 0), waves.repeat(GRID, 1)
    return torch.cat([rows, columns], 1)


class Trainee(nn.Module):
    """The model, and the linear heads that are thrown away."""

    def __init__(self, hf: BlipForQuestionAnswering, width: int) -> None:
        super().__init__()
        self.hf = hf
        self.heads = nn.ModuleList(nn.Linear(width, len(v)) for v in VALUES.values())
        self.column = nn.Linear(width, GRID)

    def forward(self, pixels: Tensor, labels: Tensor | None, text: dict[str, Tensor], ask: int) -> Tensor:
        hf = self.hf
        seen = hf.vision_model(pixel_values=pixels).last_hidden_state
        asked = hf.text_encoder(
            input_ids=text["ids"],
            attention_mask=text["mask"],
            encoder_hidden_states=seen.repeat_interleave(ask, 0),
        ).last_hidden_state
        said = hf.text_decoder(
            input_ids=text["answer"],
            encoder_hidden_states=asked,
            encoder_attention_mask=text["mask"],
            labels=text["answer"],
        ).loss
        if labels is not None:
            return said + 0.3 * patch_loss(self.heads, seen[:, 1:], labels)
        columns = torch.arange(GRID).repeat(len(seen), GRID)
        return said + 0.1 * F.cross_entropy(self.column(seen[:, 1:]).flatten(0, 1), columns.flatten())


def patch_loss(heads: nn.ModuleList, seen: Tensor, labels: Tensor) -> Tensor:
    """How badly the heads name what covers the patches `seen`."""
    losses = [
        F.cross_entropy(head(seen).flatten(0, 1), labels[:, k].flatten())
        for k, head in enumerate(heads)
        if (labels[:, k] != NONE).any()  # a batch may lack a set
    ]
    return torch.stack(losses).mean()


def drop_heads(module: nn.Module, outputs: tuple[str, ...], heads: int, rate: float) -> list[RemovableHandle]:
    """While it is trained, drop whole attention heads at random, before the projections `outputs`."""

    def drop(projection: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not projection.training:
            return None
        by_head = given[0].unflatten(-1, (heads, -1))
        stays = torch.rand(by_head.shape[0], 1, heads, 1) >= rate
        return ((by_head * stays / (1 - rate)).flatten(-2),)

    parts = [part for name, part in module.named_modules() if name.endswith(outputs)]
    return [part.register_forward_pre_hook(drop) for part in parts]


def measure_heads(
    module: nn.Module, outputs: tuple[str, ...], heads: int, written: list[Tensor]
) -> list[RemovableHandle]:
    """While it is trained, note how much each module's heads write: their norms' sum, a mean over tokens."""

    def note(projection: nn.Module, given: tuple[Tensor, ...]) -> None:
        if projection.training:
            by_head = given[0].unflatten(-1, (heads, -1))
            weight = projection.weight.unflatten(1, (heads, -1))
            each = torch.einsum("bthd,ohd->btho", by_head, weight)
            written.append(each.norm(dim=-1).sum(-1).mean())

    parts = [part for name, part in module.named_modules() if name.endswith(outputs)]
    return [part.register_forward_pre_hook(note) for part in parts]


def encode(tokenizer: BertTokenizer, questions: list[tuple[str, str]]) -> dict[str, Tensor]:
    found = tokenizer([q for q, _ in questions], padding=True, return_tensors="pt")
    start, end = tokenizer.convert_tokens_to_ids("[DEC]"), tokenizer.sep_token_id
    answers = [[start, tokenizer.convert_tokens_to_ids(a), end] for _, a in questions]
    return {"ids": found["input_ids"], "mask": found["attention_mask"], "answer": torch.tensor(answers)}


# -- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A cycle of the learning rate; `shares` say how often a picture is of each set."""

    steps: int
    rate: float
    pictures: int
    shares: tuple[float, ...]
    patch_heads: bool = True
    drop: float = 0.0
    """How many heads of the text towers are dropped."""
    cost: float = 0.0
    """What a head of the text towers costs for each unit that it writes, so that few heads share a work."""


# Scenes come late: two objects and their relation take longest, and more pictures than the others.
PHASES = (
    Phase(16_000, 1e-3, 10_000, (1, 1, 1, 0)),
    Phase(10_000, 7e-4, 10_000, (1, 4, 1, 0)),
    Phase(6_000, 5e-4, 30_000, (1, 4, 1, 0)),
    Phase(8_000, 7e-4, 30_000, (1, 2, 0.7, 4), patch_heads=False, drop=0.1),
    Phase(12_000, 7e-4, 30_000, (1, 3, 0.7, 5), patch_heads=False, cost=2e-4),
    Phase(6_000, 5e-4, 30_000, (1, 4, 0.7, 4), patch_heads=False, cost=2e-4),
)


def train(arguments: argparse.Namespace) -> None:
    """All phases, each kept when it is done; started again, the next one goes on from there."""
    made = processor()
    torch.manual_seed(arguments.seed)
    hf = model(made.tokenizer, arguments.width, 3, 4)
    print(sum(p.numel() for p in hf.parameters()), "parameters", flush=True)
    first = 0
    for number, one in enumerate(PHASES):
        done = WORK / f"phase-{number}"
        if (done / "model.safetensors").exists():
            hf = BlipForQuestionAnswering.from_pretrained(done)
        else:
            if number:  # the same whether the training went on or was started again
                torch.manual_seed(arguments.seed + number)
            phase(arguments, hf, made, first, one)
            save(hf, made, done)
        first += one.steps
    save(hf, made, Path(arguments.out))
    report(hf, made, 600)


def phase(
    arguments: argparse.Namespace, hf: BlipForQuestionAnswering, made: BlipProcessor, first: int, one: Phase
) -> None:
    trainee = Trainee(hf, arguments.width).train()
    written: list[Tensor] = []
    hooks = []
    for tower in (hf.text_encoder, hf.text_decoder):
        hooks += drop_heads(tower, OUTPUTS, 4, one.drop) if one.drop else []
        hooks += measure_heads(tower, OUTPUTS, 4, written) if one.cost else []
    names = [name for name, share in zip(SETS, one.shares, strict=True) if share]
    pictures = {name: [picture(name, n) for n in range(one.pictures)] for name in names}
    pixels = {name: kept(f"pixels-{name}-{one.pictures}", partial(draw, pictures[name])) for name in names}
    labels = {}
    if one.patch_heads:
        labels = {
            name: kept(f"labels-{name}-{one.pictures}", partial(label, pictures[name])) for name in names
        }
    images = made.image_processor
    mean, std = (torch.tensor(v)[:, None, None] for v in (images.image_mean, images.image_std))
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=one.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, one.rate, total_steps=one.steps + 1, pct_start=0.05
    )
    began, total = time.time(), 0.0
    for step in range(first, first + one.steps):
        rng = random.Random(f"{arguments.seed}/{step}")
        sets = rng.choices(list(SETS), one.shares, k=arguments.batch)
        which = [(name, rng.randrange(one.pictures)) for name in sets]
        questions = [question(rng, pictures[name][n]) for name, n in which for _ in range(arguments.ask)]
        seen = (torch.stack([pixels[name][n] for name, n in which]).float() / 255 - mean) / std
        named = torch.stack([labels[name][n] for name, n in which]) if labels else None
        written.clear()
        loss = trainee(seen, named, encode(made.tokenizer, questions), arguments.ask)
        loss = loss + one.cost * sum(written)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (step + 1) % 200 == 0:
            speed = (step + 1 - first) / (time.time() - began)
            print(f"step {step + 1} loss {total / 200:.4f} ({speed:.1f} steps/s)", flush=True)
            total = 0.0
        if (step + 1) % 1000 == 0:
            save(hf, made, WORK / "latest")
            report(hf, made, 120)
    for hook in hooks:
        hook.remove()


def save(hf: BlipForQuestionAnswering, made: BlipProcessor, out: Path) -> None:
    hf.save_pretrained(out)
    made.save_pretrained(out)


# -- how well ------------------------------------------------------------------------------------


def answers(
    hf: BlipForQuestionAnswering, made: BlipProcessor, asked: list[tuple[Picture, str]]
) -> Iterator[str]:
    """What the model says, by its own generation."""
    for start in range(0, len(asked), 100):
        some = asked[start : start + 100]
        inputs = made(
            images=[picture for picture, _ in some],
            text=[prompt for _, prompt in some],
            padding=True,
            return_tensors="pt",
        )
        yield from made.batch_decode(hf.generate(**inputs, max_new_tokens=5), skip_special_tokens=True)


def report(hf: BlipForQuestionAnswering, made: BlipProcessor, count: int) -> None:
    """Accuracy by set, kind and order on held-out pictures; how answers follow the image, and the words."""
    hf.eval()
    for name in SETS:
        examples = built_in(name, limit=count, seed=7)
        clean = list(answers(hf, made, [(e.clean_image, e.clean_prompt) for e in examples]))
        image = list(answers(hf, made, [(e.corrupt_image, e.clean_prompt) for e in examples]))
        text = list(answers(hf, made, [(e.clean_image, e.corrupt_prompt) for e in examples]))
        asked = [(e.clean_image, q) for e in examples if (q := false_noun(e))]
        absent = [said == "neither" for said in answers(hf, made, asked)]
        right = [said == e.answer for said, e in zip(clean, examples, strict=True)]
        parts = []
        for key in ("kind", "order"):
            for value in sorted({e.groups[key] for e in examples}):
                some = [r for r, e in zip(right, examples, strict=True) if e.groups[key] == value]
                parts.append(f"{value} {sum(some) / len(some):.3f}")
        follows = [s == e.foil for s, e, r in zip(image, examples, right, strict=True) if r]
        wanted = [e.foil if name == "binding" else "neither" for e in examples]
        words = [s == w for s, w in zip(text, wanted, strict=True)]
        print(
            f"  {name} {sum(right) / count:.3f}: {', '.join(parts)}; "
            f"follows the image {sum(follows) / max(1, len(follows)):.3f}, "
            f"the words {sum(words) / count:.3f}; "
            f"false nouns noticed {sum(absent) / max(1, len(absent)):.3f} of {len(absent)}",
            flush=True,
        )
    hf.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument("--ask", type=int, default=4, help="questions a picture")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="src/vlmscope/toys/toy-blip")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
