"""What is only reached on a GPU: each command and study there, beside the same on the CPU.

Matrix products are summed in another order there (and pictures cut into patches in TF32), so numbers agree to
some digits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_cli import run  # noqa: F401
from test_load import compare, larger  # noqa: F401

import vlmscope
from vlmscope.checkpoint import load
from vlmscope.cli.options import Given
from vlmscope.cli.terminal import answer
from vlmscope.errors import ModelError
from vlmscope.patching.gradients import estimate
from vlmscope.runs import corrupt
from vlmscope.runs.network import free_memory
from vlmscope.studies import workers
from vlmscope.studies.plan import plan
from vlmscope.studies.sweep import swept

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CLOSE = 0.02
BLIP, LLAVA = "--model toy-blip --data states", "--model toy-llava --data states"
HEADS = "encoder.*.cross.h*@answer"
ASKED = ("--prompt", "what color is the circle?")
PAIRS = f"{BLIP} --corrupt image"
EDIT = f"neurons edit {LLAVA} --limit 10 --from red --to blue --neurons 5 --out out.safetensors"
COMMANDS = {
    "sweep": f"sweep {PAIRS} --limit 3 --sites {HEADS} decoder.*.resid@* --out out",
    "mean": f"sweep {BLIP} --patch mean --limit 3 --sites {HEADS} --out out",
    "noise": f"sweep {BLIP} --corrupt noise --limit 2 --sites {HEADS} --out out",
    "screen": f"sweep {PAIRS} --limit 3 --sites {HEADS} --screen atp --top 4 --out out",
    "knockout": f"knockout {LLAVA} --limit 2 --sites decoder.*.attn@last<image --out out",
    "tracing": f"tracing {BLIP} --limit 2 --repeats 2 --windows 1 --kinds cross --out out",
    "heads": f"heads {PAIRS} --limit 2 --sites encoder.1.cross.h2@answer --out out",
    "lens": f"lens {LLAVA} --limit 2 --sites decoder.*.resid@readout --out out",
    "attribute": f"attribute {LLAVA} --limit 2 --sites decoder.*.mlp@last --out out",
    "edges": f"edges {LLAVA} --corrupt image --limit 2 --verify 2 --out out",
    "steer": f"steer {PAIRS} --limit 4 --sites encoder.0.resid@last --random 2 --said 1 --out out",
    "probe": f"probe {BLIP} --limit 24 --sites encoder.0.resid@last --label kind --shuffles 2 --out out",
    "inpaint": f"data inpaint {BLIP} --limit 2 --fill mean --out out.csv",
    "notice": f"notice {PAIRS} --limit 3 --out out",
    "find": f"neurons find {LLAVA} --limit 2 --out out",
    "describe": f"neurons describe {LLAVA} --limit 2 --neuron 3.250 --out out",
    "perturb": f"neurons perturb {LLAVA} --limit 50 --word red --top 1 --out out",
    "closed": f"{EDIT} --solver closed",
    "learned": f"{EDIT} --solver learned",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Nothing that it needs is left on the CPU."""
    monkeypatch.chdir(tmp_path)
    words = COMMANDS[name].split() + [*ASKED] * (
        "toy-llava" in COMMANDS[name] and "neurons" in COMMANDS[name]
    )
    status, said, err = run(*words, "--device", DEVICE)
    assert status == 0 and said, err


STUDIES: dict[str, Callable[[vlmscope.Model, Any], pd.Series]] = {
    "sweep": lambda model, given: vlmscope.sweep(model, given, [HEADS, "decoder.*.resid@*"])["effect"],
    "reference": lambda model, given: vlmscope.sweep(model, given, HEADS, engine="reference")["effect"],
    "mean": lambda model, given: vlmscope.sweep(model, given, HEADS, None, patch="mean")["value"],
    "resample": lambda model, given: vlmscope.sweep(model, given, HEADS, None, patch="resample")["value"],
    "noise": lambda model, given: vlmscope.sweep(model, given, HEADS, vlmscope.Noise(draws=2))["effect"],
    **{
        method: lambda model, given, method=method: vlmscope.attribute(
            model, given, HEADS, "image", method=method
        )["score"]
        for method in ("atp", "atp-star", "ig")
    },
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_finds_what_it_finds_on_a_cpu(name: str) -> None:
    given = vlmscope.examples("states", limit=2)
    here, there = (STUDIES[name](vlmscope.load("toy-blip", device=each), given) for each in ("cpu", DEVICE))
    size = float(here.abs().max())
    assert size > 0
    np.testing.assert_allclose(there, here, rtol=CLOSE, atol=CLOSE * size)


def test_a_model_is_where_there_is_a_gpu() -> None:
    model = vlmscope.load("toy-blip")
    assert model.device.type == DEVICE and {p.device.type for p in model.hf.parameters()} == {DEVICE}
    assert free_memory(model.device) == pytest.approx(torch.cuda.mem_get_info()[0], rel=0.1)
    assert model.free_memory() <= torch.cuda.mem_get_info()[1]


@pytest.mark.parametrize(("dtype", "close"), [("bfloat16", 0.15), ("float16", 0.02), ("float32", 1e-3)])
def test_the_engine_in_each_precision(larger: Path, dtype: str, close: float) -> None:  # noqa: F811
    compare(load(larger, dtype=dtype, device=DEVICE), close)


def test_weights_of_four_bits(larger: Path) -> None:  # noqa: F811
    """What a CPU cannot: layers of any width, and gradients through them."""
    model = load(larger, dtype="4bit", device=DEVICE)
    compare(model, 0.15)
    table = model.matrix(model.down(0))
    assert table.dtype == torch.float32 and table.device.type == DEVICE and table.std() > 0
    assert load("toy-llava", dtype="4bit", device=DEVICE).precision == "4bit"
    [example] = vlmscope.examples("states", limit=1)
    toy = load("toy-llava", dtype="4bit", device=DEVICE)
    pair = corrupt.pairs(toy, example, "image")[0]
    scores = estimate(toy, pair, "decoder.*.mlp.n*@last").scores
    assert np.isfinite(scores).all() and np.abs(scores).max() > 0


def test_weights_that_do_not_fit_into_the_gpus(
    larger: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None is fetched from elsewhere again and again."""
    monkeypatch.setattr("vlmscope.checkpoint.free_memory", lambda device: 100_000)
    with pytest.raises(ModelError, match=r"0.0 GB are free on cuda; load it in bfloat16 or 4bit, or over"):
        load(larger, device=DEVICE)
    total = torch.cuda.mem_get_info()[1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (200_000, total))
    with pytest.raises(ModelError, match="does not fit into the memory of the GPUs in float32: part of it"):
        load(larger, device="auto")


def test_memory_that_runs_out_is_one_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
    said, status = answer(caught.value)
    assert said.startswith("error: out of memory (") and status == 1


def test_a_plan_counts_the_memory_of_the_gpu() -> None:
    given = Given(model="toy-blip", data="states", limit=3, device=DEVICE)
    found = plan(swept, given, {"sites": HEADS, "corrupt": "image"}, shards=2)
    assert found.on_device is not None and found.on_device > 1e6
    assert "of it on the GPU" in "\n".join(found.lines(Path("out")))
    assert "#SBATCH --gpus-per-task=1" in found.slurm(["vlmscope", "sweep"], Path("out"))


def place_of(given: Given) -> str:
    """Where a worker's model is."""
    return given.load().device.type


def test_two_workers_share_a_gpu(tmp_path: Path) -> None:
    given = Given(model="toy-blip", data="states", limit=6)
    options = {"sites": HEADS, "corrupt": "image", "data": "states"}
    vlmscope.sweep(given.load(), given.examples(), HEADS, "image", out=tmp_path / "one", data="states")
    with workers.started(workers=2) as team_of:
        crew = team_of(given)
        assert list(crew.each([(place_of,)] * 2)) == [DEVICE] * 2
        made, _ = crew.fill(tmp_path / "two", swept, options)
    one = vlmscope.read_run(tmp_path / "one")
    pd.testing.assert_frame_equal(made.effects(), one.effects(), check_exact=True)
