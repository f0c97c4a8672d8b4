"""Drawn sets as sequences: what is drawn when, how much of it is held, and that no table depends on it."""

from __future__ import annotations

import functools
import pickle
import weakref
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from pretend_workers import Pretended
from test_shards import equal

import vlmscope
from vlmscope.cli.options import Given
from vlmscope.data import BUILT_IN, drawn, lazy
from vlmscope.data.drawn import Drawn
from vlmscope.data.example import Example, fingerprint
from vlmscope.errors import ExampleError
from vlmscope.studies.sweep import swept

SITES = ["encoder.0.cross.h*@answer"]
LOOKED_AT, WINDOW = 2, 3
COUNT = 9


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each example has been drawn since; few are looked at for the hash, and few held."""
    monkeypatch.setattr(lazy, "LOOKED_AT", LOOKED_AT)
    monkeypatch.setattr(drawn, "WINDOW", WINDOW)
    counts, make = Counter[int](), Drawn.make

    def counted(self: Drawn, number: int) -> Example:
        counts[number] += 1
        return make(self, number)

    monkeypatch.setattr(Drawn, "make", counted)
    return counts


@functools.cache
def toy() -> vlmscope.Model:
    return vlmscope.load("toy-blip")


class Kept(Given):
    """Loads its model once in a process."""

    def load(self) -> vlmscope.Model:
        return toy()


# --- a sequence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_first_of_a_set_have_the_roles_of_all(name: str) -> None:
    found = vlmscope.examples(name, limit=60)
    assert isinstance(found, Drawn) and found.ids == [one.id for one in found]
    assert [*found.roles] == list(dict.fromkeys(role for one in found for role in one.roles))


def test_an_example_is_drawn_when_it_is_asked_for(made: Counter[int]) -> None:
    found = vlmscope.examples("states", limit=5_000)
    assert len(found) == 5_000 and set(made) == set(range(6)), "one of each kind, in both orders"
    made.clear()
    [one, other] = found[4_000:4_002]
    assert made == {4_000: 1, 4_001: 1} and other.id == "states-0-4001"
    assert found[-1].id == "states-0-4999" and found[-999] is other, "it is held here"
    assert fingerprint([one]) == fingerprint([vlmscope.examples("states", limit=4_001)[-1]])
    with pytest.raises(IndexError):
        found[5_000]


def test_it_is_compared_as_a_list_is(made: Counter[int]) -> None:
    found = vlmscope.examples("faces", limit=9)
    whole = [*found]
    assert (
        found == whole
        and whole == found
        and found[2:8:3] == whole[2:8:3]
        and [*reversed(found)] == whole[::-1]
    )
    assert whole[7] in found and found.index(whole[7]) == 7
    assert found != whole[:-1] and found != whole[::-1] and found != "faces" and found
    assert found != vlmscope.examples("faces", limit=9), "whose pictures are others"


def test_it_can_be_sent_and_nothing_drawn_goes_with_it() -> None:
    found = vlmscope.examples("states", limit=100, seed=3)
    sent = pickle.dumps(found)
    assert len(sent) < 200 and fingerprint(pickle.loads(sent)) == fingerprint(found)  # noqa: S301 - our own


def test_the_first_ones_and_the_last_are_held(made: Counter[int]) -> None:
    found = vlmscope.examples("faces", limit=8)
    made.clear()
    for number in (0, 1, 5, 5, 0, 6, 5, 5, 1):
        found[number]
    assert made == {5: 2, 6: 1}


def test_an_example_that_cannot_be_made_has_no_digest() -> None:
    class Broken(lazy.Lazy):
        ids, roles = ["0"], {}

        def __len__(self) -> int:
            return 1

        def make(self, number: int) -> Example:
            raise ExampleError("broken")

    assert lazy.Digests(Broken(b"", 1))[:] == [""]


# --- runs ------------------------------------------------------------------------------------------------


def test_a_run_holds_few_pictures_however_many_it_has_drawn(
    made: Counter[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pictures: list[weakref.ref[Image.Image]] = []
    alive = Counter[int]()
    make = Drawn.make

    def noted(self: Drawn, number: int) -> Example:
        alive[number] = sum(picture() is not None for picture in pictures)
        one = make(self, number)
        shown = (one.clean_image, one.corrupt_image, *one.masks.values())
        pictures.extend(weakref.ref(each) for each in shown if isinstance(each, Image.Image))
        return one

    monkeypatch.setattr(Drawn, "make", noted)
    vlmscope.sweep(toy(), vlmscope.examples("faces", limit=COUNT), SITES, out=tmp_path, check=0)
    assert len(pictures) >= 3 * COUNT
    assert max(alive.values()) <= 3 * (WINDOW + 1) and alive[COUNT - 1] == 3 * WINDOW


def test_a_worker_draws_only_what_it_computes(made: Counter[int], tmp_path: Path) -> None:
    """And what a hash reads. The table is that of one process, and of the examples as a list."""
    given = Kept(model="toy-blip", data="faces", limit=COUNT)
    options = {"sites": SITES, "corrupt": "image", "data": "examples", "check": 0}
    pretended = Pretended(Random(0))
    crew = pretended.team(2, given)
    run, _ = crew.fill(tmp_path / "two", swept, options)
    assert all(actor.worker.count for actor in pretended.actors.values()), "both have written parts"
    once = dict.fromkeys(range(LOOKED_AT, COUNT), 1)
    assert {number: many for number, many in made.items() if number >= LOOKED_AT} == once
    made.clear()
    vlmscope.sweep(toy(), given.examples(), SITES, out=tmp_path / "one", check=0)
    assert made == once | dict.fromkeys(range(LOOKED_AT), 1)
    equal(run, vlmscope.read_run(tmp_path / "one"))
    vlmscope.sweep(toy(), [*given.examples()], SITES, out=tmp_path / "list", check=0)
    whole = vlmscope.read_run(tmp_path / "list")
    assert run.effects().equals(whole.effects()) and run.baselines().equals(whole.baselines())
    assert run.digests() == whole.digests()
