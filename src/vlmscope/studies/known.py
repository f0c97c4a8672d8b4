"""What a model knows of a task, from the runs without patches, and so how far its numbers can be trusted."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pandas as pd

from vlmscope.errors import DataError
from vlmscope.stats import FEWEST, share_interval

LEAST_RIGHT = 0.5
"""A model that does not surely answer more than this share of examples rightly does not know the task."""
LEAST_GAP = 0.1
"""A mean gap below this, in logits, is near zero: the odds change by less than a tenth."""


class Known(NamedTuple):
    """How far the numbers of a run can be trusted, and why, in sentences.

    `severity` is `fine`; `few`, fewer than `stats.FEWEST` examples; `unknown`, the model does not know the
    task. The first sentence has the numbers, the others are warnings.
    """

    severity: str
    sentences: list[str]

    def lines(self) -> list[str]:
        """The sentences as the command line says them."""
        facts, *warned = self.sentences
        return [facts, *(f"warning: {text}" for text in warned)]


def knows(baselines: pd.DataFrame) -> Known:
    """What a model knows of a task, from the runs without patches (the table `baselines` of a run).

    It does not know the task if it does not surely answer more than half of the examples rightly (the exact
    95 % interval; of fewer than 10 examples, the share itself), if what is scored is a
    letter or a small piece of the word in most of them, or if LD hardly falls when the input is corrupted.
    Examples that were answered and then left out (`select`) count for the share of right answers alone.

    >>> row = {"example": "a", "p_clean": 0.9, "p_corrupt": 0.2, "ld_clean": 3.0, "ld_corrupt": -1.0,
    ...        "answer_token": "red", "foil_token": "blue", "predicted": "red", "correct": True,
    ...        "excluded": False}
    >>> known = knows(pd.DataFrame([row | {"example": str(n)} for n in range(20)]))
    >>> known.severity, known.sentences[0][:62]
    ('fine', '20 examples, 100% answered rightly; P(answer) 0.900 clean and ')
    """
    ran = baselines[~baselines["excluded"].astype(bool)]
    if ran.empty:
        return Known("unknown", ["no example was patched"])
    answered = baselines["correct"].dropna().astype(bool)
    right = float(answered.mean()) if len(answered) else 0.0
    gap = float((ran["ld_clean"] - ran["ld_corrupt"]).mean())
    of = f" of {len(answered)}" if len(answered) > len(ran) else ""
    facts = (
        f"{len(ran)} example{'s' if len(ran) != 1 else ''}, {right:.0%}{of} answered rightly; P(answer) "
        f"{ran['p_clean'].mean():.3f} clean"
    )
    if ran["p_corrupt"].notna().any():
        facts += f" and {ran['p_corrupt'].mean():.3f} corrupt"
    if not pd.isna(gap):
        facts += f"; mean gap LD(clean) − LD(corrupt) {gap:+.3g} logits"
    why = []
    is_sure = len(answered) < FEWEST or share_interval(answered)[0] > LEAST_RIGHT
    if right < LEAST_RIGHT:
        why.append(f"it answers fewer than half of the examples rightly ({right:.0%})")
    elif not is_sure:
        why.append(f"it does not surely answer more than half of the examples rightly ({right:.0%})")
    split = ran[[_is_piece(row) for row in ran.itertuples()]]
    if len(split) > len(ran) / 2:
        scored = "(scored are '{answer_token}' against '{foil_token}' in '{example}')".format(**split.iloc[0])
        why.append(f"words are split into small pieces {scored}")
    if gap < LEAST_GAP:
        how = "rises" if gap <= -LEAST_GAP else "hardly falls"
        why.append(f"LD {how} when the input is corrupted (by {abs(gap):.3g} logits)")
    sentences, severity = [facts], "fine"
    if why:
        sentences.append(f"the model does not seem to know this task: {'; '.join(why)}")
    if len(ran) < FEWEST:
        sentences.append(f"fewer than {FEWEST} examples can hardly show anything")
        severity = "few"
    return Known("unknown" if why else severity, sentences)


def _is_piece(row: Any) -> bool:
    """Whether what is scored is a letter, or a small piece of what the model says."""
    said = row.predicted.casefold().split() if row.correct else []
    plain = [_plain(token) for token in (row.answer_token, row.foil_token) if isinstance(token, str)]
    if not plain or plain[0] in said:  # the word itself, be it one letter
        return False
    if any(len(one) == 1 and one.lower() != one.upper() for one in plain):
        return True
    return any(plain[0] in word and len(plain[0]) < len(word) / 2 for word in said if plain[0])


def _plain(token: str) -> str:
    """A token without what its tokenizer marks the beginning or the inside of a word with."""
    return token.removeprefix("##").strip("▁Ġ \n").removesuffix("</w>").casefold()


def warn_of_excluded(baselines: pd.DataFrame) -> None:
    """Warn of examples that were left out; an error if that is all of them."""
    left = baselines[baselines["excluded"].astype(bool)]
    if left.empty:
        return
    name, reason = left["example"].iloc[0], left["reason"].iloc[0]
    if len(left) == len(baselines):
        raise DataError(f"none of {len(left)} examples could be run; '{name}': {reason}")
    text = f"{len(left)} of {len(baselines)} examples were left out; '{name}': {reason}"
    warnings.warn(text, stacklevel=4)
