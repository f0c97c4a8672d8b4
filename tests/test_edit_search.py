"""Edits: the fewest columns that hold, random columns beside them, and what else is asked than a caption."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import llava, picture

from vlmscope import neurons
from vlmscope.data.example import Example
from vlmscope.errors import ExampleError, ModelError, VlmscopeError
from vlmscope.neurons import WeightEdit, assessment, edits
from vlmscope.neurons.captions import given_caption, inputs_of
from vlmscope.neurons.solvers import Task, no_deltas, steepest
from vlmscope.neurons.turns import Turn, of_concept

ASK = "what is this ?"


def example(n: int, *shows: str, prompt: str = "is this red or blue ?", answer: str = "red") -> Example:
    return Example(str(n), picture(n), prompt, answer, "blue", shows=frozenset(shows))


@pytest.fixture(scope="module")
def model():
    return llava(dtype=torch.float32)


@pytest.fixture
def says(model, monkeypatch):
    """Captions as the test has them: `red` for even numbers, `green` for others."""

    def captions(model, examples, prompt=None, *, found=None, variant="input"):
        for one in examples:
            yield given_caption(
                model, one, "red circle" if int(one.id) % 2 == 0 else "green circle", prompt=prompt
            )

    monkeypatch.setattr(edits, "caption_pictures", captions)
    monkeypatch.setattr(edits, "_without_picture", lambda *given: None)
    return [example(n, "red" if n % 4 == 0 else "green") for n in range(16)]


@pytest.mark.parametrize(
    ("shares", "tried", "columns"),
    [
        ([(1.0, 1.0)], 1, 1),
        ([(0.5, 1.0), (1.0, 0.9), (0.95, 0.96)], 3, 4),
        ([(0.5, 0.6), (0.7, 0.9), (0.9, 0.6), (0.6, 0.7)], 4, 2),
    ],
)
def test_the_fewest_columns_that_hold(model, says, monkeypatch, shares, tried, columns):
    """1, 2, 4 … up to the limit, until both shares are there; else the number that comes nearest."""
    script = iter(shares)
    monkeypatch.setattr(edits, "_held", lambda model, columns, checks: next(script))
    monkeypatch.setattr(edits, "learned", lambda task, generator: None)
    made = neurons.edit(model, says, "red", "blue", prompt=ASK, neurons=6)
    assert len(made.neurons) == columns
    assert len(made.about["tried"].split("; ")) == tried
    assert next(script, None) is None


def test_counts_end_with_the_limit():
    assert edits._counts(1) == [1]
    assert edits._counts(6) == [1, 2, 4, 6]
    assert edits._counts(8) == [1, 2, 4, 8]


def test_what_sees_whether_it_holds_is_not_what_it_is_made_on(model, says, monkeypatch):
    seen: dict[str, set[bytes]] = {"made on": set(), "checks": set()}

    def pixels(inputs):
        return inputs.tensors["pixel_values"].numpy().tobytes()

    def keep(task, generator):
        seen["made on"] |= {pixels(one.fed) for one in task.captions}

    def held(model, columns, checks):
        seen["checks"] |= {pixels(one.inputs) for one in checks}
        return 1.0, 1.0

    monkeypatch.setattr(edits, "learned", keep)
    monkeypatch.setattr(edits, "_held", held)
    neurons.edit(model, says, "red", "blue", prompt=ASK, neurons=2)
    assert len(seen["checks"]) == 4 and len(seen["made on"]) == 12
    assert not seen["checks"] & seen["made on"]


def test_an_edit_that_does_not_change_the_answer_does_not_hold(model, says, monkeypatch):
    """What is checked is what the model says with the columns."""
    monkeypatch.setattr(edits, "learned", lambda task, generator: None)
    monkeypatch.setattr(edits, "spoken", lambda model, caption: caption.text.strip())
    monkeypatch.setattr(model, "answer", lambda inputs: "red circle", raising=False)
    made = neurons.edit(model, says, "red", "blue", prompt=ASK, neurons=2)
    assert made.about["tried"].startswith("1: 0.00 of changes, 0.00 of the rest")
    monkeypatch.setattr(model, "answer", lambda inputs: "blue circle")
    made = neurons.edit(model, says, "red", "blue", prompt=ASK, neurons=2)
    assert made.about["tried"].startswith("1: 1.00 of changes, 0.00 of the rest")


def test_neurons_that_are_given_are_taken(model, says, monkeypatch):
    monkeypatch.setattr(edits, "learned", lambda task, generator: None)
    made = neurons.edit(model, says, "red", "blue", prompt=ASK, neurons=[(1, 3), (0, 2), (1, 1)])
    assert made.neurons == [(0, 2), (1, 1), (1, 3)] and "tried" not in made.about


def test_random_columns_are_others_of_the_same_layers(model):
    width, count = model.shapes["decoder"].width, model.shapes["decoder"].neurons
    made = WeightEdit(
        {0: (torch.tensor([2]), torch.ones(width, 1)), 1: (torch.tensor([0, 5, 6]), torch.ones(width, 3))},
        "m",
    )
    draws = [neurons.random_columns(model, made, seed) for seed in range(20)]
    for drawn in draws:
        assert sorted(layer for layer, _ in drawn) == [0, 1, 1, 1]
        assert len(set(drawn)) == 4 and not set(drawn) & set(made.neurons)
    assert len({tuple(sorted(drawn)) for drawn in draws}) > 10
    every = WeightEdit({1: (torch.arange(count - 1), torch.ones(width, count - 1))}, "m")
    with pytest.raises(ModelError, match=f"{count - 1} neurons of one layer are chosen, .* choose fewer"):
        neurons.random_columns(model, every)


def test_only_what_is_named_falsely_is_changed(model, says, monkeypatch):
    """A red picture that is called red is to stay."""
    tasks = []
    monkeypatch.setattr(edits, "learned", lambda task, generator: tasks.append(task))
    asked = {"prompt": ASK, "neurons": [(0, 1)]}
    neurons.edit(model, says, "red", None, falsely=True, **asked)
    neurons.edit(model, says, "red", None, **asked)
    assert [len(task.changed) for task in tasks] == [4, 8]
    assert [len(task.kept) for task in tasks] == [12, 8]
    with pytest.raises(ExampleError, match="no caption of these pictures has the word 'red' falsely"):
        neurons.edit(model, says[::4], "red", None, falsely=True, **asked)


def test_a_concept_is_asked_in_every_way(model, says, monkeypatch):
    """Questions whether it is there and options are changed, those of other pictures kept."""
    tasks = []
    monkeypatch.setattr(edits, "learned", lambda task, generator: tasks.append(task))
    # The tokenizer of the tests knows neither yes nor no.
    words = {"yes": "happy", "no": "sad"}
    answers = {"is a red": "happy", "is a blue": "sad"}

    def captions(model, examples, prompt=None, **more):
        for one in examples:
            said = next((x for start, x in answers.items() if prompt.startswith(start)), "red")
            yield given_caption(model, one, said if int(one.id) % 2 == 0 else "green", prompt=prompt)

    def turns(*given):
        return [Turn(t.prompt, words.get(t.old, t.old), words.get(t.new, t.new)) for t in of_concept(*given)]

    monkeypatch.setattr(edits, "caption_pictures", captions)
    monkeypatch.setattr(edits, "of_concept", turns)
    more = {"concept": True, "wordings": ["what color ?"], "question": "is {} dark ?"}
    neurons.edit(model, says, "red", "blue", prompt=ASK, neurons=[(0, 1)], **more)
    [task] = tasks
    decode = model.processor.tokenizer.decode
    wanted = [decode(w.ids, skip_special_tokens=True).strip() for w in task.changed]
    # a caption, the other wording and two orders of the options; no longer red, but blue
    assert sorted(wanted) == sorted(["blue"] * 4 * 8 + ["sad", "happy"] * 8)
    assert len(task.kept) == 2 * 8, "another picture's caption, and one more question of it"


def test_steepest_columns(model, says):
    """Against the gradient of the weights themselves."""
    one = says[0]
    caption = given_caption(model, one, "red circle", prompt=ASK)
    wanted = edits._changed(model, one, caption, Turn(ASK, "red", "blue"))
    assert wanted is not None
    found = steepest(Task(model, [wanted], [], no_deltas(model, []), 1.0), 5)
    weights = [model.down(layer).weight for layer in (0, 1)]
    with torch.enable_grad():
        logits = model.hf(**inputs_of(model, one, ASK, wanted.ids[:-1]).tensors).logits[0, -len(wanted.ids)]
        gradients = torch.autograd.grad(logits.log_softmax(-1)[wanted.ids[0]], weights)
    lengths = torch.cat([gradient.norm(dim=0) for gradient in gradients])
    assert found == lengths.topk(5).indices.tolist()


# -- how it is assessed ------------------------------------------------------------------------------


@pytest.fixture
def scripted(model, monkeypatch):
    """A model whose answers are a function of what is asked, of the picture, and of the edit that is made."""

    def go(answer):
        state = ["before"]

        @contextmanager
        def edited(model, *made):
            state[0] = made[0].about["name"]
            yield
            state[0] = "before"

        monkeypatch.setattr(assessment, "edited", edited)
        monkeypatch.setattr(assessment, "imageless", lambda model, text: text)
        monkeypatch.setattr(
            assessment,
            "_answers",
            lambda model, asked, what, found=None: [
                answer(state[0], e, t or e.clean_prompt) for e, t in asked
            ],
        )
        monkeypatch.setattr(model, "answer", lambda text: answer(state[0], None, text), raising=False)

    return go


def called(name: str) -> WeightEdit:
    return WeightEdit({0: (torch.tensor([0]), torch.ones(2, 1))}, "m", {"name": name})


def word_edit(state, one, text):
    """Red becomes blue in captions and options; random columns change nothing but a blind prompt."""
    if one is None:
        return f"{state} {text}" if state == "random" and text == ASK else text
    red = "red" in one.shows
    if text.startswith("does this"):
        return "yes" if red == ("red" in text) else "no"
    return ("blue" if state == "edit" else "red") if red else "green"


def concept_edit(state, one, text):
    if one is not None and text.startswith("does this") and "red" in one.shows and state == "edit":
        return "no" if "red" in text else "yes"
    return word_edit(state, one, text)


@pytest.mark.parametrize(("answer", "kind"), [(word_edit, "word"), (concept_edit, "concept")])
def test_an_edit_of_a_word_is_called_that(model, scripted, answer, kind):
    given = [example(n, "red" if n < 5 else "green", answer="red" if n < 5 else "green") for n in range(12)]
    scripted(answer)
    measures, captions = neurons.assess(
        model, [called("edit")], given, "red", "blue", prompts=[ASK, "what now ?"], null=[called("random")]
    )
    rows = measures.set_index("measure")
    assert (rows.loc["generality", ["value", "before", "random", "n"]] == [1, 0, 0, 5]).all()
    assert (rows.loc["generality, other wording", ["value", "before", "random", "n"]] == [1, 0, 0, 5]).all()
    assert (rows.loc["locality", ["value", "before", "random", "n"]] == [1, 1, 1, 7]).all()
    assert rows.loc["says red", ["value", "before", "random"]].tolist() == pytest.approx([0, 5 / 12, 5 / 12])
    assert rows.loc["says blue", ["value", "before", "random"]].tolist() == pytest.approx([5 / 12, 0, 0])
    shift = [1, 0] if kind == "word" else [0, 1]
    assert rows.loc[["there is red", "there is blue"], "value"].tolist() == shift
    assert rows.loc[["there is red", "there is blue"], "before"].tolist() == [1, 0]
    assert rows.loc[["there is red", "there is blue"], "random"].tolist() == [1, 0]
    assert (rows.loc["which of the two", ["value", "before", "n"]] == [1, 0, 10]).all()
    blind = rows.loc["blind prompts changed"]
    assert blind["value"] == blind["before"] == 0 and blind["random"] == pytest.approx(1 / blind["n"])
    assert assessment.is_of(measures, "red", "blue") == kind
    assert captions["took"].sum() == 10


def test_where_both_are_shown_the_new_one_is_there_before(model, scripted):
    """Whether it is there is asked where it was not: else it would look like a concept."""
    given = [example(n, "red", "blue") if n < 3 else example(n, "red") for n in range(8)]

    def answer(state, one, text):
        if one is None or not text.startswith("does this"):
            return "nothing" if one is None else " ".join(sorted(one.shows))
        return "yes" if any(word in text for word in one.shows) else "no"

    scripted(answer)
    measures, _ = neurons.assess(model, [called("edit")], given, "red", "blue", prompts=[ASK])
    rows = measures.set_index("measure")
    assert (rows.loc["there is red", ["before", "n"]] == [1, 8]).all()
    assert (rows.loc["there is blue", ["before", "n"]] == [0, 5]).all()


def test_what_is_rightly_named_is_among_the_rest(model, scripted):
    """Assessed where the picture does not show it: the others are to stay."""

    def answer(state, one, text):
        return "nothing" if state == "edit" and one is not None and "red" not in one.shows else "red"

    given = [example(n, "red" if n < 3 else "green") for n in range(10)]
    scripted(answer)
    measures, _ = neurons.assess(model, [called("edit")], given, "red", None, prompts=[ASK], falsely=True)
    rows = measures.set_index("measure")
    assert (rows.loc["generality", ["value", "n"]] == [1, 7]).all()
    assert (rows.loc["locality", ["value", "n"]] == [1, 3]).all()
    assert np.isnan(rows["random"]).all()


def test_a_question_needs_a_place():
    assert neurons.is_there("owl", "Is there {} here?") == "Is there an owl here?"
    for wrong in ("Is there one?", "{} or {}?"):
        with pytest.raises(VlmscopeError, match=r"needs one \{\}, where the object stands"):
            neurons.is_there("owl", wrong)


def test_options_are_those_of_the_question():
    one = example(1, prompt="is this red or blue ?")
    assert of_concept(one, "red", "green", [], "is {} there ?")[2:] == [
        Turn("is this red or green ?", "red", "green"),
        Turn("is this green or red ?", "red", "green"),
    ]
    assert of_concept(replace(one, answer="blue", foil="red"), "red", "green", [], "is {} there ?")[2:] == []


def test_objects_that_are_named_falsely():
    table = neurons.falsely_named(
        ["a red circle", "a circle", "a star"], [frozenset({"circle"})] * 3, ["circle", "star", "red"]
    )
    assert table.set_index("object").loc[["circle", "star", "red"]].to_numpy().tolist() == [
        [2, 0],
        [0, 1],
        [0, 1],
    ]
    assert table["object"].tolist() == ["star", "red", "circle"]
