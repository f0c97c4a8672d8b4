"""The site language: parsing, printing, expanding, placing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlmscope.errors import SiteError
from vlmscope.layout import Layout, slots
from vlmscope.sites import Pattern, Shape, Site, expand, place

SHAPES = {
    "vision": Shape(2, ("resid_pre", "attn", "mlp", "resid", "output"), {"attn": 3}, 5, 6),
    "encoder": Shape(12, ("resid_pre", "attn", "cross", "mlp", "resid"), {"attn": 2, "cross": 2}, 4, 4),
}
TEXT = Layout(
    ("[CLS]", "the", "un", "##happy", "cat", "[SEP]"), (0, 1, 2, 3, 4, 5), {"answer": (2, 3), "noun": (4,)}
)


def placed(text, layout=None):
    """The sites of one expression, in the two towers above or in one layout of its tower."""
    (site,) = expand([Pattern.parse(text)], SHAPES)
    return place(site, {"encoder": TEXT, "vision": IMAGE} if layout is None else {site.tower: layout})


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
    assert str(Pattern.parse(text)) == text
    assert Pattern.parse(str(Pattern.parse(text))) == Pattern.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("encodr.*.resid@*", r"'encodr' \(character 1\) is not a tower; did you mean 'encoder'"),
        ("encoder.x.resid@*", r"'x' \(character 9\) is not a layer"),
        ("encoder.1.crss@*", r"'crss' \(character 11\) is not a kind; did you mean 'cross'"),
        ("encoder.1.cross.x2@*", r"'x2' \(character 17\) is not a unit"),
        ("encoder.1.resid.h2@*", "only attn and cross have heads"),
        ("encoder.1.attn.n2@*", "only mlp have neurons"),
        ("encoder.1.cross.k2@*", "only attn have keys"),
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
        Pattern.parse(text)


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
        expand([Pattern.parse(text)], SHAPES)


def test_expand_lists_each_layer_and_unit_once():
    sites = expand([Pattern.parse("encoder.*.cross.h*@*"), Pattern.parse("encoder.1.cross.h0@*")], SHAPES)
    assert len(sites) == 24
    assert str(sites[3]) == "encoder.1.cross.h1@*"
    assert [str(s) for s in expand([Pattern.parse("vision.*.output@all")], SHAPES)] == ["vision.1.output@all"]


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
    assert [(site.position, site.positions) for site in placed(f"encoder.0.resid@{position}")] == expected


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("image[1,0]", [("image[1,0]", (3,))]),
        ("image", [("image", (1, 2, 3, 4))]),
        ("image*", [("1", (1,)), ("2", (2,)), ("3", (3,)), ("4", (4,))]),
    ],
)
def test_positions_of_an_image(position, expected):
    assert [(site.position, site.positions) for site in placed(f"vision.0.resid@{position}")] == expected


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
        placed(text, layout)


def test_roles_that_an_expression_names():
    roles = {p: Pattern.parse(f"encoder.0.attn@{p}").roles for p in ("answer", "noun*", "last", "3", "*")}
    assert roles == {"answer": ["answer"], "noun*": ["noun"], "last": [], "3": [], "*": []}
    both = Pattern.parse("encoder.0.attn@last<verb + encoder.0.mlp@noun")
    assert both.roles == ["verb", "noun"]


def test_windows_of_layers():
    shapes = {"encoder": Shape(4, ("resid", "attn"), {"attn": 2}, 8, 4)}
    found = expand([Pattern.parse("encoder.*/3.attn.h1@answer")], shapes)
    assert [str(s) for s in found] == [f"encoder.{n}/3.attn.h1@answer" for n in range(4)]
    assert [s.layer for s in found] == [0, 1, 2, 3] and found[0].window == 3
    assert [part.layer for part in found[0].parts] == [0, 1]
    assert [part.layer for part in found[2].parts] == [1, 2, 3]
    assert [str(s) for s in expand([Pattern.parse("encoder.1-2/1.resid@*")], shapes)] == [
        "encoder.1.resid@*",
        "encoder.2.resid@*",
    ]
    with pytest.raises(SiteError, match="an odd window"):
        Pattern.parse("encoder.3/2.resid@*")
    vision = {"vision": Shape(4, ("resid", "output"), {}, 8, 4)}
    with pytest.raises(SiteError, match="there is one 'output'"):
        expand([Pattern.parse("vision.*/3.output@all")], vision)


def layout_of(words: str, roles: dict[str, tuple[int, ...]], fed: int = 0) -> Layout:
    """A decoder that reads two tokens, an image of two patches, an end of line, and the words."""
    tokens = ("USER", ":", "0,0", "0,1", "\\n", *words.split())
    image = (2, 3, 4)
    text = tuple(n for n in range(len(tokens)) if n not in image)
    return Layout(tokens, text, roles, {2: (0, 0), 3: (0, 1)}, image, readout=len(tokens) - 1, fed=fed)


def test_sets_of_units_and_sums_are_one_patch():
    (heads,) = expand([Pattern.parse("encoder.3.attn.h[1,0]@answer")], SHAPES)
    assert (heads.units, str(heads)) == ((0, 1), "encoder.3.attn.h[0,1]@answer")
    text = "encoder.3.attn.h1@answer + encoder.5/3.mlp@noun + vision.1.output@image"
    (site,) = placed(text)
    assert str(Pattern.parse(text)) == str(site) == text
    places = [(part.tower, part.layer, part.kind, part.positions) for part in site.parts]
    assert places == [
        ("encoder", 3, "attn", (2, 3)),
        *(("encoder", layer, "mlp", (4,)) for layer in (4, 5, 6)),
        ("vision", 1, "output", (1, 2, 3, 4)),
    ]
    with pytest.raises(SiteError, match="each part is one layer and one unit"):
        expand([Pattern.parse("encoder.*.attn@all + encoder.0.mlp@all")], SHAPES)
    with pytest.raises(SiteError, match="each part is one position"):
        placed("encoder.0.attn@* + encoder.0.mlp@all")


def test_keys_and_values_count_key_value_heads():
    shapes = {"decoder": replace(SHAPES["encoder"], heads={"attn": 4, "cross": 4}, groups=2)}
    count = {part: len(expand([Pattern.parse(f"decoder.0.attn.{part}*@all")], shapes)) for part in "hqkvp"}
    assert count == {"h": 4, "q": 4, "k": 2, "v": 2, "p": 4}
    with pytest.raises(SiteError, match="no key 2; this tower has keys 0 to 1"):
        expand([Pattern.parse("decoder.0.attn.k2@all")], shapes)


@pytest.mark.parametrize("text", ["decoder.3.attn.h1@last<image[2,3]", "encoder.*/9.attn@answer<image*"])
def test_edges_of_attention_print_back(text):
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize("text", ["encoder.0.mlp@last<image", "encoder.0.attn.q1@last<image"])
def test_only_attention_has_edges(text):
    with pytest.raises(SiteError, match="an edge is of attn or cross"):
        Pattern.parse(text)


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
    (site,) = place(Site("decoder", 0, "resid", position="readout"), {"decoder": layout})
    assert site.positions == (7,)
    with pytest.raises(SiteError, match="nothing is read out in the encoder tower"):
        placed("encoder.0.resid@readout")


def test_a_role_does_not_take_a_name_of_the_language():
    """A column called `text` or `image` is one of the data's; `@text` and `@image` stay what they are."""
    layout = replace(IMAGE, text=(0,), roles={"text": (3,), "image": (2,)})
    assert placed("vision.0.resid@text", layout)[0].positions == (0,)
    assert placed("vision.0.resid@image", layout)[0].positions == (1, 2, 3, 4)


def test_a_role_may_begin_with_a_capital():
    assert Pattern.parse("encoder.0.resid@Nuon").roles == ["Nuon"]
