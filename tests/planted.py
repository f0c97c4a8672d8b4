"""A BLIP-VQA whose weights are set by hand, so that what its cross-attention heads do is known.

A patch of a picture has three features: its object (red or blue), its color (red less blue) and its
outlier (a green that no eye sees, of huge norm). Every head of the question encoder's one layer looks the
same way from every token:

- head 0 looks at the object and writes its color;
- head 1 looks at the object and takes 0.4 of its color away;
- head 2 looks at the outlier and writes where nobody reads;
- head 3 looks nowhere and writes nothing.

The answer decoder's head 0 reads the color off all tokens of the question. With `options`, it is turned
off: a neuron of the encoder's block fires at the word of the color that the picture shows, and the decoder
reads that:

- head 1 looks at the word where it fires, and says that word;
- head 2 looks everywhere and reads the neurons themselves, which say their word.
"""

from __future__ import annotations

import random

import torch
from models import WORDS, blip_processor
from PIL import Image, ImageDraw
from transformers import BlipConfig, BlipForQuestionAnswering

from vlmscope.data.example import Example, find_roles
from vlmscope.runs.model import Model

WIDTH, PATCH, SIDE = 16, 4, 6
OBJECT, COLOR, OUTLIER, PLACE, UNREAD, CONSTANT = 0, 2, 4, 6, 8, 10
"""Each feature is a dimension and its negative next to it, so that a norm's mean takes nothing."""
FAINT = 4
"""The outlier's green, of 255."""
WORD, MATCH, SAID = 12, 14, 4
"""Features of the text: which color a word is, that the picture shows it, and which is shown."""
TRUTH = {0: "detection", 1: "suppression", 2: "outlier suppression", 3: "none"}
OF_TEXT = {0: "none", 1: "option selector", 2: "mover", 3: "none"}
"""Of the decoder's heads, with `options`."""


def _plus(at: int, size: float = 1.0) -> torch.Tensor:
    feature = torch.zeros(WIDTH, dtype=torch.float64)
    feature[at], feature[at + 1] = size, -size
    return feature


def planted(options: bool = False) -> Model:
    torch.manual_seed(0)
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "bos_token_id": WORDS.index("[DEC]"),
        "sep_token_id": WORDS.index("[SEP]"),
        "eos_token_id": WORDS.index("[SEP]"),
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": PATCH * SIDE,
        "patch_size": PATCH,
    }
    hf = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)).double()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            is_norm = "norm" in name.lower() and name.endswith("weight")
            weight.fill_(1.0 if is_norm else 0.0)
        _see(hf)
        _read(hf)
        _say(hf)
        if options:
            _choose(hf)
    processor = blip_processor(PATCH * SIDE)
    processor.image_processor.image_mean = [0.0] * 3
    processor.image_processor.image_std = [1.0] * 3
    return Model(hf, processor, "planted")


def _see(hf: BlipForQuestionAnswering) -> None:
    embeddings = hf.vision_model.embeddings
    red, green, blue = ([1, 0, 1], [0, 50 * 255 / FAINT, 0], [1, 0, -1])
    for at, channels in ((OBJECT, red), (OUTLIER, green), (COLOR, blue)):
        for channel, size in enumerate(channels):
            embeddings.patch_embedding.weight[:, channel] += _plus(at, size / PATCH**2)[:, None, None]
    draw = random.Random(0)
    for position in range(1, SIDE**2 + 1):
        embeddings.position_embedding[0, position] = _plus(PLACE, draw.uniform(2, 4))


def _read(hf: BlipForQuestionAnswering) -> None:
    encoder = hf.text_encoder
    encoder.embeddings.word_embeddings.weight += _plus(CONSTANT, 3.0)
    cross = encoder.encoder.layer[0].crossattention
    for head, feature in ((0, OBJECT), (1, OBJECT), (2, OUTLIER)):
        first = 4 * head
        cross.self.query.bias[first] = 1.0
        cross.self.key.weight[first] = _plus(feature, 12.0)
        cross.self.value.weight[first] = _plus(COLOR if head < 2 else OUTLIER, 0.5)
    for head, (feature, size) in enumerate(((COLOR, 1.0), (COLOR, -0.4), (UNREAD, 0.3))):
        cross.output.dense.weight[:, 4 * head] = _plus(feature, size)


def _say(hf: BlipForQuestionAnswering) -> None:
    bert, head = hf.text_decoder.bert, hf.text_decoder.cls.predictions
    # The words' own embeddings are tied to what they are scored with, below.
    bert.embeddings.position_embeddings.weight += _plus(CONSTANT, 3.0)
    cross = bert.encoder.layer[0].crossattention
    cross.self.value.weight[0] = _plus(COLOR, 0.5)
    cross.output.dense.weight[:, 0] = _plus(COLOR, 0.5)
    head.transform.dense.weight.copy_(torch.eye(WIDTH))
    for word, sign in (("red", 1.0), ("blue", -1.0)):
        head.decoder.weight[WORDS.index(word)] = _plus(COLOR, 3 * sign)


def _choose(hf: BlipForQuestionAnswering) -> None:
    """Word and picture agree where a neuron fires; two heads of the decoder read that in two ways."""
    block, words = hf.text_encoder.encoder.layer[0], hf.text_encoder.embeddings.word_embeddings.weight
    for neuron, (word, sign) in enumerate((("red", 1.0), ("blue", -1.0))):
        words[WORDS.index(word)] += _plus(WORD, 3.0 * sign)
        block.intermediate.dense.weight[neuron] = _plus(WORD, 4.0 * sign) + _plus(COLOR, 4.0 * sign)
        block.intermediate.dense.bias[neuron] = -9.0
        block.output.dense.weight[:, neuron] = _plus(MATCH, 0.5) + _plus(SAID, 0.5 * sign)
    cross = hf.text_decoder.bert.encoder.layer[0].crossattention
    cross.output.dense.weight[:, 0] = 0.0
    cross.self.query.bias[4] = 1.0
    cross.self.key.weight[4] = _plus(MATCH, 4.0)
    for first, feature in ((4, WORD), (8, SAID)):
        cross.self.value.weight[first] = _plus(feature, 0.5)
        cross.output.dense.weight[:, first] = _plus(COLOR, 1.0)


def planted_examples(many: int, seed: int = 0) -> list[Example]:
    """A square of 2 x 2 patches, red or blue, and one green patch somewhere else."""
    found = []
    for number in range(many):
        draw = random.Random(f"{seed}/{number}")
        row, column = draw.randrange(SIDE - 1), draw.randrange(SIDE - 1)
        inside = [(row + r, column + c) for r in (0, 1) for c in (0, 1)]
        free = [(r, c) for r in range(SIDE) for c in range(SIDE) if (r, c) not in inside]
        spot = draw.choice(free)
        answer, foil = draw.sample(["red", "blue"], 2)
        prompt = f"is this square {answer} or {foil} ?"
        found.append(
            Example(
                id=f"p{number}",
                clean_image=_picture(answer, (row, column), spot),
                corrupt_image=_picture(foil, (row, column), spot),
                clean_prompt=prompt,
                answer=answer,
                foil=foil,
                roles=find_roles(prompt, {"answer": answer, "foil": foil}),
                masks={"object": _mask(row, column)},
            )
        )
    return found


def _picture(color: str, at: tuple[int, int], spot: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", (PATCH * SIDE, PATCH * SIDE))
    draw = ImageDraw.Draw(image)
    draw.rectangle(_box(at, 2), fill={"red": (255, 0, 0), "blue": (0, 0, 255)}[color])
    draw.rectangle(_box(spot, 1), fill=(0, FAINT, 0))
    return image


def _mask(row: int, column: int) -> Image.Image:
    mask = Image.new("L", (PATCH * SIDE, PATCH * SIDE))
    ImageDraw.Draw(mask).rectangle(_box((row, column), 2), fill=255)
    return mask


def _box(at: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    row, column = (PATCH * x for x in at)
    return column, row, column + PATCH * size - 1, row + PATCH * size - 1
