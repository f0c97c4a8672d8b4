"""The logit lens over examples: the words that each position says at each layer, and how some words do.

Beside each word that is asked about stand others as a null: a state that says everything of its like more
loudly says nothing of that word.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from torch import Tensor

from vlmscope import stored
from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.data.images import open_image, small_png
from vlmscope.errors import DataError, ExampleError, SiteError, VlmscopeError, shown, whole
from vlmscope.layout import slots
from vlmscope.models.inputs import Inputs
from vlmscope.progress import progress
from vlmscope.runs import lens as reading
from vlmscope.runs.forward import forward
from vlmscope.runs.model import Model
from vlmscope.runs.prepare import encode, option_of
from vlmscope.sites import Point, Site, Sites, expand, parse
from vlmscope.stored import formats

TOP = 5
"""How many words of each state are listed."""
NULLS = 100
"""How many other words stand beside one that is asked about."""
SHOWN = 4
"""How many pictures are kept to be drawn over."""
Tables = tuple[pd.DataFrame, pd.DataFrame]
"""What states say, and how some words do."""
LENS, WORDS = (formats.LENS.tables[name].names for name in ("lens.parquet", "words.parquet"))


@dataclass(frozen=True, eq=False)
class Lens:
    """What states say.

    `lens` has a row a state and word (columns `LENS`); `words`, a row a state and word that was asked about
    (columns `WORDS`); `pictures`, some examples' by id; `about`, of which model and sites it is.
    """

    about: Mapping[str, Any]
    lens: pd.DataFrame
    words: pd.DataFrame
    pictures: Mapping[str, Image.Image]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `lens.parquet`, `words.parquet`, pictures and, last, `lens.json`.

        An earlier lens is replaced. Raises `StoreError` as `files.save` does.
        """
        names = [f"{number:04d}.png" for number in range(len(self.pictures))]
        listed = pd.DataFrame({"example": list(self.pictures), "file": names})
        drawn = {f"pictures/{n}": small_png(p) for n, p in zip(names, self.pictures.values(), strict=True)}
        tables = {"lens.parquet": self.lens, "words.parquet": self.words, "pictures.csv": listed}
        formats.LENS.save(folder, self.about, tables | drawn)

    @staticmethod
    def claim(folder: str | os.PathLike[str]) -> None:
        """Refuse, before anything is computed, a folder that `save` could not write (`StoreError`)."""
        formats.LENS.claim(folder, "pictures/0000.png")


def read(folder: str | os.PathLike[str]) -> Lens:
    """What `Lens.save` has written; raises `StoreError` where that is not all there."""
    _, about, tables, pictures = stored.read_one(Path(folder), formats.LENS)
    drawn = {name: open_image(Image.open(io.BytesIO(png))) for name, png in pictures.items()}
    return Lens(about, tables["lens"], tables["words"], drawn)


def lens(
    model: Model,
    examples: Examples,
    sites: Sites,
    words: Sequence[str] = (),
    *,
    top: int = TOP,
    only_top: bool = False,
    data: str = "examples",
) -> Lens:
    """What the states at sites (such as `decoder.*.resid@image*`) say, of each example's clean run.

    The logit lens: softmax over the vocabulary of the model's own final norm and head on a state of the
    stream of the tower that says the words (`resid_pre`, `resid_mid`, `resid`; every position that a site
    names by itself). Of each state the `top` words are listed: `rank` from 1, `predicted` the token, `logit`,
    `p`.

    In `words` stand the answer, the foil and the roles of the prompt of each example, and the `words` that
    are given, each by its first token as it would follow the prompt (of answer and foil the first in which
    they differ): `rank` in the vocabulary, `logit`, `p`. Beside it other words of its type as a null, `nulls`
    of them: tokens that begin or go on a word and are spelt as it is, the nearest in the vocabulary's order,
    which is that of frequency in BPE, WordPiece and unigram vocabularies. `null_p` is their median
    probability, `beaten` the share of them with a smaller logit: 0.5 where nothing is known of the word.

    With `only_top` the words and their logits are the same, `p` is empty, and so is `words`: a probability
    and a rank need the logits of all words in full precision, which cost most of the time in float32 on a CPU
    (`runs.lens.Screen`).

    Examples that cannot be run are left out with a warning; `DataError` if that is all. Raises `SiteError`
    for a place with no way to words, `ExampleError` for a single example that cannot be run, as with a word
    that is none to the tokenizer, `VlmscopeError` where `only_top` is asked for together with `words`.

    >>> import vlmscope
    >>> model, one = vlmscope.load("toy-llava"), vlmscope.examples("states", limit=1)
    >>> found = lens(model, one, "decoder.*.resid@readout", top=2)
    >>> found.lens[["layer", "rank"]].to_numpy().tolist()[:3]
    [[0, 1], [0, 2], [1, 1]]
    """
    top = whole(top, "the number of words", 1, 1000)
    given, asked = listed(examples), [*([words] if isinstance(words, str) else words)]
    if not given:
        raise DataError("there are no examples; nothing to run")
    expanded = expand(parse(sites), model.shapes)
    for site in expanded:
        reading.check_place(model, site)
    if only_top and asked:
        raise VlmscopeError(
            f"the rank of {shown(asked[0])} needs all words, only the top ones are asked for; leave one out"
        )
    vocabulary = Vocabulary(model)
    said_by = partial(reading.best_words, screen=reading.Screen.of(model)) if only_top else None
    ran, parts = _each(given, lambda one: _read(model, one, expanded, asked, top, vocabulary, said_by))
    about = {
        "what": formats.LENS.name,
        "model": model.name,
        "weights": model.fingerprint(),
        "data": data,
        "examples": len(parts),
        "sites": [str(site) for site in parse(sites)],
        "top": top,
        "words": asked,
        "dtype": model.precision,
    }
    said, told = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    return Lens(about, said, told, {one.id: model.cropped(one.clean_image) for one in ran[:SHOWN]})


def _each(given: Sequence[Example], read: Callable[[Example], Tables]) -> tuple[list[Example], list[Tables]]:
    """The examples that can be run, and what is read of each; others are left out with a warning."""
    ran, parts, left = list[Example](), list[Tables](), list[VlmscopeError]()
    with progress(len(given)) as step:
        for number, example in enumerate(given, start=1):
            try:
                parts.append(read(example))
                ran.append(example)
            except (ExampleError, SiteError) as error:
                if len(given) == 1:
                    raise
                left.append(error)
            step(len(parts), number)
    if not parts:
        raise DataError(f"none of {len(left)} examples could be run: {left[0]}")
    if left:
        text = f"{len(left)} of {len(given)} examples were left out: {left[0]}"
        warnings.warn(text, stacklevel=3)
    return ran, parts


def _read(
    model: Model,
    example: Example,
    sites: Sequence[Site],
    words: Sequence[str],
    top: int,
    vocabulary: Vocabulary,
    best_words: Callable[..., reading.Words] | None,
) -> Tables:
    """The two tables of one example; the second is empty where `best_words` says only the best."""
    inputs, tokens = _asked(model, example, words)
    tokens = {} if best_words else tokens
    own = [token for token, _ in tokens.values()]
    nulls = {word: vocabulary.others(token, own) for word, (token, _) in tokens.items()}
    given = own + [n for some in nulls.values() for n in some]
    there = inputs.layout[model.speaker]
    names = slots(there)
    placed: dict[Point, dict[int, str]] = {}
    for site in model.placed(sites, inputs):
        for position in site.positions:
            written = str(site if len(site.positions) == 1 else replace(site, position=str(position)))
            placed.setdefault(site.point, {}).setdefault(position, written)
    values = forward(model, inputs, keep=placed).values
    said, told = [], []
    for point, at in placed.items():
        positions = list(at)
        states = values[point][0, positions]
        if best_words:
            found = best_words(model, inputs, states, top)
        else:
            found = reading.words(model, inputs, states, top, given, len(tokens))
        place = pd.DataFrame(
            {
                "example": example.id,
                "site": list(at.values()),
                "tower": point.tower,
                "layer": point.layer,
                "position": positions,
                "token": [there.tokens[n] for n in positions],
                "slot": [names[n] for n in positions],
            }
        )
        said.append(_said(place, found, vocabulary))
        told += list(_told(place, found, tokens, nulls))
    empty = pd.DataFrame(columns=WORDS)
    return pd.concat(said, ignore_index=True), pd.concat(told, ignore_index=True) if told else empty


def _said(place: pd.DataFrame, found: reading.Words, vocabulary: Vocabulary) -> pd.DataFrame:
    """A row a state and word, the states in their order, their words from the best on."""
    states, top = found.best.shape
    rows = place.loc[place.index.repeat(top)].reset_index(drop=True)
    ids = found.best.flatten().tolist()
    rows["rank"] = list(range(1, top + 1)) * states
    rows["predicted"] = [vocabulary.token(n) for n in ids]
    rows["token_id"] = ids
    rows["logit"] = _numbers(found.tops).flatten()
    rows["p"] = _numbers((found.tops.double() - found.total.double()[:, None]).exp()).flatten()
    return rows[LENS]


def _told(
    place: pd.DataFrame,
    found: reading.Words,
    tokens: Mapping[str, tuple[int, str]],
    nulls: Mapping[str, Sequence[int]],
) -> Iterator[pd.DataFrame]:
    """A row a state, for each word that is asked about."""
    log_p = found.logits.double() - found.total.double()[:, None]
    start = len(tokens)
    for n, (word, (token, what)) in enumerate(tokens.items()):
        others = slice(start, start + len(nulls[word]))
        start = others.stop
        rows = place.assign(word=word, what=what, token_id=token, nulls=len(nulls[word]))
        rows["rank"] = found.ranks[:, n].tolist()
        rows["logit"], rows["p"] = _numbers(found.logits[:, n]), _numbers(log_p[:, n].exp())
        if nulls[word]:
            rows["null_p"] = _numbers(log_p[:, others].median(-1).values.exp())
            below = (found.logits[:, others] < found.logits[:, n, None]).double()
            rows["beaten"] = _numbers(below.mean(-1))
        yield rows.reindex(columns=WORDS)


def _numbers(values: Tensor) -> Any:
    return values.double().cpu().numpy()


def _asked(model: Model, example: Example, words: Sequence[str]) -> tuple[Inputs, dict[str, tuple[int, str]]]:
    """The clean run, and the words that are asked about: their tokens, and what they are.

    Where there are an answer and a foil, what both begin with is fed, and their tokens differ.
    """
    prompt, many = example.clean_prompt, 1 + len(example.more_images)
    found: dict[str, tuple[int, str]] = {}
    if example.answer.strip() and example.foil.strip():
        pair = model.prepare(replace(example, corrupt_image=None, corrupt_prompt=None))
        inputs, foil = pair.clean, pair.foil
        found[example.answer] = pair.answer, "answer"
        if foil is not None:
            found[example.foil] = foil, "foil"
    else:
        inputs = encode(model, [example.clean_image, *example.more_images], prompt, example.roles)
    wanted = {example.answer: "answer"} if example.answer.strip() and not found else {}
    roles = {prompt[slice(*at)]: role for role, at in example.roles.items() if role not in ("answer", "foil")}
    for word, what in {**wanted, **roles, **dict.fromkeys(words, "given")}.items():
        with suppress(ExampleError) if what != "given" else nullcontext():
            token = option_of(model, prompt, "word", word, many)[0]
            if token not in [known for known, _ in found.values()]:
                found[word] = token, what
    return inputs, found


class Vocabulary:
    """The tokens of a model, and for each the words of its like."""

    def __init__(self, model: Model) -> None:
        head: Any = model.module(model.family.head)
        tokenizer = model.processor.tokenizer
        known = min(head.out_features, len(tokenizer))
        self.tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(known)))]
        special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        self._types = [None if n in special else _type_of(token) for n, token in enumerate(self.tokens)]

    def token(self, number: int) -> str:
        """A token as the tokenizer writes it; what is beyond its tokens has a number alone."""
        return self.tokens[number] if number < len(self.tokens) else f"[{number}]"

    def others(self, token: int, but: Sequence[int], count: int = NULLS) -> list[int]:
        """The other words of a token's type that are nearest to it in the order of the vocabulary."""
        kind, out = self._types[token], {token, *but}
        alike = [n for n, other in enumerate(self._types) if kind and other == kind and n not in out]
        return sorted(alike, key=lambda n: (abs(n - token), n))[:count]


def _type_of(token: str) -> tuple[str, bool, str] | None:
    """How a token begins, its letters and how they are written; None for what is no word."""
    begin = next((mark for mark in ("##", "▁", "Ġ") if token.startswith(mark)), "")
    body = token.removeprefix(begin)
    if not body.isalnum():
        return None
    case = "number" if not body.isalpha() else "small" if body.islower() else "other"
    return begin, body.isascii(), case
