"""How much circuits carry, measured by several processes, or in shards: what one process finds."""

from __future__ import annotations

import functools
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pytest
from models import llava
from pretend_workers import Pretended
from test_faithfulness import HEADS, others

import vlmscope
from vlmscope.studies.faithfulness import Asked, Faithful, faithful_by, measure
from vlmscope.studies.workers.worker import Alone

COUNT = 8
loaded = functools.cache(llava)


class Given:
    """Loads its model once in a process."""

    def load(self) -> vlmscope.Model:
        return loaded()

    def examples(self) -> Any:
        return others(COUNT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Faithful, Path, dict[str, Any]]:
    """What one process finds, its folder, and what it was asked."""
    folder = tmp_path_factory.mktemp("made")
    vlmscope.attribute(loaded(), others(COUNT), HEADS, "image", method="atp", out=folder / "atp")
    asked: dict[str, Any] = {"corrupt": "image", "outside": "corrupt", "metric": "ld", "ratio": "means"}
    asked |= {"draws": 2, "seed": 0, "data": "examples", "scores": folder / "atp"}
    found = vlmscope.faithfulness(loaded(), others(COUNT), **asked, out=folder / "one")
    return found, folder / "one", asked


def same(found: Faithful, out: Path, whole: tuple[Faithful, Path, dict[str, Any]]) -> None:
    pd.testing.assert_frame_equal(found.table, whole[0].table, check_exact=True)
    pd.testing.assert_frame_equal(found.circuit, whole[0].circuit, check_exact=True)
    assert found.importances == whole[0].importances
    assert vlmscope.open(out).lines() == whole[0].lines()
    runs = [vlmscope.read_run(folder) for folder in (out, whole[1])]
    for name in ("measured", "baselines"):
        pd.testing.assert_frame_equal(*(getattr(run, name)() for run in runs), check_exact=True)


@pytest.mark.filterwarnings("ignore:a worker died")
def test_a_team_finds_what_one_process_finds(
    whole: tuple[Faithful, Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Also where workers die: before the circuit is chosen, within, and before what was found is said."""
    died: dict[str, int] = {}

    def dies(moment: str) -> bool:
        died[moment] = died.get(moment, 0) + 1
        return (moment, died[moment]) in (("before call", 1), ("after compute", 3), ("after call", 2))

    crew = Pretended(Random(3), dies).team(2, Asked(Given(), whole[2]))
    found = faithful_by(crew, tmp_path / "run")
    same(found, tmp_path / "run", whole)
    assert found.summary == whole[0].summary
    assert died["before call"] >= 3 and died["after compute"] > 3


def test_shards_that_are_merged(
    whole: tuple[Faithful, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same circuit is chosen in each; merged, nothing is run again."""
    for number in (1, 2):
        asked = Asked(Given(), {**whole[2], "shard": (number, 2)})
        part = faithful_by(Alone(asked), tmp_path / str(number))
        assert part.summary["measured"] == COUNT // 4
    merged = vlmscope.merge([tmp_path / "2", tmp_path / "1"], tmp_path / "run")
    monkeypatch.setattr(measure, "_runs", None)
    found = faithful_by(Alone(Asked(Given(), whole[2])), tmp_path / "run")
    same(found, merged.path, whole)
