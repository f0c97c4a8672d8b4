"""Opening pictures as people see them."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import cast

from PIL import Image, ImageOps, UnidentifiedImageError

from vlmscope import files
from vlmscope.data.example import Picture
from vlmscope.errors import ExampleError, line

MAX_PIXELS = 89_000_000
"""A larger picture is refused before it is decoded (Pillow warns from about this size on)."""
SMALL = 384
"""Longest side, in pixels, of a picture that is kept to look at."""
EXPECTED = "an image (a path in a CSV file starts from its folder)"

_REFUSALS = {
    UnidentifiedImageError: "not an image; expected PNG, JPEG or another format that Pillow reads",
    Image.DecompressionBombError: f"more than the {MAX_PIXELS:,} pixels that are read; make it smaller",
}


def open_image(picture: Picture | str) -> Image.Image:
    """The picture as a person sees it, in RGB with 8 bits a channel.

    Turned the way its EXIF data says, transparency on white, 16 bits scaled to 8, the first frame of an
    animation; palettes, black and white, grey and CMYK become RGB. A picture in memory is copied, never
    changed. Color profiles are not applied.

    Raises `ExampleError` for what is missing, no image, broken, empty or above `MAX_PIXELS`.

    >>> half_transparent = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    >>> open_image(half_transparent).getpixel((0, 0))
    (255, 127, 127)
    """
    name = "the picture in memory" if isinstance(picture, Image.Image) else str(picture)
    try:
        # What Pillow has to say about a file is either an error here or of no interest.
        with warnings.catch_warnings(action="ignore"), contextlib.ExitStack() as opened:
            if isinstance(picture, Image.Image):
                image = picture
            else:
                content = files.read(picture, EXPECTED, ExampleError)
                if not content:
                    raise ExampleError(f"{name}: an empty file; expected {EXPECTED}")
                image = opened.enter_context(Image.open(io.BytesIO(content)))
            width, height = image.size
            if not width * height:
                raise ExampleError(f"{name}: has no pixels ({width}x{height})")
            if width * height > MAX_PIXELS:
                raise ExampleError(
                    f"{name}: {width}x{height} pixels are more than the {MAX_PIXELS:,} that are "
                    "read; make it smaller"
                )
            return _to_rgb(image, name)
    except ExampleError:
        raise
    except Exception as error:
        why = next((why for kind, why in _REFUSALS.items() if isinstance(error, kind)), None)
        # Pillow's decoders meet broken data with OSError, SyntaxError, struct.error and others.
        said = line(str(error), 100)
        broken = f"an image that cannot be decoded, broken or cut off ({said}); copy or save it again"
        raise ExampleError(f"{name}: {why or broken}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB without metadata, so that nothing is applied twice."""
    image.load()
    # A broken block of EXIF data, on which its parser may stumble in any way, leaves the image as it is.
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image, name)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}
    return image


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey levels of 16 bits, scaled; Pillow itself would clip them at 255.

    Mode I holds 32 bits, and 16 of them count where Pillow reads a 16-bit file into it. Numbers that do not
    tell their range are refused rather than guessed at.
    """
    whole = image.convert("I") if image.mode != "F" else image
    low, high = cast(tuple[float, float], whole.getextrema())
    named = image.mode.startswith("I;16")
    plain = image.mode == "I" and low >= 0 and 255 < high < 65536
    if not (named or plain or low == high == 0):
        raise ExampleError(
            f"{name}: grey levels of mode {image.mode} from {low} to {high}, and which of them is "
            "white is not known; save the image with 8 or 16 bits"
        )
    return whole.point(lambda level: level * (1 / 257) + 0.5).convert("L")


def small_png(picture: Picture | str, side: int = SMALL) -> bytes:
    """A small copy of a picture, as a PNG file, `side` pixels long at most; raises as `open_image` does."""
    image = open_image(picture)
    image.thumbnail((side, side))
    return png(image, optimize=True)


def png(image: Image.Image, **options: bool) -> bytes:
    """A picture as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()
