"""Prompts and answers as tokens, with tokenizers of the published kinds: merges, bytes, leading blanks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from models import llava, picture
from oracle import chat_templates
from oracle import published_tokenizers as published

from vlmscope.checkpoint import pieces
from vlmscope.data.example import Example
from vlmscope.errors import ExampleError
from vlmscope.models.families import chat
from vlmscope.runs.model import Model
from vlmscope.runs.prepare import encode


@pytest.fixture(scope="module")
def model() -> Model:
    """A LLaVA with LLaMA's own way of cutting words, and the published chat template."""
    made = llava(size=12)
    processor = made.processor
    tokenizer = published.llama("<image>")
    made.hf.resize_token_embeddings(len(tokenizer))
    made.hf.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    template = chat_templates.LLAVA
    processor = type(processor)(
        processor.image_processor,
        tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        chat_template=template,
    )
    return Model(made.hf, processor, "tiny LLaVA, LLaMA's tokenizer")


def words(model: Model, prompt: str, **roles: str) -> dict[str, str]:
    """The text at the positions of each role."""
    spans = {name: (prompt.index(word), prompt.index(word) + len(word)) for name, word in roles.items()}
    found = encode(model, [picture(1)] * max(1, prompt.count("<image>")), prompt, spans)
    ids = found.tensors["input_ids"][0]
    return {
        name: model.processor.tokenizer.decode(ids[list(at)]).strip()
        for name, at in found.layout["decoder"].roles.items()
    }


def test_roles_before_between_and_behind_pictures(model):
    prompt = "the red one <image> or the tealish one <image> which is dark?"
    found = words(model, prompt, first="red", second="tealish", third="dark")
    assert found == {"first": "red", "second": "tealish", "third": "dark"}


def test_a_role_is_where_its_words_first_stand(model):
    prompt = "is the tealish circle tealish or red?"
    inputs = encode(model, [picture(1)], prompt, {"answer": (7, 14)})
    ids, at = inputs.tensors["input_ids"][0].tolist(), inputs.layout["decoder"].roles["answer"]
    own = ids[at[0] : at[-1] + 1]
    later = [n for n in range(at[0] + 1, len(ids)) if ids[n : n + len(own)] == own]
    assert len(at) > 1 and len(later) == 1, "the word is several tokens, and stands once more"


@pytest.mark.parametrize("prompt", ["assistant", "USER", " is it red? "])
def test_prompts_that_the_template_says_too(model, prompt):
    text, start = chat.written(model.processor, prompt)
    assert text[start : start + len(prompt)] == prompt
    assert text[:start].endswith("<image>\n")


def test_a_template_that_strips_the_prompt(model):
    processor = type(model.processor)(
        model.processor.image_processor,
        model.processor.tokenizer,
        patch_size=4,
        chat_template=chat_templates.LLAVA.replace("part['text']", "part['text'] | trim"),
    )
    text, start = chat.written(processor, "  is it red? ")
    assert text[start + 2 : start + 12] == "is it red?"


def test_a_template_without_the_prompt(model):
    processor = type(model.processor)(
        model.processor.image_processor, model.processor.tokenizer, chat_template="<image> say"
    )
    with pytest.raises(ExampleError, match="does not write the prompt and one '<image>'"):
        chat.written(processor, "is it red?")


def test_an_answer_behind_a_prompt_that_ends_with_a_blank(model):
    """The run has the blank as a token, so the answer's first token has none of its own."""
    tokenizer = model.processor.tokenizer
    for prompt, wanted in (("<image> say: ", "red"), ("<image> say:", "▁red"), ("<image>\n", "red")):
        ids = chat.options(model.processor, prompt, "red")
        assert tokenizer.convert_ids_to_tokens(ids) == [wanted, "</s>"]
        text = tokenizer.decode([*tokenizer(prompt)["input_ids"], *ids[:-1]])
        assert text.endswith("red") and "  red" not in text


def test_what_ends_an_answer_is_the_templates():
    """`red` and `red wine` are told apart by what the model says behind its answer."""
    made = llava(size=12)
    tokenizer = published.qwen2("<image>")
    processor = type(made.processor)(
        made.processor.image_processor,
        tokenizer,
        patch_size=4,
        chat_template=chat_templates.chatml("<image>"),
    )
    assert tokenizer.convert_ids_to_tokens(chat.options(processor, "is it red?", "red")) == [
        "red",
        "<|im_end|>",
    ]


def test_prompts_align_where_they_stand(model):
    """Word by word, by what each is where it stands."""
    assert pieces(model.processor.tokenizer, "green") == 1 < pieces(model.processor.tokenizer, "tealish")
    one = Example("1", picture(1), "is it red or green?", "red", "green")
    with pytest.raises(ExampleError, match=r"word 5 is 'green\?' \(2 tokens\).*'tealish\?' \(\d+"):
        model.prepare(replace(one, corrupt_prompt="is it red or tealish?"))
    with pytest.raises(ExampleError, match="clean one has 5 words, the corrupt one 4"):
        model.prepare(replace(one, corrupt_prompt="is it blue or?"))
    pair = model.prepare(replace(one, corrupt_prompt="is it blue or grey?"))
    layouts = pair.clean.layout["decoder"], pair.corrupt.layout["decoder"]
    assert set(layouts[0].roles) == {"answer", "foil"}, "the words' own roles are gone"
    assert len(layouts[0].tokens) == len(layouts[1].tokens)
    changed = [n for n, (x, y) in enumerate(zip(*(x.tokens for x in layouts), strict=True)) if x != y]
    assert changed == [*layouts[0].roles["answer"], *layouts[0].roles["foil"]]


def test_what_stands_behind_the_prompt_is_counted_from_the_right(model):
    layout = model.inputs(picture(1), "is it red?").layout["decoder"]
    text = "".join(layout.tokens[len(layout.tokens) - layout.behind :]).replace("▁", " ")
    assert text == " ASSISTANT:"
