"""The commands that say more than single patches: words of states, attributions, circuits, one picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmscope.cli import terminal
from vlmscope.cli.neurons import Shown
from vlmscope.cli.options import Corrupt, Direction, Filled, Given, Metric, OnePicture, Share, StudyOptions
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
    if only_top and word:
        raise VlmscopeError("--word has a rank among all words, --only-top is of the top ones; leave one out")
    examples = given.examples()
    Lens.claim(out)
    claim_report(out / "report.html")
    named = given.data or examples[0].id
    found = read(given.load(), examples, sites, word or [], top=top, only_top=only_top, data=named)
    found.save(out)
    first = found.lens[found.lens["example"] == found.lens["example"].iloc[0]]
    for row in first.groupby("site", sort=False)["predicted"].agg(" ".join).head(12).items():
        print("{}: {}".format(*row))
    words = found.words[found.words["what"] != "foil"].groupby(["what", "layer"], sort=False)
    if len(words):
        means = words[["rank", "p", "null_p", "beaten"]].mean().reset_index()
        print(terminal.table(means))
    print(f"{len(found.lens):,} rows in {out / 'lens.parquet'}; {write_report([out], out / 'report.html')}")


def explain(
    given: OnePicture,
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
    picture = open_image(given.image)
    edges: Any = None if region is None else [written(edge) for edge in region.split(",")]
    box = None if edges is None else check_region(edges, picture)
    found = ask(
        given.load(),
        picture,
        given.prompt,
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


@dataclass(kw_only=True)
class Scores(StudyOptions):
    """The options of attributions."""

    makes = "studies.attribution:attributed"
    sites: list[str]
    corrupt: Corrupt | None = None
    method: Literal["direct", "atp", "atp-star", "relp", "ig"] = "direct"
    verify: int = 0
    steps: int | None = None
    direction: Direction = "denoise"
    metric: Metric = "ld"
    word: str | None = None


def attribute(given: Given, scores: Scores, share: Filled) -> None:
    """How much of the logit difference each place accounts for.

    Writes attributions/: example, corruption, site, tower, layer, kind, unit, position, token, role, slot,
    score, exact; with --verify agreement.json: how far the scores can be trusted.
    """
    from vlmscope.report import claim_report, write_report
    from vlmscope.report.ranking import strongest
    from vlmscope.studies.agreement import UNSIGNED, agreement, lines

    claim_report(share.out / "report.html")
    run, _ = share.fill(given, scores)
    table = run.attributions()
    print(f"{len(table):,} scores of {run.ran()} examples in {run.path}; the largest:")
    is_edge = table["site"].str.contains("<", regex=False)
    best = strongest(table if is_edge.all() else table[~is_edge], 10, "score")[
        ["site", "slot", "mean", "low", "high", "n"]
    ]
    print(terminal.table(best))
    print(run.check_line(), write_report(run.path, run.path / "report.html"), sep="\n")
    if scores.verify:
        print(*lines(agreement(table, scores.verify, signed=scores.method != UNSIGNED)), sep="\n")


@dataclass(kw_only=True)
class Edges(StudyOptions):
    """The options of scores of edges."""

    makes = "studies.edges:edged"
    corrupt: Corrupt
    method: Literal["eap", "eap-ig", "exact"] = "eap"
    steps: int | None = None
    verify: int = 0
    tower: Literal["decoder", "vision"] | None = None
    direction: Direction = "denoise"
    metric: Metric = "ld"


def edges(given: Given, scores: Edges, share: Filled) -> None:
    """Which part feeds which, edge by edge.

    Writes edges.parquet: source, target, score, exact, low, high over examples, and edges/, the same of each
    example; with --verify agreement.json: how far the scores can be trusted.
    """
    from vlmscope.report import claim_report, write_report
    from vlmscope.studies.agreement import agreement, lines
    from vlmscope.studies.edge_tables import by_reader, over_examples

    claim_report(share.out / "report.html")
    run, _ = share.fill(given, scores)
    each = run.edges()
    table = over_examples(each)
    print(f"{len(table):,} edges over {run.ran()} examples in {run.path / 'edges.parquet'}; the largest:")
    print(terminal.table(table.head(10)))
    print(run.check_line(), write_report(run.path, run.path / "report.html"), sep="\n")
    if scores.verify:
        print(*lines(agreement(by_reader(each), scores.verify)), sep="\n")


@dataclass(kw_only=True)
class Circuits:
    """The options of circuits."""

    scores: Path
    corrupt: Corrupt | None = None
    outside: Literal["corrupt", "mean", "zero"] = "corrupt"
    metric: Metric = "ld"
    ratio: Literal["means", "median"] = "means"
    draws: int = 20


def faithfulness(given: Given, circuits: Circuits, share: Share) -> None:
    """How much of the behaviour a circuit carries.

    Parts are ranked by scores of some examples; the best of them run on others, while all other parts have
    another run's values. Writes faithfulness.parquet: ranking, fraction, kept, f, low, high, random,
    random_low, random_high; circuit.csv; and summary.json: cpr, cmd, and the circuit that is reported.
    """
    from vlmscope.report import claim_report, write_report
    from vlmscope.studies.run_writer import claim

    claim(share.out)
    claim_report(share.out / "report.html")
    if not circuits.scores.exists():  # what is in it is read where the model is known
        raise VlmscopeError(f"{circuits.scores}: no such file or folder; --scores names what ranks the parts")
    common = {"seed": given.seed, "data": given.data, "shard": share.numbers}
    with share.team(given) as team:
        from vlmscope.studies.faithfulness import Asked, faithful_by

        found = faithful_by(team(Asked(given, {**vars(circuits), **common})), share.out)
    columns = ["ranking", "fraction", "kept", "f", "low", "high", "random"]
    print(terminal.table(found.table[columns]))
    print(terminal.table(found.circuit.head(20)))
    print(write_report(share.out, share.out / "report.html"), *found.lines(), sep="\n")
