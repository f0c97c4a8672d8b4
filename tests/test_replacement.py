"""Token replacement: aligned, in the same role, and drawn for each example alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vlmscope.data.example import Example, find_roles
from vlmscope.data.questions.replacement import DRAWN, KEPT, NONE, aligned, replace_words
from vlmscope.data.questions.synonyms import SETS, near

VOCABULARY = Path(__file__).parents[2] / "shared" / "data" / "bert-base-uncased-vocab.txt"

COLORS = ("red", "blue", "green", "yellow", "brown", "white")


def made(
    name: str,
    prompt: str,
    answer: str,
    foil: str,
    *,
    kind: str = "color",
    corrupt: str | None = None,
    **words: str,
) -> Example:
    return Example(
        id=name,
        clean_image=Path("a.png"),
        clean_prompt=prompt,
        answer=answer,
        foil=foil,
        corrupt_prompt=corrupt,
        roles=find_roles(prompt, {**words, "answer": answer, "foil": foil}),
        groups={"kind": kind},
    )


def colors() -> list[Example]:
    pairs = zip(COLORS, [*COLORS[1:], COLORS[0]], strict=True)
    return [made(one, f"is it {one} or {two}?", one, two) for one, two in pairs]


def drawn(examples: list[Example], **options: object) -> dict[str, str | None]:
    found, _ = replace_words(examples, **options)
    return {one.id: one.corrupt_prompt for one in found}


def words(prompt: str) -> list[str]:
    return prompt.rstrip("?").split()


def test_both_options_become_others_of_the_same_kind() -> None:
    states = [made(w, f"is it {w} or open?", w, "open", kind="state") for w in ("wide", "long")]
    found, counts = replace_words(colors() + states)
    assert counts == {DRAWN: 6, NONE: 2}
    for one in found[:6]:
        first, second = words(one.corrupt_prompt)[2::2]
        assert one.corrupt_prompt == f"is it {first} or {second}?"
        assert {first, second} <= set(COLORS) - {one.answer, one.foil}
        assert first != second
    assert [one.corrupt_prompt for one in found[6:]] == [None, None]


def test_the_draw_of_an_example_depends_on_its_id_and_the_seed_alone() -> None:
    once = drawn(colors())
    assert drawn(colors()[::-1]) == once
    assert drawn(colors(), seed=1) != once
    renamed = [replace(one, id=f"new-{one.id}") for one in colors()]
    assert list(drawn(renamed).values()) != list(once.values())


def test_keeps_what_aligns_and_draws_the_rest() -> None:
    examples = [
        made("kept", "is it red or blue?", "red", "blue", corrupt="is it old or new?"),
        made("longer", "is it red or blue?", "red", "blue", corrupt="is it dark green or white?"),
        made("same", "is it red or blue?", "red", "blue", corrupt="is it red or blue?"),
        *colors(),
    ]
    found, counts = replace_words(examples)
    assert counts == {KEPT: 1, DRAWN: 8}
    assert found[0] is examples[0]
    for one in found[1:3]:
        assert one.corrupt_prompt not in ("is it dark green or white?", "is it red or blue?", None)


def test_words_have_the_same_number_of_pieces() -> None:
    examples = colors()

    def pieces(word: str) -> int:
        return len(word) // 4 + 1

    assert any(not aligned(e.clean_prompt, drawn(examples)[e.id], pieces) for e in examples)
    found, counts = replace_words(examples, pieces=pieces)
    assert counts[DRAWN] + counts.get(NONE, 0) == 6
    assert counts[DRAWN] > 1
    for one in found:
        if one.corrupt_prompt is not None:
            assert aligned(one.clean_prompt, one.corrupt_prompt, pieces)
    # What was drawn without counting pieces is drawn again where it does not align.
    again, counts = replace_words(replace_words(examples)[0], pieces=pieces)
    assert counts[KEPT] >= 1 and counts[DRAWN] >= 1
    assert [e.corrupt_prompt for e in again if e.corrupt_prompt] != []


def test_aligns_under_the_pieces_of_bert() -> None:
    if not VOCABULARY.is_file():
        pytest.skip("the shared vocabulary of BERT is not there")
    vocabulary = set(VOCABULARY.read_text("utf-8").splitlines())

    def pieces(word: str) -> int:
        count, rest = 0, word.lower()
        while rest:
            start = "##" if count else ""
            end = next((n for n in range(len(rest), 0, -1) if start + rest[:n] in vocabulary), 1)
            count, rest = count + 1, rest[end:]
        return count

    looks = ("mossy", "rusty", "clean", "unripe", "caramelized", "ripe", "sunny", "murky", "dull")
    examples = [
        made(a, f"is this pond {a} or {b}?", a, b) for a, b in zip(looks, [*looks[1:], looks[0]], strict=True)
    ]
    assert len({pieces(word) for word in looks}) > 1
    found, counts = replace_words(examples, pieces=pieces)
    assert counts[DRAWN] >= 5
    for one in found:
        if one.corrupt_prompt is not None:
            assert aligned(one.clean_prompt, one.corrupt_prompt, pieces)


def test_no_near_synonyms_of_the_options_or_of_each_other() -> None:
    people = ("man", "guy", "horse", "woman", "lady", "elephant", "dog", "puppy")
    examples = [
        made(f"{a}-{b}", f"is the {a} or the {b} here?", a, b)
        for a in people
        for b in people
        if a != b and not near(a, b)
    ]
    for one in replace_words(examples)[0]:
        first, second = words(one.corrupt_prompt)[2:6:3]
        for new in (first, second):
            assert not near(new, one.answer) and not near(new, one.foil)
        assert not near(first, second)


def test_an_article_still_fits() -> None:
    nouns = dict.fromkeys(("apple", "owl", "egg", "onion", "arrow"), "an")
    nouns |= dict.fromkeys(("lamp", "ladder", "tulip", "wheel", "spoon"), "a")
    names = list(nouns)
    examples = [
        made(f"{x}-{y}", f"is this {nouns[x]} {x} or {nouns[y]} {y}?", x, y, kind="label")
        for x, y in zip(names, names[1:] + names[:1], strict=True)
    ]
    prompts = [one.corrupt_prompt for one in replace_words(examples)[0]]
    assert sum(one is not None for one in prompts) >= 8
    for prompt in filter(None, prompts):
        said = words(prompt)
        assert said[2] == nouns[said[3]] and said[5] == nouns[said[6]]


def test_a_plural_stays_a_plural() -> None:
    one = [("man", "owl"), ("dog", "cow"), ("bird", "king")]
    many = [("men", "owls"), ("dogs", "cows"), ("birds", "kings")]
    examples = [made(a, f"is a {a} or a {b} here?", a, b) for a, b in one if b != "owl"]
    examples += [made(a, f"are {a} or {b} here?", a, b) for a, b in many]
    for prompt in filter(None, drawn(examples).values()):
        plural = [word.endswith("s") or word == "men" for word in words(prompt) if len(word) > 2]
        assert sum(plural) == (2 if prompt.startswith("are") else 0)


def test_the_preposition_behind_is_minded_where_it_can_be() -> None:
    examples = [
        made(a + b, f"is she {a} or {b} {joint}the {thing}?", a, b, kind="verb")
        for a, b, joint, thing in [
            ("sitting", "lying", "on ", "bed"),
            ("walking", "running", "on ", "road"),
            ("kissing", "feeding", "", "dog"),
            ("washing", "painting", "", "car"),
        ]
    ]
    prompts = drawn(examples)
    assert set(words(prompts["sittinglying"])[2:5]) == {"walking", "running", "or"}
    assert set(words(prompts["kissingfeeding"])[2:5]) == {"washing", "painting", "or"}


def test_where_no_option_stands_in_the_prompt_the_noun_is_replaced() -> None:
    nouns = ("dog", "bus", "sky", "puppy")
    examples = [made(n, f"what is the color of the {n}?", "red", "blue", noun=n) for n in nouns]
    prompts = drawn(examples)
    for noun, prompt in prompts.items():
        new = words(prompt)[-1]
        assert new != noun and new in nouns and not near(new, noun)
        assert prompt.startswith("what is the color of the ")
    lone = [replace(one, roles={"object": one.roles["noun"]}) for one in examples]
    assert all(drawn(lone).values())
    assert set(drawn([replace(one, roles={}) for one in examples]).values()) == {None}


def test_no_word_that_already_stands_in_the_prompt() -> None:
    examples = [
        made("1", "is the orange red or blue?", "red", "blue"),
        made("2", "is the cup orange or green?", "orange", "green"),
        made("3", "is the cup white or green?", "white", "green"),
    ]
    for seed in range(10):
        assert set(words(drawn(examples, seed=seed)["1"])[3::2]) == {"white", "green"}


def test_several_words_are_replaced_by_as_many() -> None:
    phrases = ("red cube", "large red cube", "small ball", "green cone", "tiny blue ball")
    examples = [made(p, f"is the {p} there?", "yes", "no", object=p) for p in phrases]
    for phrase, prompt in drawn(examples).items():
        if prompt is not None:
            assert len(words(prompt)) == 3 + len(phrase.split())
    assert drawn(examples)["red cube"] in ("is the small ball there?", "is the green cone there?")


def test_punctuation_counts_where_it_stands() -> None:
    assert not aligned("is it red?", "is it? red")
    assert not aligned("red, or blue?", "red or blue now?")
    assert aligned("a t-shirt?", "a raincoat?")


def test_near_synonyms() -> None:
    for one, other in [
        ("man", "Guy"),
        ("child", "kids"),
        ("talking", "speak"),
        ("sitting", "resting"),
        ("lying", "laying"),
        ("gray", "grey"),
        ("2", "two"),
        ("horse", "horses"),
        ("huge", "large"),
        ("dirty", "muddy"),
    ]:
        assert near(one, other) and near(other, one), (one, other)
    for one, other in [("man", "woman"), ("boy", "girl"), ("red", "blue"), ("sit", "stand")]:
        assert not near(one, other), (one, other)


def test_the_table_of_synonyms_holds_sets() -> None:
    assert all(len(words) == len(set(words)) > 1 for words in SETS)
    assert len({frozenset(words) for words in SETS}) == len(SETS)
