"""A prompt as the text that a model is given, through its chat template, and an answer's tokens behind it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from vlmscope.data.example import Span
from vlmscope.errors import ExampleError, ModelError, VlmscopeError, line

Tokens = list[tuple[int, Span]]
"""Token ids, each with the characters of a text that it stands for."""


def written(processor: Any, prompt: str, images: int = 1, *, between: str = "\n") -> tuple[str, int]:
    """The whole text of a prompt about some images, and where the prompt begins in it.

    A prompt that holds the image placeholder is taken as it is. Without a chat template `between` stands
    between the placeholders and the prompt.
    """
    mark = str(processor.image_token)
    if mark in prompt:
        return prompt, 0
    if not getattr(processor, "chat_template", None):
        text = f"{mark * images}{between}{prompt}" if images else prompt
        return text, len(text) - len(prompt)
    text = _rendered(processor, prompt, images)
    # Where another prompt would stand: this one's words may be the template's, too.
    start = _rendered(processor, _STANDIN, images).find(_STANDIN)
    blanks = len(prompt) - len(prompt.lstrip())  # which some templates strip
    begins = [start - n for n in (0, blanks) if text.startswith(prompt[n:].rstrip(), start)]
    if start < 0 or not begins or (images and mark not in text):
        raise ExampleError(
            f"the processor's chat template does not write the prompt and one '{mark}'; "
            f"put '{mark}' into the prompt, which is then used as it is"
        )
    return text, begins[0]


_STANDIN = "promptprompt"
STEPS = 1_000_000
"""Steps that a chat template may take; published ones take some hundreds."""


def _rendered(processor: Any, prompt: str, images: int, answer: str | None = None) -> str:
    """A chat of one question, by the processor's template: up to where the answer begins, or with it."""
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
    chat: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    try:
        with _bounded():
            return str(processor.apply_chat_template(chat, add_generation_prompt=answer is None))
    except (VlmscopeError, MemoryError):
        raise
    except Exception as error:  # a template does whatever its author wrote
        mark = str(processor.image_token)
        raise ModelError(
            f"the processor's chat template fails ({type(error).__name__}: {line(str(error), 100)}); put "
            f"'{mark}' into the prompt, which is then used as it is"
        ) from error


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop a template that takes more steps than any needs; Jinja's sandbox bounds single loops only."""
    steps = itertools.count()

    def count(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != "<template>":
            return None
        if next(steps) > STEPS:
            raise ModelError(f"the chat template takes more than {STEPS:,} steps; make its loops shorter")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def special(processor: Any, text: str) -> dict[str, bool]:
    """How a text is to be tokenised: a template that writes the start token has written all of them.

    The rule of transformers' own `apply_chat_template(tokenize=True)`.
    """
    begin = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if begin and text.startswith(begin) else {}


def tokenized(processor: Any, text: str) -> Tokens:
    """The tokens of a text as the processor makes them, but for images, of which each is one token."""
    keywords = special(processor, text)
    encoding = processor.tokenizer(text, return_offsets_mapping=True, **keywords)
    return list(zip(encoding["input_ids"], map(tuple, encoding["offset_mapping"]), strict=True))


def options(
    processor: Any,
    prompt: str,
    answer: str,
    images: int = 1,
    *,
    write: Callable[..., tuple[str, int]] = written,
) -> list[int]:
    """The answer's tokens as they follow the prompt's own, and the token that ends it.

    Whether there is a blank before the answer, and what ends it, the chat template says, where there is one;
    otherwise a blank, unless the prompt ends with one, and the tokenizer's end token.
    """
    text, _ = write(processor, prompt, images)
    tokenizer = processor.tokenizer
    between, after = _reply(processor, text, prompt, images, answer)
    before = [token for token, _ in tokenized(processor, text)]
    joined = [token for token, _ in tokenized(processor, text + between + answer)]
    if joined[: len(before)] == before:
        own = joined[len(before) :]
    else:  # the last token of the prompt has grown, and the run has the one that it was
        own = _alone_behind(tokenizer, before, between + answer)
    return [*own, _end(tokenizer, after)]


def _reply(processor: Any, text: str, prompt: str, images: int, answer: str) -> tuple[str, str]:
    """What stands between the text and the answer, and behind it."""
    plain = "" if text[-1:].isspace() else " ", ""
    if not getattr(processor, "chat_template", None) or str(processor.image_token) in prompt:
        return plain
    try:
        whole = _rendered(processor, prompt, images, answer)
    except ModelError:  # a template of questions alone
        return plain
    between, found, after = whole[len(text) :].partition(answer)
    if not whole.startswith(text) or not found or between.strip():
        return plain
    return between, after.strip()


def _alone_behind(tokenizer: Any, before: list[int], text: str) -> list[int]:
    """The tokens of a text that is tokenised by itself and read on behind others."""

    def ids(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False)["input_ids"])

    # SentencePiece puts a blank before a text, but not behind a line break.
    candidates = [ids(text), ids(f"\n{text}")[len(ids("\n")) :], ids(text.lstrip())]
    wanted = tokenizer.decode(before) + text
    return next((x for x in candidates if tokenizer.decode([*before, *x]) == wanted), candidates[0])


def _end(tokenizer: Any, text: str) -> int:
    """The special token that a text begins with, or else the tokenizer's end token."""
    first = tokenizer(text, add_special_tokens=False)["input_ids"][:1] if text else []
    known = tokenizer.added_tokens_decoder
    return int(
        first[0] if first and first[0] in known and known[first[0]].special else tokenizer.eos_token_id
    )
