"""Tokenizers built as those of published checkpoints are, with small vocabularies.

What makes them like the published ones: blanks are part of the word behind them (`▁red`, `Ġred`), so
that a word has another token at the beginning of a line; words that are not in the vocabulary fall into
several pieces; letters that are not there at all fall into bytes; and the start token is put there by
the tokenizer, by the chat template, by both or by none.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as before
from tokenizers import processors as after
from transformers import BertTokenizer, PreTrainedTokenizerFast

WORDS = (
    "is are the a an of in or and what color does picture show this that it image question answer "
    "short circle square star red blue green grey dark light user assistant model human helpful"
).split()
"""With a blank before them these are one token; every other word is several."""
BARE = ["red", "blue", "is", "user", "assistant", "model"]
"""These are one token without a blank, too, as the first words of a line are."""
LETTERS = [chr(n) for n in range(33, 127) if chr(n) not in "#~^"] + ["é"]
"""Single letters of the vocabularies that fall back to bytes; `#`, `~` and `^` are not among them."""


def chains(words: Sequence[str], marks: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Merges that build each word from the left, letter by letter."""
    found: dict[tuple[str, str], None] = {}
    for word in words:
        for n in range(1, len(word)):
            found[word[:n], word[n]] = None
    return list(found) + [(mark[:-1], mark[-1]) for mark in marks]


def fast(made: Tokenizer, named: dict[str, str] | None = None, **more: object):
    """A tokenizer of transformers; `named` are special tokens that are attributes of it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side="left", extra_special_tokens=named or {}, **more
    )


def special(made: Tokenizer, *tokens: str) -> None:
    made.add_special_tokens([AddedToken(one, normalized=False, special=True) for one in tokens])


def starting_with(made: Tokenizer, token: str) -> None:
    """The tokenizer puts a start token before every text."""
    made.post_processor = after.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token}:1 $B:1",
        special_tokens=[(token, made.token_to_id(token))],
    )


def _spaced(own: Sequence[str], newlines: Sequence[str]) -> tuple[dict[str, int], list]:
    """Vocabulary and merges of SentencePiece's kind, blanks as `▁`."""
    merges = chains([f"▁{word}" for word in WORDS]) + chains(BARE) + chains(newlines)
    pieces = [*own, *(f"<0x{n:02X}>" for n in range(256)), "▁", *LETTERS, *newlines[:1]]
    pieces += [a + b for a, b in merges]
    return {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}, merges


def llama(*more: str, legacy: bool = True) -> PreTrainedTokenizerFast:
    """Llama's and Vicuna's: every stretch of text begins with a blank, line breaks are bytes, `<s>` first."""
    vocabulary, merges = _spaced(["<unk>", "<s>", "</s>"], [])
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = before.Metaspace("▁", prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special(made, "<unk>", "<s>", "</s>")
    starting_with(made, "<s>")
    special(made, *more, "<pad>")
    return fast(made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def gemma(*more: str, **named: str) -> PreTrainedTokenizerFast:
    """Gemma's: no blank is put first, line breaks are tokens (several together are one), `<bos>` first."""
    vocabulary, merges = _spaced(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], ["\n", "\n\n", "\n\n\n"])
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = before.Split(" ", behavior="merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special(made, "<pad>", "<eos>", "<bos>", "<unk>", *more, *named.values())
    starting_with(made, "<bos>")
    return fast(made, named, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _bytes(pattern: str | None) -> Tokenizer:
    """Byte-level BPE, blanks as `Ġ`, line breaks as `Ċ`."""
    alphabet = sorted(before.ByteLevel.alphabet())
    # "(r" and "?\n" lie over the seams between what is asked and what is said.
    merges = chains([f"Ġ{word}" for word in WORDS], ["(r", "?Ċ", ":Ċ", "ĊĊ"]) + chains(BARE)
    pieces = dict.fromkeys([*alphabet, *(a + b for a, b in merges)])
    made = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges))
    level = before.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    made.pre_tokenizer = (
        level
        if pattern is None
        else before.Sequence([before.Split(Regex(pattern), behavior="isolated"), level])
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = after.ByteLevel(trim_offsets=False)
    return made


def qwen2(*more: str, **named: str) -> PreTrainedTokenizerFast:
    """Qwen 2's: no start token at all."""
    made = _bytes(QWEN)
    special(made, "<|endoftext|>", "<|im_start|>", "<|im_end|>", *more, *named.values())
    return fast(made, named, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def smol(*more: str, **named: str) -> PreTrainedTokenizerFast:
    """SmolLM 2's: GPT-2's way of cutting; a start token that only the template writes."""
    made = _bytes(None)
    special(made, "<|endoftext|>", "<|im_start|>", "<|im_end|>", *more, *named.values())
    return fast(
        made,
        named,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def llama3(*more: str, **named: str) -> PreTrainedTokenizerFast:
    """Llama 3's: the tokenizer puts `<|begin_of_text|>` first, and so does the chat template."""
    made = _bytes(LLAMA3)
    special(
        made,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
        *more,
        *named.values(),
    )
    begin = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
    made.post_processor = after.Sequence(
        [
            after.ByteLevel(trim_offsets=False),
            after.TemplateProcessing(
                single=f"{begin[0]} $A", pair=f"{begin[0]} $A {begin[0]}:1 $B:1", special_tokens=[begin]
            ),
        ]
    )
    return fast(
        made,
        named,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )


def opt(*more: str) -> PreTrainedTokenizerFast:
    """OPT's: GPT-2's way of cutting, and `</s>` is the start token, too."""
    made = _bytes(None)
    special(made, "<pad>", "</s>", *more)
    starting_with(made, "</s>")
    return fast(made, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")


def t5(*more: str) -> PreTrainedTokenizerFast:
    """T5's: Unigram, cut at every blank or line break, `</s>` behind every text."""
    words = [*WORDS, *(word.capitalize() for word in BARE)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0)]
    pieces += [(f"▁{word}", -4.0 - n / 100) for n, word in enumerate(words)]
    pieces += [(letter, -9.0 - n / 100) for n, letter in enumerate(LETTERS)]
    made = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    made.pre_tokenizer = before.Sequence(
        [before.WhitespaceSplit(), before.Metaspace("▁", prepend_scheme="always", split=True)]
    )
    made.decoder = decoders.Metaspace("▁", prepend_scheme="always", split=True)
    special(made, "<pad>", "</s>", "<unk>")
    made.post_processor = after.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    special(made, *more)
    return fast(made, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def bert() -> BertTokenizer:
    """BLIP's and the Q-Formers': WordPiece of small letters, with the tokens that BLIP added."""
    letters = [chr(n) for n in range(ord("a"), ord("z") + 1)] + list("0123456789?.,:!'()-")
    own = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters]
    vocabulary = dict.fromkeys([*own, *(f"##{one}" for one in letters), "[DEC]", "[ENC]"])
    return BertTokenizer(vocab={piece: n for n, piece in enumerate(vocabulary)})
