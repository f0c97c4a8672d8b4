"""The commands about neurons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from vlmscope.cli.options import Given, OneModel, command
from vlmscope.errors import VlmscopeError

app = typer.Typer(
    no_args_is_help=True, help="Neurons that turn what is seen into a word.\n\nFind, show, perturb, edit."
)


@dataclass(kw_only=True)
class Shown(OneModel):
    """The options of a command with a model, and one picture with a prompt or a data set."""

    image: Path | None = None
    data: str | None = None
    prompt: str | None = None
    limit: int | None = None
    seed: int = 0

    def examples(self) -> list[Any]:
        from vlmscope.data import examples
        from vlmscope.data.example import Example

        if self.data is not None and self.image is None:
            return examples(self.data, limit=self.limit, seed=self.seed)
        if self.image is None or self.data is not None:
            raise VlmscopeError("give either --image or --data")
        if self.prompt is None:
            raise VlmscopeError("--image needs a --prompt that asks for the caption")
        return [
            Example(id=self.image.name, clean_image=self.image, clean_prompt=self.prompt, answer="", foil="")
        ]


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
    from vlmscope.neurons import folder

    examples = given.examples()
    if caption is not None and len(examples) > 1:
        raise VlmscopeError("--caption is of one picture; give --image")
    table = folder.find(
        out,
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
    best = table[table["rank"] <= 3].drop(columns=["token_id"])
    print(best.head(30).to_string(index=False, float_format="{:.4g}".format))
    print(f"tables in {out}; neurons.parquet has them all")


def _layer_and_number(text: str) -> tuple[int, int]:
    layer, dot, number = text.strip().lstrip("L").replace(".N", ".").partition(".")
    if not (dot and layer.isdigit() and number.isdigit()):
        raise VlmscopeError(f"bad neuron '{text}'; expected LAYER.NUMBER, such as 12.4071")
    return int(layer), int(number)


@command(app)
def describe(
    given: Shown,
    out: Path,
    word: list[str] | None = None,
    neuron: list[str] | None = None,
    measures: bool = True,
    embedding: str | None = None,
) -> None:
    """Cards: top tokens, maps, pictures and measures.

    Where on the image a neuron is active, which pictures drive it, and the measures with their nulls.
    """
    from vlmscope.neurons import folder
    from vlmscope.report import write_report

    examples = given.examples()
    neurons = [_layer_and_number(text) for text in neuron or []]
    options: dict[str, Any] = {"measures": measures, "embedding": embedding, "seed": given.seed}
    found = folder.describe(out, given.load(), examples, word or [], neurons, prompt=given.prompt, **options)
    print(found.drop(columns="weights").to_string(index=False))
    print(f"tables in {out}; {write_report([out], out / 'report.html')}")


@command(app)
def perturb(
    given: Given,
    word: list[str],
    out: Path,
    prompt: str | None = None,
    top: list[int] | None = None,
    sigma: list[float] | None = None,
) -> None:
    """A word without its neurons, and without random ones."""
    from vlmscope.neurons import folder

    options: dict[str, Any] = {"tops": top or (1, 10), "sigmas": sigma or (), "seed": given.seed}
    table = folder.perturb(out, given.load(), given.examples(), word, prompt=prompt, **options)
    print(table.to_string(index=False, float_format="{:.3g}".format))
    print(f"table in {out / 'perturb.csv'}")


@command(app)
def edit(
    given: Given,
    source: str,
    out: Path,
    target: str | None = None,
    suppress: bool = False,
    neurons: int | None = None,
    prompt: str | None = None,
    wording: list[str] | None = None,
    objects: list[str] | None = None,
    solver: Literal["closed", "learned"] = "learned",
    margin: float | None = None,
    locality: float = 1.0,
    on: list[Path] | None = None,
    export: Path | None = None,
) -> None:
    """Make the model say another word, by a few neurons' columns only.

    Made on one half of the data and assessed on the other, by free generation; the card lies beside it.
    """
    from vlmscope.neurons import edits, folder, weight_edit
    from vlmscope.report import write_report
    from vlmscope.stats import shuffled

    if (target is None) != suppress:
        raise VlmscopeError("give either --to WORD or --suppress")
    edits.checked(solver, margin)
    seed = given.seed
    model, examples = given.load(), given.examples()
    before = [weight_edit.WeightEdit.load(path) for path in on or []]
    mixed = [examples[n] for n in shuffled(seed, [example.id for example in examples], "halves")]
    half = (len(mixed) + 1) // 2
    with weight_edit.edited(model, *before):
        made = edits.edit(
            model,
            mixed[:half],
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
            card, model, made, mixed[half:], prompts=prompts, objects=objects or (), seed=seed
        )
    print(found.to_string(index=False, float_format="{:.3g}".format))
    print(write_report([card], card / "report.html"))
    if export is not None:
        weight_edit.export(model, [*before, made], export)
        print(f"edited checkpoint in {export}")


@command(app)
def edits(files: list[Path], /) -> None:
    """List what is in edits."""
    from vlmscope.neurons.weight_edit import WeightEdit

    for path in files:
        made = WeightEdit.load(path)
        print(f"{path} ({made.digest[:8]}): {made}")
