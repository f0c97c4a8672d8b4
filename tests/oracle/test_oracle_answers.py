"""What is scored is what teacher forcing through the processor puts behind the prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anatomy
import pytest
import torch
from cases import ONE, PROMPT, Case, Chat
from test_oracle_prompts import example
from transformers import LogitsProcessor, LogitsProcessorList

import vlmscope
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.forward import SPEECH
from vlmscope.studies import rows
from vlmscope.studies.rows import patched
from vlmscope.studies.sweep import in_memory
from vlmscope.studies.task import task_of

OPTIONS = {
    "one token": ("red", "blue"),
    "capitals": ("Red", "Blue"),
    "a shared word": ("dark red", "dark blue"),
    "a shared piece": ("turquoise", "turf"),
    "several pieces": ("mauve", "ochre"),
    "bytes": ("#1", "~2"),
}


def expected(case: Case, prompt: str, answer: str, foil: str) -> tuple[list[int], int, int]:
    """The tokens that are fed, and the two that are scored behind them."""
    taught = [case.taught([ONE], prompt, said) for said in (answer, foil)]
    asked = case.asked([ONE], prompt)
    assert all(one[: len(asked)] == asked for one in taught), "a merge goes over the seam"
    at = next(n for n, (a, b) in enumerate(zip(*taught, strict=False)) if a != b)
    return taught[0][:at], taught[0][at], taught[1][at]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_tokens_that_are_scored(case, options):
    answer, foil = OPTIONS[options]
    if (
        options == "bytes"
        and case.processor.tokenizer.unk_token_id in (case.processor.tokenizer("#")["input_ids"])
    ):
        pytest.skip("a vocabulary without bytes does not know these")
    try:
        fed, right, wrong = expected(case, PROMPT, answer, foil)
    except StopIteration:
        pytest.skip("the tokenizer knows no capitals")
    pair = case.model.prepare(example(answer=answer, foil=foil))
    shown = case.processor.tokenizer.convert_ids_to_tokens
    assert shown([pair.answer, pair.foil]) == shown([right, wrong])
    # Whether the prompt itself is right is another test.
    prompt = case.model.prepare(example()).clean.tensors[case.ids][0].tolist()
    got = pair.clean.tensors[case.ids][0].tolist()
    assert shown(got[: len(prompt)]) == shown(prompt)
    assert shown(got[len(prompt) :]) == shown(fed[len(case.asked([ONE], PROMPT)) :])
    assert (pair.answer, pair.foil) == (right, wrong)


def closed(case: Case, answer: str) -> list[int] | None:
    """All tokens with an answer and the special token that ends it, where one is written there."""
    taught = case.taught([ONE], PROMPT, answer)
    if isinstance(case, Chat):
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = case.processor.apply_chat_template([*case.talk([ONE], PROMPT), said])
        if not whole.startswith(case.text([ONE], PROMPT)):
            return None
        many = len(taught)
        taught = case.call([ONE], whole)["input_ids"][0].tolist()[: many + 1]
    tokenizer = case.processor.tokenizer
    special = {n for n, one in tokenizer.added_tokens_decoder.items() if one.special}
    return taught if taught[-1] in special | set(tokenizer.all_special_ids) else None


def test_an_answer_that_the_other_begins_with_is_scored_at_its_end(case):
    """`dark` or `dark red`: behind `dark`, the token that ends an answer there stands against `red`."""
    short, long = closed(case, "dark"), case.taught([ONE], PROMPT, "dark red")
    if short is None:
        pytest.skip("no special token ends an answer")
    shown = case.processor.tokenizer.convert_ids_to_tokens
    assert short[:-1] == long[: len(short) - 1]
    pair = case.model.prepare(example(answer="dark", foil="dark red"))
    assert shown([pair.answer, pair.foil]) == shown([short[-1], long[len(short) - 1]])


class Say(LogitsProcessor):
    """Generation says these tokens, one after another."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = iter(tokens)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.tokens, 0)] = 0.0
        return forced


def generated(case: Case, prompt: str, said: list[int]) -> torch.Tensor:
    """The logits that Hugging Face's own generation sees, once it has said `said`."""
    tensors: dict[str, Any] = case.double(case.read([ONE], prompt))
    out = case.hf.generate(
        **tensors,
        max_new_tokens=len(said) + 1,
        do_sample=False,
        num_beams=1,
        logits_processor=LogitsProcessorList([Say(said)]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.logits[len(said)][0]


@pytest.mark.parametrize("options", ["one token", "a shared word", "a shared piece"])
def test_logits_are_those_of_generation(case, options):
    """What is read out is what generation reads, behind what both options share, too."""
    answer, foil = OPTIONS[options]
    fed, _, _ = expected(case, PROMPT, answer, foil)
    said = fed[len(case.asked([ONE], PROMPT)) :]
    pair = case.model.prepare(example(answer=answer, foil=foil))
    want = generated(case, PROMPT, said)
    anatomy.close(case.model.run(pair.clean), want, "logits", 3e-7)  # it keeps them in float32


def heard(case: Case, prompt: str) -> str:
    """What Hugging Face's own generation says behind a prompt, greedily."""
    tensors: dict[str, Any] = case.double(case.read([ONE], prompt))
    greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": SPEECH}
    out = case.hf.generate(**tensors, **greedy, output_logits=True, return_dict_in_generate=True)
    tokens = [int(logits[0].argmax()) for logits in out.logits]
    return case.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_what_the_model_says_is_behind_the_prompt_alone(case, monkeypatch):
    """Not behind what answer and foil begin with, nor behind a whole answer, which are fed to be scored."""
    corrupt = PROMPT.replace("circle", "square")
    one = replace(example(answer="dark red", foil="dark blue"), corrupt_prompt=corrupt)
    clean, other = heard(case, PROMPT), heard(case, corrupt)
    monkeypatch.setattr(rows, "agrees", lambda predicted, answer: True)
    for metric, corruption in (("ld", "text"), ("logprob", "text"), ("logprob", Noise(at="text", draws=1))):
        task = task_of(case.model, [one], [], corruption, metric=metric, select=True)
        base, _ = in_memory(task, patched)
        assert base["predicted"].tolist() == [clean]
        why = f"with the corrupt input ({task.kind}) the model still answers "
        assert base["reason"].item().startswith(why)
        if corruption == "text":
            assert base["reason"].item() == f"{why}'{other}'"


SEAMS = {
    "blip2-opt": "Question: what color is the circle? Answer: ",
    "instructblip-vicuna": "Question: what color is the circle? Answer: ",
    "llava": "USER: <image>\nis the circle red or blue? ASSISTANT: ",
    "llava-next-vicuna": "USER: <image>\nis the circle red or blue? ASSISTANT: ",
    "llava-next-mistral": "[INST] <image>\nis the circle red or blue? [/INST] ",
    "llava-next-granite": "<image>\nthe color is ",
    "llava-onevision": "<|im_start|>user <image>\nthe color is ",
    "qwen2-vl": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>the color is ",
    "qwen2.5-vl": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>the color is ",
    "qwen3-vl": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>the color is ",
    "internvl": "<|im_start|>user\n<IMG_CONTEXT>\nthe color is ",
    "smolvlm": "<|im_start|>User:<image>red or blue?<end_of_utterance>\nAssistant: ",
    "idefics3": "<|begin_of_text|>User:<image>red or blue?<end_of_utterance>\nAssistant: ",
    "gemma3": "<bos><start_of_turn>user\n<start_of_image>the color is ",
    "mllama": "<|begin_of_text|><|image|>the color is ",
}
"""Prompts whose end would be merged with the answer, if the two were tokenized together."""


def test_merges_do_not_go_over_the_seam(case):
    """The prompt stays as it is, and what is scored continues it: the two read as the text does.

    To refuse such a prompt in one line is right as well.
    """
    if case.name not in SEAMS:
        pytest.skip("no such prompt")
    prompt = SEAMS[case.name]
    written = vlmscope.Example("one", ONE, prompt, "red", "blue")
    try:
        pair = case.model.prepare(written)
    except vlmscope.VlmscopeError:
        return
    want = case.call([ONE], prompt)["input_ids"][0].tolist()
    shown = case.processor.tokenizer.convert_ids_to_tokens
    assert shown(pair.clean.tensors["input_ids"][0].tolist()) == shown(want)
    pieces = case.processor.tokenizer.convert_ids_to_tokens([pair.answer, pair.foil])
    assert "red".startswith(pieces[0]) and "blue".startswith(pieces[1]), pieces
