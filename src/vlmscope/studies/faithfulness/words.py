"""What was found, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from vlmscope.stats import LEVEL


def lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """What was found, in words; the last line is of the circuit."""
    own, cpr, cmd = (summary[name] for name in ("circuit", "cpr", "cmd"))
    yield f"CPR {_with(cpr, '{:.2f}')}, CMD {_with(cmd, '{:.2f}')}"
    gap, runs = summary["gap"]["value"], summary["gap_of_runs"]
    if summary["outside"] == "corrupt" and runs and abs(gap - runs) > 0.05 * abs(runs):
        yield (
            f"the {summary['parts']:,} parts that have scores carry {_percent(gap / runs)} of the gap "
            "between the two runs: what else carries it has no score, and computes freely"
        )
    if not summary["signed"]:
        yield "these scores have no sign, so both rankings are by their size"
    if not summary["held_out"]:
        yield "nothing says on which examples the scores were made: these may be among them"
    if summary["gap"]["low"] is not None and summary["gap"]["low"] <= 0:
        yield "the gap that is to be carried is not surely above zero, so shares of it have no interval"
    if own["needed"] is not None and own["low"] is not None and own["low"] > 0 and own["kept"] > 1:
        why, kept = "(an interval each, not corrected for their number)", own["kept"]
        some = (
            f"the circuit needs {own['needed']} of its {kept} parts: without each of these alone it carries"
        )
        none = f"without any one of its {kept} parts the circuit does not surely carry less"
        yield f"{f'{some} less' if own['needed'] else none} {why}"
    if own["without"] is not None and summary["parts"] > own["kept"]:
        ends = {"value": own["without"], "low": own["without_low"], "high": own["without_high"]}
        yield f"without the circuit, the other {summary['parts'] - own['kept']:,} parts carry {_with(ends)}"
    many = sum(summary["kinds"].values())
    words = _counted(summary["kinds"])
    on = "pictures" if summary["corrupt"] == "image" else "examples"
    held = f"held-out {on}" if summary["held_out"] else on
    f = {"value": own["f"], "low": own["low"], "high": own["high"]}
    text = f"these {words} carry" if many != 1 else f"this {words.removeprefix('1 ')} carries"
    text += f" {_with(f)} of the behaviour on {summary['measured']} {held}"
    if own["random"] is not None:
        text += f", random circuits of that size {_percent(own['random'])}"
    if summary["known"]["severity"] == "unknown":
        yield text + "; but the model does not seem to know this task, so this says little"
        return
    if not own["passes"]:
        can_pass = own["low"] is not None and 1 / (1 + own["draws"]) <= LEVEL
        none = "no evidence that it is more than a random circuit"
        text += f" ({none if can_pass else 'too few examples or random circuits to test it'})"
    yield text + _lacking(own, summary["groups"])


def _lacking(own: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> str:
    """Why a circuit carries less than half: which group of parts has what it needs beside its own."""
    if own["f"] is None or own["f"] >= 0.5:
        return ""
    # Below 10 examples nothing has an interval, and the difference itself has to do.
    better = [one for one in groups if (one["more_low"] if own["low"] is not None else one["more"]) > 0]
    if better:
        best = max(better, key=itemgetter("f"))
        where = best["group"] if "." in best["group"] else f"the {best['group']}"
        text = f"; what the circuit lacks is in {where}: with the {_counted(best['kinds'])} there it carries "
        text += _with({**best, "value": best["f"]})
        return text + (f", these alone {_percent(best['alone'])}" if best["alone"] != best["f"] else "")
    if own["low"] is None or own["low"] <= 0:
        return "; a circuit carries nothing unless every link from the input to the answer is in it"
    return ""


def _counted(kinds: Mapping[str, int]) -> str:
    return " and ".join(f"{n:,} {noun}{'s' * (n != 1)}" for noun, n in kinds.items())


def _percent(share: float) -> str:
    return f"{round(100 * share)} %"


def _with(one: Mapping[str, float | None], form: str = "") -> str:
    """A share, or a number in a form, with its interval."""
    value, low, high = one["value"], one["low"], one["high"]
    if value is None:
        return "nothing that can be measured"
    text = form.format(value) if form else _percent(value)
    if low is None or high is None:
        return text
    ends = [form.format(end) if form else _percent(end).removesuffix(" %") for end in (low, high)]
    return f"{text} [{ends[0]}, {ends[1]}]"
