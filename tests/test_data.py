"""The drawn sets: from a seed, balanced, aligned, with exact masks."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from PIL import ImageChops

from vlmscope.data import BUILT_IN, examples
from vlmscope.data.drawn import binding
from vlmscope.data.example import fingerprint
from vlmscope.errors import DataError, VlmscopeError

COUNT = 36


@pytest.fixture(scope="module", params=BUILT_IN)
def drawn(request):
    return examples(request.param, limit=COUNT)


def test_a_seed_gives_the_same_set_and_another_seed_another(drawn):
    name = drawn[0].id.split("-")[0]
    assert fingerprint(drawn) == fingerprint(examples(name, limit=COUNT))
    assert fingerprint(drawn) != fingerprint(examples(name, limit=COUNT, seed=1))


def test_a_limit_takes_the_first(drawn):
    name = drawn[0].id.split("-")[0]
    assert fingerprint(drawn[:5]) == fingerprint(examples(name, limit=5))
    assert len({e.id for e in drawn}) == COUNT


def test_kinds_and_orders_are_balanced(drawn):
    for key in ("kind", "order"):
        counts = Counter(e.groups[key] for e in drawn)
        assert len(set(counts.values())) == 1, counts
    both = Counter((e.groups["kind"], e.groups["order"]) for e in drawn)
    assert len(set(both.values())) == 1, both
    for e in drawn:
        is_first = e.roles["answer"] < e.roles["foil"]
        assert e.groups["order"] == ("answer first" if is_first else "foil first")


def test_prompts_align_word_for_word_and_change_only_the_options_or_the_noun(drawn):
    for e in drawn:
        clean, corrupt = e.clean_prompt.rstrip("?").split(), e.corrupt_prompt.rstrip("?").split()
        assert len(clean) == len(corrupt)
        changed = {a for a, b in zip(clean, corrupt, strict=True) if a != b}
        if e.id.startswith("binding"):
            assert changed == {e.clean_prompt[slice(*e.roles["noun"])]}
            continue
        assert changed == {e.answer, e.foil}
        assert e.answer not in corrupt
        assert e.foil not in corrupt


def test_roles_are_where_their_words_stand(drawn):
    for e in drawn:
        for role, word in (("answer", e.answer), ("foil", e.foil)):
            start, end = e.roles[role]
            assert e.clean_prompt[start:end] == word
        assert "noun" in e.roles


def test_pictures_differ_where_the_answer_is_seen(drawn):
    """Outside of what either picture shows of the object, the two agree (but for a moved one)."""
    for e in drawn:
        difference = ImageChops.difference(e.clean_image, e.corrupt_image).convert("L")
        assert difference.getbbox() is not None
        asked = e.groups["kind"]
        name = asked if asked in e.masks else "object"
        mask = e.masks[name]
        assert mask.size == e.clean_image.size
        assert [value for value, count in enumerate(mask.histogram()) if count] == [0, 255]
        if e.id.startswith("binding"):
            mask = ImageChops.lighter(mask, e.masks["foil"])
        if asked in ("color", "texture", "expression", "neighbor"):
            outside = ImageChops.multiply(difference, ImageChops.invert(mask))
            assert outside.getextrema()[1] == 0


AWAY = {"left of": (-1, 0), "right of": (1, 0), "over": (0, -1), "under": (0, 1)}


def told(things, prompt):
    """The color that a question of `binding` asks for, by where the objects are."""
    *_, relation, noun = re.fullmatch(r"is the (shape (.+) the )?(\w+) \w+ or \w+\?", prompt).groups()
    [named] = [thing for thing in things if thing.shape == noun]
    dx, dy = AWAY[relation] if relation else (0, 0)
    x, y = named.x + dx * binding.CELL, named.y + dy * binding.CELL
    return min(things, key=lambda thing: (thing.x - x) ** 2 + (thing.y - y) ** 2).color


def test_each_noun_of_binding_has_its_color_in_each_picture():
    """The picture or the noun alone turns the answer into the foil, both together keep it."""
    for n in range(200):
        one = binding.contrast(random.Random(f"oracle/{n}"), binding.KINDS[n % 2])
        clean, corrupt = one.ask(one.foil, one.answer), one.ask_corrupt(one.foil, one.answer)
        assert told(one.clean.things, clean) == told(one.corrupt.things, corrupt) == one.answer
        assert told(one.corrupt.things, clean) == told(one.clean.things, corrupt) == one.foil
        assert {t.color for t in one.clean.things} == {t.color for t in one.corrupt.things}
        object_, foil = (one.clean.masks()[name] for name in ("object", "foil"))
        assert not ImageChops.multiply(object_, foil).getbbox()


def test_a_set_that_is_not_there():
    with pytest.raises(DataError, match="no data set 'colours'.*states, scenes, faces, binding"):
        examples("colours")
    with pytest.raises(VlmscopeError, match="the limit is '0'; expected a whole number from 1"):
        examples("states", limit=0)
