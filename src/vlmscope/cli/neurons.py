"""The commands about neurons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlmscope.cli import options as shared
from vlmscope.cli.options import Command
from vlmscope.errors import VlmscopeError

app = typer.Typer(
    no_args_is_help=True, help="Neurons that turn what is seen into a word.\n\nFind, show, perturb, edit."
)

_Image = Annotated[Path | None, typer.Option(help="One picture.")]
_ImageOrData = Annotated[str | None, typer.Option(help="states, scenes, faces, or a CSV file.")]
_Prompt = Annotated[
    str | None, typer.Option(help="What asks for the caption.  [default: each example's own]")
]
_Words = Annotated[list[str] | None, typer.Option(metavar="WORD...", help="Words of the caption.")]


def _examples(
    image: Path | None, data: str | None, prompt: str | None, limit: int | None, seed: int
) -> list[Any]:
    """One picture with a prompt, or a data set."""
    from vlmscope.data import examples
    from vlmscope.data.example import Example

    if data is not None and image is None:
        return examples(data, limit=limit, seed=seed)
    if image is None or data is not None:
        raise VlmscopeError("give either --image or --data")
    if prompt is None:
        raise VlmscopeError("--image needs a --prompt that asks for the caption")
    return [Example(id=image.name, clean_image=image, clean_prompt=prompt, answer="", foil="")]


@app.command(cls=Command)
def find(
    model: shared.Model,
    out: shared.Folder,
    image: _Image = None,
    data: _ImageOrData = None,
    prompt: _Prompt = None,
    caption: Annotated[str | None, typer.Option(help="Score this instead of what the model says.")] = None,
    word: _Words = None,
    tagger: Annotated[
        str | None, typer.Option(help="A spaCy pipeline that picks the nouns, such as en_core_web_sm.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Neurons of each token; 0 for all.")] = 100,
    gate: Annotated[
        bool, typer.Option("--gate", help="The gate's activation alone, as some published code.")
    ] = False,
    gain: Annotated[bool, typer.Option("--gain", help="Take the final norm's weight into account.")] = False,
    dtype: shared.Precision = "float32",
    device: shared.Device = None,
    limit: shared.Limit = None,
    seed: shared.Seed = 0,
) -> None:
    """Neurons that contribute most to words of a caption.

    Writes neurons.parquet: example, word, token, token_id, position, layer, neuron, activation, weight,
    score, rank.
    """
    from vlmscope.checkpoint import load
    from vlmscope.neurons import folder

    examples = _examples(image, data, prompt, limit, seed)
    if caption is not None and len(examples) > 1:
        raise VlmscopeError("--caption is of one picture; give --image")
    table = folder.find(
        out,
        load(model, dtype=dtype, device=device),
        examples,
        word or [],
        prompt=prompt,
        caption=caption,
        tagger=tagger,
        top=top,
        variant="gate" if gate else "input",
        gain=gain,
    )
    best = table[table["rank"] <= 3].drop(columns=["token_id"])
    print(best.head(30).to_string(index=False, float_format="{:.4g}".format))
    print(f"tables in {out}; neurons.parquet has them all")


def _layer_and_number(text: str) -> tuple[int, int]:
    layer, dot, number = text.strip().lstrip("L").replace(".N", ".").partition(".")
    if not (dot and layer.isdigit() and number.isdigit()):
        raise VlmscopeError(f"bad neuron '{text}'; expected LAYER.NUMBER, such as 12.4071")
    return int(layer), int(number)


@app.command(cls=Command)
def describe(
    model: shared.Model,
    out: shared.Folder,
    image: _Image = None,
    data: _ImageOrData = None,
    prompt: _Prompt = None,
    word: _Words = None,
    neuron: Annotated[
        list[str] | None, typer.Option(metavar="LAYER.NUMBER...", help="Neurons to show, too.")
    ] = None,
    measures: Annotated[bool, typer.Option(help="Measure the words' neurons over the set, too.")] = True,
    embedding: Annotated[
        str | None, typer.Option(help="A small text model that compares top tokens with the word, too.")
    ] = None,
    dtype: shared.Precision = "float32",
    device: shared.Device = None,
    limit: shared.Limit = None,
    seed: shared.Seed = 0,
) -> None:
    """Cards: top tokens, maps, pictures and measures.

    Where on the image a neuron is active, which pictures drive it, and the measures with their nulls.
    """
    from vlmscope.checkpoint import load
    from vlmscope.neurons import folder
    from vlmscope.report import write_report

    examples = _examples(image, data, prompt, limit, seed)
    found = folder.describe(
        out,
        load(model, dtype=dtype, device=device),
        examples,
        word or [],
        [_layer_and_number(text) for text in neuron or []],
        prompt=prompt,
        measures=measures,
        embedding=embedding,
        seed=seed,
    )
    print(found.drop(columns="weights").to_string(index=False))
    print(f"tables in {out}; {write_report([out], out / 'report.html')}")


@app.command(cls=Command)
def perturb(
    model: shared.Model,
    data: shared.Data,
    word: Annotated[list[str], typer.Option(metavar="WORD...", help="Words of the captions.")],
    out: shared.Folder,
    prompt: _Prompt = None,
    top: Annotated[
        list[int] | None, typer.Option(metavar="N...", help="How many neurons.  [default: 1 10]")
    ] = None,
    sigma: Annotated[
        list[float] | None, typer.Option(metavar="X...", help="Noise of this size on the columns.")
    ] = None,
    dtype: shared.Precision = "float32",
    device: shared.Device = None,
    limit: shared.Limit = None,
    seed: shared.Seed = 0,
) -> None:
    """A word without its neurons, and without random ones."""
    from vlmscope.checkpoint import load
    from vlmscope.data import examples
    from vlmscope.neurons import folder

    table = folder.perturb(
        out,
        load(model, dtype=dtype, device=device),
        examples(data, limit=limit, seed=seed),
        word,
        prompt=prompt,
        tops=top or (1, 10),
        sigmas=sigma or (),
        seed=seed,
    )
    print(table.to_string(index=False, float_format="{:.3g}".format))
    print(f"table in {out / 'perturb.csv'}")


@app.command(cls=Command)
def edit(
    model: shared.Model,
    source: Annotated[str, typer.Option("--from", metavar="WORD", help="The word to change.")],
    data: shared.Data,
    out: Annotated[Path, typer.Option(help="The edit, a safetensors file.")],
    target: Annotated[str | None, typer.Option("--to", metavar="WORD", help="What to say instead.")] = None,
    suppress: Annotated[bool, typer.Option("--suppress", help="Say anything but the word.")] = False,
    neurons: Annotated[
        int | None, typer.Option(min=1, help="How many columns may change.  [default: 1 %]")
    ] = None,
    prompt: _Prompt = None,
    wording: Annotated[
        list[str] | None, typer.Option(metavar="TEXT...", help="Other wordings to assess it with.")
    ] = None,
    objects: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD...", help="Objects that captions may name wrongly (CHAIR, POPE)."),
    ] = None,
    solver: Annotated[Literal["closed", "learned"], typer.Option(help="How it is found.")] = "learned",
    margin: Annotated[
        float | None,
        typer.Option(help="With --solver closed: logits by which the new word leads.  [default: 4]"),
    ] = None,
    locality: Annotated[float, typer.Option(min=0, help="What the rest weighs.")] = 1.0,
    on: Annotated[
        list[Path] | None, typer.Option(metavar="FILE...", help="Edits that are made before.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write an edited checkpoint to this folder, too.")
    ] = None,
    dtype: shared.Precision = "float32",
    device: shared.Device = None,
    limit: shared.Limit = None,
    seed: shared.Seed = 0,
) -> None:
    """Make the model say another word, by a few neurons' columns only.

    Made on one half of the data and assessed on the other, by free generation; the card lies beside it.
    """
    from vlmscope.checkpoint import load
    from vlmscope.data import examples
    from vlmscope.neurons import edits, folder, weight_edit
    from vlmscope.report import write_report
    from vlmscope.stats import shuffled

    if (target is None) != suppress:
        raise VlmscopeError("give either --to WORD or --suppress")
    edits.checked(solver, margin)
    loaded = load(model, dtype=dtype, device=device)
    before = [weight_edit.WeightEdit.load(path) for path in on or []]
    given = examples(data, limit=limit, seed=seed)
    given = [given[n] for n in shuffled(seed, [example.id for example in given], "halves")]
    half = (len(given) + 1) // 2
    with weight_edit.edited(loaded, *before):
        made = edits.edit(
            loaded,
            given[:half],
            source,
            target,
            prompt=prompt,
            neurons=neurons,
            solver=solver,
            margin=margin,
            locality=locality,
            seed=seed,
        )
        made.save(out)
        print(f"{made}\n{out}")
        card = out.with_name(f"{out.stem}-card")
        prompts = [prompt, *(wording or [])]
        found = folder.edit(
            card, loaded, made, given[half:], prompts=prompts, objects=objects or (), seed=seed
        )
    print(found.to_string(index=False, float_format="{:.3g}".format))
    print(write_report([card], card / "report.html"))
    if export is not None:
        weight_edit.export(loaded, [*before, made], export)
        print(f"edited checkpoint in {export}")


@app.command(cls=Command)
def edits(files: Annotated[list[Path], typer.Argument(help="Files of `vlmscope neurons edit`.")]) -> None:
    """List what is in edits."""
    from vlmscope.neurons.weight_edit import WeightEdit

    for path in files:
        edit = WeightEdit.load(path)
        print(f"{path} ({edit.digest[:8]}): {edit}")
