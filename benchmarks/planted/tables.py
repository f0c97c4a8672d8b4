"""The tables of docs/benchmark.md, from the JSON that a run leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from measures import RULES

Result = Mapping[str, Any]
NOT_CELLS = ("not_planted", "models", "edges")
"""What a part holds beside its cells of heads and neurons."""
FIGURES = (
    ("heads", "auroc"),
    ("heads", "ap"),
    ("attention", "auroc"),
    ("neurons", "auroc"),
    ("neurons", "ap"),
)


def tables(result: Result) -> Iterator[str]:
    """Line by line: the bars, rankings, rules, edges and circuits; of the parts that were run."""
    if reached := [*bars(result), *mechanism_bars(result)]:
        yield from ("| bar | to reach | reached | of |", "|---|---|---|---|")
        yield from (f"| {' | '.join(row)} |" for row in reached)
    if any(True for _ in cells(result)):
        yield from _head_tables(result)
    if edges := result.get("edges", {}) | result.get("trained", {}).get("edges", {}):
        yield from _edge_table(edges)
    if "circuits" in result:
        yield from _circuit_table(result["circuits"])
    for kind in ("nodes", "edges") if "peers" in result else ():
        yield from _peer_table(result["peers"], kind)


def _head_tables(result: Result) -> Iterator[str]:
    yield from ("", "| models | heads AUROC | AP | largest attention | neurons AUROC | AP | of |")
    yield "|---|---|---|---|---|---|---|"
    for name, cell in cells(result):
        found = [_mean(cell.get(kind, {}).get(figure)) for kind, figure in FIGURES]
        yield f"| {' | '.join([name, *found, str(cell['heads']['auroc']['models'])])} |"
    yield from ("", "| false share / recall | `important` | `confirmed` | mean + 2·SD |", "|---|---|---|---|")
    for name, cell in cells(result):
        rules = [f"{_short(cell[r]['false_share'])} / {_short(cell[r]['recall']['mean'])}" for r in RULES]
        yield f"| {' | '.join([name, *rules])} |"


def _edge_table(given: Result) -> Iterator[str]:
    methods = list(next(iter(given.values())))
    names = [f"{method} {figure}" for method in methods for figure in ("AUROC", "AP")]
    yield from ("", f"| models | {' | '.join(names)} | decoys first | of |", "|---" * (len(names) + 3) + "|")
    for name, cell in given.items():
        pairs = [(_mean(cell[method]["auroc"]), _three(cell[method]["ap"]["mean"])) for method in methods]
        found = [figure for pair in pairs for figure in pair]
        decoys = _short(max(own["decoys_first"]["mean"] for own in cell.values()))
        many = str(cell[methods[0]]["auroc"]["models"])
        yield f"| {' | '.join([name.replace('effect ', ''), *found, decoys, many])} |"


def _circuit_table(given: Result) -> Iterator[str]:
    yield ""
    yield "| models | ranked by | CPR | over the oracle's | CMD | below the oracle's | decoys first | of |"
    yield "|---" * 8 + "|"
    for name, cell in given.items():
        for method, own in cell.items() if name != "random" else ():
            figures = ("cpr", "cpr_of_oracle", "cmd", "cmd_below_oracle", "decoys_first")
            found = [_mean(own[figure]) for figure in figures]
            yield f"| {' | '.join([name, method, *found, str(own['cpr']['models'])])} |"


def _peer_table(given: Result, kind: str) -> Iterator[str]:
    """A row a method: means over cells of the same effect, circuits and seconds at the largest."""
    cells: dict[str, list[Any]] = {}
    for name, cell in given.items():
        if f" {kind} " in name:
            cells.setdefault(name.rsplit(" ", 1)[1], []).append(cell)
    last = list(cells)[-1]
    names = [f"{figure} {effect}" for effect in cells for figure in ("AUROC", "AP")]
    yield from ("", f"| {kind} | {' | '.join(names)} | CPR | CMD | decoys first | seconds |")
    yield "|---" * (len(names) + 5) + "|"
    for method in cells[last][0]:
        found = [_over(some, method, figure) for some in cells.values() for figure in ("auroc", "ap")]
        found += [_over(cells[last], method, name) for name in ("cpr", "cmd", "decoys_first", "seconds")]
        yield f"| {' | '.join([method, *found])} |"


def _over(cells: list[Any], method: str, figure: str) -> str:
    """The mean over cells of a method's figure, where it has one."""
    found = [cell[method][figure]["mean"] for cell in cells if figure in cell.get(method, {})]
    return _three(sum(found) / len(found)) if found else ""


def mechanism_bars(result: Result) -> Iterator[tuple[str, str, str, str]]:
    """The same of edges and of circuits."""
    given, trained = result.get("edges", {}), result.get("trained", {}).get("edges", {})
    high = [cell for name, cell in given.items() if float(name.rsplit(" ", 1)[1]) >= 0.1]
    for method in high[0] if high else ():
        yield _limit(
            f"edges, AUROC, effects ≥ 10 %, {method}", 0.95, [cell[method]["auroc"] for cell in high]
        )
    for method in next(iter(trained.values()), {}):
        found = [cell[method]["auroc"] for cell in trained.values()]
        yield _limit(f"edges, AUROC, trained circuits, {method}", 0.9, found)
    circuits = {name: cell for name, cell in result.get("circuits", {}).items() if name != "random"}
    for kind in ("nodes", "edges"):
        some = [
            own
            for name, cell in circuits.items()
            if name.endswith(kind)
            for method, own in cell.items()
            if method != "oracle"
        ]
        if some:
            yield _limit(f"CPR over the oracle's, {kind}", 0.9, [own["cpr_of_oracle"] for own in some])
            below = [own["cmd_below_oracle"] for own in some]
            yield _limit(f"CMD below the oracle's, {kind}", -0.05, below)
    every = [
        own["decoys_first"]["mean"] for cell in [*given.values(), *circuits.values()] for own in cell.values()
    ]
    if every:
        yield "decoys among the first", "0", _short(max(every)), f"{len(every)} rankings"
    nulls = result.get("circuits", {}).get("random", {}) | result.get("nulls", {})
    for kind, own in nulls.items():
        yield f"circuits that pass in random models, {kind}", "0", *_share(own["passes"], "models")


def cells(result: Result) -> Iterator[tuple[str, Any]]:
    for part in ("effects", "trained", "knobs"):
        for name, cell in result.get(part, {}).items():
            if name not in NOT_CELLS:
                yield name.replace("effect ", ""), cell


def bars(result: Result) -> Iterator[tuple[str, str, str, str]]:
    """What is to be reached, and the worst cell of what was: lower 95 % limits of means over models."""
    effects = {name: cell for name, cell in result.get("effects", {}).items() if name != "not_planted"}
    for toy, build in ((False, "random models"), (True, "toys")) if effects else ():
        own = {name: cell for name, cell in effects.items() if ("-toy" in name) == toy}
        high = [cell for name, cell in own.items() if float(name.rsplit(" ", 1)[1]) >= 0.1]
        low = [cell for name, cell in own.items() if name.endswith(" 0.01")]
        yield _limit(
            f"heads, AUROC, effects ≥ 10 %, {build}", 0.99, [cell["heads"]["auroc"] for cell in high]
        )
        if not toy:
            neurons = [cell["neurons"]["auroc"] for cell in high if "neurons" in cell]
            yield _limit(f"neurons, AUROC, effects ≥ 10 %, {build}", 0.95, neurons)
        yield _limit(f"heads, AUROC, effect 1 %, {build}", 0.85, [cell["heads"]["auroc"] for cell in low])
        for rule in RULES[:2]:
            picked = [cell[rule]["picked"] * cell["heads"]["auroc"]["models"] for cell in own.values()]
            for words, key, most in (
                ("false share", "small_share", "≤ .05"),
                ("not planted", "false_share", ""),
            ):
                false = sum(n * cell[rule][key] for n, cell in zip(picked, own.values(), strict=True))
                share = _short(false / max(1, sum(picked)))
                yield f"{words} of `{rule}`, {build}", most, share, f"{sum(picked):.0f} picked heads"
    if trained := [cell["heads"]["auroc"] for name, cell in cells({"trained": result.get("trained", {})})]:
        yield _limit("heads, AUROC, trained circuits", 0.95, trained)
    if "tool" in result:
        own = result["tool"]
        *named, _ = _limit("labels, macro-F1, mean over models", 0.8, [own["labels"]["each_model"]])
        yield named[0], named[1], named[2], f"{own['labels']['each_model']['models']} models in all"
        pooled = _short(own["labels"]["macro_f1"])
        yield "labels, macro-F1, all heads together", "≥ .80", pooled, f"{own['labels']['heads']} heads"
        for name, words in (("decoys_named", "decoys"), ("named_on_random", "heads of random networks")):
            yield f"named: {words}", "≤ .05", *_share(own[name])
        if own["important_on_random"] is not None:
            yield (
                "heads of a random network that are `important`",
                "",
                _short(own["important_on_random"]),
                "the mean share",
            )
        yield "labels that sharpness changes", "0", *_share(own["changed_by_sharpness"])
    for one in result.get("coverage", []):
        words = f"coverage of the 95 % interval, {one['recipe']['form']}"
        yield words, "≥ .93", _short(one["covered"]), f"{one['heads']} heads, {one['examples']:,} examples"


def _limit(words: str, least: float, found: list[Any]) -> tuple[str, str, str, str]:
    worst = min(found, key=lambda one: one["mean"] if one["lower95"] is None else one["lower95"])
    many = sorted({one["models"] for one in found})
    each = str(many[0]) if len(many) == 1 else f"{many[0]} to {many[-1]}"
    return words, f"≥ {_short(least)}", _mean(worst), f"{each} models a cell"


def _mean(one: Any) -> str:
    """The mean, with its lower limit in brackets."""
    if one is None:
        return ""
    low = "" if one["lower95"] is None else f" ({_three(one['lower95'])})"
    return f"{_three(one['mean'])}{low}"


def _share(one: Any, noun: str = "heads") -> tuple[str, str]:
    """The share with the upper end of its interval in brackets, and of how many."""
    if not one["of"]:
        return "not measured", f"0 {noun}"
    return f"{_short(one['share'])} (≤ {_short(one['most'])})", f"{one['of']} {noun}"


def _three(number: float) -> str:
    return f"{number:.3f}"


def _short(number: float) -> str:
    """Two digits, without the zero before the point."""
    return f"{'−' if number < 0 else ''}{f'{abs(number):.2f}'.removeprefix('0')}" if number else "0"
