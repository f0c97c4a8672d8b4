"""What `vlmscope neurons` writes: a folder of tables and pictures, with a JSON file that says what it is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.data.images import open_image
from vlmscope.errors import ExampleError, ModelError, StoreError, VlmscopeError
from vlmscope.layout import grid
from vlmscope.neurons import contributions
from vlmscope.neurons import edits as rewrite
from vlmscope.neurons import measures as concepts
from vlmscope.neurons.contributions import Variant, over_image, say, score, told, top_tokens
from vlmscope.neurons.weight_edit import WeightEdit
from vlmscope.progress import progress
from vlmscope.runs.model import Model

SHOWN = 4
"""How many pictures a card shows."""
CARDS = 3
"""How many neurons of each word get a card where none are named."""
LISTED = 200
"""How many neurons have their top tokens listed."""
MEANS = (1, 10, 100, 1000)
"""Of how many top neurons the mean activation is drawn."""
LEVEL = 0.95
"""The quantile of a map above which a patch is in its mask."""


def find(
    out: str | os.PathLike[str],
    model: Model,
    examples: Examples,
    words: Sequence[str] = (),
    *,
    prompt: str | None = None,
    caption: str | None = None,
    tagger: str | None = None,
    top: int = contributions.TOP,
    variant: Variant = "input",
    gain: bool = False,
) -> pd.DataFrame:
    """Write `neurons.parquet` (see `neurons.find`) for some examples, and what goes with it.

    Beside it: `captions.csv`; `tokens.csv`, the top tokens of the neurons that are listed most;
    `layers.csv`, how the listed neurons and their scores are spread over the layers. Without `words`, those
    that an example is known to show (`Example.shows`, or its answer) and that its caption has; `tagger`
    adds the caption's nouns (see `neurons.nouns`). An example
    whose caption has none of the words is passed over; with a single example that is an error.

    Raises `ExampleError` if no caption has any of the words.
    """
    folder, examples = Path(out), listed(examples)
    captions, schema, problems = [], None, []
    kept: list[pd.DataFrame] = []
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "neurons.parquet.part"
        writer: pq.ParquetWriter | None = None
        with progress(len(examples), what="captions") as step:
            for number, one in enumerate(examples):
                asked = prompt or one.clean_prompt
                if caption is None:
                    inputs = model.inputs(one.clean_image, asked, one.more_images)
                    said = say(model, inputs, variant=variant)
                else:
                    said = told(model, one.clean_image, asked, caption, variant=variant, more=one.more_images)
                captions.append({"example": one.id, "prompt": asked, "caption": said.text.strip()})
                own = list(words)
                if tagger is not None:
                    own += contributions.nouns(said.text.strip(), tagger)
                own = own or sorted(one.shows or {one.answer} - {""})
                there, why = _there(said, own)
                problems += [f"{one.id}: {why}"] if why and not there else []
                if why and len(examples) == 1 and (words or not there):
                    raise ExampleError(why)
                if there:
                    table = score(model, said, there, top=top, gain=gain, example=one.id)
                    rows = pa.Table.from_pandas(table, schema=schema, preserve_index=False)
                    schema = rows.schema
                    writer = writer or pq.ParquetWriter(part, schema)
                    writer.write_table(rows)
                    kept.append(table[table["rank"] <= contributions.TOP])
                step(0, number + 1)
        if writer is None:
            raise ExampleError(f"no caption has any of these words: {'; '.join(problems[:3])}")
        writer.close()
        part.replace(folder / "neurons.parquet")
        best = pd.concat(kept, ignore_index=True)
        pd.DataFrame(captions).to_csv(folder / "captions.csv", index=False)
        _layers(best).to_csv(folder / "layers.csv", index=False)
        common = best.groupby(["layer", "neuron"])["score"].agg(["size", "mean"])
        common = common.sort_values(["size", "mean"], ascending=False).head(LISTED)
        named = [(int(a), int(b)) for a, b in common.index]
        tokens = pd.DataFrame(
            {
                "layer": [a for a, _ in named],
                "neuron": [b for _, b in named],
                "listed": common["size"].to_numpy(),
                "mean_score": common["mean"].to_numpy(),
                "tokens": [" ".join(w for w, _ in x) for x in top_tokens(model, named)],
            }
        )
        tokens.to_csv(folder / "tokens.csv", index=False)
        about = {
            "what": "find",
            "model": model.name,
            "family": model.family.name,
            "weights": model.fingerprint(),
            "words": list(words),
            "top": top,
            "variant": variant,
            "gain": gain,
            "examples": len(examples),
        }
        _about(folder, about)
    return best


def _there(said: contributions.Caption, words: Sequence[str]) -> tuple[list[str], str]:
    """The words that a caption has, and why another is not among them."""
    found, why = [], ""
    for word in words:
        try:
            said.find(word)
            found.append(word)
        except ExampleError as error:
            why = why or str(error)
    if not words:
        why = f"nothing is known of what is shown beside the caption '{said.text.strip()}'; name words"
    return found, why


def _layers(table: pd.DataFrame) -> pd.DataFrame:
    """By word and layer: how many of the listed neurons lie there, and their share of the scores."""
    by = table.groupby(["word", "layer"])["score"].agg(["size", "sum"]).reset_index()
    by["share"] = by["sum"] / by.groupby("word")["sum"].transform("sum")
    return by.rename(columns={"size": "neurons", "sum": "score"})


def describe(
    out: str | os.PathLike[str],
    model: Model,
    examples: Examples,
    words: Sequence[str] = (),
    neurons: Sequence[tuple[int, int]] = (),
    *,
    prompt: str | None = None,
    measures: bool = True,
    embedding: str | Path | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Write cards of neurons: of those that are named (layer, number), or the best of each word.

    `cards.csv` (layer, neuron, word, top tokens), `maps.parquet` (activation over the image's patches, of each
    neuron and of the mean of a word's top 1, 10, 100, 1000, with the mask above its 95th percentile),
    `driving.csv` (the pictures that drive a neuron most), `measures.csv` (see `concepts.measure`, where there are
    enough pictures), and the pictures. Returns the cards.
    """
    folder, examples = Path(out), listed(examples)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        cards, ranked = _cards(model, examples, words, neurons, prompt)
        maps, driving = _look(model, examples, cards, ranked, prompt, folder)
        cards.to_csv(folder / "cards.csv", index=False)
        maps.to_parquet(folder / "maps.parquet", index=False)
        driving.to_csv(folder / "driving.csv", index=False)
        (folder / "measures.csv").unlink(missing_ok=True)
        if measures and len(examples) > 4 * concepts.FEW:
            found = concepts.measure(
                model, examples, prompt, list(words) or None, embedding=embedding, seed=seed
            )
            found.measures.to_csv(folder / "measures.csv", index=False)
        _about(
            folder,
            {
                "what": "describe",
                "model": model.name,
                "weights": model.fingerprint(),
                "words": list(words),
                "examples": len(examples),
            },
        )
    return cards


def _cards(
    model: Model,
    examples: Sequence[Example],
    words: Sequence[str],
    neurons: Sequence[tuple[int, int]],
    prompt: str | None,
) -> tuple[pd.DataFrame, dict[str, list[tuple[int, int]]]]:
    """Which neurons get a card, and all neurons of each word in the order of their contribution."""
    shape = model.shapes[model.speaker]
    for layer, number in neurons:
        if layer not in shape.having("mlp") or not 0 <= number < shape.neurons:
            raise ModelError(
                f"{model.name} has no neuron {layer}.{number}; expected a layer from 0 to "
                f"{shape.layers - 1} and a number from 0 to {shape.neurons - 1}"
            )
    ranked: dict[str, list[tuple[int, int]]] = {}
    said = [
        say(model, model.inputs(e.clean_image, prompt or e.clean_prompt, e.more_images))
        for e in (examples if words else ())
    ]
    for word in words:
        has = [one for one in said if rewrite.says(one.text, word)]
        if not has:
            raise ExampleError(f"no caption of these {len(said)} pictures has the word '{word}'")
        many = min(max(MEANS), len(shape.having("mlp")) * shape.neurons)
        ranked[word] = rewrite.choose(model, has, word, many)
    named = [(layer, number, "") for layer, number in neurons]
    if not neurons:
        named = [(*n, word) for word, some in ranked.items() for n in some[:CARDS]]
    if not named:
        raise VlmscopeError("nothing to describe; name words or neurons (layer.number)")
    tokens = top_tokens(model, [(a, b) for a, b, _ in named])
    cards = pd.DataFrame(named, columns=["layer", "neuron", "word"])
    cards["tokens"] = [" ".join(w for w, _ in some) for some in tokens]
    cards["weights"] = [" ".join(f"{x:.3g}" for _, x in some) for some in tokens]
    return cards, ranked


def _look(
    model: Model,
    examples: Sequence[Example],
    cards: pd.DataFrame,
    ranked: Mapping[str, list[tuple[int, int]]],
    prompt: str | None,
    folder: Path,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The neurons' maps over the pictures that drive them most, and which these are."""
    own = [(int(a), int(b)) for a, b in zip(cards["layer"], cards["neuron"], strict=True)]
    means = {
        f"{word}: mean of top {many}": some[:many]
        for word, some in ranked.items()
        for many in MEANS
        if many <= len(some)
    }
    every = list(dict.fromkeys([*own, *(n for some in means.values() for n in some)]))
    place = {n: i for i, n in enumerate(every)}
    names = [f"L{a}.N{b}" for a, b in own]
    peaks, rows, sizes = [], [], []
    with progress(len(examples), what="pictures") as step:
        for number, one in enumerate(examples):
            inputs = model.inputs(one.clean_image, prompt or one.clean_prompt, one.more_images)
            active = over_image(model, inputs, every).cpu().numpy()
            maps = {name: active[place[n]] for name, n in zip(names, own, strict=True)}
            maps |= {name: active[[place[n] for n in some]].mean(0) for name, some in means.items()}
            peaks.append([maps[name].max() for name in names])
            rows.append(maps)
            sizes.append(grid(inputs.layout[model.speaker]))
            step(0, number + 1)
    peak = np.array(peaks)
    driving = pd.DataFrame(
        [
            {"layer": a, "neuron": b, "rank": rank + 1, "example": examples[int(n)].id, "peak": peak[n, i]}
            for i, (a, b) in enumerate(own)
            for rank, n in enumerate(np.argsort(-peak[:, i], kind="stable")[:10])
        ]
    )
    wanted: dict[str, list[int]] = {
        name: list(np.argsort(-peak[:, i], kind="stable")[:SHOWN]) for i, name in enumerate(names)
    }
    wanted |= {
        name: list(np.argsort([-r[name].max() for r in rows], kind="stable")[:SHOWN]) for name in means
    }
    parts = []
    for name, some in wanted.items():
        for n in some:
            values, (_, columns) = rows[int(n)][name], sizes[int(n)]
            at = np.arange(len(values))
            parts.append(
                pd.DataFrame(
                    {
                        "example": examples[int(n)].id,
                        "neuron": name,
                        "row": at // columns,
                        "column": at % columns,
                        "activation": values,
                        "mask": values >= np.quantile(values, LEVEL),
                    }
                )
            )
    _pictures(folder, model, [examples[int(n)] for n in {int(n) for some in wanted.values() for n in some}])
    return pd.concat(parts, ignore_index=True), driving


def perturb(
    out: str | os.PathLike[str],
    model: Model,
    examples: Examples,
    words: Sequence[str],
    *,
    prompt: str | None = None,
    tops: Sequence[int] = (1, 10),
    sigmas: Sequence[float] = (),
    seed: int = 0,
) -> pd.DataFrame:
    """Write `perturb.csv`: what happens to words without their neurons, or with noise on their columns.

    See `concepts.perturb`.
    """
    folder = Path(out)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        table = concepts.perturb(model, listed(examples), prompt, words, tops=tops, sigmas=sigmas, seed=seed)
        table.to_csv(folder / "perturb.csv", index=False)
        _about(
            folder,
            {"what": "perturb", "model": model.name, "weights": model.fingerprint(), "words": list(words)},
        )
    return table


def edit(
    out: str | os.PathLike[str],
    model: Model,
    made: WeightEdit,
    examples: Examples,
    *,
    prompts: Sequence[str | None] = (None,),
    objects: Sequence[str] = (),
    seed: int = 0,
) -> pd.DataFrame:
    """Write an edit's card: what it changes, and what that does to pictures that it was not made on.

    `measures.csv` and `captions.csv` (see `rewrite.assess`), `columns.csv` (each changed column:
    its length before, and that of the change), and some pictures; with names of `objects` also `objects.csv`
    (see `rewrite.objects`), for examples that say what they show. Returns the measures.
    """
    folder, examples = Path(out), listed(examples)
    source, target = made.about.get("from", ""), made.about.get("to") or None
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        measures, captions = rewrite.assess(
            model, [made], examples, source, target, prompts=prompts, seed=seed
        )
        measures.to_csv(folder / "measures.csv", index=False)
        captions.to_csv(folder / "captions.csv", index=False)
        (folder / "objects.csv").unlink(missing_ok=True)
        if objects:
            asked = rewrite.questions(examples, objects, seed=seed)
            counts = rewrite.objects(model, [made], examples, objects, prompt=prompts[0], asked=asked)
            counts.to_csv(folder / "objects.csv", index=False)
        rows = []
        for layer, (some, delta) in sorted(made.columns.items()):
            before = model.columns(layer)[:, some.to(model.device)].norm(dim=0).tolist()
            rows += [
                {"layer": layer, "neuron": int(n), "length": length, "change": float(d)}
                for n, length, d in zip(some, before, delta.norm(dim=0), strict=True)
            ]
        pd.DataFrame(rows).to_csv(folder / "columns.csv", index=False)
        has = captions[captions["has"]].head(SHOWN)["example"].tolist()
        other = captions[~captions["has"]].head(SHOWN)["example"].tolist()
        _pictures(folder, model, [e for e in examples if e.id in {*has, *other}])
        _about(
            folder,
            {
                "what": "edit",
                "model": model.name,
                "weights": made.model,
                **made.about,
                "digest": made.digest,
                "on": list(made.on),
                "neurons": len(made.neurons),
                "size": made.size,
            },
        )
    return measures


def _pictures(folder: Path, model: Model, examples: Sequence[Example]) -> None:
    """Small copies, as the patches cover them, in `pictures/`, by the example's number in `pictures.csv`."""
    place = folder / "pictures"
    place.mkdir(exist_ok=True)
    rows = []
    for number, one in enumerate(dict.fromkeys(examples)):
        image = model.seen(open_image(one.clean_image))
        image.thumbnail((320, 320))
        image.save(place / f"{number:04d}.png")
        rows.append({"example": one.id, "file": f"{number:04d}.png"})
    pd.DataFrame(rows, columns=["example", "file"]).to_csv(folder / "pictures.csv", index=False)


def _about(folder: Path, about: Mapping[str, Any]) -> None:
    text = json.dumps(dict(about), indent=2, ensure_ascii=False) + "\n"
    (folder / "neurons.json").write_text(text, "utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written ({error.strerror or error})") from error
