"""The commands about neurons."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import typer

from vlmscope.cli import terminal
from vlmscope.cli.options import Given, OneModel, command
from vlmscope.errors import StoreError, VlmscopeError, plain, shown

app = typer.Typer(
    no_args_is_help=True, help="Neurons that contribute to words.\n\nFind, show, perturb, edit."
)


@dataclass(kw_only=True)
class Shown(OneModel):
    """The options of a command with a model, and one picture with a prompt or a data set."""

    image: Path | None = None
    data: str | None = None
    prompt: str | None = None
    limit: int | None = None
    seed: int = 0
    columns: str | None = None

    def examples(self) -> Sequence[Any]:
        from vlmscope.data import examples
        from vlmscope.data.example import Example
        from vlmscope.data.images import open_image

        if self.data is not None and self.image is None:
            return examples(self.data, limit=self.limit, seed=self.seed, columns=self.columns)
        if self.image is None or self.data is not None:
            many = "neither" if self.image is None else "both"
            raise VlmscopeError(f"{many} of --image and --data given; give one of them")
        if self.prompt is None:
            raise VlmscopeError("--image needs a --prompt that asks for the caption")
        open_image(self.image)
        # The name goes into tables, which hold no bytes that are no text.
        return [Example(plain(self.image.name), self.image, self.prompt, answer="", foil="")]


@command(app)
def find(
    given: Shown,
    out: Path,
    caption: str | None = None,
    word: list[str] | None = None,
    tagger: str | None = None,
    top: int = 100,
    gate: bool = False,
    gain: bool = False,
) -> None:
    """Neurons that contribute most to words of a caption.

    Writes neurons.parquet: example, word, token, token_id, position, layer, neuron, activation, weight,
    score, rank.
    """
    from vlmscope import neurons

    examples = given.examples()
    if caption is not None and len(examples) > 1:
        raise VlmscopeError("--caption is of one picture; give --image")
    neurons.Found.claim(out)
    found = neurons.find(
        given.load(),
        examples,
        word or [],
        prompt=given.prompt,
        caption=caption,
        tagger=tagger,
        top=top,
        variant="gate" if gate else "input",
        gain=gain,
    )
    found.save(out)
    best = found.neurons[found.neurons["rank"] <= 3].drop(columns=["token_id"])
    print(terminal.table(best.head(30), 4))
    print(f"tables in {out}; neurons.parquet has them all")


def _layer_and_number(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"L?([0-9]{1,6})\.N?([0-9]{1,9})", text.strip())
    if not found:
        raise VlmscopeError(f"bad neuron {shown(text)}; expected LAYER.NUMBER, such as 12.4071")
    return int(found[1]), int(found[2])


@command(app)
def describe(
    given: Shown,
    out: Path,
    word: list[str] | None = None,
    neuron: list[str] | None = None,
    measures: bool = True,
    embedding: str | None = None,
    found: Path | None = None,
) -> None:
    """Cards: top tokens, maps, pictures and measures.

    Where on the image a neuron is active, which pictures drive it, and the measures with their nulls.
    """
    from vlmscope import neurons
    from vlmscope.report import claim_report, write_report

    examples = given.examples()
    if embedding is not None and not measures:
        raise VlmscopeError("--embedding is for the measures; leave --no-measures out")
    neurons.Described.claim(out)
    claim_report(out / "report.html")
    known = neurons.read(found, neurons.Found) if found else None
    described = neurons.describe(
        given.load(),
        examples,
        word or [],
        [_layer_and_number(text) for text in neuron or []],
        prompt=given.prompt,
        measures=measures,
        embedding=embedding,
        found=known,
        seed=given.seed,
    )
    described.save(out)
    print(terminal.table(described.cards.drop(columns="weights")))
    if described.left_out is not None:
        for word, measure, why in described.left_out.itertuples(index=False):
            print(f"not measured: {word}{f' ({measure})' if measure else ''}: {why}")
    print(f"tables in {out}; {write_report([out], out / 'report.html')}")


@command(app)
def perturb(
    given: Given,
    word: list[str],
    out: Path,
    prompt: str | None = None,
    top: list[int] | None = None,
    sigma: list[float] | None = None,
    rounds: int = 2,
    found: Path | None = None,
) -> None:
    """A word without its neurons, and without those that take over.

    Beside it as many random neurons of the same layers.
    """
    from vlmscope import neurons

    neurons.Perturbed.claim(out)
    examples, known = given.examples(), neurons.read(found, neurons.Found) if found else None
    result = neurons.perturb(
        given.load(),
        examples,
        word,
        prompt=prompt,
        tops=top or (1, 10),
        sigmas=sigma or (),
        rounds=rounds,
        found=known,
        seed=given.seed,
    )
    result.save(out)
    print(terminal.table(result.effects))
    print(f"table in {out / 'perturb.csv'}")


@command(app)
def edit(
    given: Given,
    source: str,
    out: Path,
    target: str | None = None,
    suppress: bool = False,
    neurons: int | None = None,
    concept: bool = False,
    falsely: bool = False,
    prompt: str | None = None,
    wording: list[str] | None = None,
    question: str | None = None,
    objects: list[str] | None = None,
    solver: Literal["closed", "learned"] = "learned",
    margin: float | None = None,
    locality: float = 1.0,
    on: list[Path] | None = None,
    export: Path | None = None,
    found: Path | None = None,
) -> None:
    """Make the model say another word, by a few neurons' columns only.

    Made on one half of the data and assessed on the other, by free generation, beside the same edit of random
    columns; the card lies beside it.
    """
    from vlmscope import neurons as room
    from vlmscope.report import claim_report, write_report
    from vlmscope.stats import shuffled

    if (target is None) != suppress:
        many = "neither" if target is None else "both"
        raise VlmscopeError(f"{many} of --to and --suppress given; give --to WORD, or else --suppress")
    room.check_margin(solver, margin)
    question = question or room.QUESTION
    room.is_there(source, question)
    if out.suffix != ".safetensors":
        raise VlmscopeError(
            f"{out}: an edit is a safetensors file; expected a name that ends in .safetensors"
        )
    card = out.with_name(f"{out.stem}-card")
    room.WeightEdit.claim(out)
    room.Assessed.claim(card)
    claim_report(card / "report.html")
    examples, seed = given.examples(), given.seed
    before = [room.WeightEdit.load(path) for path in on or []]
    known = room.read(found, room.Found) if found else None
    model = given.load()
    if export is not None:
        model.claim(export)
    mixed = [examples[n] for n in shuffled(seed, [example.id for example in examples], "halves")]
    half = (len(mixed) + 1) // 2
    make: Any = partial(
        room.edit,
        model,
        mixed[:half],
        source,
        target,
        prompt=prompt,
        concept=concept,
        wordings=wording or (),
        question=question,
        falsely=falsely,
        solver=solver,
        margin=margin,
        locality=locality,
        found=known,
        seed=seed,
    )
    with room.edited(model, *before):
        made = make(neurons=neurons)
        _keep(made, out)
        print(f"{made}\n{out}")
        assessed = room.describe_edit(
            model,
            made,
            mixed[half:],
            null=make(neurons=room.random_columns(model, made, seed)),
            prompts=[prompt, *(wording or [])],
            question=question,
            names=objects,
            found=known,
            seed=seed,
        )
    assessed.save(card)
    for table in (assessed.measures, assessed.objects):
        if table is not None:
            print(terminal.table(table))
    print(f"{made}: {assessed.about['verdict']}")
    print(write_report([card], card / "report.html"))
    if export is not None:
        room.export(model, [*before, made], export)
        print(f"edited checkpoint in {export}")


def _keep(made: Any, out: Path) -> None:
    """Save an edit, or else keep it elsewhere: it may have taken hours."""
    try:
        made.save(out)
    except StoreError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="vlmscope-")) / out.name
        made.save(elsewhere)
        raise StoreError(f"{error}; the edit is kept in {elsewhere}: copy it from there") from error


@command(app)
def edits(files: list[Path], /) -> None:
    """List what is in edits."""
    from vlmscope.neurons import WeightEdit

    for path in files:
        made = WeightEdit.load(path)
        print(f"{path} ({made.digest[:8]}): {made}")
