"""How fast the engine is on a model of BLIP-base's shape, against the published way of doing it.

    python benchmarks/blip.py [--threads 2] [--out benchmarks/results/NAME.json]

One pair of pictures, random weights, float32. Everything is timed in one run on one machine, and
the answers are compared as they are timed:

- *published*: what the NOTICE code does for a site, written afresh with plain hooks: open and
  process both inputs, then three full forwards (clean, corrupt, patched);
- *plain*: one forward a site, with the vision tower's output kept;
- the engine, on the 108 sites of `encoder.*.resid@*` and the 2,592 heads of the encoder.

The slow sides are timed on a sample of sites, spread over the layers; their cost a site does not
depend on the site. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from vlmscope.cli.machine import keep_freed_memory
from vlmscope.data.example import Example
from vlmscope.models.inputs import Pair
from vlmscope.patching import engine
from vlmscope.runs import corrupt
from vlmscope.runs.model import Model
from vlmscope.sites import Site

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["is", "the", "cat", "red", "or", "blue", "?"]
RESID = ["encoder.*.resid@*"]
HEADS = ["encoder.*.attn.h*@*", "encoder.*.cross.h*@*"]
SAMPLE = 12
ROUNDS = {"resid": 6, "heads": 2}
"""How often a sweep is timed. Machines are noisy, so published sites are timed right before and
after each sweep, and the ratio is the median over the rounds."""
TOLERANCE = 2e-4  # of the logit difference, in logits, in float32


def base_model() -> Model:
    """BLIP-base with random weights, and a made-up vocabulary of BERT's size."""
    torch.manual_seed(0)
    config = BlipConfig(text_config={"num_attention_heads": 12}, vision_config={"initializer_range": 0.02})
    made_up = [f"w{n}" for n in range(30_522 - len(SPECIAL) - len(WORDS))]
    vocab = {w: n for n, w in enumerate([*SPECIAL, *WORDS, *made_up, "[DEC]", "[ENC]"])}
    config.text_config.sep_token_id = vocab["[SEP]"]
    images = BlipImageProcessorPil(size={"height": 384, "width": 384})
    processor = BlipProcessor(images, BertTokenizer(vocab=vocab))
    return Model(BlipForQuestionAnswering(config), processor, "random BLIP-base")


def photographs(folder: Path) -> Example:
    """A pair of JPEG files of a photograph's size; the content does not matter."""
    paths = []
    for seed in (1, 2):
        noise = Image.frombytes("RGB", (40, 30), random.Random(seed).randbytes(3600))
        picture = noise.resize((640, 480)).filter(ImageFilter.GaussianBlur(3))
        paths.append(folder / f"{seed}.jpg")
        picture.save(paths[-1])
    return Example("one", paths[0], "is the cat red or blue?", "red", "blue", paths[1])


# -- the slow sides ------------------------------------------------------------------------------


class Published:
    """Patching as it is published: nothing is kept from one site to the next."""

    def __init__(self, model: Model, example: Example) -> None:
        self.hf, self.processor = model.hf, model.processor
        self.example = example
        self.start = torch.tensor([[self.hf.decoder_start_token_id]])

    def inputs(self, path: Any) -> dict[str, torch.Tensor]:
        picture = Image.open(path).convert("RGB")
        found = self.processor(images=picture, text=self.example.clean_prompt, return_tensors="pt")
        return {**found, "decoder_input_ids": self.start}

    def site(self, site: Site) -> torch.Tensor:
        clean, corrupt = (self.inputs(p) for p in (self.example.clean_image, self.example.corrupt_image))
        kept: dict[str, torch.Tensor] = {}

        def keep(x: torch.Tensor) -> None:
            kept["x"] = x.clone()

        def put(x: torch.Tensor) -> None:
            columns = slice(None)
            if site.units:
                columns = slice(64 * site.units[0], 64 * site.units[0] + 64)
            x[:, list(site.positions), columns] = kept["x"][:, list(site.positions), columns]

        with self.looking(site, keep):
            self.forward(clean)
        self.forward(corrupt)
        with self.looking(site, put):
            return self.forward(corrupt)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        found: list[torch.Tensor] = []
        handle = self.hf.text_decoder.register_forward_hook(lambda m, a, out: found.append(out.logits))
        self.hf(**inputs)
        handle.remove()
        return found[0][0, -1]

    @contextmanager
    def looking(self, site: Site, function: Callable[[torch.Tensor], None]) -> Iterator[None]:
        layer = self.hf.text_encoder.encoder.layer[site.layer]
        if site.kind == "resid":
            handle = layer.register_forward_hook(lambda m, args, out: function(out))
        else:
            part = layer.attention if site.kind == "attn" else layer.crossattention
            handle = part.output.dense.register_forward_pre_hook(lambda m, args: function(args[0]))
        try:
            yield
        finally:
            handle.remove()


class Plain(Published):
    """One forward a site, the vision tower's output and the clean activations kept."""

    def __init__(self, model: Model, example: Example, sites: list[Site]) -> None:
        super().__init__(model, example)
        self.corrupt = self.inputs(example.corrupt_image)
        self.image = self.hf.vision_model(self.corrupt["pixel_values"]).last_hidden_state
        self.clean: dict[Site, torch.Tensor] = {}
        clean = self.inputs(example.clean_image)
        with ExitStack() as stack:
            for site in sites:
                keep = lambda x, site=site: self.clean.update({site: x.clone()})  # noqa: E731
                stack.enter_context(self.looking(site, keep))
            self.forward(clean)

    def site(self, site: Site) -> torch.Tensor:
        def put(x: torch.Tensor) -> None:
            columns = slice(None)
            if site.units:
                columns = slice(64 * site.units[0], 64 * site.units[0] + 64)
            x[:, list(site.positions), columns] = self.clean[site][:, list(site.positions), columns]

        with self.looking(site, put):
            asked = self.hf.text_encoder(
                input_ids=self.corrupt["input_ids"],
                attention_mask=self.corrupt["attention_mask"],
                encoder_hidden_states=self.image,
                encoder_attention_mask=torch.ones(self.image.shape[:2], dtype=torch.long),
            ).last_hidden_state
        return self.hf.text_decoder(
            input_ids=self.start,
            encoder_hidden_states=asked,
            encoder_attention_mask=self.corrupt["attention_mask"],
        ).logits[0, -1]


def timed(one: Published, sites: list[Site], pair: Pair) -> tuple[float, list[float]]:
    """Seconds a site (the median), and the logit differences."""
    seconds, found = [], []
    for site in sites:
        start = time.perf_counter()
        logits = one.site(site)
        seconds.append(time.perf_counter() - start)
        found.append((logits[pair.answer] - logits[pair.foil]).item())
    return statistics.median(seconds), found


# -- the engine ----------------------------------------------------------------------------------


def placed(model: Model, pair: Pair, expressions: list[str]) -> list[Site]:
    return model.placed(expressions, pair.clean)


def sweep(model: Model, example: Example, expressions: list[str]) -> tuple[float, list[float]]:
    """Seconds from the files to all scores, and the logit differences in order."""
    start = time.perf_counter()
    (pair,) = corrupt.pairs(model, example, "image")
    sites = placed(model, pair, expressions)
    found = [0.0] * len(sites)
    for numbers, scores in engine.patch(model, pair, sites).chunks:
        for number, ld in zip(numbers, scores.ld.tolist(), strict=True):
            found[number] = ld
    return time.perf_counter() - start, found


def unavoidable(model: Model, pair: Pair, expressions: list[str]) -> float:
    """Floating-point operations of a sweep that no exact way of running the layers can leave out.

    Two full runs; and for each patch that changes anything: its own position through the rest of
    its block, all positions through the blocks above (queries, keys and values of the first of
    them at the changed position only), the decoder (whose first block is the same for all rows up
    to the queries of its cross-attention), and the vocabulary. A multiply and an add are two.
    """
    text, vision = model.shapes["encoder"], model.shapes["vision"]
    d, layers = text.width, text.layers
    words = len(pair.clean.layout["encoder"].tokens)
    seen = len(pair.clean.layout["vision"].tokens)
    image = vision.layers * (12 * seen * d * d + 2 * seen * seen * d) + seen * 3 * 16 * 16 * d
    block = 14 * words * d * d + 2 * words * words * d + 2 * words * seen * d
    keys = 2 * seen * d * d
    answer = layers * (14 * d * d + 2 * words * d * d + 2 * words * d) + d * d + d * 30_524
    total = 2 * (image + layers * (block + keys) + answer)
    own = {"attn": 11 * d * d + 2 * seen * d, "cross": 9 * d * d, "resid": 0}
    for site in placed(model, pair, expressions):
        if site.kind == "attn" and site.layer == 0:
            continue  # the image has not been read yet: nothing changes
        above = layers - 1 - site.layer
        total += own[site.kind] + above * block - (3 * (words - 1) * d * d if above else 0)
        total += answer - 5 * d * d
    return 2.0 * total


def matmul_rate() -> float:
    """Floating-point operations a second of large float32 matrix products."""
    a, b = torch.randn(2304, 768), torch.randn(768, 3072)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(8):
            a @ b
        best = max(best, 8 * 2 * 2304 * 768 * 3072 / (time.perf_counter() - start))
    return best


class Memory(threading.Thread):
    """The largest resident memory while it runs, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = 0, threading.Event()

    @staticmethod
    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def run(self) -> None:
        while not self.over.wait(0.005):
            self.most = max(self.most, self.now())

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def measure(threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model = base_model()
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        example = photographs(Path(folder))
        (pair,) = corrupt.pairs(model, example, "image")
        gc.collect()
        rate = [matmul_rate()]
        sweep(model, example, RESID)  # the first run of anything is slower
        results: dict[str, Any] = {}
        for name, expressions in (("resid", RESID), ("heads", HEADS)):
            sites = placed(model, pair, expressions)
            sample = random.Random(0).sample(range(len(sites)), SAMPLE)
            chosen = [sites[n] for n in sample]
            plain, expected = timed(Plain(model, example, chosen), chosen, pair)
            published = Published(model, example)
            rounds, each = [], SAMPLE // ROUNDS[name]
            with Memory() as memory:
                for start in range(0, SAMPLE, each):
                    some = chosen[start : start + each]
                    before, more = timed(published, some[: each // 2], pair)
                    seconds, found = sweep(model, example, expressions)
                    after, rest = timed(published, some[each // 2 :], pair)
                    rounds.append((seconds, (before + after) / 2))
                    for n, e in zip(sample[start : start + each], more + rest, strict=True):
                        assert abs(found[n] - e) < TOLERANCE, f"{sites[n]}: {found[n]}, not {e}"
            rate.append(matmul_rate())
            error = max(abs(found[n] - e) for n, e in zip(sample, expected, strict=True))
            assert error < TOLERANCE, f"{name}: the answers differ by {error}"
            seconds = statistics.median(fast for fast, _ in rounds)
            slow = statistics.median(slow for _, slow in rounds)
            results[name] = {
                "sites": len(sites),
                "seconds": seconds,
                "rounds": [[round(x, 3) for x in one] for one in rounds],
                "published_seconds_a_site": slow,
                "published_sites_timed": SAMPLE,
                "times_published": statistics.median(s * len(sites) / f for f, s in rounds),
                "plain_seconds_a_site": plain,
                "times_plain": plain * len(sites) / seconds,
                "largest_difference": error,
                "spread_of_answers": statistics.pstdev(found),
                "share_of_matmul_rate": unavoidable(model, pair, expressions)
                / seconds
                / statistics.median(rate),
                "memory_beyond_model_gb": (memory.most - weights) / 2**30,
            }
            print(name, json.dumps(results[name]), flush=True)
        growth = {}
        for positions in ("0-2", "0-5", "*"):  # a third, two thirds and all of the heads' sites
            some = [e.replace("@*", f"@{positions}") for e in HEADS]
            growth[len(placed(model, pair, some))] = sweep(model, example, some)[0]
    return {
        "benchmark": "blip",
        "model": "random weights, BLIP-base's shape, float32",
        "machine": f"{platform.machine()}, {threads} threads, CPU",
        "torch": torch.__version__,
        "matmul_gflops": statistics.median(rate) / 1e9,
        **results,
        "seconds_by_sites": growth,
    }


def main() -> None:
    keep_freed_memory()  # as a command does
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    result = json.dumps(measure(arguments.threads))
    if arguments.out:
        arguments.out.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
