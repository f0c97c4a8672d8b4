"""The supported families of models, a table each."""

from __future__ import annotations

from collections.abc import Sequence

from vlmscope.errors import ModelError
from vlmscope.models.towers import Family


def families() -> tuple[Family, ...]:
    """The supported families."""
    from vlmscope.models.families import blip, blip2, gemma, llava, mllama, mplug_owl2, qwen, tiled

    return (
        blip.VQA,
        blip.CAPTION,
        *blip2.FAMILIES,
        llava.LLAVA,
        llava.NEXT,
        tiled.ONEVISION,
        qwen.QWEN2,
        qwen.QWEN2_5,
        qwen.QWEN3,
        gemma.GEMMA3,
        gemma.PALIGEMMA,
        tiled.SMOLVLM,
        tiled.IDEFICS3,
        tiled.INTERNVL,
        mllama.MLLAMA,
        mplug_owl2.MPLUG_OWL2,
    )


def family_of(architectures: Sequence[str], language: str | None, name: str) -> Family:
    """The family of a checkpoint, by its class and, if that has several, its language model."""
    known = families()
    of_class = [f for f in known if f.architecture in architectures]
    for family in of_class:
        if family.variant in (None, language):
            return family
    what = f"is a {architectures[0]}" if architectures else "does not say what model it is"
    if of_class:
        what += f" with a language model of type '{language}'"
    variants = [f"{f.architecture} with {f.variant}" if f.variant else f.architecture for f in known]
    names = dict.fromkeys(f"{f.name} ({variant})" for f, variant in zip(known, variants, strict=True))
    raise ModelError(
        f"{name} {what}, which is not supported; docs/add-a-family.md says how to add it; "
        f"supported: {', '.join(names)}"
    )
