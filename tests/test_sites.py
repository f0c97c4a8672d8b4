"""The site language: parsing, printing, expanding, placing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlmscope.errors import SiteError
from vlmscope.sites import Layout, Shape, Site, expand, members, place, slots

SHAPES = {
    "vision": Shape(2, ("resid_pre", "attn", "mlp", "resid", "output"), {"attn": 3}, 5, 6),
    "encoder": Shape(12, ("resid_pre", "attn", "cross", "mlp", "resid"), {"attn": 2, "cross": 2}, 4, 4),
}
TEXT = Layout(
    ("[CLS]", "the", "un", "##happy", "cat", "[SEP]"), (0, 1, 2, 3, 4, 5), {"answer": (2, 3), "noun": (4,)}
)
IMAGE = Layout(("[CLS]", "0,0", "0,1", "1,0", "1,1"), cells={1: (0, 0), 2: (0, 1), 3: (1, 0), 4: (1, 1)})


@pytest.mark.parametrize(
    "text",
    [
        "encoder.*.cross.h*@answer",
        "vision.3-7.attn@image[3,7]",
        "decoder.0.mlp.n512@-1",
        "qformer.11.resid_pre@2-6",
        "vision.*.output@all",
        "encoder.5.attn.h3@text*",
    ],
)
def test_an_expression_prints_back_as_it_was_written(text):
    assert str(Site.parse(text)) == text
    assert Site.parse(str(Site.parse(text))) == Site.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("encodr.*.resid@*", r"'encodr' \(character 1\) is not a tower; did you mean 'encoder'"),
        ("encoder.x.resid@*", r"'x' \(character 9\) is not a layer"),
        ("encoder.1.crss@*", r"'crss' \(character 11\) is not a kind; did you mean 'cross'"),
        ("encoder.1.cross.q2@*", r"'q2' \(character 17\) is not a unit"),
        ("encoder.1.resid.h2@*", "only attn and cross have heads"),
        ("encoder.1.attn.n2@*", "only mlp have neurons"),
        ("encoder.1.attn", "no position"),
        ("encoder.1.attn@", "no position"),
        ("encoder.1@3", "2 parts"),
        ("encoder.1.attn.h1.x@3", "5 parts"),
        ("encoder.1.attn@image[3]", "is not a position"),
        ("encoder.1.attn@1..2", "is not a position"),
        ("", "no position"),
    ],
)
def test_a_wrong_expression_is_told_where(text, message):
    with pytest.raises(SiteError, match=message):
        Site.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decoder.0.resid@*", r"no 'decoder' tower.*allowed: vision, encoder"),
        ("vision.0.cross@*", r"the vision tower of this model has no 'cross'"),
        ("encoder.12.resid@*", r"no layer 12; this tower has layers 0 to 11"),
        ("encoder.7-3.resid@*", r"no layer 7-3"),
        ("encoder.0.attn.h2@*", r"no head 2; this tower has heads 0 to 1"),
        ("vision.0.mlp.n5@*", r"no neuron 5; this tower has neurons 0 to 4"),
        ("vision.0.output@*", r"only the last layer, 1, has 'output'"),
    ],
)
def test_a_site_that_the_model_lacks_is_refused(text, message):
    with pytest.raises(SiteError, match=message):
        expand([Site.parse(text)], SHAPES)


def test_expand_lists_each_layer_and_unit_once():
    sites = expand([Site.parse("encoder.*.cross.h*@*"), Site.parse("encoder.1.cross.h0@*")], SHAPES)
    assert len(sites) == 24
    assert str(sites[3]) == "encoder.1.cross.h1@*"
    assert [str(s) for s in expand([Site.parse("vision.*.output@all")], SHAPES)] == ["vision.1.output@all"]


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("*", [("0", (0,)), ("1", (1,)), ("2", (2,)), ("3", (3,)), ("4", (4,)), ("5", (5,))]),
        ("2-3", [("2", (2,)), ("3", (3,))]),
        ("-1", [("-1", (5,))]),
        ("last", [("last", (5,))]),
        ("answer", [("answer", (2, 3))]),
        ("answer*", [("2", (2,)), ("3", (3,))]),
        ("noun", [("noun", (4,))]),
        ("all", [("all", (0, 1, 2, 3, 4, 5))]),
        ("text", [("text", (0, 1, 2, 3, 4, 5))]),
    ],
)
def test_positions_of_text(position, expected):
    placed = place(Site.parse(f"encoder.0.resid@{position}"), TEXT)
    assert [(site.position, at) for site, at in placed] == expected


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("image[1,0]", [("image[1,0]", (3,))]),
        ("image", [("image", (1, 2, 3, 4))]),
        ("image*", [("1", (1,)), ("2", (2,)), ("3", (3,)), ("4", (4,))]),
    ],
)
def test_positions_of_an_image(position, expected):
    placed = place(Site.parse(f"vision.0.resid@{position}"), IMAGE)
    assert [(site.position, at) for site, at in placed] == expected


@pytest.mark.parametrize(
    ("text", "layout", "message"),
    [
        ("encoder.0.resid@6", TEXT, "positions 0 to 5"),
        ("encoder.0.resid@-7", TEXT, "positions 0 to 5"),
        ("encoder.0.resid@verb", TEXT, "no position 'verb'.*text, answer, noun"),
        ("encoder.0.resid@image", TEXT, "no position 'image'"),
        ("vision.0.resid@text", IMAGE, "no position 'text'"),
        ("vision.0.resid@image[2,0]", IMAGE, "2 rows and 2 columns"),
    ],
)
def test_a_position_that_is_not_there_is_refused(text, layout, message):
    with pytest.raises(SiteError, match=message):
        place(Site.parse(text), layout)


def test_role_of_a_position():
    roles = {p: Site.parse(f"encoder.0.resid@{p}").role for p in ("answer", "answer*", "last", "3", "*")}
    assert roles == {"answer": "answer", "answer*": "answer", "last": None, "3": None, "*": None}


def test_windows_of_layers():
    shapes = {"encoder": Shape(4, ("resid", "attn"), {"attn": 2}, 8, 4)}
    found = expand([Site.parse("encoder.*/3.attn.h1@answer")], shapes)
    assert [str(s) for s in found] == [f"encoder.{n}/3.attn.h1@answer" for n in range(4)]
    assert [s.center for s in found] == [0, 1, 2, 3] and found[0].window == 3
    assert [s.layer for s in members(found[0], shapes)] == ["0", "1"]
    assert [s.layer for s in members(found[2], shapes)] == ["1", "2", "3"]
    assert [str(s) for s in expand([Site.parse("encoder.1-2/1.resid@*")], shapes)] == [
        "encoder.1.resid@*",
        "encoder.2.resid@*",
    ]
    with pytest.raises(SiteError, match="an odd window"):
        Site.parse("encoder.3/2.resid@*")
    with pytest.raises(SiteError, match="a window of layers; expected one layer"):
        _ = found[0].point
    vision = {"vision": Shape(4, ("resid", "output"), {}, 8, 4)}
    with pytest.raises(SiteError, match="there is one 'output'"):
        expand([Site.parse("vision.*/3.output@all")], vision)


def layout_of(words: str, roles: dict[str, tuple[int, ...]], fed: int = 0) -> Layout:
    """A decoder that reads two tokens, an image of two patches, an end of line, and the words."""
    tokens = ("USER", ":", "0,0", "0,1", "\\n", *words.split())
    image = (2, 3, 4)
    text = tuple(n for n in range(len(tokens)) if n not in image)
    return Layout(tokens, text, roles, {2: (0, 0), 3: (0, 1)}, image, readout=len(tokens) - 1, fed=fed)


def test_a_pattern_has_no_single_place():
    for text, why in (
        ("encoder.*.resid@all", r"'\*' is a pattern of layers; expected one here"),
        ("encoder.0-2.resid@all", "'0-2' is a pattern of layers"),
        ("encoder.*/3.resid@all", "a window of layers|pattern of layers"),
    ):
        with pytest.raises(SiteError, match=why):
            _ = Site.parse(text).point
    with pytest.raises(SiteError, match=r"'\*' is a pattern of units"):
        _ = Site.parse("encoder.1.attn.h*@all").index


def test_slots_meet_over_prompts_of_other_lengths():
    short = layout_of("is it red ? ASSISTANT :", {"answer": (7,)})
    assert slots(short) == (
        "0",
        "1",
        "image[0,0]",
        "image[0,1]",
        "image.2",
        "2",
        "3",
        "answer",
        "-3",
        "-2",
        "readout",
    )
    long = layout_of("is this big thing red or dark blue ? ASSISTANT :", {"answer": (9,), "foil": (11, 12)})
    assert slots(long) == (
        "0",
        "1",
        "image[0,0]",
        "image[0,1]",
        "image.2",
        "2",
        "3",
        "4",
        "5",
        "answer",
        "answer+1",
        "foil[0]",
        "foil[1]",
        "-3",
        "-2",
        "readout",
    )
    colons = [
        [name for name, token in zip(slots(x), x.tokens, strict=True) if token == ":"] for x in (short, long)
    ]
    assert colons == [["1", "readout"]] * 2, "two colons of one template are two columns"


def test_slots_of_what_the_answer_begins_with():
    """Both options begin with two tokens, which are fed behind the prompt."""
    fed = layout_of("red ? : a plain", {"answer": (5,)}, fed=2)
    assert slots(fed)[5:] == ("answer", "-2", "-1", "fed[0]", "readout")


def test_slots_of_a_prompt_without_roles():
    """What the template writes behind it is counted from the right, so that it meets over examples."""
    for words in ("what color ? ASSISTANT :", "what color is that ? ASSISTANT :"):
        names = slots(replace(layout_of(words, {}), behind=2))
        assert names[-3:] == (str(len(names) - 6), "-2", "readout")


def test_slots_of_towers_without_text():
    assert slots(IMAGE) == ("0", "image[0,0]", "image[0,1]", "image[1,0]", "image[1,1]")
    assert slots(Layout(("query 0", "query 1"))) == ("0", "1")


@pytest.mark.parametrize(
    "roles",
    [
        {},
        {"a": (0,)},
        {"a": (10,)},
        {"a": (5, 6), "b": (6, 7)},
        {"b": (6,), "a": (5, 6, 7)},
        {"a": (7,), "b": (1,), "c": (9, 10)},
        {"a": (6, 8)},
    ],
)
@pytest.mark.parametrize("fed", [0, 1, 2])
def test_no_two_positions_of_one_example_share_a_slot(roles, fed):
    names = slots(layout_of("a b c d e f", roles, fed))
    assert len(set(names)) == len(names) == 11
    assert names[-1] == "readout"


def test_readout_is_where_the_answer_is_predicted():
    layout = layout_of("red ? :", {})
    assert place(Site.parse("decoder.0.resid@readout"), layout)[0][1] == (7,)
    with pytest.raises(SiteError, match="nothing is read out in the encoder tower"):
        place(Site.parse("encoder.0.resid@readout"), TEXT)
