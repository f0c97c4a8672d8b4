"""The command line: flags only. Torch is imported when a command needs it, not for `--help`."""

from __future__ import annotations

import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmscope import __version__
from vlmscope.errors import VlmscopeError

app = typer.Typer(
    name="vlmscope",
    help="Which part of a vision-language model carries the evidence to its answer?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Corrupt(StrEnum):
    image = "image"
    text = "text"
    noise = "noise"


class Form(StrEnum):
    multiply = "multiply"
    add = "add"
    factor = "factor"


class Where(StrEnum):
    image = "image"
    text = "text"


class Direction(StrEnum):
    denoise = "denoise"
    noise = "noise"


class Engine(StrEnum):
    fast = "fast"
    reference = "reference"


class Solver(StrEnum):
    closed = "closed"
    learned = "learned"


class DType(StrEnum):
    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    four_bits = "4bit"


_Model = Annotated[str, typer.Option(help="A toy's name, a Hugging Face id, or a folder.")]
_Image = Annotated[Path | None, typer.Option(help="One picture.")]
_Data = Annotated[str | None, typer.Option(help="states, scenes, faces, or a CSV file.")]
_Prompt = Annotated[
    str | None, typer.Option(help="What asks for the caption.  [default: each example's own]")
]
_Precision = Annotated[DType, typer.Option(help="Precision of the model.")]
_Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, auto (all GPUs)  [default: the GPU if any]")
]
_Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many.")]
_More = Annotated[list[str] | None, typer.Argument(hidden=True, metavar="WORD")]
_Found = Annotated[
    Path | None,
    typer.Option(help="The folder of `neurons find` on these pictures, which are not captioned again."),
]
_Words = Annotated[list[str] | None, typer.Option("--word", metavar="WORD...", help="Words of the caption.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vlmscope {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("vlmscope-demo"),
    limit: Annotated[int, typer.Option(min=1, help="Examples of each set.")] = 20,
) -> None:
    """Run `notice` on the toy and the sets that ship with it."""
    from vlmscope.demo import run

    run(out, limit)


@app.command()
def sweep(
    model: Annotated[
        str, typer.Option(help="A toy's name, a Hugging Face id, or a folder of save_pretrained.")
    ],
    data: Annotated[str, typer.Option(help="states, scenes, faces, or a CSV file.")],
    corrupt: Annotated[Corrupt, typer.Option(help="What the corrupt run has changed.")],
    sites: Annotated[
        list[str],
        typer.Option(metavar="EXPR...", help="Site expressions such as 'encoder.*.cross.h*@answer'."),
    ],
    out: Annotated[Path, typer.Option(help="The run's folder; an unfinished run goes on.")],
    direction: Annotated[
        Direction, typer.Option(help="denoise: clean into corrupt; noise: corrupt into clean.")
    ] = Direction.denoise,
    engine: Annotated[
        Engine, typer.Option(help="fast, or the slow one that defines its answers.")
    ] = Engine.fast,
    dtype: _Precision = DType.float32,
    device: _Device = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of built-in sets and of noise.")] = 0,
    noise: Annotated[Form, typer.Option(help="With --corrupt noise: x·ε, x+ε, or x·scale.")] = Form.multiply,
    noise_at: Annotated[
        Where, typer.Option(help="Noise on what is read of the image, or on the text embeddings.")
    ] = Where.image,
    noise_scale: Annotated[
        float | None, typer.Option(help="Strength of the noise.  [default: 5, 3 or 0.7691]")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of noise to average over.")] = 10,
    more: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="EXPR")] = None,  # --sites A B C
) -> None:
    """Patch every site of every example, into a run folder."""
    from vlmscope.corrupt import Noise
    from vlmscope.data import examples
    from vlmscope.model import load
    from vlmscope.study import sweep_to
    from vlmscope.tables import knows

    kind: Any = corrupt.value
    if corrupt is Corrupt.noise:
        kind = Noise(noise.value, noise_at.value, noise_scale, draws)
    given = examples(data, limit=limit, seed=seed)
    run = sweep_to(
        out,
        load(model, dtype=dtype.value, device=device),
        given,
        [*sites, *(more or [])],
        kind,
        direction=direction.value,
        engine=engine.value,
        seed=seed,
        data=data,
    )
    _left_out(run)
    print(f"{run.patches():,} patches of {run.ran()} examples in {out}")
    print(*knows(run.baselines()).lines(), sep="\n")


@app.command()
def notice(
    out: Annotated[Path, typer.Option(help="The folder; an unfinished one goes on.")],
    spec: Annotated[
        Path | None, typer.Option(help="A TOML file; options given beside it take precedence.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A toy's name, a Hugging Face id, or a folder.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="D...", help="Built-in sets or CSV files.")
    ] = None,
    corrupt: Annotated[
        list[Corrupt] | None, typer.Option(help="Give it once for each.  [default: image and text]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each set.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of drawing and testing.")] = None,
    position: Annotated[
        str | None,
        typer.Option(
            help="Where heads are read out: readout, answer, another role.  [default: readout in a decoder, answer elsewhere]"
        ),
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="Precision.  [default: float32]")] = None,
    device: _Device = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="D")] = None,
) -> None:
    """The NOTICE pipeline, from examples to a report.

    Selection, sweeps of all modules and heads, circuits, what the heads do, and a report.
    """
    from vlmscope.notice import Spec, run

    given: dict[str, Any] = {
        "model": model,
        "data": (*(data or []), *(more or [])) or None,
        "corrupt": tuple(one.value for one in corrupt) if corrupt else None,
        "limit": limit,
        "seed": seed,
        "position": position,
        "dtype": dtype.value if dtype else None,
        "device": device,
    }
    if spec is None and not (model and data):
        raise VlmscopeError("notice needs --model and --data, or --spec FILE with both")
    settings = {name: value for name, value in given.items() if value is not None}
    run(Spec.from_toml(spec, **settings) if spec else Spec(**settings), out, print)


@app.command()
def tracing(
    model: _Model,
    data: Annotated[str, typer.Option(help="states, scenes, faces, or a CSV file.")],
    out: Annotated[Path, typer.Option(help="The folder; an unfinished one goes on.")],
    windows: Annotated[
        list[int] | None, typer.Option(help="Widths of windows of layers, each once.  [default: 1, 3, 5]")
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(help="What is restored, each once.  [default: resid, attn, cross, mlp]"),
    ] = None,
    by: Annotated[str, typer.Option(help="Average tokens by slot, or by length of question.")] = "slot",
    repeats: Annotated[int, typer.Option(min=1, help="Draws of noise.")] = 10,
    noise: Annotated[Form, typer.Option(help="x·ε, x+ε, or x·scale.")] = Form.multiply,
    noise_scale: Annotated[
        float | None, typer.Option(help="Strength of the noise.  [default: 5, 3 or 0.7691]")
    ] = None,
    dtype: _Precision = DType.float32,
    device: _Device = None,
    limit: _Limit = None,
    seed: Annotated[int, typer.Option(help="Seed of built-in sets and of noise.")] = 0,
) -> None:
    """Causal tracing with noise on the image.

    Clean states are restored layer by layer, token by token.
    """
    from vlmscope.corrupt import Noise
    from vlmscope.data import examples
    from vlmscope.model import load
    from vlmscope.plots import most_restored
    from vlmscope.report import write_report
    from vlmscope.store import read_run
    from vlmscope.tables import knows
    from vlmscope.tracing import KINDS, WINDOWS, trace

    loaded = load(model, dtype=dtype.value, device=device)
    table = trace(
        out,
        loaded,
        examples(data, limit=limit, seed=seed),
        noise=Noise(noise.value, "image", noise_scale, repeats),
        windows=windows or WINDOWS,
        kinds=kinds or [k for k in KINDS if any(k in s.kinds for s in loaded.shapes.values())],
        by=by,
        seed=seed,
        data=data,
    )
    print(*knows(read_run(out / "repeats" / "00").baselines()).lines(), sep="\n")
    print("what restores most of P(answer):")
    for row in most_restored(table).itertuples():
        spread = f", SD over repeats {row.spread:.1%}" if row.repeats > 1 else ""
        print(
            f"  {row.tower} layer {row.layer} {row.kind} at {row.at}, window of {row.window}: "
            f"{row.restored:.1%} ({row.n} examples{spread})"
        )
    print(f"{len(table):,} rows in {out / 'tracing.parquet'}; {write_report([out], out / 'report.html')}")


@app.command()
def circuits(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, as sweep or notice write them.")],
    out: Annotated[Path, typer.Option(help="The folder for the tables.")],
    position: Annotated[
        str | None,
        typer.Option(
            help="Where heads are read out: readout, answer, another role.  [default: readout in a decoder, answer elsewhere]"
        ),
    ] = None,
    across_models: Annotated[
        bool, typer.Option("--across-models", help="The runs are of models with the same heads.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of permutations and halves.")] = 0,
) -> None:
    """Important heads of each run, universal ones over all."""
    from vlmscope.circuits import expressions, write

    found = write(runs, out, position=position, across_models=across_models, seed=seed)
    columns = [
        "run",
        "tower",
        "layer",
        "kind",
        "head",
        "position",
        "mean",
        "ci_low",
        "ci_high",
        "q_value",
        "confirmed",
    ]
    important = found.heads[found.heads["important"]].sort_values("mean", key=abs, ascending=False)
    print(f"{len(important)} important of {len(found.heads)} heads; the strongest:")
    print(important[columns].head(15).to_string(index=False, float_format="{:.3g}".format))
    everywhere = expressions(found.universal[found.universal["universal"]])
    print(f"important in every run: {' '.join(everywhere) or 'none'}")
    print(f"tables in {out}; `--sites $(cat {out / 'sites.txt'})` sweeps the important heads again")


@app.command()
def heads(
    model: _Model,
    data: Annotated[str, typer.Option(help="states, scenes, faces, or a CSV file.")],
    sites: Annotated[
        list[str], typer.Option(metavar="EXPR...", help="Heads, such as 'encoder.*.cross.h*@answer'.")
    ],
    out: Annotated[Path, typer.Option(help="The folder for the tables.")],
    corrupt: Annotated[Corrupt, typer.Option(help="What the corrupt run has changed.")] = Corrupt.image,
    dtype: _Precision = DType.float32,
    device: _Device = None,
    limit: _Limit = None,
    seed: Annotated[int, typer.Option(help="Seed of built-in sets, shuffles and knock-outs.")] = 0,
    more: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="EXPR")] = None,
) -> None:
    """What heads do.

    Where they look, what they move, and what happens without them.
    """
    from vlmscope.data import examples
    from vlmscope.heads import write
    from vlmscope.model import load
    from vlmscope.report import write_report

    found = write(
        out,
        load(model, dtype=dtype.value, device=device),
        examples(data, limit=limit, seed=seed),
        [*sites, *(more or [])],
        corrupt.value,
        seed=seed,
        data=data,
    )
    for row in found.functions.itertuples():
        print(f"{row.site}: {row.label}\n  {row.evidence}")
    accuracy = found.together.groupby(["set", "knockout"], sort=False)["accuracy"].mean()
    print("accuracy with heads knocked out together:")
    for (name, how), value in accuracy.items():  # type: ignore[misc]
        print(f"  {name}{f' ({how})' if how else ''}: {value:.1%}")
    print(f"tables in {out}; {write_report([out], out / 'report.html')}")


neurons = typer.Typer(
    no_args_is_help=True, help="Neurons that turn what is seen into a word: find, show, perturb, edit."
)
app.add_typer(neurons, name="neurons")


def _given(
    image: Path | None, data: str | None, prompt: str | None, limit: int | None, seed: int
) -> list[Any]:
    """The examples that are meant: one picture with a prompt, or a data set."""
    from vlmscope.data import examples
    from vlmscope.example import Example

    if (image is None) == (data is None):
        raise VlmscopeError("give either --image or --data")
    if data is not None:
        return examples(data, limit=limit, seed=seed)
    if prompt is None:
        raise VlmscopeError("--image needs a --prompt that asks for the caption")
    assert image is not None
    return [Example(id=image.name, clean_image=image, clean_prompt=prompt, answer="", foil="")]


@neurons.command("find")
def neurons_find(
    model: _Model,
    out: Annotated[Path, typer.Option(help="The folder for the tables.")],
    image: _Image = None,
    data: _Data = None,
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
    dtype: _Precision = DType.float32,
    device: _Device = None,
    limit: _Limit = None,
    seed: Annotated[int, typer.Option(help="Seed of built-in sets.")] = 0,
    more: _More = None,
) -> None:
    """Neurons that contribute most to words of a caption.

    Writes neurons.parquet: example, word, token, token_id, position, layer, neuron, activation, weight,
    score, rank.
    """
    from vlmscope.model import load
    from vlmscope.neurons import find, make_folder

    given = _given(image, data, prompt, limit, seed)
    if caption is not None and len(given) > 1:
        raise VlmscopeError("--caption is of one picture; give --image")
    make_folder(out)
    found = find(
        load(model, dtype=dtype.value, device=device),
        given,
        [*(word or []), *(more or [])],
        prompt=prompt,
        caption=caption,
        tagger=tagger,
        top=top,
        variant="gate" if gate else "input",
        gain=gain,
    )
    found.save(out)
    best = found.neurons[found.neurons["rank"] <= 3].drop(columns=["token_id"])
    print(best.head(30).to_string(index=False, float_format="{:.4g}".format))
    print(f"tables in {out}; neurons.parquet has them all")


def _numbers(text: str) -> tuple[int, int]:
    layer, dot, number = text.strip().lstrip("L").replace(".N", ".").partition(".")
    if not (dot and layer.isdigit() and number.isdigit()):
        raise VlmscopeError(f"bad neuron '{text}'; expected LAYER.NUMBER, such as 12.4071")
    return int(layer), int(number)


@neurons.command("describe")
def neurons_describe(
    model: _Model,
    out: Annotated[Path, typer.Option(help="The folder for the cards.")],
    image: _Image = None,
    data: _Data = None,
    prompt: _Prompt = None,
    word: _Words = None,
    neuron: Annotated[list[str] | None, typer.Option(help="LAYER.NUMBER; once for each.")] = None,
    measures: Annotated[bool, typer.Option(help="Measure the words' neurons over the set, too.")] = True,
    embedding: Annotated[
        str | None, typer.Option(help="A small text model that compares top tokens with the word, too.")
    ] = None,
    found: _Found = None,
    dtype: _Precision = DType.float32,
    device: _Device = None,
    limit: _Limit = None,
    seed: Annotated[int, typer.Option(help="Seed of built-in sets and of nulls.")] = 0,
    more: _More = None,
) -> None:
    """Cards: top tokens, where on the image, which pictures, and the measures with their nulls."""
    from vlmscope.model import load
    from vlmscope.neurons import Found, describe, make_folder, read
    from vlmscope.report import write_report

    given = _given(image, data, prompt, limit, seed)
    make_folder(out)
    described = describe(
        load(model, dtype=dtype.value, device=device),
        given,
        [*(word or []), *(more or [])],
        [_numbers(text) for text in neuron or []],
        prompt=prompt,
        measures=measures,
        embedding=embedding,
        found=None if found is None else read(found, Found),
        seed=seed,
    )
    described.save(out)
    print(described.cards.drop(columns="weights").to_string(index=False))
    print(f"tables in {out}; {write_report([out], out / 'report.html')}")


@neurons.command("perturb")
def neurons_perturb(
    model: _Model,
    data: Annotated[str, typer.Option(help="states, scenes, faces, or a CSV file.")],
    word: Annotated[list[str], typer.Option(metavar="WORD...", help="Words of the captions.")],
    out: Annotated[Path, typer.Option(help="The folder for the table.")],
    prompt: _Prompt = None,
    top: Annotated[
        list[int] | None, typer.Option(help="How many neurons; once for each.  [default: 1, 10]")
    ] = None,
    sigma: Annotated[
        list[float] | None, typer.Option(help="Noise of this size on the columns; once for each.")
    ] = None,
    found: _Found = None,
    dtype: _Precision = DType.float32,
    device: _Device = None,
    limit: _Limit = None,
    seed: Annotated[int, typer.Option(help="Seed of built-in sets, halves and noise.")] = 0,
    more: _More = None,
) -> None:
    """What happens to a word without its neurons, and without random ones."""
    from vlmscope.data import examples
    from vlmscope.model import load
    from vlmscope.neurons import Found, make_folder, perturb, read

    make_folder(out)
    result = perturb(
        load(model, dtype=dtype.value, device=device),
        examples(data, limit=limit, seed=seed),
        [*word, *(more or [])],
        prompt=prompt,
        tops=top or (1, 10),
        sigmas=sigma or (),
        found=None if found is None else read(found, Found),
        seed=seed,
    )
    result.save(out)
    print(result.effects.to_string(index=False, float_format="{:.3g}".format))
    print(f"table in {out / 'perturb.csv'}")


@neurons.command("edit")
def neurons_edit(
    model: _Model,
    source: Annotated[str, typer.Option("--from", metavar="WORD", help="The word to change.")],
    data: Annotated[str, typer.Option(help="states, scenes, faces, or a CSV file.")],
    out: Annotated[Path, typer.Option(help="The edit, a safetensors file.")],
    target: Annotated[str | None, typer.Option("--to", metavar="WORD", help="What to say instead.")] = None,
    suppress: Annotated[bool, typer.Option("--suppress", help="Say anything but the word.")] = False,
    neurons: Annotated[
        int | None, typer.Option(min=1, help="How many columns may change.  [default: 1 %]")
    ] = None,
    prompt: _Prompt = None,
    wording: Annotated[
        list[str] | None, typer.Option(help="Another wording to assess it with; once for each.")
    ] = None,
    objects: Annotated[
        list[str] | None,
        typer.Option(help="Objects that captions may name wrongly (CHAIR, POPE); once for each."),
    ] = None,
    solver: Annotated[Solver, typer.Option(help="How it is found.")] = Solver.learned,
    margin: Annotated[
        float | None,
        typer.Option(help="With --solver closed: logits by which the new word leads.  [default: 4]"),
    ] = None,
    locality: Annotated[float, typer.Option(min=0, help="What the rest weighs.")] = 1.0,
    on: Annotated[list[Path] | None, typer.Option(help="Edits that are made before; once for each.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--export", help="Write an edited checkpoint to this folder, too.")
    ] = None,
    found: _Found = None,
    dtype: _Precision = DType.float32,
    device: _Device = None,
    limit: _Limit = None,
    seed: Annotated[int, typer.Option(help="Seed of built-in sets and of the halves.")] = 0,
) -> None:
    """Make the model say another word, by a few neurons' columns only.

    Made on one half of the data and assessed on the other, by free generation; the card lies beside it.
    """
    from vlmscope.data import examples
    from vlmscope.model import load
    from vlmscope.neurons import Found, WeightEdit, check_margin, describe_edit, edit, edited, export, read
    from vlmscope.report import write_report
    from vlmscope.seeds import shuffled

    if (target is None) != suppress:
        raise VlmscopeError("give either --to WORD or --suppress")
    check_margin(solver.value, margin)
    loaded = load(model, dtype=dtype.value, device=device)
    before = [WeightEdit.load(path) for path in on or []]
    known = None if found is None else read(found, Found)
    given = examples(data, limit=limit, seed=seed)
    given = [given[n] for n in shuffled(seed, [one.id for one in given], "halves")]
    half = (len(given) + 1) // 2
    with edited(loaded, *before):
        made = edit(
            loaded,
            given[:half],
            source,
            target,
            prompt=prompt,
            neurons=neurons,
            solver=solver.value,
            margin=margin,
            locality=locality,
            found=known,
            seed=seed,
        )
        made.save(out)
        print(f"{made}\n{out}")
        card = out.with_name(f"{out.stem}-card")
        assessed = describe_edit(
            loaded,
            made,
            given[half:],
            prompts=[prompt, *(wording or [])],
            names=objects or (),
            found=known,
            seed=seed,
        )
    assessed.save(card)
    print(assessed.measures.to_string(index=False, float_format="{:.3g}".format))
    print(write_report([card], card / "report.html"))
    if checkpoint is not None:
        export(loaded, [*before, made], checkpoint)
        print(f"edited checkpoint in {checkpoint}")


@neurons.command("edits")
def neurons_edits(
    files: Annotated[list[Path], typer.Argument(help="Files of `vlmscope neurons edit`.")],
) -> None:
    """List what is in edits."""
    from vlmscope.neurons import WeightEdit

    for path in files:
        edit = WeightEdit.load(path)
        print(f"{path} ({edit.digest[:8]}): {edit}")


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="svo-probes, mit-states, faces, coco-qa, clevr or folder.")],
    root: Annotated[Path, typer.Option(help="The folder of the unpacked data set.")],
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    model: Annotated[
        str | None,
        typer.Option(help="Whose tokenizer replaced words align with.  [default: one word, one token]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many examples in all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    download: Annotated[bool, typer.Option("--download", help="Fetch missing images (svo-probes).")] = False,
) -> None:
    """Build a contrast set from a downloaded data set.

    Says how many rows each rule dropped, and why.
    """
    from vlmscope.data import build
    from vlmscope.example import write_csv

    pieces = None
    if model:
        from vlmscope.model import tokenizer

        pieces = tokenizer(model)

    def fetched(done: int, of: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == of else ""
            print(f"\r{done:,} of {of:,} images", end=end, file=sys.stderr, flush=True)

    built = build(name, root, limit=limit, seed=seed, pieces=pieces, download=download, progress=fetched)
    write_csv(out, built.examples)
    print(f"{built.summary()}\n{out}")


@app.command()
def generate(
    model: _Model,
    image: Annotated[Path, typer.Option(help="The picture.")],
    prompt: Annotated[str, typer.Option(help="What is asked.")],
    edit: Annotated[
        list[str] | None, typer.Option(help="'SITE set|add|scale NUMBER'; once for each.")
    ] = None,
    patch: Annotated[list[str] | None, typer.Option(help="SITE to copy from --other; once for each.")] = None,
    other: Annotated[Path | None, typer.Option(help="The picture that --patch copies from.")] = None,
    dtype: _Precision = DType.float32,
    device: _Device = None,
) -> None:
    """What a model says, without and with edits.

    An edit is made as the model reads the prompt; positions count from its start.
    """
    from vlmscope.inputs import parse_edit
    from vlmscope.model import load
    from vlmscope.sites import Site

    edits = [parse_edit(text) for text in edit or []]
    sites = [Site.parse(text) for text in patch or []]
    if sites and other is None:
        raise VlmscopeError("--patch copies from another picture; name it with --other")
    loaded = load(model, dtype=dtype.value, device=device)
    inputs = loaded.inputs(image, prompt)
    if sites and other is not None:
        source = loaded.inputs(other, prompt)
        edits += loaded.copied(source, inputs, sites)
        print(f"the other picture: {loaded.answer(source)}")
    print(f"without edits:     {loaded.answer(inputs)}")
    if edits:
        print(
            f"with {len(edits)} edit{'s' if len(edits) > 1 else ''}: ".ljust(19)
            + loaded.answer(inputs, edits)
        )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of sweep, circuits, heads, tracing or notice.")],
    out: Annotated[Path, typer.Option(help="The HTML file; its figures go beside it.")],
) -> None:
    """Write one self-contained HTML file."""
    from vlmscope.report import write_report

    print(write_report(runs, out))


@app.command()
def models(
    model: Annotated[str | None, typer.Argument(help="A toy's name, a Hugging Face id, or a folder.")] = None,
    example: Annotated[
        str | None,
        typer.Option(
            metavar="DATA:ROW",
            help="Print what the model is given for one example: a set or CSV file, and an id or row.",
        ),
    ] = None,
) -> None:
    """List the families, or what one model has, or exactly what it is given for an example."""
    from vlmscope import describe
    from vlmscope.model import load

    if example is not None:
        if model is None:
            raise VlmscopeError("--example asks what a model is given; name the model first")
        one = _row(example)  # read before the model is loaded
        print(describe.example(load(model), one))
    else:
        print(describe.model(load(model)) if model else describe.supported())


def _row(text: str) -> Any:
    """The example that `DATA:ROW` names, by its id or else its number, counted from 0."""
    from vlmscope.data import examples

    data, _, row = text.rpartition(":")
    if not data or not row:
        raise VlmscopeError(f"'{text}' names no example; expected DATA:ROW, such as states:0")
    found = examples(data)
    for number, one in enumerate(found):
        if row in (one.id, str(number)):
            return one
    raise VlmscopeError(f"{data} has no example '{row}'; expected an id, or a row from 0 to {len(found) - 1}")


def _left_out(run: Any) -> None:
    """Warn of examples that could not be run; an error if that is all of them."""
    from vlmscope.study import tell

    tell(run.baselines())


def main() -> None:
    """Run the command line; an error that a person can mend is one line and exit status 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda text, *_, **__: print(f"warning: {text}", file=sys.stderr)
        try:
            app(prog_name="vlmscope")
        except VlmscopeError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(1)
        except SystemExit as end:
            if end.code == 130:  # what typer makes of Ctrl-C
                print("interrupted; run the same command again to go on", file=sys.stderr)
            raise
