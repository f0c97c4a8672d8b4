"""Train `toy-llava`, which captions the drawn pictures and answers questions about them.

    python tools/train_toy_llava.py [--out src/vlmscope/toys/toy-llava]

Its vision tower starts from that of `toy-blip`, which ships with the package (or the whole model from one
trained before, with `--start`), so nothing has to teach its patches what covers them; the pictures and
questions are those of `toy_questions.py`, the cost of heads that of `train_toy_blip.py`, and there are
questions whether a picture shows an object. Linear helpers that are thrown away afterwards name places: each
patch's column, behind the vision tower and before the last layer, and there the quarter of the board in which
the thing is that a question names. Without them what is above or below a thing is not learned: two tokens
would have to be compared by their columns, and neither has its own at hand. One
sequence holds a picture and several branches behind it, each a question with its answer or the caption;
branches do not see each other. The training is kept every 500 steps in `build/toy-llava` and goes on from
there.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from toy_questions import (
    GRID,
    NONE,
    PATCH,
    SETS,
    SIDE,
    TEMPLATES,
    VALUES,
    Shown,
    covers,
    draw,
    false_noun,
    kept,
    picture,
    question,
    things_in,
)
from train_toy_blip import measure_heads
from transformers import (
    AutoModelForVisualQuestionAnswering,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmscope.data import examples as built_in
from vlmscope.data.drawn import binding, drawing, faces, scenes, states
from vlmscope.data.fills import fill

WORK = Path("build/toy-llava")
TOY_BLIP = Path("src/vlmscope/toys/toy-blip")
ASK = "describe this picture."
OTHERWISE = "what does this picture show?"
"""Another wording, which gets the same caption."""
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
IMAGES = GRID * GRID
SHARES = (1, 4, 0.7, 4)
"""How often a picture is of each of `SETS`."""
BARE = 0.05
"""How often a picture has lost all that it showed; what is asked of it is answered by "neither" or "no"."""
COST = 2e-4
"""What a head of the language model costs for each unit that it writes."""


# -- captions ------------------------------------------------------------------------------------


def caption_of(shown: Shown) -> str:
    """What a picture shows, in one order: above rather than below, inside rather than around, left
    before right.

    >>> import random
    >>> caption_of(faces.sample(random.Random(0))).endswith("face")
    True
    """
    if isinstance(shown, states.State):
        return f"a {shown.thing.texture} {shown.thing.color} {shown.thing.shape}"
    if isinstance(shown, faces.Face):
        return f"{_a(shown.expression)} face"
    named = [f"{_a(thing.color)} {thing.shape}" for thing in things_in(shown)]
    if isinstance(shown, binding.Board):
        return f"{named[0]} and {named[1]} above {named[2]} and {named[3]}"
    relation = shown.relation
    if relation in ("below", "around") or (relation == "beside" and shown.side > 0):
        relation, named = scenes.INVERSE[relation], named[::-1]
    return f"{named[0]} {relation} {named[1]}"


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


OBJECTS = {
    **{shape: f"a {shape}" for shape in drawing.SHAPES},
    **{x: f"{_a(x)} face" for x in faces.EXPRESSIONS},
}
"""What a picture may show, and how it is asked about."""


def objects_in(shown: Shown) -> set[str]:
    return {shown.expression} if isinstance(shown, faces.Face) else {t.shape for t in things_in(shown)}


def is_there(rng: random.Random, there: set[str], yes: bool) -> tuple[str, str]:
    """A question whether a picture shows an object, and its answer; absent ones are mostly of its kind."""
    other = rng.random() < 0.25
    faced = not there.isdisjoint(faces.EXPRESSIONS)
    absent = [x for x in OBJECTS if x not in there and (other or (x in faces.EXPRESSIONS) is faced)]
    name = rng.choice(sorted(there) if yes else absent)
    return f"does this picture show {OBJECTS[name]}?", "yes" if yes else "no"


# -- the model -----------------------------------------------------------------------------------


def processor() -> LlavaProcessor:
    """LLaVA's processor for small pictures, with a vocabulary of whole words."""
    words = [w for v in VALUES.values() for w in v]
    words += f"{TEMPLATES} {ASK} face user assistant : an and shows show no yes".replace(".", " . ").split()
    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    vocab = {token: n for n, token in enumerate(dict.fromkeys([*special, *words]))}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    side = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlavaForConditionalGeneration:
    """A small LLaVA whose vision tower is toy-blip's, as far as CLIP's has the same parts."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=160,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    hf = LlavaForConditionalGeneration(config)
    _take_over(hf)
    return hf


def _take_over(hf: LlavaForConditionalGeneration) -> None:
    blip = AutoModelForVisualQuestionAnswering.from_pretrained(TOY_BLIP).vision_model
    clip = hf.model.vision_tower
    clip = getattr(clip, "vision_model", clip)
    with torch.no_grad():
        old, new = blip.embeddings, clip.embeddings
        new.class_embedding.copy_(old.class_embedding[0, 0])
        new.patch_embedding.weight.copy_(old.patch_embedding.weight)
        position = old.position_embedding[0].clone()
        position[1:] += old.patch_embedding.bias
        new.position_embedding.weight.copy_(position)
        for mine, theirs in zip(clip.encoder.layers, blip.encoder.layers, strict=True):
            for norm in ("layer_norm1", "layer_norm2"):
                getattr(mine, norm).load_state_dict(getattr(theirs, norm).state_dict())
            mine.mlp.load_state_dict(theirs.mlp.state_dict())
            mine.self_attn.out_proj.load_state_dict(theirs.self_attn.projection.state_dict())
            parts = (x.chunk(3) for x in (theirs.self_attn.qkv.weight, theirs.self_attn.qkv.bias))
            for name, weight, bias in zip("qkv", *parts, strict=True):
                target = getattr(mine.self_attn, f"{name}_proj")
                target.weight.copy_(weight)
                target.bias.copy_(bias)


Branch: TypeAlias = tuple[str, str, int]
"""A question, what is to be said, and the quarter of the thing that it names (or `NONE`)."""


def loss_of(
    hf: LlavaForConditionalGeneration, helpers: nn.ModuleDict, pixels: Tensor, text: dict[str, Tensor]
) -> Tensor:
    """How badly the model says what is to be said, and a tenth of how badly the helpers name places."""
    inner = hf.model
    seen = inner.vision_tower(pixels).last_hidden_state[:, 1:]
    embedded = inner.get_input_embeddings()(text["ids"])
    image = inner.multi_modal_projector(seen)
    is_image = (text["ids"] == 4)[..., None].expand_as(embedded)
    embedded = embedded.masked_scatter(is_image, image)
    states = inner.language_model(
        inputs_embeds=embedded,
        attention_mask=text["mask"],
        position_ids=text["positions"],
        output_hidden_states=True,
    ).hidden_states
    chosen, placed = text["labels"] != NONE, text["places"] != NONE
    columns = torch.arange(GRID).repeat(len(seen) * GRID)
    before = states[-2]  # what the last layer is given
    patches = before[text["ids"] == 4].unflatten(0, (len(seen), -1))
    named = [
        F.cross_entropy(helpers["column"](seen).flatten(0, 1), columns),
        F.cross_entropy(helpers["patch"](patches).flatten(0, 1), columns),
    ]
    if placed.any():
        named.append(F.cross_entropy(helpers["noun"](before[placed]), text["places"][placed]))
    said = hf.lm_head(states[-1][chosen])
    return F.cross_entropy(said, text["labels"][chosen]) + 0.1 * sum(named)


def pack(tokenizer: PreTrainedTokenizerFast, branches: list[list[Branch]]) -> dict[str, Tensor]:
    """Sequences of a picture and its branches, with masks, positions and what is to be said."""
    words = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    prefix = [2, *words("user:"), *[4] * IMAGES]
    rows = []
    for some in branches:
        ids, group, positions = list(prefix), [0] * len(prefix), list(range(len(prefix)))
        labels, places = [NONE] * len(prefix), [NONE] * len(prefix)
        for number, (asked, answer, place) in enumerate(some, start=1):
            before, after = [*words(asked), *words("assistant:")], [*words(answer), 3]
            ids += before + after[:-1]
            many = len(before) + len(after) - 1
            group += [number] * many
            positions += range(len(prefix), len(prefix) + many)
            labels += [NONE] * (len(before) - 1) + after
            places += [NONE] * (len(before) - 1) + [place] + [NONE] * (len(after) - 1)
        rows.append((ids, group, positions, labels, places))
    longest = max(len(ids) for ids, *_ in rows)
    table = [
        torch.tensor([column + [fill] * (longest - len(column)) for column in columns])
        for columns, fill in zip(zip(*rows, strict=True), (0, -1, 0, NONE, NONE), strict=True)
    ]
    group = table[1]
    same = (group[:, :, None] == group[:, None, :]) | (group[:, None, :] == 0)
    allowed = same & torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return {
        "ids": table[0],
        "positions": table[2],
        "labels": table[3],
        "places": table[4],
        "mask": mask[:, None],
    }


# -- training ------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    made = processor()
    if arguments.start:
        hf = LlavaForConditionalGeneration.from_pretrained(arguments.start)
    else:
        hf = model(made.tokenizer, arguments.width, arguments.layers)
    print(sum(p.numel() for p in hf.parameters()), "parameters", flush=True)
    hf.train()
    text = hf.config.text_config.hidden_size
    helpers = nn.ModuleDict(
        {
            "column": nn.Linear(hf.config.vision_config.hidden_size, GRID),
            "patch": nn.Linear(text, GRID),
            "noun": nn.Linear(text, 4),
        }
    )
    written: list[Tensor] = []
    measure_heads(hf.model.language_model, ("o_proj",), 4, written)
    pictures = {name: [picture(name, n) for n in range(arguments.pictures)] for name in SETS}
    pixels = {
        name: kept(f"pixels-{name}-{arguments.pictures}", partial(draw, some))
        for name, some in pictures.items()
    }
    without = {
        name: kept(f"bare-{name}-{arguments.pictures}", partial(draw, [_Bare(x) for x in some[:1000]]))
        for name, some in pictures.items()
    }
    images = made.image_processor
    mean, std = (torch.tensor(v)[:, None, None] for v in (images.image_mean, images.image_std))
    optimizer = torch.optim.AdamW(
        [*hf.parameters(), *helpers.parameters()], lr=arguments.rate, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.rate, total_steps=arguments.steps + 1, pct_start=0.05
    )
    first = _resume(hf, helpers, optimizer, schedule)
    began, total = time.time(), 0.0
    for step in range(first, arguments.steps):
        rng = random.Random(f"{arguments.seed}/{step}")
        sets = rng.choices(list(SETS), SHARES, k=arguments.batch)
        which = [(name, rng.randrange(arguments.pictures), rng.random() < BARE) for name in sets]
        branches = [
            (_of_nothing if bare else _branches)(rng, pictures[name][n], arguments.ask)
            for name, n, bare in which
        ]
        chosen = [
            without[name][n % len(without[name])] if bare else pixels[name][n] for name, n, bare in which
        ]
        seen = (torch.stack(chosen).float() / 255 - mean) / std
        written.clear()
        loss = loss_of(hf, helpers, seen, pack(made.tokenizer, branches)) + COST * sum(written)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (step + 1) % 100 == 0:
            speed = (step + 1 - first) / (time.time() - began)
            print(f"step {step + 1} loss {total / 100:.4f} ({speed:.1f} steps/s)", flush=True)
            total = 0.0
        if (step + 1) % 500 == 0:
            _keep(hf, helpers, optimizer, step + 1)
            save(hf, made, WORK / "latest")
        if (step + 1) % 1000 == 0:
            report(hf, made, 90)
    save(hf, made, Path(arguments.out))
    report(hf, made, 600)


def _branches(rng: random.Random, shown: Shown, ask: int) -> list[Branch]:
    """What is asked of a picture, and what is to be said."""
    there = objects_in(shown)
    asked = [question(rng, shown) for _ in range(ask)]
    return [
        *((text, answer, place_of(shown, text)) for text, answer in asked),
        (rng.choice((ASK, OTHERWISE)), caption_of(shown), NONE),
        (*is_there(rng, there, True), NONE),
        (*is_there(rng, there, False), NONE),
    ]


class _Bare:
    """A picture of which all things are painted over with the mean of the rest."""

    def __init__(self, shown: Shown) -> None:
        self.shown = shown

    def draw(self) -> Image.Image:
        where = np.any([np.asarray(mask) > 0 for mask, _ in covers(self.shown)], axis=0)
        return fill(self.shown.draw(), where, "mean")


def _of_nothing(rng: random.Random, shown: Shown, ask: int) -> list[Branch]:
    """What is asked of a picture that has lost what it showed."""
    asked = [text for text, _ in (question(rng, shown) for _ in range(ask))]
    there = [is_there(rng, objects_in(shown), yes)[0] for yes in (True, False)]
    return [*((text, "neither", NONE) for text in asked), *((text, "no", NONE) for text in there)]


def place_of(shown: Shown, asked: str) -> int:
    """In which quarter of a board the thing is that a question names."""
    if not isinstance(shown, binding.Board):
        return NONE
    words = set(asked.rstrip("?").split())
    found = [n for n, thing in enumerate(shown.things) if thing.shape in words]
    return found[0] if len(found) == 1 else NONE


def _keep(
    hf: LlavaForConditionalGeneration, helpers: nn.ModuleDict, optimizer: torch.optim.Optimizer, step: int
) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    state = {f"model.{k}": v for k, v in hf.state_dict().items() if "lm_head" not in k}
    state |= {f"helpers.{k}": v for k, v in helpers.state_dict().items()}
    for n, values in optimizer.state_dict()["state"].items():
        state |= {f"adam.{n}.{k}": v for k, v in values.items()}
    save_file({k: v.clone().contiguous() for k, v in state.items()}, WORK / "state.tmp")
    (WORK / "state.tmp").replace(WORK / "state.safetensors")
    (WORK / "step.json").write_text(json.dumps(step))


def _resume(
    hf: LlavaForConditionalGeneration,
    helpers: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    schedule: object,
) -> int:
    if not (WORK / "step.json").exists():
        return 0
    step, state = (json.loads((WORK / "step.json").read_text()), load_file(WORK / "state.safetensors"))
    own = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    hf.load_state_dict(own, strict=False)
    found = {k.removeprefix("helpers."): v for k, v in state.items() if k.startswith("helpers.")}
    helpers.load_state_dict(found)
    kept = optimizer.state_dict()
    for name, value in state.items():
        if name.startswith("adam."):
            _, n, key = name.split(".")
            kept["state"].setdefault(int(n), {})[key] = value
    optimizer.load_state_dict(kept)
    for _ in range(step):
        optimizer.zero_grad()
        schedule.step()
    print(f"goes on at step {step}", flush=True)
    return step


def save(hf: LlavaForConditionalGeneration, made: LlavaProcessor, out: Path) -> None:
    hf.save_pretrained(out)
    made.save_pretrained(out)


# -- how well ------------------------------------------------------------------------------------


def answers(
    hf: LlavaForConditionalGeneration, made: LlavaProcessor, asked: list[tuple[Image.Image, str]]
) -> list[str]:
    """What the model says, by its own generation, through the chat template."""
    found = []
    for start in range(0, len(asked), 50):
        some = asked[start : start + 50]
        prompts = [f"user: <image>\n{text} assistant:" for _, text in some]
        inputs = made(images=[p for p, _ in some], text=prompts, padding=True, return_tensors="pt")
        said = hf.generate(**inputs, max_new_tokens=20, do_sample=False)
        found += made.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


@torch.no_grad()
def report(hf: LlavaForConditionalGeneration, made: LlavaProcessor, count: int) -> None:
    """Accuracy by set and kind on held-out pictures, corrupt inputs, and captions exactly right."""
    hf.eval()
    for name in SETS:
        examples = built_in(name, limit=count, seed=7)
        clean = answers(hf, made, [(e.clean_image, e.clean_prompt) for e in examples])
        image = answers(hf, made, [(e.corrupt_image, e.clean_prompt) for e in examples])
        text = answers(hf, made, [(e.clean_image, e.corrupt_prompt) for e in examples])
        right = [said == e.answer for said, e in zip(clean, examples, strict=True)]
        parts = []
        for value in sorted({e.groups["kind"] for e in examples}):
            some = [r for r, e in zip(right, examples, strict=True) if e.groups["kind"] == value]
            parts.append(f"{value} {sum(some) / len(some):.3f}")
        follows = [s == e.foil for s, e, r in zip(image, examples, right, strict=True) if r]
        wanted = [e.foil if name == "binding" else "neither" for e in examples]
        words = [s == w for s, w in zip(text, wanted, strict=True)]
        asked = [(e.clean_image, q) for e in examples if (q := false_noun(e))]
        absent = [s == "neither" for s in answers(hf, made, asked)]
        shown = [SETS[name].sample(random.Random(f"{name}/7/caption/{n}")) for n in range(count)]
        said = answers(hf, made, [(one.draw(), ASK) for one in shown])
        exact = [s == caption_of(one) for s, one in zip(said, shown, strict=True)]
        other = answers(hf, made, [(one.draw(), OTHERWISE) for one in shown])
        again = [s == caption_of(one) for s, one in zip(other, shown, strict=True)]
        rng = random.Random(7)
        there = [is_there(rng, objects_in(one), n % 2 == 0) for n, one in enumerate(shown)]
        told = answers(hf, made, [(one.draw(), q) for one, (q, _) in zip(shown, there, strict=True)])
        yes_no = [s == a for s, (_, a) in zip(told, there, strict=True)]
        print(
            f"  {name} {sum(right) / count:.3f}: {', '.join(parts)}; follows the image "
            f"{sum(follows) / max(1, len(follows)):.3f}, the words {sum(words) / count:.3f}; false nouns "
            f"noticed {sum(absent) / max(1, len(absent)):.3f} of {len(absent)}; "
            f"captions {sum(exact) / count:.3f}, worded otherwise {sum(again) / count:.3f}; is it there "
            f"{sum(yes_no) / count:.3f} ('{said[0]}')",
            flush=True,
        )
    hf.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=14_000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument("--ask", type=int, default=4, help="questions a picture")
    parser.add_argument("--pictures", type=int, default=30_000)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", help="a folder with the model to begin with")
    parser.add_argument("--out", default="src/vlmscope/toys/toy-llava")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
