"""The commands about directions and probes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmscope.cli import terminal
from vlmscope.cli.options import Given


@dataclass(kw_only=True)
class Directed(Given):
    """The options of a command about places that are read as one vector."""

    sites: list[str]


def steer(
    given: Directed,
    out: Path,
    without: str | None = None,
    label: str | None = None,
    corrupt: Literal["image", "text"] | None = None,
    word: str | None = None,
    strength: list[float] | None = None,
    keep_norm: bool = False,
    at: Literal["read", "words"] = "read",
    others: str | None = None,
    random: int = 10,
    said: int = 20,
) -> None:
    """A direction from two sets: where it works, what it harms.

    Built on one half of the examples, measured on the other against random directions of the same length;
    `generate --steer` applies it.
    """
    from vlmscope.report import claim_report, write_report
    from vlmscope.studies import steering

    steering.Steered.claim(out)
    claim_report(out / "report.html")
    having, lacking, aside = given.examples(), given.others(without), given.others(others)
    found = steering.steer(
        given.load(),
        having,
        given.sites,
        without=lacking,
        label=label,
        corrupt=corrupt,
        word=word,
        others=aside,
        strengths=strength or (1.0,),
        keep_norm=keep_norm,
        at=at,
        random=random,
        said=said,
        seed=given.seed,
        data=given.data,
    )
    found.save(out)
    columns = "site strength n effect low high null null_low null_high q_value works chosen".split()
    print(terminal.table(found.layers[columns]))
    print(terminal.table(found.measures))
    print(f"the direction is in {out / steering.DIRECTION}; {write_report([out], out / 'report.html')}")


def probe(
    given: Directed,
    label: str,
    out: Path,
    held_out: str | None = None,
    corrupt: Literal["image", "text", "noise"] | None = None,
    shuffles: int = 20,
    ridge: float = 1.0,
) -> None:
    """What linear probes read off sites, and what patches move.

    Beside shuffled labels, objects that were never seen, and the causal effect of a patch of the same site.
    """
    from vlmscope.report import claim_report, write_report
    from vlmscope.studies import probes

    probes.Probed.claim(out)
    claim_report(out / "report.html")
    examples = given.examples()
    found = probes.probe(
        given.load(),
        examples,
        given.sites,
        label,
        held_out=held_out,
        corrupt=corrupt,
        shuffles=shuffles,
        ridge=ridge,
        seed=given.seed,
        data=given.data,
    )
    found.save(out)
    columns = (
        "site n accuracy low high chance shuffled p_value held_out effect effect_low effect_high".split()
    )
    print(terminal.table(found.table[columns]))
    print(f"table in {out / 'probes.csv'}; {write_report([out], out / 'report.html')}")
