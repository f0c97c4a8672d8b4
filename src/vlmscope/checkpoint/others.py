"""Models that are not studied but help: one that embeds words, one that paints."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from vlmscope.checkpoint.folder import device_of, one_line, place_of, quiet, read_json
from vlmscope.errors import ExampleError, ModelError, line, shown


def embedder(name: str | Path) -> Callable[[Sequence[str]], Float[Tensor, "words width"]]:
    """Words to vectors of length one, by the mean of the last hidden states of a small text model.

    `name` is a Hugging Face id or a folder, such as `sentence-transformers/all-MiniLM-L6-v2`. Raises
    `ModelError` if it cannot be loaded.
    """
    with one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        text = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False).eval()

    @torch.inference_mode()
    def embed(words: Sequence[str]) -> Tensor:
        batch = tokenizer(list(words), padding=True, return_tensors="pt")
        hidden = text(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    return embed


class Inpainter:
    """A pipeline of `diffusers` that replaces what a mask shows: `inpainter(picture, mask, prompt, seed)`.

    `name` is a folder written by `save_pretrained`, or a Hugging Face id. Weights are read from safetensors
    only, and no code that comes with them is run. `steps` are those of denoising, by default the pipeline's
    own. Raises `ModelError` if it cannot be loaded, `ExampleError` for a picture that it withholds.
    """

    def __init__(self, name: str | Path, *, steps: int | None = None, device: str | None = None) -> None:
        try:
            diffusers = import_module("diffusers")
        except Exception as error:  # one that does not fit the machine raises errors of its own
            raise ModelError(
                f"inpainting by a model needs diffusers, which cannot be imported ({line(str(error), 100)}); "
                "pip install 'vlmscope[inpaint]' brings it, or fill instead"
            ) from error
        self.name, self.steps, path = str(name), steps, place_of(name)
        with quiet(diffusers.utils.logging), one_line(name), warnings.catch_warnings(action="ignore"):
            _check_pipeline(diffusers, path)
            loaded = diffusers.AutoPipelineForInpainting.from_pretrained(
                path, use_safetensors=True, trust_remote_code=False
            )
            self.pipeline = loaded.to(device_of(None if device == "auto" else device))
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, picture: Image.Image, mask: Image.Image, prompt: str, seed: int) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on any device
        options = {} if self.steps is None else {"num_inference_steps": self.steps}
        try:
            with warnings.catch_warnings(action="ignore"):
                found = self.pipeline(
                    prompt=prompt, image=picture, mask_image=mask, generator=generator, **options
                )
        except MemoryError:
            raise
        except Exception as error:  # whatever its parts make of it
            size = "{}x{}".format(*picture.size)
            said = line(str(error), 150)
            raise ModelError(
                f"{self.name} cannot paint in a picture of {size} ({said}); fill instead"
            ) from error
        if any(getattr(found, "nsfw_content_detected", None) or ()):
            raise ExampleError("the pipeline's safety checker withholds the picture that it made")
        made = found.images[0].convert("RGB")
        return made if made.size == picture.size else made.resize(picture.size, Image.Resampling.LANCZOS)

    def fingerprint(self) -> str:
        """The SHA-256 over the weights of all of its models, as 64 hex digits."""
        digest = hashlib.sha256()
        for name, part in sorted(self.pipeline.components.items()):
            for key, tensor in sorted(part.state_dict().items() if isinstance(part, torch.nn.Module) else ()):
                digest.update(f"{name} {key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def _check_pipeline(diffusers: Any, path: str | Path) -> None:
    """Refuse what is no pipeline, or has parts that neither diffusers nor transformers has the code of."""
    file = "model_index.json"
    place = Path(path, file) if Path(path).is_dir() else Path(cached_file(str(path), file) or "")
    for key, value in read_json(place).items():
        library = value[0] if isinstance(value, list) and value else None
        known = library in (None, "diffusers", "transformers") or hasattr(diffusers.pipelines, str(library))
        if not known or (key == "_class_name" and not isinstance(value, str)):
            raise ModelError(f"{path}: {shown(key)} is of code that comes with it, which is not run")
