"""Every cell of every table is a plain group-by over the rows; which rows, in which order, how sure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from models import example, llava, picture

import vlmscope
from vlmscope import stats
from vlmscope.data.example import find_roles
from vlmscope.errors import DataError
from vlmscope.report.ranking import strongest
from vlmscope.studies import tables
from vlmscope.studies.known import knows
from vlmscope.studies.run_folder import EFFECTS, typed

WORDS = {"answer": "red", "foil": "blue", "noun": "circle"}


def by_hand(rows, column, value):
    """(layer, column) -> mean over examples of the mean within an example, and how many examples."""
    found = {}
    for row in rows.to_dict("records"):
        of = found.setdefault((row["layer"], row[column]), {})
        of.setdefault(row["example"], []).append(row[value])
    return {
        cell: (sum(sum(some) / len(some) for some in of.values()) / len(of), len(of))
        for cell, of in found.items()
    }


def assert_cells(table, wanted):
    """Every cell that there is, and nulls in all others."""
    for layer in table.index:
        for column in table.columns:
            mean, _ = wanted.get((layer, column), (np.nan, 0))
            assert table.loc[layer, column] == pytest.approx(mean, rel=1e-12, nan_ok=True)
    assert {(layer, c) for layer, c in wanted} <= {(r, c) for r in table.index for c in table.columns}
    counts = {}
    for (_, column), (_, n) in wanted.items():
        counts[column] = max(counts.get(column, 0), n)
    assert {c: n for c, n in table.attrs["n"].items() if n} == counts


def repeated():
    """Prompts of several lengths in which words come twice."""
    prompts = [
        "is the red circle red or blue?",
        "is this circle red or blue?",
        "is this blue circle blue or a red circle?",
        "is this a circle or is this red or blue?",
    ]
    base = vlmscope.examples("states", limit=4)
    return [
        replace(
            one,
            id=f"r{n}",
            clean_prompt=prompt,
            corrupt_prompt=None,
            answer="red",
            foil="blue",
            roles=find_roles(prompt, WORDS),
        )
        for n, (one, prompt) in enumerate(zip(base, prompts, strict=True))
    ]


def swept(name):
    model = vlmscope.load(name, device="cpu")
    tower = "decoder" if name == "toy-llava" else "encoder"
    kind = "attn" if name == "toy-llava" else "cross"
    sites = [
        f"{tower}.*.resid@text*",
        f"{tower}.*.resid@answer",
        f"{tower}.*.resid@answer*",
        f"{tower}.*.resid@text",
        f"{tower}.*/3.resid@text*",
        f"{tower}.*.mlp@text*",
        f"{tower}.*.{kind}.h*@text*",
        f"{tower}.*.{kind}.h*@foil",
    ]
    sites += ["decoder.*.resid@*", "decoder.*.cross.h*@readout"] if name == "toy-blip" else []
    sites += ["decoder.*.resid@image*"] if name == "toy-llava" else []
    given = [*vlmscope.examples("states", limit=12), *repeated()]
    return vlmscope.sweep(model, given, sites)


@pytest.fixture(scope="module")
def effects():
    return {name: swept(name) for name in ("toy-llava", "toy-blip")}


@pytest.mark.parametrize("value", tables.VALUES[:-1])  # the last is of attributions
@pytest.mark.parametrize("name", ["toy-llava", "toy-blip"])
def test_every_cell_is_a_group_by(effects, name, value):
    rows = effects[name]
    rows = rows[~rows["site"].str.contains("/", regex=False)]
    for tower, some in rows.groupby("tower"):
        whole, heads = some[some["unit"].isna()], some[some["unit"].notna()]
        for kind, these in whole.groupby("kind"):
            table = vlmscope.token_table(effects[name], tower=tower, kind=kind, value=value)
            assert_cells(table, by_hand(these, "slot", value))
        for kind, these in heads.groupby("kind"):
            these = these.assign(head=these["unit"].str[1:].astype(int))
            for slot in these["slot"].unique():
                table = vlmscope.head_table(effects[name], tower=tower, kind=kind, slot=slot, value=value)
                assert_cells(table, by_hand(these[these["slot"] == slot], "head", value))
                assert table.attrs["slot"] == slot


def test_cells_with_their_intervals_are_those_of_the_table(effects):
    rows = effects["toy-llava"]
    cells = tables.cells_of(rows, kind="resid", intervals=True)
    plain = rows[rows["unit"].isna() & (rows["kind"] == "resid")]
    plain = plain[~plain["site"].str.contains("/", regex=False)]
    for (layer, slot), (mean, n) in by_hand(plain, "slot", "logit_diff").items():
        (row,) = cells[(cells["layer"] == layer) & (cells["slot"] == slot)].to_dict("records")
        assert (row["mean"], row["n"]) == (pytest.approx(mean, rel=1e-12), n)
        each = plain[(plain["layer"] == layer) & (plain["slot"] == slot)]
        scores = each.groupby("example")["logit_diff"].mean()
        if n == 1:
            assert np.isnan(row["low"]) and np.isnan(row["sd"])
            continue
        assert row["sd"] == pytest.approx(float(np.std(scores, ddof=1)))
        low, high = stats.interval(scores.to_numpy()[:, None])
        wanted = pytest.approx(low[0], nan_ok=True), pytest.approx(high[0], nan_ok=True)
        assert (row["low"], row["high"]) == wanted


def test_no_two_positions_of_an_example_are_one_column(effects):
    for rows in effects.values():
        single = rows[rows["position"].notna()]
        assert (single.groupby(["tower", "example", "slot"])["position"].nunique() == 1).all()
        assert "other" not in set(rows["slot"])


def test_the_two_colons_of_a_template_are_two_columns(effects):
    table = vlmscope.token_table(effects["toy-llava"], kind="resid")
    assert table.loc[3, "2"] == 0.0 and table.loc[3, "readout"] > 10
    assert table.attrs["labels"]["2"] == "2 :" and table.attrs["labels"]["readout"] == "readout :"
    assert table.attrs["n"]["2"] == table.attrs["n"]["readout"] == 16


def test_the_heads_of_states_over_all_examples():
    """Worked out with all 12 examples: by `@last` and the text of tokens only 4 would count."""
    model = vlmscope.load("toy-llava", device="cpu")
    rows = vlmscope.sweep(model, vlmscope.examples("states", limit=12), "decoder.*.attn.h*@text*")
    table = vlmscope.head_table(rows)
    assert table.attrs["n"] == dict.fromkeys(range(4), 12)
    assert table.attrs["slot"] == "readout"
    assert table.loc[2, 1] == pytest.approx(5.91, abs=0.01) == table.max().max()
    assert table.loc[3, 2] == pytest.approx(4.45, abs=0.01)


def test_several_pictures():
    model = llava()
    words = "is this circle red or blue ?", "is this dark circle red or blue ?"
    given = [
        example(
            prompt,
            id=f"e{n}",
            corrupt_prompt=None,
            clean_image=picture(n),
            corrupt_image=picture(9 + n),
            more_images=tuple(picture(20 + n + k) for k in range(n % 2 + 1)),
        )
        for n, prompt in enumerate((*words, *words))
    ]
    rows = vlmscope.sweep(model, given, ["decoder.*.resid@*", "decoder.*.attn.h*@*"])
    assert rows["example"].nunique() == 4
    table = vlmscope.token_table(rows)
    assert_cells(table, by_hand(rows[rows["unit"].isna()], "slot", "logit_diff"))
    order = list(table.columns)
    cells = [slot for slot in order if slot.startswith("image[")]
    assert cells == [f"image[{r},{c}]" for r in range(3) for c in range(3)]
    assert order.index("image[0,0]") < order.index("noun") < order.index("answer")
    assert table.attrs["n"]["readout"] == 4 and order[-1] == "readout"
    heads = rows[rows["unit"].notna() & (rows["slot"] == "readout")]
    heads = heads.assign(head=heads["unit"].str[1:].astype(int))
    assert_cells(vlmscope.head_table(rows), by_hand(heads, "head", "logit_diff"))


# --- columns ---------------------------------------------------------------------------------


def test_the_order_of_columns(effects):
    table = vlmscope.token_table(effects["toy-llava"], kind="resid")
    order = list(table.columns)
    cells = [f"image[{r},{c}]" for r in range(6) for c in range(6)]
    start = order.index("image[0,0]")
    assert order[start : start + 36] == cells and order[start - 1] == "2"
    assert order[start + 36] == "3"
    for role in ("noun", "answer", "foil"):
        behind = [slot for slot in order if slot.startswith(f"{role}+")]
        at = order.index(role)
        assert order[at : at + 1 + len(behind)] == [role, *[f"{role}+{n}" for n in range(1, len(behind) + 1)]]
    right = [slot for slot in order if slot.startswith("-")]
    assert right == sorted(right, key=int) and order[-len(right) - 2 : -2] == right
    assert order[-2:] == ["readout", "text"]


def test_roles_stand_in_the_order_of_most_examples_whatever_their_length():
    """A long example with the roles the other way round does not decide, though its positions are high."""
    places = [
        ("a", ["0", "noun", "answer", "foil"], 0),
        ("b", ["0", "noun", "answer", "foil"], 0),
        ("c", ["0", "foil", "answer", "noun"], 500),
    ]
    rows = pd.DataFrame(
        [
            {"example": e, "slot": slot, "position": n + add}
            for e, slots, add in places
            for n, slot in enumerate(slots)
        ]
    )
    assert tables.slot_order(rows) == ["0", "noun", "answer", "foil"]


def test_slots_of_every_form_in_order():
    slots = [
        "0",
        "image[0,0]",
        "image[0,1]",
        "image[1,0]",
        "image.0",
        "1",
        "noun[0]",
        "noun[1]",
        "noun+1",
        "answer",
        "answer+1",
        "answer+2",
        "-11",
        "-2",
        "fed[0]",
        "readout",
    ]
    rows = pd.DataFrame({"example": "a", "slot": slots, "position": range(len(slots))})
    whole = pd.DataFrame({"example": "a", "slot": ["noun", "image", "all"], "position": None})
    shuffled = pd.concat([rows.sample(frac=1, random_state=0), whole])
    assert tables.slot_order(shuffled) == [*slots, "all", "image", "noun"]


def test_a_vision_tower_with_its_class_token():
    slots = ["0", "image[0,0]", "image[0,1]", "3"]
    rows = pd.DataFrame({"example": "a", "slot": slots, "position": range(4)})
    assert tables.slot_order(rows) == slots


# --- which rows ------------------------------------------------------------------------------


def test_where_heads_are_read_out(effects):
    blip, lava = effects["toy-blip"], effects["toy-llava"]
    assert vlmscope.head_table(blip).attrs["slot"] == "answer"
    assert vlmscope.head_table(blip, tower="decoder").attrs["slot"] == "readout"
    assert vlmscope.head_table(lava).attrs["slot"] == "readout"
    assert vlmscope.head_table(lava, slot="last").attrs["slot"] == "readout"
    assert vlmscope.head_table(lava, slot="answer").attrs["slot"] == "answer"
    assert "nothing is read out in this tower" in tables.slot_words("answer", "encoder")
    assert "nothing" not in tables.slot_words("answer", "decoder")


def test_a_decoder_that_was_not_patched_there_has_no_read_out(effects):
    """Its answer's token does not stand for it, nor the last one that happens to be in the table."""
    rows = effects["toy-llava"].query("slot != 'readout'")
    with pytest.raises(DataError, match="nothing was patched at the slot 'readout' of the decoder"):
        vlmscope.head_table(rows)


def test_an_encoder_without_an_answer_is_read_at_its_last_token(effects):
    rows = effects["toy-blip"].query("tower == 'encoder' and slot != 'answer'")
    rows = rows[rows["unit"].notna()]
    name, found = tables.at_slot(rows)
    assert name == "last" and set(found["token"]) == {"[SEP]"}


def test_the_last_that_was_patched_is_not_the_last(effects):
    """Where only the answer's token was patched, nothing is at the last one, and nothing is called so."""
    for name, tower in (("toy-blip", "encoder"), ("toy-llava", "decoder")):
        rows = effects[name].query(f"tower == '{tower}' and slot == 'answer'")
        with pytest.raises(DataError, match="nothing was patched at the slot 'last' .* holds answer"):
            tables.at_slot(rows, "last")


def test_what_is_taken_where_nothing_is_named(effects):
    blip, lava = effects["toy-blip"], effects["toy-llava"]
    assert vlmscope.token_table(blip).attrs["tower"] == "encoder"
    assert vlmscope.token_table(lava).attrs["tower"] == "decoder"
    assert vlmscope.token_table(lava).attrs["kind"] == "resid"
    assert vlmscope.head_table(lava).attrs["kind"] == "attn"
    only = lava[lava["kind"] == "mlp"]
    assert vlmscope.token_table(only).attrs["kind"] == "mlp"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tower": "encoder"}, "no patches of whole kinds with tower 'encoder' .* it holds decoder"),
        ({"kind": "cross"}, "with kind 'cross' in the table; it holds resid, mlp"),
        ({"value": "loudness"}, "no value 'loudness' .* expected logit_diff, effect"),
    ],
)
def test_what_the_table_does_not_hold_is_one_line(effects, asked, message):
    with pytest.raises(DataError, match=message) as found:
        vlmscope.token_table(effects["toy-llava"], **asked)
    assert "\n" not in str(found.value)


def test_more_that_is_not_held(effects):
    rows = effects["toy-llava"]
    with pytest.raises(DataError, match="nothing was patched at the slot 'verb' .* holds 0, 1"):
        vlmscope.head_table(rows, slot="verb")
    with pytest.raises(DataError, match="no patches of heads in single layers"):
        vlmscope.head_table(rows[rows["unit"].isna()])
    with pytest.raises(DataError, match="it holds nothing"):
        vlmscope.token_table(rows.head(0))
    with pytest.raises(DataError, match="'effect' is null in all rows .* too little in LD"):
        vlmscope.token_table(rows.assign(effect=np.nan), value="effect")
    both = pd.concat([rows, rows.assign(corruption="text")])
    with pytest.raises(DataError, match="the corruptions image, text, which are not averaged"):
        vlmscope.token_table(both)


@pytest.mark.parametrize("draw", [vlmscope.token_table, vlmscope.head_table])
def test_where_a_column_is_null_those_with_values_are_named(effects, draw):
    rows = effects["toy-blip"].assign(logit_diff=np.nan, ld_change=np.nan, effect=np.nan)
    said = (
        "'logit_diff' is null in all rows of .*; columns with values: p_restored, p_patched, p_change, value"
    )
    with pytest.raises(DataError, match=said):
        draw(rows)
    assert draw(rows, value="p_change").notna().any(axis=None)


def test_nulls_do_not_count(effects):
    rows = effects["toy-llava"].copy()
    rows.loc[rows["example"] == "r0", "effect"] = np.nan
    table = vlmscope.token_table(rows, kind="resid", value="effect")
    assert table.attrs["n"]["readout"] == 15
    rows = rows[rows["example"] != "r0"]
    pd.testing.assert_frame_equal(
        table, vlmscope.token_table(rows, kind="resid", value="effect")[table.columns]
    )


def test_the_gap_is_that_of_the_baselines(tmp_path):
    model = vlmscope.load("toy-blip", device="cpu")
    vlmscope.sweep(model, vlmscope.examples("states", limit=5), "encoder.*.resid@text*", out=tmp_path / "r")
    run = vlmscope.read_run(tmp_path / "r")
    base = run.baselines()
    wanted = (base["ld_clean"] - base["ld_corrupt"]).mean()
    assert tables.mean_gap(run.effects()) == pytest.approx(wanted, rel=1e-9)
    assert vlmscope.token_table(run.effects()).attrs["gap"] == pytest.approx(wanted, rel=1e-9)


# --- intervals -------------------------------------------------------------------------------


def test_the_gap_is_not_told_from_effects_of_another_metric():
    given = vlmscope.load("toy-blip"), vlmscope.examples("states", limit=3), "encoder.*.resid@text*"
    assert vlmscope.token_table(vlmscope.sweep(*given)).attrs["gap"] > 1
    assert vlmscope.token_table(vlmscope.sweep(*given, metric="p")).attrs["gap"] is None


def test_an_interval_depends_on_its_examples_alone(effects):
    rows = effects["toy-llava"]
    whole = tables.cells_of(rows, kind="resid", intervals=True)
    few = rows[rows["slot"].isin(["readout", "noun"])].sample(frac=1, random_state=1)
    alone = tables.cells_of(few, kind="resid", intervals=True)
    both = whole.merge(alone, on=["layer", "slot"])
    assert len(both) == len(alone)
    for end in ("mean", "low", "high"):
        np.testing.assert_allclose(both[f"{end}_x"], both[f"{end}_y"], rtol=1e-12)


# --- sites that can be swept again -----------------------------------------------------------


def test_the_strongest_sites_can_be_swept_again():
    """Each expression gives, over the same examples, the mean and n that stand beside it."""
    model = vlmscope.load("toy-llava", device="cpu")
    given = vlmscope.examples("states", limit=6)
    rows = vlmscope.sweep(model, given, ["decoder.*.resid@text*", "decoder.*/3.mlp@text*"])
    found = strongest(rows, n=1000)
    assert len(found) == len(rows.groupby(["layer", "kind", "slot"]))
    can = found[found["site"].str.contains("@")]
    cannot = set(found["slot"]) - set(can["slot"])
    assert cannot == {"noun+1", "answer+1", "answer+2", "foil+1", "foil+2"}
    at = dict(zip(can["slot"], can["site"].str.partition("@")[2], strict=True))
    assert at["readout"] == "readout" and at["noun"] == "noun" and at["2"] == "2" and at["3"] == "39"
    assert (at["-2"], at["-3"]) == ("-2", "-3")
    again = strongest(vlmscope.sweep(model, given, list(can["site"])), n=1000)
    both = can.merge(again, on=["site"])
    assert len(both) == len(can)
    np.testing.assert_allclose(both["mean_x"], both["mean_y"], atol=1e-4)
    assert (both["n_x"] == both["n_y"]).all() and both["low_x"].isna().all()  # six examples have no interval


def test_sites_of_few_examples_come_last():
    base = {
        "corruption": "image",
        "tower": "encoder",
        "layer": 0,
        "kind": "resid",
        "token": "x",
        "p_patched": 0.5,
        "p_restored": 0.1,
    }
    some = [
        base
        | {
            "example": f"e{n}",
            "slot": slot,
            "position": place,
            "role": slot if slot == "noun" else None,
            "site": f"encoder.0.resid@{place}",
            "logit_diff": value,
            "effect": value,
        }
        for n in range(6)
        for slot, place, value in (("noun", 1, 1.0), ("-1", 2, 0.1), ("noun+1", 3, 50.0))
        if slot != "noun+1" or n == 0
    ]
    rows = typed(pd.DataFrame(some).reindex(columns=EFFECTS.names), EFFECTS)
    found = strongest(rows)
    assert found["slot"].tolist() == ["noun", "-1", "noun+1"]
    assert found["n"].tolist() == [6, 6, 1]
    assert found["low"].isna().all()


# --- what the model knows --------------------------------------------------------------------


def told(n=20, **changes):
    row = {
        "corruption": "image",
        "p_clean": 0.9,
        "p_corrupt": 0.2,
        "ld_clean": 3.0,
        "ld_corrupt": -1.0,
        "answer_token": "red",
        "foil_token": "blue",
        "predicted": "red",
        "correct": True,
        "excluded": False,
        "reason": None,
        **changes,
    }
    return pd.DataFrame([row | {"example": f"e{n}"} for n in range(n)])


def test_a_model_that_knows_is_said_to():
    known = knows(told())
    assert known.severity == "fine"
    assert known.sentences == [
        "20 examples, 100% answered rightly; P(answer) 0.900 clean and 0.200 corrupt; mean gap LD(clean) − "
        "LD(corrupt) +4 logits"
    ]


def test_what_was_not_run_is_not_said():
    nan = float("nan")
    known = knows(told(p_corrupt=nan, ld_corrupt=nan))
    assert (known.severity, known.sentences) == (
        "fine",
        ["20 examples, 100% answered rightly; P(answer) 0.900 clean"],
    )
    facts = knows(told(ld_clean=nan, ld_corrupt=nan)).sentences[0]
    assert facts.endswith("P(answer) 0.900 clean and 0.200 corrupt")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"correct": False, "predicted": "dog"}, r"fewer than half of the examples rightly \(0%\)"),
        ({"ld_clean": -0.99}, "LD hardly falls"),
        ({"ld_clean": -4.0}, r"LD rises when the input is corrupted \(by 3 logits\)"),
        ({"answer_token": "▁r", "foil_token": "▁b"}, "split into small pieces .*'▁r' against '▁b'"),
        ({"answer_token": "Ġst", "predicted": "striped"}, "split into small pieces"),
        ({"answer_token": "##r", "predicted": "dog", "correct": False}, "split into small pieces"),
    ],
)
def test_a_model_that_does_not_know(changes, why):
    known = knows(told(**changes))
    assert known.severity == "unknown"
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(known.sentences[1])


@pytest.mark.parametrize(
    ("token", "foil", "said"),
    [
        ("▁red", "▁blue", "red"),
        ("Ġred", "Ġblue", "a plain red circle"),
        ("##happy", "##kind", "unhappy"),
        ("2", "3", "2"),
        ("▁no", "▁yes", "no"),
        ("▁A", "▁B", "A"),
        ("红", "蓝", "红色"),
        ("strip", "dot", "striped"),
    ],
)
def test_words_that_are_whole_enough(token, foil, said):
    base = told(answer_token=token, foil_token=foil, predicted=said)
    assert knows(base).severity == "fine"


def test_few_examples_are_said():
    known = knows(told(stats.FEWEST - 1))
    assert known.severity == "few" and "fewer than 10 examples" in known.sentences[1]
    assert knows(told(stats.FEWEST)).severity == "fine"


def test_examples_that_selection_leaves_out_count_as_answered():
    wrong = told(30, correct=False, excluded=True, predicted="dog", ld_clean=np.nan)
    known = knows(pd.concat([told(20), wrong], ignore_index=True))
    assert "20 examples, 40% of 50 answered rightly" in known.sentences[0]
    assert known.severity == "unknown"
    nothing = knows(told(3, excluded=True, correct=None))
    assert nothing == ("unknown", ["no example was patched"])
