"""Two threads: what each gets is what it gets alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import anatomy
import pytest
import torch
import zoo
from cases import Case
from test_oracle_engine import handful, patched
from test_oracle_prompts import example
from torch import Tensor

import vlmscope

SWEEPS = 3
NAMES = [
    "blip-vqa",
    "llava",
    "instructblip-vicuna",
    "blip2-t5",
    "gemma3",
    "paligemma2",
    "mllama",
    "qwen2.5-vl",
    "qwen3-vl",
    "idefics3",
    "internvl",
]
"""A family of each kind: rows, suffixes, plain forwards; with eager attention, windows, cross-attention."""


@pytest.fixture(params=[name for name in NAMES if name in zoo.MAKERS])
def case(request):
    return zoo.case(request.param)


@pytest.fixture(autouse=True)
def busy():
    """Threads take turns much more often than they would, so that what can go wrong does."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)
    yield
    sys.setswitchinterval(usual)


def work(case: Case, pair: vlmscope.Pair) -> Callable[[], list[Tensor]]:
    """A sweep, a run, activations and attention of one model."""
    sites = handful(case, pair.clean)[:: max(1, len(case.model.shapes))]

    def once() -> list[Tensor]:
        model = case.model
        last = len(pair.clean.layout["decoder"].tokens) - 1
        found = [patched(model, pair, sites, "denoise")]
        found.append(model.run(pair.corrupt))
        found += model.capture(pair.clean, ["vision.0.resid@all", "decoder.0.attn@last"]).values()
        if not case.name.endswith("t5"):  # its attention does not tell what it pays
            found.append(model.attention(pair.clean, "decoder", "attn", [last]))
        return found

    return once


def together(*jobs: Callable[[], list[Tensor]]) -> list[list[list[Tensor] | Exception]]:
    """Every job several times over, each in a thread of its own, all at the same time."""
    start = threading.Barrier(len(jobs))
    done: list[list[list[Tensor] | Exception]] = [[] for _ in jobs]

    def repeat(number: int, job: Callable[[], list[Tensor]]) -> None:
        start.wait()
        for _ in range(SWEEPS):
            try:
                done[number].append(job())
            except Exception as error:
                done[number].append(error)

    threads = [threading.Thread(target=repeat, args=one) for one in enumerate(jobs)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return done


def verdict(results: list[list[Tensor] | Exception], want: list[Tensor]) -> str:
    """How many sweeps raised, how many were wrong."""
    raised = [one for one in results if isinstance(one, Exception)]
    wrong = 0
    for one in results:
        if not isinstance(one, Exception):
            wrong += any(not equal(a, b) for a, b in zip(one, want, strict=True))
    first = f" ({type(raised[0]).__name__}: {str(raised[0])[:90]})" if raised else ""
    return f"{len(raised)} of {len(results)} raised{first}, {wrong} wrong" if raised or wrong else ""


def equal(got: Tensor, want: Tensor) -> bool:
    try:
        anatomy.close(got, want, "", 1e-9)
    except AssertionError:
        return False
    return True


def test_two_models_in_two_threads(case):
    other = zoo.case(case.name, 1)
    pairs = [one.model.prepare(example()) for one in (case, other)]
    jobs = [work(one, pair) for one, pair in zip((case, other), pairs, strict=True)]
    alone = [job() for job in jobs]
    assert not equal(alone[0][0], alone[1][0])  # two models, not one
    done = together(*jobs)
    told = [verdict(*one) for one in zip(done, alone, strict=True)]
    assert not any(told), " | ".join(told)
    again = [verdict([job()], want) for job, want in zip(jobs, alone, strict=True)]
    assert not any(again), f"broken for good: {' | '.join(again)}"


def test_models_of_two_families_in_two_threads():
    names = [name for name in NAMES if name in zoo.MAKERS][1:3]
    jobs = [work(one, one.model.prepare(example())) for one in map(zoo.case, names)]
    alone = [job() for job in jobs]
    told = [verdict(*one) for one in zip(together(*jobs), alone, strict=True)]
    assert not any(told), f"{' and '.join(names)}: {' | '.join(told)}"


def test_one_model_in_two_threads(case):
    """Right, or one clear error; never a wrong number, and the model is as before."""
    job = work(case, case.model.prepare(example()))
    alone = job()
    attention = [one._attn_implementation for one in configs(case)]
    done = [one for results in together(job, job) for one in results]
    unclear = [
        one for one in done if isinstance(one, Exception) and not isinstance(one, vlmscope.VlmscopeError)
    ]
    told = verdict([one for one in done if not isinstance(one, vlmscope.VlmscopeError)], alone)
    assert not unclear and not told, told
    assert [one._attn_implementation for one in configs(case)] == attention
    again = verdict([job()], alone)
    assert not again, f"broken for good: {again}"


def configs(case: Case) -> list[object]:
    return [m.config for m in case.hf.modules() if hasattr(m, "config")]


@pytest.fixture(autouse=True)
def fresh():
    """What a thread broke is not to fail other tests: the models are made anew."""
    yield
    torch.set_num_threads(1)
    zoo.case.cache_clear()
