"""The commands that say more than single patches: words of states, attributions, circuits, one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from vlmscope.cli.neurons import Shown
from vlmscope.cli.options import Corrupt, Filled, Given, OneModel
from vlmscope.errors import VlmscopeError, written


def lens(
    given: Shown,
    sites: list[str],
    out: Path,
    top: int = 5,
    word: list[str] | None = None,
    only_top: bool = False,
) -> None:
    """The words that states say at each layer (logit lens).

    Writes lens.parquet: example, site, tower, layer, position, token, slot, rank, predicted, token_id, logit,
    p; and words.parquet: how answer, foil, roles and --word do, beside other words of their type.
    """
    from vlmscope.report import claim_report, write_report
    from vlmscope.studies.lens import Lens
    from vlmscope.studies.lens import lens as read

    if given.data is not None and given.prompt is not None:
        raise VlmscopeError("--prompt is of one --image; the examples of --data have their own, leave it out")
    examples = given.examples()
    Lens.claim(out)
    claim_report(out / "report.html")
    if only_top and word:
        raise VlmscopeError("--word has a rank among all words, --only-top is of the top ones; leave one out")
    named = given.data or examples[0].id
    found = read(given.load(), examples, sites, word or [], top=top, only_top=only_top, data=named)
    found.save(out)
    first = found.lens[found.lens["example"] == found.lens["example"].iloc[0]]
    for row in first.groupby("site", sort=False)["predicted"].agg(" ".join).head(12).items():
        print("{}: {}".format(*row))
    words = found.words[found.words["what"] != "foil"].groupby(["what", "layer"], sort=False)
    if len(words):
        means = words[["rank", "p", "null_p", "beaten"]].mean().reset_index()
        print(means.to_string(index=False, float_format="{:.3g}".format))
    print(f"{len(found.lens):,} rows in {out / 'lens.parquet'}; {write_report([out], out / 'report.html')}")


def explain(
    given: OneModel,
    image: Path,
    prompt: str,
    out: Path,
    word: list[str] | None = None,
    region: str | None = None,
    reference: Literal["blur", "mean"] = "blur",
    direction: Literal["noise", "denoise"] = "noise",
    at: Literal["features", "pixels"] = "features",
    patches: int = 48,
    length: int = 20,
) -> None:
    """Where in picture and model each word comes from.

    The model answers; each cell of the picture is replaced, and what that does to each word is on a page.
    """
    from vlmscope import files
    from vlmscope.data.images import open_image
    from vlmscope.explanation import check_region
    from vlmscope.explanation import explain as ask
    from vlmscope.report.explanation import claim, sentences

    if out.suffix.lower() not in (".html", ".htm"):
        raise VlmscopeError(f"{out}: is a web page; expected a file that ends in .html")
    claim(out)
    picture = open_image(image)
    edges: Any = None if region is None else [written(edge) for edge in region.split(",")]
    box = None if edges is None else check_region(edges, picture)
    found = ask(
        given.load(),
        picture,
        prompt,
        word or [],
        region=box,
        reference=reference,
        direction=direction,
        at=at,
        patches=patches,
        length=length,
    )
    files.write(out, found.page().encode())
    print(found.about["answer"].strip())
    for _, row in found.words.iterrows():
        print(*sentences(found.about, row, found.cells[found.cells["word"] == row["word"]]))
        if box is not None:
            print(f"  of the region: {row['region']:.3g} nats")
    about = found.about
    if about["alone"] < about["cells"]:
        print(f"{about['alone']} of {about['cells']} cells one by one, the others in groups: see --patches")
    print(*about["lacking"], out, sep="\n")


def attribute(
    given: Given,
    share: Filled,
    sites: list[str],
    out: Path,
    corrupt: Corrupt | None = None,
    method: Literal["direct", "atp", "atp-star", "relp", "ig"] = "direct",
    verify: int = 0,
    steps: int | None = None,
    direction: Literal["denoise", "noise"] = "denoise",
    metric: Literal["ld", "p", "logprob", "kl"] = "ld",
    word: str | None = None,
) -> None:
    """How much of the logit difference each place accounts for.

    Writes attributions/: example, corruption, site, tower, layer, kind, unit, position, token, role, slot,
    score, exact; with --verify agreement.json: how far the scores can be trusted.
    """
    from vlmscope.report import claim_report, write_report
    from vlmscope.report.ranking import strongest
    from vlmscope.studies.agreement import lines
    from vlmscope.studies.attribution import agreement_of, attributed
    from vlmscope.studies.run_writer import claim
    from vlmscope.studies.sweep import warn_of_excluded

    claim(out)
    claim_report(out / "report.html")
    options = {
        "sites": sites,
        "corrupt": corrupt,
        "method": method,
        "direction": direction,
        "metric": metric,
        "verify": verify,
        "steps": steps,
        "word": word,
        "seed": given.seed,
    }
    run, _ = share.fill(out, given, lambda: (attributed, options))
    warn_of_excluded(run.baselines())
    table = run.attributions()
    print(f"{len(table):,} scores of {run.ran()} examples in {out}; the largest:")
    is_edge = table["site"].str.contains("<", regex=False)
    best = strongest(table if is_edge.all() else table[~is_edge], 10, "score")[
        ["site", "slot", "mean", "low", "high", "n"]
    ]
    print(best.to_string(index=False, float_format="{:.3g}".format))
    print(run.check_line(), write_report([out], out / "report.html"), sep="\n")
    if verify:
        print(*lines(agreement_of(table, run.spec)), sep="\n")


def edges(
    given: Given,
    share: Filled,
    corrupt: Corrupt,
    out: Path,
    method: Literal["eap", "eap-ig", "exact"] = "eap",
    steps: int | None = None,
    verify: int = 0,
    tower: Literal["decoder", "vision"] | None = None,
    direction: Literal["denoise", "noise"] = "denoise",
    metric: Literal["ld", "p", "logprob", "kl"] = "ld",
) -> None:
    """Which part feeds which, edge by edge.

    Writes edges.parquet: source, target, score, exact, low, high over examples, and edges/, the same of each
    example; with --verify agreement.json: how far the scores can be trusted.
    """
    from vlmscope.report import claim_report, write_report
    from vlmscope.studies.agreement import agreement, lines
    from vlmscope.studies.edge_tables import by_reader, over_examples
    from vlmscope.studies.edges import edged
    from vlmscope.studies.run_writer import claim
    from vlmscope.studies.sweep import warn_of_excluded

    claim(out)
    claim_report(out / "report.html")
    options = {
        "corrupt": corrupt,
        "method": method,
        "steps": steps,
        "verify": verify,
        "tower": tower,
        "direction": direction,
        "metric": metric,
        "seed": given.seed,
    }
    run, _ = share.fill(out, given, lambda: (edged, options))
    warn_of_excluded(run.baselines())
    each = run.edges()
    table = over_examples(each)
    print(f"{len(table):,} edges over {run.ran()} examples in {out / 'edges.parquet'}; the largest:")
    print(table.head(10).to_string(index=False, float_format="{:.3g}".format))
    print(run.check_line(), write_report([out], out / "report.html"), sep="\n")
    if verify:
        print(*lines(agreement(by_reader(each), verify)), sep="\n")


def faithfulness(
    given: Given,
    scores: Path,
    out: Path,
    corrupt: Corrupt | None = None,
    outside: Literal["corrupt", "mean", "zero"] = "corrupt",
    metric: Literal["ld", "p", "logprob", "kl"] = "ld",
    ratio: Literal["means", "median"] = "means",
    draws: int = 20,
) -> None:
    """How much of the behaviour a circuit carries.

    Parts are ranked by scores of some examples; the best of them run on others, while all other parts have
    another run's values. Writes faithfulness.parquet: ranking, fraction, kept, f, low, high, random,
    random_low, random_high; circuit.csv; and summary.json: cpr, cmd, and the circuit that is reported.
    """
    from vlmscope.report import claim_report, write_report
    from vlmscope.studies.faithfulness import faithfulness as measure
    from vlmscope.studies.run_writer import claim

    claim(out)
    claim_report(out / "report.html")
    found = measure(
        given.load(),
        given.examples(),
        scores,
        corrupt,
        outside=outside,
        metric=metric,
        ratio=ratio,
        draws=draws,
        seed=given.seed,
        out=out,
        data=given.data,
    )
    columns = ["ranking", "fraction", "kept", "f", "low", "high", "random"]
    print(found.table[columns].to_string(index=False, float_format="{:.3g}".format))
    print(found.circuit.head(20).to_string(index=False, float_format="{:.3g}".format))
    print(write_report([out], out / "report.html"), *found.lines(), sep="\n")
