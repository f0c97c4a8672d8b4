"""Finding neurons: those that contribute most to words of what a model says about pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from vlmscope.data import Examples, listed
from vlmscope.errors import ExampleError
from vlmscope.neurons.captions import Caption, Variant, caption_pictures, given_caption, nouns, packed
from vlmscope.neurons.contributions import TOP, score, top_tokens
from vlmscope.neurons.results import Found
from vlmscope.neurons.weight_edit import base_fingerprint
from vlmscope.runs.model import Model

LISTED = 200
"""How many neurons have their top tokens listed."""
ROOM = 2**31
"""Of how many bytes of neurons' activations the captions are held in memory, to be handed on."""


def find(
    model: Model,
    examples: Examples,
    words: Sequence[str] = (),
    *,
    prompt: str | None = None,
    caption: str | None = None,
    tagger: str | None = None,
    top: int = TOP,
    variant: Variant = "input",
    gain: bool = False,
) -> Found:
    """The neurons that contribute most to words of what a model says about pictures.

    The captions are the model's own, by its greedy generation (`prompt` asks for them, each example's own by
    default), unless one is given. Every token of a word counts, at every place where the word stands: the
    table `neurons` has the `top` neurons of each with the largest signed scores (0: all of them).

    Without `words`, those that an example is known to show (`Example.shows`, or its answer) and that its
    caption has; `tagger` adds the caption's nouns (see `captions.nouns`). An example whose caption has none
    of the words is passed over; with a single example that is an error.

    What comes back can be given to `describe`, `measure`, `perturb`, `edit` and `assess` as `found`, which
    then caption no picture again.

    Raises `ExampleError` if no caption has any of the words.

    >>> from vlmscope.data import examples
    >>> from vlmscope.checkpoint import load
    >>> given = examples("states", limit=1)
    >>> found = find(load("toy-llava"), given, ["cross"], prompt="describe this picture.", top=3)
    >>> found.neurons[["word", "rank"]].to_numpy().tolist()
    [['cross', 1], ['cross', 2], ['cross', 3]]
    """
    given = listed(examples)
    captions: Iterable[Caption] = caption_pictures(model, given, prompt, variant=variant)
    if caption is not None:
        captions = (given_caption(model, e, caption, prompt=prompt, variant=variant) for e in given)
    tables, rows, problems, held, room = [], [], [], {}, ROOM
    for example, made in zip(given, captions, strict=True):
        asked, text = prompt or example.clean_prompt, made.text.strip()
        rows.append((example.id, asked, text))
        wanted = [*words, *(nouns(text, tagger) if tagger is not None else [])]
        there, why = _in_caption(made, wanted or sorted(example.shows or {example.answer} - {""}))
        if why and len(given) == 1 and (words or not there):
            raise ExampleError(why)
        if there:
            tables.append(score(model, made, there, top=top, gain=gain, example=example.id))
        else:
            problems.append(f"{example.id}: {why}")
        small = packed(model, made)
        room -= small.activations.nbytes
        if caption is None and variant == "input" and room >= 0:
            held[example, asked] = small
    if not tables:
        raise ExampleError(f"no caption has any of these words: {'; '.join(problems[:3])}")
    neurons = pd.concat(tables, ignore_index=True)
    best = neurons[neurons["rank"] <= TOP]
    about = {
        "model": model.name,
        "family": model.family.name,
        "weights": base_fingerprint(model),
        "words": list(words),
        "top": top,
        "variant": variant,
        "gain": gain,
        "examples": len(given),
        **({"on": list(model.edits)} if model.edits else {}),
    }
    table = pd.DataFrame(rows, columns=["example", "prompt", "caption"])
    return Found(about, neurons, table, _by_layer(best), _most_listed(model, best), held)


def _in_caption(caption: Caption, words: Sequence[str]) -> tuple[list[str], str]:
    """The words that a caption has, and why another is not among them."""
    found, why = [], ""
    for word in words:
        try:
            caption.find(word)
            found.append(word)
        except ExampleError as error:
            why = why or str(error)
    if not words:
        why = f"nothing is known of what is shown beside the caption '{caption.text.strip()}'; name words"
    return found, why


def _by_layer(best: pd.DataFrame) -> pd.DataFrame:
    """By word and layer: how many of the listed neurons lie there, and their share of the scores."""
    by = best.groupby(["word", "layer"])["score"].agg(["size", "sum"]).reset_index()
    by["share"] = by["sum"] / by.groupby("word")["sum"].transform("sum")
    return by.rename(columns={"size": "neurons", "sum": "score"})


def _most_listed(model: Model, best: pd.DataFrame) -> pd.DataFrame:
    """The neurons that are listed most, with their top tokens."""
    by = best.groupby(["layer", "neuron"])["score"].agg(["size", "mean"])
    by = by.sort_values(["size", "mean"], ascending=False).head(LISTED).reset_index()
    tokens = top_tokens(model, list(zip(by["layer"], by["neuron"], strict=True)))
    by["tokens"] = [" ".join(word for word, _ in words) for words in tokens]
    return by.rename(columns={"size": "listed", "mean": "mean_score"})
