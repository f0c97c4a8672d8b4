"""The supported families of models, a table each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module

from vlmscope.errors import ModelError, line, shown
from vlmscope.models.towers import Family

MODULES = {
    "BlipForQuestionAnswering": "blip",
    "BlipForConditionalGeneration": "blip",
    "Blip2ForConditionalGeneration": "blip2",
    "InstructBlipForConditionalGeneration": "blip2",
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava",
    "LlavaOnevisionForConditionalGeneration": "tiled",
    "SmolVLMForConditionalGeneration": "tiled",
    "Idefics3ForConditionalGeneration": "tiled",
    "InternVLForConditionalGeneration": "tiled",
    "Qwen2VLForConditionalGeneration": "qwen",
    "Qwen2_5_VLForConditionalGeneration": "qwen",
    "Qwen3VLForConditionalGeneration": "qwen",
    "Gemma3ForConditionalGeneration": "gemma",
    "PaliGemmaForConditionalGeneration": "gemma",
    "MllamaForConditionalGeneration": "mllama",
    "MPLUGOwl2LlamaForCausalLM": "mplug_owl2",
}
"""Which file has the families of a class: importing transformers' code of all of them takes a while."""


def families(architectures: Iterable[str] = MODULES) -> tuple[Family, ...]:
    """The supported families, or those of some classes."""
    names = dict.fromkeys(MODULES[name] for name in architectures if name in MODULES)
    modules = [import_module(f"vlmscope.models.families.{name}") for name in names]
    return tuple(family for module in modules for family in module.FAMILIES)


def family_of(architectures: Sequence[str], language: str | None, name: str) -> Family:
    """The family of a checkpoint, by its class and, if that has several, its language model."""
    of_class = [f for f in families(architectures) if f.architecture in architectures]
    for family in of_class:
        if family.variant in (None, language):
            return family
    what = f"is a {line(architectures[0], 60)}" if architectures else "does not say what model it is"
    if of_class:
        what += f" with a language model of type {shown(language)}"
    known = families()
    variants = [f"{f.architecture} with {f.variant}" if f.variant else f.architecture for f in known]
    names = dict.fromkeys(f"{f.name} ({variant})" for f, variant in zip(known, variants, strict=True))
    raise ModelError(
        f"{name} {what}, which is not supported; docs/add-a-family.md says how to add it; "
        f"supported: {', '.join(names)}"
    )
