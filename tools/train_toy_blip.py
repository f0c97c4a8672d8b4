"""Train `toy-blip`, the model that ships with the package, from nothing.

    python tools/train_toy_blip.py [--out src/vlmscope/toys/toy-blip]

Pictures are drawn from seeds of a million and more, so that the smaller seeds, which users get,
are held out. The vision tower runs once a picture and several questions are asked of it. Linear
heads on its patches, which are thrown away afterwards, learn what covers each patch from the exact
masks: features appear at once, and the text towers have only to find them. Finished phases are
kept in `build/toy-blip`; started again, the training goes on with the next.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from vlmscope.data import examples as built_in
from vlmscope.data.drawn import drawing, faces, scenes, states
from vlmscope.data.example import Picture

SETS = {"states": states, "scenes": scenes, "faces": faces}
SIDE, PATCH = 48, 8
GRID = SIDE // PATCH
WORK = Path("build/toy-blip")
FIRST_SEED = 1_000_000
# What a picture shows, as columns of numbers: first the set, then the values by these names.
VALUES = {
    "shape": drawing.SHAPES,
    "color": tuple(drawing.COLORS),
    "texture": drawing.TEXTURES,
    "expression": faces.EXPRESSIONS,
    "relation": scenes.RELATIONS,
    "other": drawing.SHAPES,
}
TEMPLATES = (
    "is this shape a x or a y ? is the x feeling person neither what color is texture how does "
    "feel where to . , ' -"
)
NONE = -100


# -- pictures ------------------------------------------------------------------------------------


def draw(number: int) -> tuple[Image.Image, list[int], list[tuple[Image.Image, dict[str, str]]]]:
    """Picture `number`: itself, its facts, and the mask and values of each thing in it."""
    name = list(SETS)[number % 3]
    rng = random.Random(f"{name}/{FIRST_SEED}/{number}")
    if name == "states":
        state = states.sample(rng)
        thing = state.thing
        known = {"shape": thing.shape, "color": thing.color, "texture": thing.texture}
        return state.draw(), _facts(0, known), [(state.masks()["object"], known)]
    if name == "faces":
        face = faces.sample(rng)
        known = {"expression": face.expression}
        return face.draw(), _facts(2, known), [(face.masks()["object"], known)]
    scene = scenes.sample(rng)
    masks = scene.masks()
    known = {"shape": scene.subject.shape, "relation": scene.relation, "other": scene.object.shape}
    inverse = {
        "shape": scene.object.shape,
        "relation": scenes.INVERSE[scene.relation],
        "other": scene.subject.shape,
    }
    things = [(masks["subject"], known), (masks["object"], inverse)]
    return scene.draw(), _facts(1, known), things


def _facts(kind: int, known: dict[str, str]) -> list[int]:
    return [kind, *(VALUES[k].index(known[k]) if k in known else NONE for k in VALUES)]


def pool(count: int) -> dict[str, Tensor]:
    """Pixels, facts and patch labels of so many pictures; drawn once and kept."""
    file = WORK / f"pool-{count}.safetensors"
    if file.exists():
        return load_file(file)
    pixels = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    facts = torch.empty(count, 1 + len(VALUES), dtype=torch.long)
    labels = torch.full((count, len(VALUES), GRID * GRID), NONE)
    for n in range(count):
        picture, facts_n, things = draw(n)
        small = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels[n] = (
            torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
            .view(SIDE, SIDE, 3)
            .permute(2, 0, 1)
        )
        facts[n] = torch.tensor(facts_n)
        for mask, known in things:
            share = mask.resize((GRID, GRID), Image.Resampling.BOX).tobytes()
            covered = torch.tensor([value > 90 for value in share])
            for k, value in known.items():
                labels[n, list(VALUES).index(k), covered] = VALUES[k].index(value)
        if n % 2000 == 0:
            print(f"drawn {n} of {count}", flush=True)
    made = {"pixels": pixels, "facts": facts, "labels": labels}
    WORK.mkdir(parents=True, exist_ok=True)
    save_file(made, file)
    return made


# -- questions -----------------------------------------------------------------------------------


def question(rng: random.Random, facts: list[int]) -> tuple[str, str]:
    """A random question about a picture, and its answer."""
    known = {k: VALUES[k][v] for k, v in zip(VALUES, facts[1:], strict=True) if v != NONE}
    how = rng.choices(("options", "open", "neither"), (0.5, 0.38, 0.12))[0]
    if facts[0] == 0:
        return _about_state(rng, known, how)
    if facts[0] == 2:
        return _about_face(rng, known, how)
    return _about_scene(rng, known, how)


def _choose(rng: random.Random, how: str, answer: str, wrong: list[str]) -> tuple[list[str], str]:
    """Two options in random order, and what is right to say."""
    if how == "neither":
        return rng.sample(wrong, 2), "neither"
    return rng.sample([answer, rng.choice(wrong)], 2), answer


def _about_state(rng: random.Random, known: dict[str, str], how: str) -> tuple[str, str]:
    kind = rng.choice(states.KINDS)
    noun = "shape" if kind == "shape" else known["shape"]
    if how == "open":
        text = "what shape is this?" if kind == "shape" else f"what {kind} is this {noun}?"
        return text, known[kind]
    wrong = [v for v in states.VALUES[kind] if v != known[kind]]
    options, answer = _choose(rng, how, known[kind], wrong)
    return states.ask(kind, noun, *options), answer


def _about_face(rng: random.Random, known: dict[str, str], how: str) -> tuple[str, str]:
    if how == "open":
        return "how does this person feel?", known["expression"]
    wrong = [v for v in faces.EXPRESSIONS if v != known["expression"]]
    options, answer = _choose(rng, how, known["expression"], wrong)
    return faces.ask(*options), answer


def _about_scene(rng: random.Random, known: dict[str, str], how: str) -> tuple[str, str]:
    subject, relation, other = known["shape"], known["relation"], known["other"]
    if rng.random() < 0.5:
        subject, relation, other = other, scenes.INVERSE[relation], subject
    kind = rng.choice(scenes.KINDS)
    answer = {"subject": subject, "relation": relation, "object": other}[kind]
    if how == "open":
        return {
            "subject": f"what is {relation} the {other}?",
            "relation": f"where is the {subject} to the {other}?",
            "object": f"the {subject} is {relation} what?",
        }[kind], answer
    values = scenes.RELATIONS if kind == "relation" else drawing.SHAPES
    wrong = [v for v in values if v not in ((relation,) if kind == "relation" else (subject, other))]
    options, answer = _choose(rng, how, answer, wrong)
    first, second = options
    return {
        "subject": f"is a {first} or a {second} {relation} the {other}?",
        "relation": f"is the {subject} {first} or {second} the {other}?",
        "object": f"is the {subject} {relation} a {first} or a {second}?",
    }[kind], answer


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

    def forward(self, pixels: Tensor, labels: Tensor, text: dict[str, Tensor], ask: int) -> Tensor:
        hf = self.hf
        seen = hf.vision_model(pixel_values=pixels).last_hidden_state
        losses = [
            F.cross_entropy(head(seen[:, 1:]).flatten(0, 1), labels[:, k].flatten())
            for k, head in enumerate(self.heads)
            if (labels[:, k] != NONE).any()  # a batch may lack a set
        ]
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
        )
        return said.loss + 0.3 * torch.stack(losses).mean()


def encode(tokenizer: BertTokenizer, questions: list[tuple[str, str]]) -> dict[str, Tensor]:
    found = tokenizer([q for q, _ in questions], padding=True, return_tensors="pt")
    start, end = tokenizer.convert_tokens_to_ids("[DEC]"), tokenizer.sep_token_id
    answers = [[start, tokenizer.convert_tokens_to_ids(a), end] for _, a in questions]
    return {"ids": found["input_ids"], "mask": found["attention_mask"], "answer": torch.tensor(answers)}


# -- training ------------------------------------------------------------------------------------

# Steps, learning rate, how many pictures, and how often each of a set may be taken. Scenes come
# last: two objects and their relation take longest, and more pictures than the others.
PHASES = (
    (16_000, 1e-3, 30_000, (1, 1, 1)),
    (10_000, 7e-4, 30_000, (1, 4, 1)),
    (6_000, 5e-4, 90_000, (1, 4, 1)),
)


def train(arguments: argparse.Namespace) -> None:
    """All phases, each kept when it is done; started again, the next one goes on from there."""
    made = processor()
    torch.manual_seed(arguments.seed)
    hf = model(made.tokenizer, arguments.width, 3, 4)
    print(sum(p.numel() for p in hf.parameters()), "parameters", flush=True)
    first = 0
    for number, (steps, rate, pictures, shares) in enumerate(PHASES):
        kept = WORK / f"phase-{number}"
        if (kept / "model.safetensors").exists():
            hf = BlipForQuestionAnswering.from_pretrained(kept)
        else:
            if number:  # the same whether the training went on or was started again
                torch.manual_seed(arguments.seed + number)
            phase(arguments, hf, made, range(first, first + steps), rate, pictures, shares)
            save(hf, made, kept)
        first += steps
    save(hf, made, Path(arguments.out))
    report(hf, made, 600)


def phase(
    arguments: argparse.Namespace,
    hf: BlipForQuestionAnswering,
    made: BlipProcessor,
    steps: range,
    rate: float,
    pictures: int,
    shares: tuple[int, ...],
) -> None:
    trainee = Trainee(hf, arguments.width).train()
    data = pool(pictures)
    images = made.image_processor
    mean, std = (torch.tensor(v)[:, None, None] for v in (images.image_mean, images.image_std))
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=len(steps) + 1, pct_start=0.05
    )
    # Picture number n is of set n % 3.
    drawn = [n for turn in range(max(shares)) for n in range(pictures) if turn < shares[n % 3]]
    began, total = time.time(), 0.0
    for step in steps:
        rng = random.Random(f"{arguments.seed}/{step}")
        which = torch.tensor(rng.sample(drawn, arguments.batch))
        facts = data["facts"][which].tolist()
        questions = [question(rng, f) for f in facts for _ in range(arguments.ask)]
        pixels = (data["pixels"][which].float() / 255 - mean) / std
        text = encode(made.tokenizer, questions)
        loss = trainee(pixels, data["labels"][which], text, arguments.ask)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (step + 1) % 200 == 0:
            speed = (step + 1 - steps.start) / (time.time() - began)
            print(f"step {step + 1} loss {total / 200:.4f} ({speed:.1f} steps/s)", flush=True)
            total = 0.0
        if (step + 1) % 1000 == 0:
            save(hf, made, WORK / "latest")
            report(hf, made, 120)


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
    """Accuracy by set, kind and order on held-out pictures; how answers follow the image."""
    hf.eval()
    for name in SETS:
        examples = built_in(name, limit=count, seed=7)
        clean = list(answers(hf, made, [(e.clean_image, e.clean_prompt) for e in examples]))
        image = list(answers(hf, made, [(e.corrupt_image, e.clean_prompt) for e in examples]))
        text = list(answers(hf, made, [(e.clean_image, e.corrupt_prompt) for e in examples]))
        right = [said == e.answer for said, e in zip(clean, examples, strict=True)]
        parts = []
        for key in ("kind", "order"):
            for value in sorted({e.groups[key] for e in examples}):
                some = [r for r, e in zip(right, examples, strict=True) if e.groups[key] == value]
                parts.append(f"{value} {sum(some) / len(some):.3f}")
        follows = [s == e.foil for s, e, r in zip(image, examples, right, strict=True) if r]
        neither = sum(said == "neither" for said in text) / count
        print(
            f"  {name} {sum(right) / count:.3f}: {', '.join(parts)}; "
            f"follows the image {sum(follows) / max(1, len(follows)):.3f}; "
            f"neither on corrupt text {neither:.3f}",
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
