"""Kills, full disks and other accidents while vlmscope writes, and what has to be there afterwards.

    python tests/fuzz/kills.py [--kills N] [--others N] [--seed N] [--only COMMAND ...] [--jobs N]

Every command that writes runs as a forked process on tiny inputs, and an accident befalls it: it is killed at
a random moment, or right before its k-th operation on a file (where that is a sync, with half of the file
written); or the disk is full from the k-th operation on; nothing can be written; its folder vanishes; it is
interrupted; a second process does the same. Then:

- who reads between finds whole files only, or is refused in one line;
- a command that ends by itself says so in one line, and what was there before is as it was;
- the same command, run again, ends with what an undisturbed run writes, and leaves nothing else.

The last lines count, by command, how many accidents there were and how many were not survived: in words, and
as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import importlib
import io
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parent)]

from frame import SECONDS, Answer, apart, end, spoken, start  # noqa: E402

BLIP = "--model toy-blip --data states --corrupt image"
TRACED = "--model toy-blip --data states"
LLAVA = "--model toy-llava --data states --prompt PROMPT"
EDGE = "--model toy-llava --data states --sites decoder.1/3.attn@last<image --check 2"
EDIT = f"neurons edit {LLAVA} --limit 10 --from red --to blue --solver closed"
COMMANDS = {
    "sweep": f"sweep {BLIP} --limit 3 --sites encoder.*.cross.h*@answer --check 2 --out out",
    "merge": "merge ../../inputs/s1 ../../inputs/s2 --out out",
    "circuits": "circuits ../../inputs/a ../../inputs/b --out out",
    "report": "report ../../inputs/a --out out.html",
    "data": "data folder --root ../../inputs/pictures --out new/out.csv",
    "inpaint": f"data inpaint {TRACED} --limit 2 --fill mean --out new/out.csv",
    "heads": f"heads {BLIP} --limit 2 --sites encoder.1.cross.h2@answer --out out",
    "tracing": f"tracing {TRACED} --limit 2 --repeats 2 --windows 1 --kinds cross --out out",
    "lens": "lens --model toy-llava --data states --limit 2 --sites decoder.*.resid@readout --out out",
    "attribute": "attribute --model toy-llava --data states --limit 3 --sites decoder.*.mlp@last --out out",
    "edges": "edges --model toy-llava --data states --limit 3 --corrupt image --verify 2 --out out",
    "gradients": f"attribute {BLIP} --limit 3 --sites encoder.*.cross.h*@answer --method atp --verify 2 "
    "--out out",
    "screen": f"sweep {BLIP} --limit 3 --sites encoder.*.cross.h*@answer --screen atp --top 4 --out out",
    "faithfulness": f"faithfulness {BLIP} --limit 6 --scores ../../inputs/a --draws 1 --out out",
    "knockout": f"knockout {EDGE} --limit 3 --out out",
    "steer": f"steer {BLIP} --limit 4 --sites encoder.0.resid@last --random 2 --said 1 --out out",
    "probe": f"probe {TRACED} --limit 24 --sites encoder.0.resid@last --label kind --shuffles 2 --out out",
    "explain": "explain --model toy-llava --image ../../inputs/pictures/sad/3.png --prompt PROMPT "
    "--out out.html",
    "notice": f"notice {BLIP} --limit 3 --out out",
    "find": f"neurons find {LLAVA} --limit 2 --out out",
    "describe": f"neurons describe {LLAVA} --limit 2 --neuron 3.250 --no-measures --out out",
    "perturb": f"neurons perturb {LLAVA} --limit 50 --word red --top 1 --out out",
    "edit": f"{EDIT} --neurons 5 --out new/out.safetensors --export model",
}
"""Tiny commands, by a name for each; a word PROMPT is the toy's question."""
BEFORE = {
    "sweep": f"sweep {BLIP} --limit 2 --sites encoder.*.cross.h*@answer --check 2 --out out",
    "circuits": "circuits ../../inputs/a ../../inputs/b --seed 1 --out out",
    "report": "report ../../inputs/b --out out.html",
    "knockout": f"knockout {EDGE} --limit 2 --out out",
    "find": f"neurons find {LLAVA} --limit 1 --out out",
    "describe": f"neurons describe {LLAVA} --limit 3 --neuron 2.25 --no-measures --out out",
    "edit": f"{EDIT} --neurons 4 --out new/out.safetensors --export model",
}
"""What may have been there before: the same with other options; elsewhere the same command, done."""
OFTEN = {
    "notice": 1,
    "faithfulness": 2,
    "edit": 1,
    "perturb": 1,
    "heads": 2,
    "tracing": 2,
    "probe": 2,
    "steer": 2,
}
"""How often a command is drawn, where that is not 5: some take long."""
OTHERS = "full readonly vanish interrupt twice".split()
IMPORTED = "cli.main checkpoint studies.sweep studies.heads studies.circuits".split()
IMPORTED += "studies.lens studies.attribution studies.edges studies.faithfulness studies.knockout".split()
IMPORTED += "studies.merge studies.probes studies.steering explanation notice neurons report".split()
LIMIT = 12 * SECONDS
"""By when a command has ended that nothing befalls."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Wrong(NamedTuple):
    """What was wrong after an accident."""

    command: str
    accident: str
    detail: str


class LostError(Exception):
    """Something that has to hold does not."""


class Operations:
    """Counts the operations on files below a folder in this process, and calls `happens` before each."""

    def __init__(self, top: Path, happens: Callable[[int, str, int | None], None]) -> None:
        self.top, self.count, self.busy = str(top), 0, False
        self.happens, sync = happens, os.fsync

        def fsync(descriptor: int) -> None:
            self.one("fsync", descriptor)
            sync(descriptor)

        os.fsync = fsync
        sys.addaudithook(self.hook)

    def hook(self, event: str, given: tuple[Any, ...]) -> None:
        is_written = event == "open" and isinstance(given[2], int) and given[2] & WRITING
        if not is_written and event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if isinstance(given[0], str | bytes | os.PathLike):
            path = os.path.join(os.getcwd(), os.fsdecode(given[0]))  # noqa: PTH109, PTH118
            if path.startswith(self.top):
                self.one(event)

    def one(self, event: str, descriptor: int | None = None) -> None:
        if not self.busy:
            self.busy = True
            try:
                self.happens(self.count, event, descriptor)
            finally:
                self.busy = False
                self.count += 1


def kill_at(number: int, count: int, event: str, descriptor: int | None) -> None:
    if count == number:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def full_from(number: int, count: int, event: str, descriptor: int | None) -> None:
    if count >= number and event in ("open", "fsync", "os.mkdir"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def readonly(number: int, count: int, event: str, descriptor: int | None) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def vanish_at(number: int, count: int, event: str, descriptor: int | None) -> None:
    if count == number:
        for path in list(Path().iterdir()):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def interrupt_at(number: int, count: int, event: str, descriptor: int | None) -> None:
    if count == number:
        os.kill(os.getpid(), signal.SIGINT)


HAPPENS = {
    "kill": kill_at,
    "full": full_from,
    "readonly": readonly,
    "vanish": vanish_at,
    "interrupt": interrupt_at,
}


class Bench:
    """Inputs, models and what undisturbed commands write; runs commands in forks of this process."""

    def __init__(self, top: Path, only: list[str]) -> None:
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            importlib.import_module(f"vlmscope.{name}")
        import torch

        from vlmscope import checkpoint, notice

        torch.set_num_threads(1)
        # A model is loaded before the forks, so that a run costs its command alone.
        load = functools.cache(checkpoint.load)
        checkpoint.load = notice.load = lambda name, dtype="float32", device=None: load(name)
        for name in ("toy-blip", "toy-llava"):
            load(name)
        self.top, self.scratch = top, top / "scratch"
        self.scratch.mkdir()
        self._make_inputs()
        self.wanted: dict[str, dict[str, str]] = {}
        self.files: dict[str, dict[str, str]] = {}
        self.states: dict[str, Path] = {}
        self.counts: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        for name in only:
            self._warm_up(name)
            self._undisturbed(name)

    def _make_inputs(self) -> None:
        from PIL import Image

        inputs = self.top / "inputs"
        for label in ("happy", "sad"):
            (inputs / "pictures" / label).mkdir(parents=True)
            for n in range(4):
                Image.new("RGB", (8, 8), (60 * n, 9, 9)).save(inputs / "pictures" / label / f"{n}.png")
        for name, seed in (("a", 0), ("b", 1)):
            words = f"sweep {BLIP} --limit 6 --seed {seed} --sites encoder.*.cross.h*@answer --out {name}"
            self.done(words, inputs)
        for number in (1, 2):
            words = f"sweep {BLIP} --limit 3 --sites encoder.*.cross.h*@answer --shard {number}/2 --check 2"
            self.done(f"{words} --out s{number}", inputs)

    def _warm_up(self, name: str) -> None:
        """Run a command in this process, so that no fork has to import what it needs."""
        from vlmscope.cli.main import app

        with contextlib.chdir(self.folder()), contextlib.redirect_stdout(io.StringIO()):
            app(words_of(COMMANDS[name]), standalone_mode=False)

    def _undisturbed(self, name: str) -> None:
        """What a command writes, where it ran before, how many operations and how long it takes."""
        begun = time.monotonic()
        folder = self.folder()
        self.done(COMMANDS[name], folder)
        self.seconds[name] = time.monotonic() - begun
        self.wanted[name], self.files[name] = contents(folder), digests(folder)
        folder = self.folder()
        count = self.top / "count"

        def counting() -> None:
            operations = Operations(self.top, lambda *_: None)
            leave = os._exit

            def left(status: int) -> None:
                operations.busy = True
                count.write_text(str(operations.count))
                leave(status)

            os._exit = left

        self.done(COMMANDS[name], folder, counting)
        self.counts[name] = int(count.read_text())
        odd = differing(contents(folder), self.wanted[name])
        if odd:
            raise LostError(f"two undisturbed runs differ: {odd}")
        state = self.folder()
        self.done(BEFORE.get(name, COMMANDS[name]), state)
        self.states[name] = Path(shutil.copytree(state, self.top / "states" / name))

    def folder(self, like: Path | None = None) -> Path:
        """The folder for a command, always of the same name; empty, or like another one."""
        folder = self.top / "case" / "here"
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        if like is not None:
            shutil.copytree(like, folder, dirs_exist_ok=True)
        return folder

    def run(
        self, words: str, folder: Path, first: Callable[[], object] = lambda: None, after: float | None = None
    ) -> Answer:
        """Run a command to its end, or kill it after so many seconds."""
        begun = time.monotonic()
        child = start(words_of(words), folder, self.scratch, first=first)
        if after is not None:
            return end(child, self.scratch, begun, after)
        return self.ended(child, self.scratch, begun)

    def ended(self, child: int, scratch: Path, begun: float) -> Answer:
        given = end(child, scratch, begun, LIMIT)
        if given.status == -9 and given.seconds > LIMIT:
            raise LostError(f"hangs: no end after {LIMIT:.0f} s")
        return given

    def done(self, words: str, folder: Path, first: Callable[[], object] = lambda: None) -> None:
        """Run a command to its good end."""
        given = self.run(words, folder, first)
        if given.status:
            raise LostError(f"ends with {given.status}: {given.err[-300:]}")

    # --- accidents -----------------------------------------------------------------------------

    def kill(self, name: str, random: Random) -> str:
        """Kill a command once, or again and again, look at what it left, and run it to its end."""
        folder, what = self.folder(), ""
        for _ in range(1 + (random.random() < 0.25)):
            if random.random() < 0.5:
                after = random.random() * self.seconds[name]
                what += f"killed after {after:.2f} s; "
                self.run(COMMANDS[name], folder, after=after)
            else:
                number = random.randrange(self.counts[name])
                what += f"killed at operation {number}; "
                self.run(COMMANDS[name], folder, self.first("kill", number))
            with told(what):
                self.look(name, folder)
        with told(what):
            self.again(name, folder)
        return what

    def other(self, name: str, accident: str, random: Random) -> str:
        """Let an accident happen that the command can answer, and run it again to its end."""
        state = self.states[name] if random.random() < 0.5 else None
        folder, number = self.folder(state), random.randrange(self.counts[name])
        what = f"{accident} at operation {number}{', with earlier results' if state else ''}; "
        with told(what):
            before = digests(folder)
            if accident == "twice":
                self.twice(name, folder)
            else:
                given = self.run(COMMANDS[name], folder, self.first(accident, number))
                self.answered(accident, given)
                if accident != "vanish" and given.status:
                    self.unchanged(name, before, folder, whole=accident == "readonly")
            self.look(name, folder, fresh=state is None)
            self.again(name, folder)
        return what

    def first(self, accident: str, number: int) -> Callable[[], object]:
        return lambda: Operations(self.top, functools.partial(HAPPENS[accident], number))

    def twice(self, name: str, folder: Path) -> None:
        """Two processes at once: each ends well or says in one line why not; one ends well."""
        begun, scratches = time.monotonic(), [self.scratch / "one", self.scratch / "two"]
        for scratch in scratches:
            scratch.mkdir(exist_ok=True)
        children = [start(words_of(COMMANDS[name]), folder, scratch) for scratch in scratches]
        answers = [self.ended(*each, begun) for each in zip(children, scratches, strict=True)]
        for given in answers:
            self.answered("twice", given)
        if all(given.status for given in answers):
            raise LostError(f"neither of two ends well: {answers[0].err[-200:]}")

    def answered(self, accident: str, given: Answer) -> None:
        if given.status == 130 and accident == "interrupt":
            said = [line for line in given.err.splitlines() if not line.startswith("warning: ")]
            if said != ["interrupted; run the same command again to go on"]:
                raise LostError(f"interrupted: {given.err[-300:]}")
        elif given.status:
            given = given._replace(err="\n".join(x for x in given.err.splitlines() if " of " not in x[:12]))
            verdict = spoken(given)
            if verdict.fault:
                raise LostError(f"{verdict.fault}: {verdict.detail}")

    def unchanged(self, name: str, before: dict[str, str], folder: Path, whole: bool) -> None:
        """What was there before is as it was; of a run that grows, its parts and pictures.

        A file may also be that of an undisturbed run: of two sets the first may be done, and Ctrl-C waits for
        renames. A manifest names its own place, so of it only that it is not one of a half.
        """
        after, done = digests(folder), {} if whole else self.files[name]
        grows = ("run.json", "done.json", ".lock")
        for file, digest in before.items():
            may_be = (digest, done.get(file, None if done else digest))
            if (
                not whole
                and file in after
                and is_manifest(file)
                and b'"unfinished": true' not in (folder / file).read_bytes()
            ):
                continue
            if after.get(file) not in may_be and (whole or Path(file).name not in grows):
                raise LostError(f"changed: {file}")
        if whole and (new := after.keys() - before.keys()):
            raise LostError(f"new: {min(new)}")
        if left := [file for file in after if is_temporary(file) and file not in before]:
            raise LostError(f"left: {left[0]}")

    def look(self, name: str, folder: Path, fresh: bool = True) -> None:
        """Who reads now finds whole files, or is refused in one line."""
        from vlmscope import results
        from vlmscope.errors import VlmscopeError
        from vlmscope.studies.run_folder import Run, table_in

        for path in [folder, *folder.rglob("*")]:
            if not path.is_dir() or not any((path / manifest).is_file() for manifest in results.READERS):
                continue
            try:
                found = results.open(path)
                if isinstance(found, Run):
                    getattr(found, table_in(found.spec))(), found.baselines(), found.pictures()
            except VlmscopeError as error:
                if "damaged" in str(error):
                    raise LostError(f"damaged: {error}") from error
        for file, digest in digests(folder).items() if fresh else ():
            if file in self.files[name] and not is_manifest(file) and digest != self.files[name][file]:
                raise LostError(f"not whole, or not that of an undisturbed run: {file}")

    def again(self, name: str, folder: Path) -> None:
        """The same command ends with what an undisturbed run writes."""
        self.done(COMMANDS[name], folder)
        if odd := differing(contents(folder), self.wanted[name]):
            raise LostError(f"after it has run again: {odd}")


def words_of(command: str) -> list[str]:
    return ["describe this picture." if word == "PROMPT" else word for word in command.split()]


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Say what was done before a loss."""
    try:
        yield
    except LostError as error:
        raise LostError(f"{what}{error}") from error


def digests(folder: Path) -> dict[str, str]:
    """A digest of each file; of an exported model without its header, whose order is the library's."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "model.safetensors":
                content = content[8 + int.from_bytes(content[:8], "little") :]
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def contents(folder: Path) -> dict[str, str]:
    """What is in a folder: files by their bytes, runs by their tables, whatever the parts."""
    from vlmscope.studies.run_folder import read_run, table_in

    runs = [file.parent for file in folder.rglob("run.json")]
    found = {}
    for file, digest in digests(folder).items():
        path = folder / file
        inside = any(run in path.parents and "examples" not in path.parts for run in runs)
        if not (inside or path.name == ".lock"):
            found[file] = digest
        elif is_temporary(file):
            found[file] = "left"
    for run in runs:
        read = read_run(run)
        rows = getattr(read, table_in(read.spec))()
        tables = [table.to_csv(index=False) for table in (rows, read.baselines())]
        text = json.dumps(
            [read.spec, read.check and read.check["rows"], read.finished, *tables], sort_keys=True
        )
        found[str(run.relative_to(folder))] = hashlib.sha256(text.encode()).hexdigest()
    return found


def differing(one: dict[str, str], other: dict[str, str]) -> str:
    """The names under which two folders differ."""
    return ", ".join(
        sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))[:4]
    )


def is_temporary(file: str) -> bool:
    return Path(file).suffix in (".tmp", ".part") or ("/." in f"/{file}" and not file.endswith(".lock"))


def is_manifest(file: str) -> bool:
    """Whether a file changes while a command goes on: a mark, or a part of a run."""
    return file.endswith((".json", "notice.toml", ".lock")) or "part-" in file


def names(random: Random, only: list[str]) -> Iterator[str]:
    while True:
        yield random.choices(only, [OFTEN.get(name, 5) for name in only])[0]


def accidents(
    seed: int, kills: int, others: int, only: list[str]
) -> tuple[dict[str, Counter[str]], list[Wrong]]:
    """So many kills and other accidents; how many there were of each command, and what was wrong."""
    random, wrong = Random(seed), []
    counts: dict[str, Counter[str]] = {name: Counter() for name in only}
    with tempfile.TemporaryDirectory() as top:
        begun = time.monotonic()
        bench = Bench(Path(top).resolve(), only)
        print(f"undisturbed commands took {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        begun = time.monotonic()
        drawn = names(random, only)
        plan = ["kill"] * kills + [OTHERS[n % len(OTHERS)] for n in range(others)]
        for number, accident in enumerate(plan):
            if number and number % 25 == 0:
                each = (time.monotonic() - begun) / number
                done = f"{number} of {len(plan)} accidents, {len(wrong)} wrong, {each:.2f} s each"
                print(done, file=sys.stderr, flush=True)
            name = next(drawn)
            counts[name][accident] += 1
            try:
                bench.kill(name, random) if accident == "kill" else bench.other(name, accident, random)
            except LostError as fault:
                counts[name]["wrong"] += 1
                wrong.append(Wrong(name, accident, str(fault)))
                print(f"{name}: {accident}: {fault}", flush=True)
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--others", type=int, default=50, help=f"of {', '.join(OTHERS)}")
    parser.add_argument("--only", nargs="*", default=[*COMMANDS], choices=COMMANDS)
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with a share of the accidents")
    given = parser.parse_args()
    if given.jobs > 1:
        counts, wrong = together(given)
    else:
        counts, faults = accidents(given.seed, given.kills, given.others, given.only)
        wrong = len(faults)
    by_command = {name: dict(sorted(some.items())) for name, some in counts.items()}
    words = [f"{name} {some['wrong']} of {some.total() - some['wrong']}" for name, some in counts.items()]
    print(f"not survived, of accidents: {', '.join(words)}")
    print(
        json.dumps(
            {"seed": given.seed, "kills": given.kills, "others": given.others, "wrong": wrong} | by_command
        )
    )
    sys.exit(bool(wrong))


def together(given: argparse.Namespace) -> tuple[dict[str, Counter[str]], int]:
    """The accidents in several processes, from seeds of their own; one that does not end is wrong."""
    parts = []
    for n in range(given.jobs):
        shares = [(many + n) // given.jobs for many in (given.kills, given.others)]
        numbers = zip(("--seed", "--kills", "--others"), (given.seed + n, *shares), strict=True)
        parts.append([*itertools.chain(*((flag, str(one)) for flag, one in numbers)), "--only", *given.only])
    counts: dict[str, Counter[str]] = {name: Counter() for name in given.only}
    done = apart(__file__, parts, given.jobs)
    for name, part in itertools.product(given.only, filter(None, done)):
        counts[name] += Counter(part[name])
    return counts, sum(1 if part is None else part["wrong"] for part in done)


if __name__ == "__main__":
    main()
