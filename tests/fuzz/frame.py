"""Wrong inputs, given to the command line, and what each has to be answered with.

A `Case` is one wrong input: the words of a command, run in a folder that the case has filled. `judge` runs
it as a process of its own, forked from one in which everything is imported, and says what was wrong with the
answer: nothing, or one of `FAULTS`. What a case may change is named by it; everything else in its folder and
beside it has to stay as it was, byte for byte.

A module of cases lies in `wrong/` and has a function `cases(random, folder) -> Iterator[Case]`, without end.
Each case has a folder `<folder>/<name>/<here>` of its own, which is removed behind it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 10.0
"""By when a case has to be answered."""
LONGEST = 400
"""Characters of the line of an answer."""
MEMORY = 4 * 2**30
"""Bytes beyond those of the parent that a case may use."""
FAULTS = "traceback accepted unclear long control lines hang crash changed".split()
"""In the order in which they are looked for; `accepted` is a wrong input that ended with status 0."""
WAYS_OUT = (
    *(
        "expected",
        "allowed: ",
        "use ",
        "choose",
        "name ",
        "give",
        "write",
        "save",
        "delete",
        "run ",
        "take",
        "check",
    ),
    *("rename", "add", "must", "only", "see", "need", "instead", "make", "put", "fill", "such as", "install"),
    *(
        "--help",
        "did you mean",
        "is it",
        "lower",
        "higher",
        "free",
        "wait",
        "copy",
        "change",
        "leave",
        "one of",
    ),
)
"""One of these stands in every line: what was expected, or what can be done."""


@dataclass(frozen=True)
class Case:
    """A wrong input: `argv` (without `vlmscope`), run with `folder` as its working directory.

    `may_change` are paths (relative to the folder) that may be new or other afterwards. `right` says whether
    an answer with status 0 is right after all: some mutations leave a file as good as it was, and then the
    output has to be that of the good file. It is given standard output.
    """

    what: str
    argv: list[str]
    folder: Path
    may_change: tuple[str, ...] = ()
    right: Callable[[str], bool] = field(default=lambda out: False)
    environment: dict[str, str] = field(default_factory=dict)


class Answer(NamedTuple):
    status: int
    out: str
    err: str
    seconds: float


class Verdict(NamedTuple):
    """What was wrong with an answer: one of `FAULTS`, or none, and what shows it."""

    fault: str | None
    detail: str


def start(
    argv: Sequence[str],
    folder: Path,
    scratch: Path,
    environment: Mapping[str, str] | None = None,
    first: Callable[[], object] = lambda: None,
) -> int:
    """Run a command in a forked process of its own group; `first` is called in it. Gives its number.

    What it prints goes to `stdout` and `stderr` in the folder `scratch`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        with contextlib.suppress(
            OSError
        ):  # who comes first makes the group, so that it is there to be killed
            os.setpgid(child, child)
        return child
    try:
        os.setpgid(0, 0)
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(environment or {})
        with Path("/proc/self/statm").open() as file:
            mine = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mine + MEMORY, mine + MEMORY))
        sys.stdout = open(1, "w", encoding="utf-8", errors="strict", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        sys.argv = ["vlmscope", *argv]
        first()
        from vlmscope.cli.main import main

        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    finally:
        os._exit(99)


def answer(case: Case, scratch: Path) -> Answer:
    """Run the command of a case; one that takes longer than `SECONDS` is killed."""
    begun = time.monotonic()
    return end(start(case.argv, case.folder, scratch, case.environment), scratch, begun, SECONDS)


def end(child: int, scratch: Path, begun: float, limit: float) -> Answer:
    """Wait for a command that `start` has begun; it is killed so many seconds after it was begun."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - begun
        if done:
            return Answer(os.waitstatus_to_exitcode(status), *printed(scratch), seconds)
        if seconds > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Answer(-9, "", "", seconds)
        time.sleep(0.002)


def apart(script: str, parts: Sequence[Sequence[str]], jobs: int) -> list[dict[str, Any] | None]:
    """Run a script with each of these options, so many at once, and give the JSON of each last line.

    What they print before is printed as it comes; None is of one that did not get to its end.
    """

    def one(words: Sequence[str]) -> dict[str, Any] | None:
        last = ""
        with subprocess.Popen([sys.executable, script, *words], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if last:
                    print(last, end="", flush=True)
                last = line
        return json.loads(last) if last.startswith("{") else None

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, parts))


def printed(scratch: Path) -> list[str]:
    """What a command printed: standard output, and standard error."""
    files = scratch / "stdout", scratch / "stderr"
    return [file.read_bytes().decode("utf-8", "surrogateescape") for file in files]


def snapshot(folder: Path) -> dict[str, str]:
    """What is in a folder: a digest of each file, a mark for everything else. Never opens what is no file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        name = str(path.relative_to(folder))
        if stat.S_ISLNK(mode):
            found[name] = f"link {path.readlink()}"
        elif not stat.S_ISREG(mode):
            found[name] = f"mode {stat.S_IFMT(mode)}"
        elif not os.access(path, os.R_OK) or path.lstat().st_size > 2**26:
            found[name] = f"size {path.lstat().st_size}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def judge(case: Case, scratch: Path) -> Verdict:
    """Run a case and say what is wrong with its answer."""
    around = case.folder.parent
    before = snapshot(around)
    given = answer(case, scratch)
    after = snapshot(around)
    free = {str((case.folder / name).relative_to(around)) for name in case.may_change}
    touched = [
        name
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
        and not any(name == path or name.startswith(f"{path}/") for path in free)
    ]
    if given.status == -9 and given.seconds > SECONDS:
        return Verdict("hang", f"{given.seconds:.0f} s")
    said = spoken(given)
    if said.fault in ("traceback", "crash"):
        return said
    if touched:
        return Verdict("changed", ", ".join(touched[:3]))
    if given.status == 0:
        return Verdict(None if case.right(given.out) else "accepted", (given.out or given.err)[-200:])
    return said


def spoken(given: Answer) -> Verdict:
    """What is wrong with how a command that could not be done said so."""
    lines = [line for line in given.err.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if "Traceback" in given.err or "this is a bug" in given.err:
        return Verdict("traceback", last)
    if given.status < 0 or given.status == 99:
        return Verdict("crash", f"status {given.status}: {last}")
    shown = given.err.replace("\n", "") + given.out.replace("\n", "").replace("\t", "")
    if odd := [c for c in shown if not c.isprintable()]:
        return Verdict("control", repr(odd[:3]))
    errors = [line for line in lines if not line.startswith("warning: ")]
    if len(errors) != 1:
        return Verdict("lines", f"{len(errors)} lines: {' / '.join(errors)[:200]}")
    if max(map(len, lines)) > LONGEST:
        return Verdict("long", f"{max(map(len, lines))} characters")
    if not last.startswith("error: ") or not any(way in last.lower() for way in WAYS_OUT):
        return Verdict("unclear", last)
    return Verdict(None, last)
