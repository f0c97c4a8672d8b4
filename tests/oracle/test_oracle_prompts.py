"""What a model is given is, tensor for tensor, what its own documentation gives it."""

from __future__ import annotations

import anatomy
import pytest
import torch
from cases import ONE, OTHER, PROMPT, SECOND, Case, Chat

import vlmscope


def example(prompt: str = PROMPT, **more: object) -> vlmscope.Example:
    fields = {"clean_image": ONE, "corrupt_image": OTHER, "answer": "red", "foil": "blue", **more}
    return vlmscope.Example(id="one", clean_prompt=prompt, **fields)


def same(case: Case, inputs: vlmscope.Inputs, want: dict[str, torch.Tensor]) -> None:
    got = dict(inputs.tensors)
    shown = case.processor.tokenizer.convert_ids_to_tokens
    for name in ("input_ids", case.ids):
        assert " ".join(shown(got[name][0].tolist())) == " ".join(shown(want[name][0].tolist()))
    want = {name: one for name, one in want.items() if name != "labels"}  # of no use without a loss
    assert sorted(got) == sorted(want)
    for name, one in want.items():
        alike = got[name].shape == one.shape and bool((got[name] == one.to(got[name].dtype)).all())
        assert alike, f"{name} is not as the processor makes it"


PROMPTS = [
    PROMPT,
    "Question: what color is the café’s circle?\nShort answer, red or blue:",
    "is the user’s model (the assistant) red or blue",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_picture(case, prompt):
    pair = case.model.prepare(example(prompt))
    same(case, pair.clean, case.run([ONE], prompt))
    same(case, pair.corrupt, case.run([OTHER], prompt))


def test_two_pictures_of_different_size(case):
    if not case.several:
        pytest.skip("takes one picture")
    pair = case.model.prepare(example(more_images=(SECOND,)))
    same(case, pair.clean, case.run([ONE, SECOND], PROMPT))
    same(case, pair.corrupt, case.run([OTHER, SECOND], PROMPT))


def test_inputs_without_an_answer(case):
    """`Model.inputs` gives the same prompt as `prepare`."""
    same(case, case.model.inputs(ONE, PROMPT), case.run([ONE], PROMPT))


def test_a_start_token_stands_once_at_most(case):
    tokenizer = case.processor.tokenizer
    ids = case.model.prepare(example()).clean.tensors["input_ids"][0].tolist()
    if tokenizer.bos_token_id is not None:
        want = case.run([ONE], PROMPT)["input_ids"][0].tolist().count(tokenizer.bos_token_id)
        many = ids.count(tokenizer.bos_token_id)
        assert many == want <= 1, f"{many} start tokens"


def test_a_prompt_that_holds_the_placeholder_is_used_as_it_is(case):
    """A prompt that the user has rendered already is not rendered again, nor started twice."""
    if not isinstance(case, Chat):
        pytest.skip("no chat template")
    written = case.text([ONE], PROMPT)
    same(case, case.model.prepare(example(written)).clean, case.run([ONE], PROMPT))


def test_a_run_is_hugging_faces_own(case):
    """The logits are those of the class's own forward on the documentation's tensors."""
    pair = case.model.prepare(example())
    want = anatomy.forward(case, case.double(case.run([ONE], PROMPT)))
    anatomy.close(case.model.run(pair.clean), want, "logits")
