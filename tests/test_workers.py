"""Several processes fill one folder: what they write, what their deaths cost, and what is wrong with Ray."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import connection
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretend_workers import KilledError, Pretended
from test_shards import equal

import vlmscope
from vlmscope import files
from vlmscope.cli.options import Given
from vlmscope.errors import SiteError, StoreError, VlmscopeError
from vlmscope.studies import run_writer, workers
from vlmscope.studies.run_folder import Run
from vlmscope.studies.run_writer import Todo, open_run
from vlmscope.studies.sweep import Study, swept
from vlmscope.studies.workers import cluster, local, team
from vlmscope.studies.workers.orders import DiedError, Done, Named, Order
from vlmscope.studies.workers.team import DEATHS, REASON
from vlmscope.studies.workers.worker import Worker

SITES = ["encoder.*.cross.h*@answer", "encoder.0.resid@*"]
COUNT = 6


class Kept(Given):
    """Loads its model once in a process."""

    def load(self) -> vlmscope.Model:
        return loaded(self.model)


loaded = cache(vlmscope.load)
GIVEN = Kept(model="toy-blip", data="states", limit=COUNT)
OPTIONS = {"sites": SITES, "corrupt": "image", "data": "states"}
COMMAND = (
    "sweep --model toy-blip --data states --corrupt image --sites encoder.*.cross.h*@* encoder.*.resid@*"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("made")
    vlmscope.sweep(GIVEN.load(), GIVEN.examples(), SITES, out=folder / "whole", data="states")
    return vlmscope.read_run(folder / "whole")


def left_behind(folder: Path) -> list[Path]:
    return [file for file in folder.rglob(".*") if file.name != ".lock"]


def spread(out: Path, given: Any, study: Any, options: dict[str, Any], **how: Any) -> tuple[Run, int]:
    with workers.started(**how) as team_of:
        found: tuple[Run, int] = team_of(given).fill(out, study, options)
        return found


def begun() -> Worker:
    worker = Worker()
    worker.begin(GIVEN)
    return worker


# --- a worker, in this process ---------------------------------------------------------------------------


def test_workers_write_parts_and_the_driver_commits_them(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two take turns; what the second does not hand over is computed by another one."""
    clock = itertools.count()
    monkeypatch.setattr(run_writer.time, "monotonic", lambda: next(clock) / 1000)
    order = Order(swept, OPTIONS, tmp_path / "run")
    crew = [begun() for _ in range(3)]
    about = [worker.make(order) for worker in crew]
    assert about[0] == about[1] and about[0].numbers == range(COUNT)
    with open_run(order.out, about[0].spec, about[0].description) as writer:
        jobs = writer.todo(about[0].numbers, about[0].sites)
        done = [crew[number % 2].compute(order, writer.sites, [job]) for number, job in enumerate(jobs)]
        assert [one.about for one in done] == [*about[:2], None, None, None, None]
        assert done[0].parts and not done[2].parts, "the first example is handed over at once"
        assert [part.held[0].number for one in done for part in one.parts] == [0, 1]
        assert len(vlmscope.read_run(order.out).baselines()) == 0, "nothing is committed yet"
        for part in [*done[0].parts, *done[1].parts, *crew[0].hand_over().parts]:
            writer.take(part)
        assert crew[0].hand_over() == Done([])
        assert sorted(writer.done) == [0, 1, 2, 4]
        crew[1].hand_over()  # and dies
        again = writer.todo(about[0].numbers, about[0].sites)
        last = [crew[2].compute(order, writer.sites, [job]).parts for job in again]
        for part in itertools.chain(*last, crew[2].hand_over().parts):
            writer.take(part)
        writer.finish()
    assert len(left_behind(order.out)) == 2
    with open_run(order.out, about[0].spec, about[0].description) as writer:
        writer.keep_check(crew[2].check(order) or {})
        writer.finish()
    assert not left_behind(order.out)
    run = vlmscope.read_run(order.out)
    equal(run, whole)
    assert run.check == whole.check


def test_an_example_that_is_refused_is_left_out_with_the_reason(tmp_path: Path) -> None:
    worker, order = begun(), Order(swept, OPTIONS, tmp_path)
    about = worker.make(order)
    with open_run(tmp_path, about.spec) as writer:
        jobs = writer.todo([3], about.sites)
        for part in worker.compute(order, about.sites, jobs, REASON).parts:
            writer.take(part)
    (row,) = vlmscope.read_run(tmp_path).baselines().to_dict("records")
    assert row["excluded"] and row["reason"] == REASON


def test_a_folder_that_is_not_on_the_workers_machine(tmp_path: Path) -> None:
    worker = begun()
    with pytest.raises(
        StoreError, match="run: is not there on .*; choose an --out on a disk that all machines"
    ):
        worker.compute(Order(swept, OPTIONS, tmp_path / "run"), SITES, [Todo(0, SITES, [])])


# --- a team, of workers in this process ------------------------------------------------------------------


@dataclass
class Known:
    """A study whose examples are computed once, so that many deaths cost little."""

    results: dict[int, Any]

    def __call__(self, model: Any, examples: Any, **options: Any) -> Study:
        study = swept(model, examples, **options)

        def work(task: Any, job: Any, *rest: Any) -> Any:
            if job.number not in self.results:
                self.results[job.number] = study.work(task, job, *rest)
            return self.results[job.number]

        return replace(study, work=work)


@pytest.mark.filterwarnings("ignore:a worker died")
@pytest.mark.parametrize("seed", range(4))
def test_a_run_survives_fifty_deaths(
    seed: int, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers die before, within and after what they do, also half-way through a file; and so does the
    driver, before and after it commits a part."""
    random, deaths = Random(seed), Counter[str]()
    monkeypatch.setattr(team, "DEATHS", 10_000)

    def dies(moment: str) -> bool:
        found = deaths.total() < 50 and random.random() < 0.3
        deaths[moment] += found
        return found

    write, take = files.write, run_writer.Writer.take

    def written(file: Path, content: Any, ends: Path | None = None) -> None:
        if file.suffix == ".tmp" and dies("within hand_over"):
            file.write_bytes(content[: len(content) // 2])
            raise KilledError
        write(file, content, ends)

    def taken(writer: Any, part: Any) -> None:
        if dies("driver before a part"):
            raise KilledError
        take(writer, part)
        if dies("driver after a part"):
            raise KilledError

    monkeypatch.setattr(files, "write", written)
    monkeypatch.setattr(run_writer.Writer, "take", taken)
    study = Known({})
    for _ in range(100):
        try:
            crew = Pretended(random, dies).team(3, GIVEN)
            run, asked = crew.fill(tmp_path / "run", study, OPTIONS)
            break
        except KilledError:
            continue
    equal(run, whole)
    assert run.check == whole.check and asked == COUNT and not left_behind(run.path)
    assert deaths.total() == 50 and sum(deaths[kind] > 0 for kind in deaths) >= 6, deaths


@pytest.mark.filterwarnings("ignore:a worker died", "ignore:1 of 24 examples")
def test_quick_examples_are_given_several_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that a worker died on together, each is then given alone; so one is left out, and no other."""
    monkeypatch.setattr(team, "AT_ONCE", 3600)
    given, sites, kills = replace(GIVEN, data="faces", limit=24), ["encoder.0.cross.h0@answer"], 3
    options = OPTIONS | {"sites": sites, "check": 0}
    known, calls, deaths = Known({}), list[list[int]](), list[int]()
    compute = Worker.compute

    def noted(self: Worker, order: Order, sites: list[str], jobs: list[Todo], *reason: str) -> Done:
        calls.append([job.number for job in jobs])
        if kills in calls[-1] and not reason:
            deaths.append(len(jobs))
            raise KilledError
        return compute(self, order, sites, jobs, *reason)

    monkeypatch.setattr(Worker, "compute", noted)
    crew = Pretended(Random(0)).team(1, given)
    with pytest.warns(UserWarning, match="a worker died at one of the examples number .*3.* of the data"):
        run, _ = crew.fill(tmp_path / "run", known, options)
    assert deaths[0] > 1 and deaths[1:] == [1] * (DEATHS - 1)
    assert len(calls[1]) == 11, "half of those that wait, where there is one worker"
    base = run.baselines()
    assert base["reason"].dropna().tolist() == [REASON] and base["excluded"][kills]
    wanted = vlmscope.sweep(given.load(), given.examples(), sites, check=0)
    left = wanted[wanted["example"] != base["example"][kills]].reset_index(drop=True)
    assert run.effects().equals(left)


def test_a_team_does_calls_and_several_folders(whole: Run, tmp_path: Path) -> None:
    """A call on which a worker dies is done by another one; what is done is not done again."""
    died: list[str] = []

    def dies(moment: str) -> bool:
        found = moment in ("before call", "after make") and moment not in died
        died.extend([moment] * found)
        return found

    crew = Pretended(Random(0), dies).team(2, GIVEN)
    with pytest.warns(UserWarning, match="a worker died|twice as much") as caught:
        found = list(crew.each([(Kept.examples,), (doubled, 3), (doubled, 4)]))
    died_at = "a worker died; another one takes its place"
    assert sorted(str(one.message) for one in caught) == [died_at, "twice as much", "twice as much"]
    with pytest.warns(UserWarning, match=died_at):
        run, _ = crew.fill(tmp_path / "one", swept, OPTIONS)
    assert [example.id for example in found[0]] == [example.id for example in GIVEN.examples()]
    assert found[1:] == [6, 8]
    equal(run, whole)
    other, _ = crew.fill(tmp_path / "two", swept, OPTIONS | {"sites": SITES[1:]})
    again, _ = crew.fill(tmp_path / "one", swept, OPTIONS)
    equal(again, whole)
    named, _ = crew.fill(tmp_path / "three", Named("studies.sweep:swept"), OPTIONS)
    equal(named, whole)
    assert len(other.effects()) == (whole.effects()["kind"] == "resid").sum()


def doubled(given: Any, number: int) -> int:
    warnings.warn("twice as much", stacklevel=1)
    return 2 * number


def test_a_worker_that_lacks_a_package(tmp_path: Path) -> None:
    crew = Pretended(Random(0)).team(1, GIVEN)
    with pytest.raises(VlmscopeError, match="cannot import what it needs .No module named 'vlmscope.nowhere"):
        crew.fill(tmp_path / "run", Named("nowhere:nothing"), OPTIONS)


@pytest.mark.filterwarnings("ignore:a worker died")
def test_a_call_on_which_three_workers_die() -> None:
    crew = Pretended(Random(0), lambda moment: moment == "before call").team(2, GIVEN)
    with pytest.raises(VlmscopeError, match="3 workers died of the same .the actor died.; take fewer"):
        list(crew.each([(doubled, 1)]))


def test_workers_that_would_compute_another_run(tmp_path: Path) -> None:
    """The second one has another seed."""
    crew = Pretended(Random(1)).team(2, GIVEN)
    with pytest.raises(VlmscopeError, match="would compute another run .*: seed is . there, . here"):
        crew.fill(tmp_path / "run", Fickle(itertools.count(1)), OPTIONS)


@dataclass
class Fickle:
    """A study that is never the same."""

    numbers: Iterator[int]

    def __call__(self, model: Any, examples: Any, **options: Any) -> Study:
        return swept(model, examples, **options, seed=next(self.numbers))


# --- what is wrong with Ray ------------------------------------------------------------------------------


class FakeRay:
    """Stands for what Ray says when it cannot be had; it computes nothing."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        raise self.error


def test_ray_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        VlmscopeError, match=r"needs ray, which cannot be imported .*; pip install 'vlmscope\[ray"
    ):
        spread(tmp_path / "run", GIVEN, swept, OPTIONS, address="auto")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (
            "nowhere",
            "--ray is 'nowhere'; expected HOST:PORT of a cluster's head, such as 10.0.0.1:6379, or auto",
        ),
        ("ray://x", "--ray is 'ray://x'; expected HOST:PORT"),
        ("localhost:99999", "--ray is 'localhost:99999'; expected HOST:PORT"),
        (
            "CLOSED",
            "no Ray cluster at '127.0.0.1:.*' .not reachable: .*refused.; expected HOST:PORT of its head",
        ),
    ],
)
def test_a_cluster_that_is_not_there(
    address: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(AssertionError("is not asked")))
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(VlmscopeError, match=words):
        spread(tmp_path, GIVEN, swept, OPTIONS, address=address.replace("CLOSED", closed))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.8.0\n    Python: 3.9"),
            "another version: Version mismatch: .* Ray: 2.8.0 Python: 3.9; install",
        ),
        (
            ConnectionError("Could not find any running Ray instance."),
            "no Ray cluster at 'auto' .Could not find",
        ),
    ],
)
def test_a_ray_of_another_version_or_none(
    said: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray says itself, word for word; the real thing needs a cluster of another version."""
    monkeypatch.setitem(sys.modules, "ray", FakeRay(said))
    with pytest.raises(VlmscopeError, match=words):
        spread(tmp_path, GIVEN, swept, OPTIONS, address="auto")


def test_workers_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(VlmscopeError, match="the number of workers is '0'; expected a whole number from 1"):
        spread(tmp_path, GIVEN, swept, OPTIONS, workers=0)


def test_processes_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "os", SimpleNamespace(name="nt"))
    with pytest.raises(VlmscopeError, match="not started on Windows; share with --shard"):
        spread(tmp_path, GIVEN, swept, OPTIONS, workers=2)


class Full:
    """Stands for a cluster that has no core free."""

    def __init__(self, gpus: float) -> None:
        self.gpus, self.killed = gpus, 0

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0, "GPU": self.gpus}

    def available_resources(self) -> dict[str, float]:
        return {"GPU": self.gpus / 2}

    def remote(self, *given: Any) -> Any:
        return self if given else 0

    def options(self, **options: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return self  # of an actor, what can be called

    def wait(self, refs: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return [], refs

    def kill(self, actor: Any) -> None:
        self.killed += 1


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        (0.0, "each needs a core, and 0 of 4 cores of the cluster are free"),
        (2.0, "each needs a core and 1 of a GPU, and 0 of 4 cores and 1 of 2 GPUs of the cluster are free"),
    ],
)
def test_a_cluster_with_no_core_free(gpus: float, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Full(gpus)
    monkeypatch.setattr(cluster, "connected", lambda *given: contextlib.nullcontext(full))
    said = f"no worker has started for 10 s: {words}.*end what else runs"
    with workers.started(address="auto", workers=2) as team_of, pytest.warns(UserWarning, match=said):
        assert team_of(GIVEN).busy
    assert full.killed == 2


def test_gpus_are_shared_out_evenly() -> None:
    class Cluster:
        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 8.0, "GPU": 2.0}

    assert cluster.shares(Cluster(), 2, None) == (2, 1.0)
    assert cluster.shares(Cluster(), None, "cuda") == (2, 1.0)
    assert cluster.shares(Cluster(), 3, None) == (3, 0.5)
    assert cluster.shares(Cluster(), 6, None) == (6, 0.3333)
    assert cluster.shares(Cluster(), None, "cpu") == (8, 0.0)
    with pytest.raises(VlmscopeError, match="--device cuda:1 names one GPU, and workers are given theirs"):
        workers.started(workers=2, device="cuda:1")


# --- processes of this machine ---------------------------------------------------------------------------


@dataclass
class Deadly:
    """A study of which an example kills the process that computes it; once, where a flag says so."""

    example: str
    flag: str | None = None

    def __call__(self, model: Any, examples: Any, **options: Any) -> Study:
        study = swept(model, examples, **options)

        def work(task: Any, job: Any, *rest: Any) -> Any:
            if task.examples[job.number].id == self.example and not (self.flag and Path(self.flag).exists()):
                if self.flag:
                    Path(self.flag).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return study.work(task, job, *rest)

        return replace(study, work=work)


def test_two_workers_write_what_one_process_writes(whole: Run, tmp_path: Path) -> None:
    """Though one of them is killed as it computes, and another example, which is left out, kills all."""
    names, flag = [example.id for example in GIVEN.examples()], str(tmp_path / "died")
    died = "a worker died at example number 3 of the data; another one takes its place"
    with workers.started(workers=2) as team_of:
        crew = team_of(GIVEN)
        with pytest.warns(UserWarning, match=died):
            run, asked = crew.fill(tmp_path / "run", Deadly(names[3], flag), OPTIONS)
        assert Path(flag).exists() and asked == COUNT and not left_behind(run.path)
        equal(run, whole)
        assert run.check == whole.check
        with pytest.warns(UserWarning, match="a worker died at example number 1") as caught:
            other, _ = crew.fill(tmp_path / "other", Deadly(names[1]), OPTIONS)
        assert len(caught) == DEATHS
        with pytest.raises(SiteError, match="no example has a role 'no'"):
            crew.fill(tmp_path / "no", swept, {**OPTIONS, "sites": ["encoder.0.resid@no"]})
        assert not (tmp_path / "no").exists()
    base = other.baselines().set_index("example")
    assert base["excluded"].sum() == 1 and base.loc[names[1], "reason"] == REASON
    wanted = whole.effects().query("example != @names[1]").reset_index(drop=True)
    assert other.effects().equals(wanted)


def test_what_travels_between_processes() -> None:
    """What a call gives, and what it raises, also where neither can be sent; no process is left."""
    crew = local.Local(quiet, has_gpu=False)
    try:
        actor = crew.start()
        crew.answer(crew.wait([crew.ask(actor, "begin", GIVEN)]))
        assert crew.answer(crew.ask(actor, "call", doubled, 21)).value == 42
        with pytest.raises(RuntimeError, match="Unsendable: 7 and 8"):
            crew.answer(crew.ask(actor, "call", unsendable))
        with pytest.raises((RuntimeError, TypeError, AttributeError), match="pickle"):
            crew.answer(crew.ask(actor, "call", generator))
        assert crew.answer(crew.ask(actor, "call", doubled, 2)).value == 4, "it goes on"
        other = crew.start()
        assert (actor.number, other.number) == (0, 1)
        os.kill(actor.process.pid, signal.SIGKILL)
        with pytest.raises(DiedError, match="its process ended with signal 9"):
            crew.answer(crew.ask(actor, "call", doubled, 2))
        assert crew.start().number == 0, "that of the dead one"
    finally:
        crew.end()
    assert all(process.returncode is not None for process in crew.processes)


@pytest.mark.skipif(sys.platform != "linux", reason="forks are of Linux alone")
def test_processes_that_are_started_together_are_forks_of_one() -> None:
    """Each dies alone; and when all is over none is left, even where what they are forks of was killed."""
    for is_killed in (False, True):
        crew = local.Local(quiet, has_gpu=False)
        try:
            actors = crew.start_together(3)
            assert len({actor.process for actor in actors}) == 1
            for actor in actors:
                crew.answer(crew.ask(actor, "begin", GIVEN))
            ids = [crew.answer(crew.ask(actor, "call", own_id)).value for actor in actors]
            assert len({*ids, actors[0].process.pid}) == 4
            os.kill(ids[1], signal.SIGKILL)
            with pytest.raises(DiedError, match=r"its process ended$"):
                crew.answer(crew.ask(actors[1], "call", doubled, 2))
            other = crew.start()
            assert other.process is not actors[0].process and other.number == 1, "that of the dead one"
            if is_killed:
                os.kill(actors[0].process.pid, signal.SIGKILL)
                actors[0].process.wait()
                assert crew.start().number == 3, "the third lives on"
            assert crew.answer(crew.ask(actors[2], "call", doubled, 2)).value == 4
        finally:
            crew.end()
        deadline = time.monotonic() + 10
        while any(is_running(one) for one in ids):
            assert time.monotonic() < deadline, "a fork is left"
            time.sleep(0.01)


def own_id(given: Any) -> int:
    return os.getpid()


def is_running(number: int) -> bool:
    """Whether there is such a process, which has not ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_with_gpus_each_process_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    crew = local.Local(quiet, has_gpu=True)
    monkeypatch.setattr(crew, "_start", lambda many: started.append(many) or [many])
    assert crew.start_together(3) == [1, 1, 1] == started


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
def test_a_gpu_that_may_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "DEVICES", tmp_path)
    assert not local.may_have_gpu()
    (tmp_path / "nvidiactl").touch()
    assert local.may_have_gpu()


def test_a_machine_without_room_for_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of forks that could not be made end."""
    pipes = [connection.Pipe() for _ in range(2)]

    class OverError(BaseException):
        """Where the process ends."""

    def refuse(*_: Any) -> Any:
        raise BlockingIOError("Resource temporarily unavailable")

    def over(*_: Any) -> Any:
        raise OverError

    monkeypatch.setattr(local.os, "fork", refuse)
    monkeypatch.setattr(local.os, "wait", over)
    with pytest.raises(OverError):
        local._forked([os.dup(other.fileno()) for _, other in pipes])
    gc.unfreeze()
    for line, other in pipes:
        other.close()
        with pytest.raises(EOFError):
            line.recv()
        line.close()


def quiet() -> None:
    """Nothing to set up; what a worker prints is nobody's."""
    print("not to be seen")


class Unsendable(Exception):  # noqa: N818
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def unsendable(given: Any) -> None:
    raise Unsendable(7, 8)


def generator(given: Any) -> Any:
    return (n for n in range(3))


def test_processes_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch counts them; there need be none."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        for number in (0, 1, 2, None):
            local._ready(quiet, number)
    assert taken == [0, 1, 0]


@pytest.mark.filterwarnings("ignore:a worker died")
def test_workers_that_die_before_they_begin(tmp_path: Path) -> None:
    words = (
        "3 workers died before they could begin .its process ended with exit status 1.; take fewer of them"
    )
    with pytest.raises(VlmscopeError, match=words):
        spread(tmp_path / "run", GIVEN, swept, OPTIONS, workers=2, set_up=partial(os._exit, 1))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What the command writes that is killed below."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    driver = started(out)
    _, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    return vlmscope.read_run(out)


def started(out: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vlmscope", *COMMAND.split(), "--limit", "24", *words, "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in a script's background, Ctrl-C is ignored, and by all that they start.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_killed_or_interrupted_goes_on(undisturbed: Run, tmp_path: Path, how: int) -> None:
    """With two workers, then with one process: one table."""
    driver = started(tmp_path / "run", "--workers", "2")
    end = time.monotonic() + 120
    begun = tmp_path / "run" / "baselines" / "part-000001.parquet"
    while time.monotonic() < end and not begun.exists() and driver.poll() is None:
        time.sleep(0.05)
    driver.send_signal(how)
    _, err = driver.communicate(timeout=60)
    if how == signal.SIGINT:
        assert driver.returncode == 130 and err == "interrupted; run the same command again to go on\n"
    assert 0 < len(vlmscope.read_run(tmp_path / "run").baselines()) < 24, err
    again = started(tmp_path / "run")
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    equal(vlmscope.read_run(tmp_path / "run"), undisturbed)
    assert not left_behind(tmp_path / "run")


# --- with Ray --------------------------------------------------------------------------------------------


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ray's processes, which find this module."""
    found = pytest.importorskip("ray")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    yield found
    found.shutdown()


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:a worker died")
def test_two_workers_of_a_cluster_write_what_one_process_writes(ray: Any, whole: Run, tmp_path: Path) -> None:
    names, flag = [example.id for example in GIVEN.examples()], str(tmp_path / "died")
    ray.init(address="local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    with pytest.warns(UserWarning, match="a worker died at example number 3 of the data; another one takes"):
        run, asked = spread(tmp_path / "run", GIVEN, Deadly(names[3], flag), OPTIONS, address="auto")
    assert Path(flag).exists() and asked == COUNT and not left_behind(run.path)
    equal(run, whole)
    with pytest.raises(SiteError, match="no example has a role 'no'"):
        spread(tmp_path / "no", GIVEN, swept, {**OPTIONS, "sites": ["encoder.0.resid@no"]}, address="auto")
    with pytest.raises(VlmscopeError, match="3 workers died before they could begin .*; take fewer of them"):
        spread(tmp_path / "no", GIVEN, swept, OPTIONS, address="auto", set_up=partial(os._exit, 1))


class Watch(threading.Thread):
    """Kills a node once two workers have begun."""

    def __init__(self, cluster: Any, node: Any, flags: Path) -> None:
        super().__init__(daemon=True)
        self.cluster, self.node, self.flags, self.killed = cluster, node, flags, False

    def run(self) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and len(list(self.flags.glob("*"))) < 2:
            time.sleep(0.05)
        self.cluster.remove_node(self.node, allow_graceful=False)
        self.killed = True


@dataclass
class Slow:
    """A study that takes its time, and says which processes compute."""

    flags: str

    def __call__(self, model: Any, examples: Any, **options: Any) -> Study:
        study = swept(model, examples, **options)

        def work(*given: Any) -> Any:
            Path(self.flags, str(os.getpid())).touch()
            time.sleep(0.5)
            return study.work(*given)

        return replace(study, work=work)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_a_node_that_goes_down_loses_nothing(ray: Any, tmp_path: Path) -> None:
    """A cluster of two raylets on this machine; the second is killed while a worker computes there."""
    from ray.cluster_utils import Cluster

    given, flags = replace(GIVEN, limit=40), tmp_path / "flags"
    flags.mkdir()
    vlmscope.sweep(given.load(), given.examples(), SITES, out=tmp_path / "whole", data="states")
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    both = Cluster(initialize_head=True, head_node_args=node)
    try:
        watch = Watch(both, both.add_node(**node), flags)
        watch.start()
        run, _ = spread(tmp_path / "run", given, Slow(str(flags)), OPTIONS, address=both.address)
        assert watch.killed
    finally:
        ray.shutdown()
        both.shutdown()
    equal(run, vlmscope.read_run(tmp_path / "whole"))
