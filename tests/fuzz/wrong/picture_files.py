"""Pictures, masks and boxes: files that are none, broken ones, forms that hold a picture in another way."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

from frame import Case
from PIL import Image, ImageOps
from sets import DATA, EXAMPLE, HEADS, IMAGE, changed, fill, folders, one, pictures, same

GENERATE = ["generate", "--model", "toy-blip", "--prompt", "is this cross yellow or green?", "--image"]
CAPTION = ["neurons", "find", "--model", "toy-llava", "--prompt", "describe this picture.", "--top", "3"]
CAPTION += ["--out", "out", "--image"]


def _clean() -> Image.Image:
    return Image.open(io.BytesIO(pictures()["clean-0.png"]))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, content: bytes = b"", more: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + more
        + chunk(b"IDAT", zlib.compress(content))
        + chunk(b"IEND", b"")
    )


def within(good: bytes, more: bytes) -> bytes:
    """A PNG file with a part more behind its head."""
    return good[:33] + more + good[33:]


GOOD = pictures()["clean-0.png"]
NOT_PICTURES: dict[str, bytes] = {
    "nothing": b"",
    "a zero": b"\0",
    "zeros": bytes(10_000),
    "text": b"no picture",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
    "SVG that names a file": b'<svg><image href="file:///etc/passwd"/></svg>',
    "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
    "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
    "a bomb of a PNG": png(60_000, 60_000),
    "a wide bomb": png(2**31 - 1, 1),
    "no pixels": png(0, 5),
    "too few rows": png(500, 500, bytes(1000)),
    "no data": png(50, 50),
    "half a PNG": GOOD[: len(GOOD) // 2],
    "the head of a PNG": GOOD[:40],
    "half a JPEG": saved(_clean(), "JPEG")[:900],
    "half a GIF": saved(_clean(), "GIF")[:400],
    "half a WebP": saved(_clean(), "WEBP")[:150],
    "half a TIFF": saved(_clean(), "TIFF")[:1000],
    "half a BMP": saved(_clean(), "BMP")[:1000],
    "a TIFF of loops": b"II*\0\x08\0\0\0" + struct.pack("<H", 0) + struct.pack("<I", 8),
    "a bomb of a comment": within(GOOD, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28)))),
    "32 bits a level": saved(Image.new("I", (9, 9), 2**30), "TIFF"),
    "levels of nan": saved(Image.new("F", (9, 9), float("nan")), "TIFF"),
}


def as_good() -> dict[str, bytes]:
    """The first picture in other forms, all of which hold the same pixels."""
    clean = _clean()
    turned = clean.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    animated = saved(clean, "PNG", save_all=True, append_images=[Image.new("RGB", clean.size, "red")])
    return {
        "a PNG without its end": GOOD[:-12],
        "TIFF": saved(clean, "TIFF"),
        "BMP": saved(clean, "BMP"),
        "WebP": saved(clean, "WEBP", lossless=True),
        "PPM": saved(clean, "PPM"),
        "turned by EXIF": saved(turned, "PNG", exif=exif),
        "broken EXIF": within(GOOD, chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")),
        "EXIF of garbage": within(GOOD, chunk(b"eXIf", bytes(range(256)))),
        "a profile of garbage": saved(clean, "PNG", icc_profile=bytes(range(256)) * 9),
        "an animation": animated,
        "transparency": saved(clean.convert("RGBA"), "PNG"),
        "bytes behind the end": GOOD + b"<script>" * 99,
        "a comment": within(GOOD, chunk(b"tEXt", b"Comment\0\x1b[2J")),
        "a gamma": within(GOOD, chunk(b"gAMA", struct.pack(">I", 1))),
    }


SHAPES: dict[str, Image.Image] = {
    "1x1": Image.new("RGB", (1, 1), "red"),
    "1x50000": Image.new("RGB", (1, 50_000), "red"),
    "50000x1": Image.new("RGB", (50_000, 1), "red"),
    "3x9000": Image.new("L", (3, 9_000), 5),
}
FORMS: dict[str, bytes] = {
    "CMYK": saved(_clean().convert("CMYK"), "TIFF"),
    "a palette": saved(_clean().convert("P"), "PNG"),
    "grey": saved(_clean().convert("L"), "PNG"),
    "black and white": saved(_clean().convert("1"), "PNG"),
    "16 bits": saved(_clean().convert("L").convert("I;16"), "PNG"),
    "a JPEG": saved(_clean(), "JPEG"),
}


def decoded(content: bytes) -> bytes | None:
    """The pixels of a picture as a plain PNG by Pillow alone, or None where it finds none."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
            if turned.has_transparency_data:
                turned = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
            return saved(turned.convert("RGB"), "PNG")
    except Exception:
        return None


def broken(random: Random) -> bytes:
    """A picture with some bytes that are others, away or twice."""
    good = random.choice(
        [GOOD, saved(_clean(), random.choice(["JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]))]
    )
    content = bytearray(good)
    for _ in range(random.choice((1, 2, 10))):
        at = random.randrange(len(content))
        how = random.randrange(4)
        if how == 0:
            content[at] = random.randrange(256)
        elif how == 1:
            del content[at:]
        elif how == 2:
            content[at:at] = random.randbytes(random.choice((1, 4, 100)))
        else:
            del content[at : at + random.choice((1, 4, 100))]
        content = content or bytearray(b"x")
    return bytes(content)


def special(folder: Path) -> dict[str, Path | str]:
    """What is no file that holds a picture, by its name."""
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "zeros.png").symlink_to("/dev/zero")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(2**33)
    names = [
        "pipe.png",
        "folder.png",
        "loop.png",
        "zeros.png",
        "huge.png",
        "nowhere.png",
        "/dev/zero",
        "/dev/tty",
    ]
    names += [
        "/proc/self/mem",
        "x" * 300 + ".png",
        "x/" * 3000,
        "clean-0.png/x",
        "../here",
        "\x1b[2J.png",
        "a\u202eb.png",
    ]
    return {name: name for name in names}


def cells(random: Random) -> tuple[str, bytes]:
    """Masks and boxes that are none of the picture."""
    boxes = ["", "1 2 3", "1 2 3 4 5", "nan 0 9 9", "0 0 inf 9", "9 9 1 1", "0 0 0 0", "-5 0 9 9", "a b c d"]
    boxes += ["500 500 900 900", "0.1 0.1 0.2 0.2", "1e300 1e300 2e300 2e300", "0 0 1e309 9", "1e-9 0 2e-9 1"]
    boxes += ["1;2;3", "0 0 9", "0x1 1 9 9", "١ ٢ ٣ x", "1_0 0 5 5 5"]
    box = random.choice(boxes[1:])
    row = {"mask_path": "", "box": box}
    return f"a box {box}", changed(0, **row)


def masks() -> dict[str, bytes]:
    return {
        "black": saved(Image.new("L", (144, 144), 0), "PNG"),
        "smaller": saved(Image.new("L", (9, 9), 255), "PNG"),
        "larger": saved(Image.new("1", (2000, 2000), 1), "PNG"),
        "turned": saved(Image.new("L", (144, 145), 255), "PNG"),
        "nan": saved(Image.new("F", (144, 144), float("nan")), "TIFF"),
        **NOT_PICTURES,
    }


def _case(random: Random, folder: Path, what: str, content: bytes, good: bytes | None) -> Case:
    """A picture as the clean or corrupt one of a data set, or alone; `good` holds the same pixels."""
    suffix = random.choice([".png", ".jpg", ".gif", ".txt", "", ".svg"])
    name = f"picture{suffix}"
    fill(folder)
    (folder / name).write_bytes(content)
    alone = random.random() < 0.4
    if alone:
        argv = [*random.choice((GENERATE, CAPTION)), name]
    else:
        which = random.choice(("clean", "corrupt"))
        every = {f"{which}_image_path": name}
        (folder / DATA).write_bytes(one(**every))
        argv = random.choice((EXAMPLE, IMAGE))
    if good is None:
        return Case(what, argv, folder, may_change=("out",))

    def put(there: Path) -> None:
        fill(there)
        (there / name).write_bytes(good)
        if not alone:
            (there / DATA).write_bytes((folder / DATA).read_bytes())

    return Case(what, argv, folder, may_change=("out",), right=same(folder, argv, put, None))


def cases(random: Random, top: Path) -> Iterator[Case]:
    place = folders(top)
    always = list(NOT_PICTURES)
    random.shuffle(always)
    for what in always:
        yield _case(random, next(place), what, NOT_PICTURES[what], None)
    while True:
        what, content = random.choice(list(as_good().items()))
        yield _case(random, next(place), what, content, GOOD)
        what, shape = random.choice(list(SHAPES.items()))
        yield _case(random, next(place), what, saved(shape, "PNG"), saved(shape.convert("RGB"), "TIFF"))
        what, content = random.choice(list(FORMS.items()))
        yield _case(random, next(place), what, content, content)
        for _ in range(8):
            content = broken(random)
            yield _case(random, next(place), "other bytes", content, decoded(content))
        for _ in range(3):
            folder = next(place)
            fill(folder)
            name = random.choice(list(special(folder)))
            if random.random() < 0.5:
                argv = [*random.choice((GENERATE, CAPTION)), name]
                yield Case(f"picture {name[:30]!r}", argv, folder, may_change=("out",))
                continue
            column = random.choice(("clean_image_path", "corrupt_image_path"))
            (folder / DATA).write_bytes(one(**{column: name}))
            yield Case(
                f"{column} {name[:30]!r}", random.choice((EXAMPLE, IMAGE)), folder, may_change=("out",)
            )
        folder = next(place)
        what, content = cells(random)
        fill(folder, content)
        yield Case(what, HEADS, folder)
        folder = next(place)
        what, mask = random.choice(list(masks().items()))
        fill(folder)
        (folder / "mask-0.png").write_bytes(mask)
        yield Case(f"a mask: {what}", HEADS, folder)
