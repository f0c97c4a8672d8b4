"""What a person has: two images, two prompts, an answer and a foil.

`Example` imports no torch. A list of them has a CSV form (`read_csv`, `write_csv`) with the
column names of the published NOTICE code. `open_image` reads a picture the way a person sees it.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeGuard, cast

from PIL import Image, ImageOps, UnidentifiedImageError

from vlmscope.errors import DataError, ExampleError

Picture: TypeAlias = Path | Image.Image
Span: TypeAlias = tuple[int, int]
Box: TypeAlias = tuple[float, float, float, float]

COLUMNS = (
    "clean_image_path",
    "corrupt_image_path",
    "clean_prompt",
    "corrupt_prompt",
    "correct_answer",
    "incorrect_answer",
)
"""The columns of the CSV form, besides `id`, masks, groups and roles."""
OPTIONAL = ("corrupt_image_path", "corrupt_prompt")
"""May be absent or empty: not every corruption needs them, and the one that does says so."""
PROMPTS = ("clean_prompt", "corrupt_prompt")
"""Taken with the blanks around them, which a model's tokens may depend on."""
MASK = "mask_path"
"""A column of this name holds the mask of `object`; `mask_path_NAME` the mask of NAME."""
BOX = "box"
"""The same for a box around it, written `left top right bottom`, in pixels of the clean image."""
MAX_PIXELS = 89_000_000
"""A larger picture is refused before it is decoded (Pillow warns from about this size on)."""
SHOWS = "shows"
"""A column of this name holds the words for what the clean image shows, with commas between them."""
MORE = "image_path"
"""Columns `image_path_2`, `image_path_3`… hold the further pictures of an example."""
SHOWN = 5
"""How many bad lines of a CSV an error lists."""


@dataclass(frozen=True, eq=False)
class Example:
    """One contrast: what was asked, what is true of the clean image, and what of the corrupt one.

    `roles` maps a role's name to the character spans `(start, end)` of its words, in
    `clean_prompt` (by token alignment the same words hold it in `corrupt_prompt`). Those that are not
    given are looked up: `answer`, `foil` and each of `groups`, where its words stand in the prompt
    (`find_roles`). `dataclasses.replace` with another prompt looks these up anew. `masks` maps
    an object's name to a black and white picture of the size of `clean_image`, white where the
    object is, or to the box around it: left, top, right, bottom in pixels of `clean_image`.
    `more_images` are further pictures that the prompt is about, behind the first and the same in
    both runs, for models that take several. `shows` are words for what is known to be in
    `clean_image`, in small letters: labels, which no run reads.
    """

    id: str
    clean_image: Picture
    clean_prompt: str
    answer: str
    foil: str
    corrupt_image: Picture | None = None
    corrupt_prompt: str | None = None
    roles: Mapping[str, Span] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, Picture | Box] = field(default_factory=dict)
    more_images: tuple[Picture, ...] = ()
    shows: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        prompt, known = self.clean_prompt, self.roles
        given, of = (known.given, known.of) if isinstance(known, _Roles) else (dict(known), None)
        for name, (start, end) in given.items():
            if not 0 <= start < end <= len(prompt):
                problem = f"the prompt has {len(prompt)} characters"
            elif of is not None and of[start:end] != prompt[start:end]:
                problem = f"there {prompt[start:end]!r} has taken the place of {of[start:end]!r}"
            else:
                continue
            raise ExampleError(
                f"example {self.id!r}: the role {name!r} is characters {start} to {end} of clean_prompt, and "
                f"{problem}; give the roles of this prompt"
            )
        words = {**self.groups, "answer": self.answer, "foil": self.foil}
        found = find_roles(prompt, words)
        # A token of two roles is called by the first of them, so the options come first.
        order = dict.fromkeys(("answer", "foil", *known, *self.groups))
        roles = {name: (found | given)[name] for name in order if name in found | given}
        own = {name: span for name, span in given.items() if found.get(name) != span}
        object.__setattr__(self, "roles", _Roles(roles, own, prompt))


class _Roles(dict[str, Span]):
    """All roles of an example, which remember those that no lookup finds, and the prompt they are `of`."""

    def __init__(
        self,
        roles: Mapping[str, Span] | Iterable[tuple[str, Span]],
        given: Mapping[str, Span] | None = None,
        of: str | None = None,
    ) -> None:
        super().__init__(roles)
        self.given, self.of = dict(self if given is None else given), of


def find_roles(prompt: str, words: Mapping[str, str]) -> dict[str, Span]:
    """Character spans of `words` in `prompt`, for the words that stand there as whole words.

    The first occurrence counts; upper and lower case are the same.

    >>> find_roles("Is this circle red or blue?", {"answer": "red", "noun": "circle", "x": "cat"})
    {'answer': (15, 18), 'noun': (8, 14)}
    """
    spans = {}
    for role, word in words.items():
        pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
        found = re.search(pattern, prompt, re.IGNORECASE) if word else None
        if found:
            spans[role] = found.span()
    return spans


def read_csv(path: Path | str) -> list[Example]:
    """The examples in a CSV file, in its order.

    The columns are `COLUMNS`, the published NOTICE code's own; the two of the corrupt input may
    be absent, and their cells empty. `id` is optional: by default an example's id is the number
    of its row, counted from 0 as pandas does. `mask_path` and `mask_path_NAME` give masks,
    `box` and `box_NAME` boxes instead; `image_path_2`, `image_path_3`… are further pictures of an
    example, the same in both runs; `shows` are words for what the clean image shows. Every further column is a group, and where its words stand in the clean prompt also a role of that
    name; the roles `answer` and `foil` are always looked up. Columns without a name, as pandas
    writes an index, are left out. Image paths are relative to the file's folder, and are not
    opened here.

    Raises `DataError` where the file as a whole cannot be trusted: it is missing or not UTF-8, a
    column is missing, a row has too many or too few cells or an empty one that every example
    needs, an id stands twice, or an answer is its own foil.

    >>> from tempfile import TemporaryDirectory
    >>> table = '''clean_image_path,clean_prompt,correct_answer,incorrect_answer,noun
    ... cat.png,Is this cat black or white?,black,white,cat
    ... '''
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder, "my.csv")
    ...     _ = file.write_text(table)
    ...     [example] = read_csv(file)
    >>> example.id, example.answer, example.foil, dict(example.groups)
    ('0', 'black', 'white', {'noun': 'cat'})
    >>> example.roles
    {'answer': (12, 17), 'foil': (21, 26), 'noun': (8, 11)}
    """
    path = Path(path)
    lines = _parse(path, _read_text(path))
    _, header = next(lines, (1, []))
    names = _check_header(path, header)
    rows: list[dict[str, str]] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    for line, cells in lines:
        if len(cells) != len(names):
            problems.append(
                f"line {line} has {len(cells)} cells where the header has {len(names)} "
                "(put a cell with a comma or a line break in double quotes)"
            )
            continue
        row = _clean(names, cells)
        row.setdefault("id", str(len(rows)))
        earlier = first_line.setdefault(row["id"], line)
        if problem := _problem(row):
            problems.append(f"line {line}: {problem}")
        elif earlier != line:
            problems.append(f"line {line}: the id {row['id']!r} is line {earlier}'s (make it new)")
        rows.append(row)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(f"{path}: {'; '.join(problems[:SHOWN])}{more}")
    if not rows:
        raise DataError(f"{path}: a header and no examples; expected a row for each example")
    return [_example(path.parent, row) for row in rows]


def write_csv(path: Path | str, examples: Iterable[Example]) -> None:
    """Write examples as the CSV file that `read_csv` reads back.

    Pictures in memory become PNG files in the folder `<stem>-images` next to the file; a picture
    that is a path stays where it is (relative to the file where it lies below its folder). Roles
    become columns that hold their words. The file itself is written last and renamed into place.

    Raises `DataError` for an example that the form cannot hold, such as a role whose words stand
    in the prompt a second time and mean the later place.
    """
    path = Path(path)
    rows: list[dict[str, str]] = []
    seen = set[str]()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for number, example in enumerate(examples):
            row = _row(path, number, example)
            _check_row(row, example, duplicate=example.id in seen)
            seen.add(example.id)
            rows.append(row)
        if not rows:
            raise DataError(f"{path}: no examples to write; expected at least one")
        columns = list(dict.fromkeys(("id", *COLUMNS, *(name for row in rows for name in row))))
        part = path.with_name(f"{path.name}.part")
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


def open_image(picture: Picture | str) -> Image.Image:
    """The picture as a person sees it, in RGB with 8 bits a channel.

    Turned the way its EXIF data says, transparency on white, 16 bits scaled to 8, the first frame
    of an animation; palettes, black and white, grey and CMYK become RGB. A picture in memory is
    copied, never changed. Color profiles are not applied.

    Raises `ExampleError` for what is missing, no image, broken, empty or above `MAX_PIXELS`.

    >>> half_transparent = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    >>> open_image(half_transparent).getpixel((0, 0))
    (255, 127, 127)
    """
    name = "the picture in memory" if isinstance(picture, Image.Image) else str(picture)
    try:
        # What Pillow has to say about a file is either an error here or of no interest.
        with warnings.catch_warnings(action="ignore"), _opened(picture) as image:
            width, height = image.size
            if not width * height:
                raise ExampleError(f"{name}: has no pixels ({width}x{height})")
            if width * height > MAX_PIXELS:
                raise ExampleError(
                    f"{name}: {width}x{height} pixels are more than the {MAX_PIXELS:,} that are "
                    "read; scale it down"
                )
            return _to_rgb(_turned(image), name)
    except ExampleError:
        raise
    except UnidentifiedImageError as error:
        raise ExampleError(
            f"{name}: not an image; expected PNG, JPEG or another format that Pillow reads"
        ) from error
    except Image.DecompressionBombError as error:
        raise ExampleError(
            f"{name}: more than the {MAX_PIXELS:,} pixels that are read; scale it down"
        ) from error
    except Exception as error:
        # Pillow's decoders meet broken data with OSError, SyntaxError, struct.error and others;
        # an OSError with a number comes from the file system.
        if isinstance(error, OSError) and error.errno:
            raise ExampleError(f"{name}: cannot be read ({error.strerror})") from error
        raise ExampleError(
            f"{name}: an image that cannot be decoded, broken or cut off ({error}); copy or save it again"
        ) from error


def fingerprint(examples: Iterable[Example]) -> str:
    """The SHA-256, as 64 hex digits, of all that a run reads from the examples, in their order.

    Ids, prompts, answers, foils, roles, and the content of images and masks (not where they
    lie); groups only label the results and are left out. A file that is missing counts as such.

    >>> example = Example("0", Image.new("RGB", (1, 1)), "Red or blue?", "red", "blue")
    >>> fingerprint([example])[:8]
    '471d3f40'
    >>> fingerprint([example]) == fingerprint([example, example])
    False
    """
    total = hashlib.sha256()
    known: dict[Path, str] = {}
    for example in examples:
        pictures = {"clean": example.clean_image, "corrupt": example.corrupt_image}
        boxes = {name: mask for name, mask in sorted(example.masks.items()) if is_box(mask)}
        pictures |= {
            f"mask {name}": cast(Picture, mask)
            for name, mask in sorted(example.masks.items())
            if name not in boxes
        }
        record = {
            "id": example.id,
            "prompts": [example.clean_prompt, example.corrupt_prompt],
            "answers": [example.answer, example.foil],
            "roles": {name: list(span) for name, span in sorted(example.roles.items())},
            "pictures": {name: _content(one, known) for name, one in pictures.items()},
        }
        record |= {"boxes": boxes} if boxes else {}
        more = [_content(one, known) for one in example.more_images]
        record |= {"more": more} if more else {}
        total.update(json.dumps(record).encode() + b"\n")
    return total.hexdigest()


def _read_text(path: Path) -> str:
    """The text of a CSV file, without its byte order mark."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a CSV file of examples") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder; expected the CSV file of examples in it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); "
            "save the file as CSV in UTF-8"
        ) from None
    if not text.strip():
        raise DataError(f"{path}: empty; expected a header with {', '.join(COLUMNS)}")
    return text


def _parse(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that hold anything, each with the number of the line on which it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: not a row of a CSV file ({error}); "
            "check its double quotes (one inside a quoted cell is written twice)"
        ) from error


def _check_header(path: Path, header: Sequence[str]) -> list[str]:
    """The names of the columns, with `mask_path` and `box` in their long form."""
    short = {MASK: f"{MASK}_object", BOX: f"{BOX}_object"}
    names = [short.get(name.strip(), name.strip()) for name in header]
    named = [name for name in names if not _is_index(name)]
    missing = [name for name in COLUMNS if name not in named and name not in OPTIONAL]
    if missing:
        lower = {name.lower(): name for name in named if name not in COLUMNS}
        near = {name: difflib.get_close_matches(name, lower, n=1, cutoff=0.8) for name in missing}
        lacks = [f"{one} (is it {lower[near[one][0]]!r}?)" if near[one] else one for one in missing]
        commas = " (its cells must be separated by commas)" if len(names) == 1 else ""
        raise DataError(
            f"{path}: no column {', '.join(lacks)}; the file has "
            f"{', '.join(map(repr, named)) or 'none'}{commas}; rename or add columns"
        )
    if twice := [name for name in named if named.count(name) > 1]:
        raise DataError(f"{path}: two columns {twice[0]!r}; rename one or take it out")
    return names


def _is_index(name: str) -> bool:
    """Whether a column only counts rows: pandas leaves its index unnamed and reads it back so."""
    return re.fullmatch(r"(Unnamed: [\d.]+)?", name) is not None


def _clean(names: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """A row without index columns and, but for its prompts, without blanks around the cells."""
    return {
        name: cell if name in PROMPTS and cell.strip() else cell.strip()
        for name, cell in zip(names, cells, strict=True)
        if not _is_index(name)
    }


def _problem(row: Mapping[str, str]) -> str | None:
    """Why no example can be made of a row, if so."""
    needed = ("id", *(name for name in COLUMNS if name not in OPTIONAL))
    if empty := [name for name in needed if not row[name]]:
        return f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty (fill it in)"
    if row["correct_answer"].casefold() == row["incorrect_answer"].casefold():
        word = row["correct_answer"]
        return f"correct_answer and incorrect_answer are both {word!r} (they must differ)"
    for name, cell in row.items():
        if cell and name.startswith(f"{BOX}_"):
            try:
                _box(cell)
            except ValueError:
                return f"{name} is {cell!r} (write left top right bottom, in pixels)"
    return None


def _example(folder: Path, row: Mapping[str, str]) -> Example:
    """The example in a row that `_problem` has nothing against."""
    masks: dict[str, Picture | Box] = {}
    for name, cell in row.items():
        if _is_mask(name) and cell:
            kind = MASK if name.startswith(MASK) else BOX
            of = name.removeprefix(f"{kind}_")
            masks[of] = folder / cell if kind == MASK else _box(cell)
    fixed = {"id", SHOWS, *COLUMNS}
    groups = {
        name: cell
        for name, cell in row.items()
        if name not in fixed and not _is_mask(name) and not _is_more(name) and cell
    }
    further = sorted(name for name in row if _is_more(name) and row[name])
    corrupt_image = row.get("corrupt_image_path")
    return Example(
        id=row["id"],
        clean_image=folder / row["clean_image_path"],
        clean_prompt=row["clean_prompt"],
        answer=row["correct_answer"],
        foil=row["incorrect_answer"],
        corrupt_image=folder / corrupt_image if corrupt_image else None,
        corrupt_prompt=row.get("corrupt_prompt") or None,
        groups=groups,
        masks=masks,
        more_images=tuple(folder / row[name] for name in further),
        shows=frozenset(x for x in (x.strip() for x in row.get(SHOWS, "").casefold().split(",")) if x),
    )


def _is_mask(name: str) -> bool:
    return re.fullmatch(rf"({MASK}|{BOX})_.+", name) is not None


def _is_more(name: str) -> bool:
    return re.fullmatch(rf"{MORE}_[2-9]", name) is not None


def is_box(mask: Picture | Box) -> TypeGuard[Box]:
    """Whether an object's place is given as a box, not as a picture."""
    return isinstance(mask, tuple)


def _box(cell: str) -> Box:
    """The four numbers of a cell; raises `ValueError` if they are no box."""
    left, top, right, bottom = (float(part) for part in re.split(r"[,;\s]+", cell.strip("()[] ")))
    if not (0 <= left < right < math.inf and 0 <= top < bottom < math.inf):
        raise ValueError(cell)
    return left, top, right, bottom


def _row(path: Path, number: int, example: Example) -> dict[str, str]:
    """The cells of an example; its pictures in memory are saved on the way."""

    def place(picture: Picture | None, name: str) -> str:
        if picture is None:
            return ""
        if isinstance(picture, Image.Image):
            file = path.with_name(f"{path.stem}-images") / f"{number:05d}-{name}.png"
            _save(picture, file)
            return file.relative_to(path.parent).as_posix()
        here, there = path.parent.absolute(), Path(picture).absolute()
        return (there.relative_to(here) if there.is_relative_to(here) else there).as_posix()

    def place_mask(name: str, mask: Picture | Box, index: int) -> tuple[str, str]:
        if isinstance(mask, tuple):
            return f"{BOX}_{name}", " ".join(f"{x:.10g}" for x in mask)
        return f"{MASK}_{name}", place(mask, f"mask{index}")

    words = {
        name: example.clean_prompt[slice(*span)]
        for name, span in example.roles.items()
        if name not in ("answer", "foil")
    }
    return {
        "id": example.id,
        "clean_image_path": place(example.clean_image, "clean"),
        "corrupt_image_path": place(example.corrupt_image, "corrupt"),
        "clean_prompt": example.clean_prompt,
        "corrupt_prompt": example.corrupt_prompt or "",
        "correct_answer": example.answer,
        "incorrect_answer": example.foil,
        **{f"{MORE}_{n}": place(one, f"image{n}") for n, one in enumerate(example.more_images, 2)},
        **dict(place_mask(*item, index) for index, item in enumerate(example.masks.items())),
        **({SHOWS: ", ".join(sorted(example.shows))} if example.shows else {}),
        **words,
        **example.groups,
    }


def _check_row(row: Mapping[str, str], example: Example, duplicate: bool) -> None:
    """Refuse an example that would not come back as it is."""
    where = f"example {example.id!r}"
    if duplicate:
        raise DataError(f"{where}: a second example of this id; make it new")
    if problem := _problem(row):
        raise DataError(f"{where}: {problem}")
    for name in (*example.roles, *example.groups):
        own = _is_mask(name) or _is_more(name) or _is_index(name)
        if name in ("id", SHOWS, *COLUMNS) or own or name != name.strip():
            raise DataError(f"{where}: a role or group cannot be called {name!r}; rename it")
    back = _example(Path(), row)
    if lost := [name for name, span in example.roles.items() if back.roles.get(name) != span]:
        word = example.clean_prompt[slice(*example.roles[lost[0]])]
        raise DataError(
            f"{where}: role {lost[0]!r} ({word!r}) has no place in a CSV file, which holds the "
            "first occurrence of one whole word or phrase and no other group of the same name; "
            "change the prompt or the role"
        )


def _save(picture: Image.Image, file: Path) -> None:
    """Save a picture in memory as a PNG that `open_image` reads as the same pixels."""
    plain = picture.mode in ("1", "L", "RGB") and not picture.info and not picture.getexif()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    (picture if plain else open_image(picture)).save(part, format="PNG")
    part.replace(file)


@contextlib.contextmanager
def _opened(picture: Picture | str) -> Iterator[Image.Image]:
    """A picture whose header is read; where it was a path, closed again at the end."""
    if isinstance(picture, Image.Image):
        yield picture
        return
    path = Path(picture)
    if path.is_dir():
        raise ExampleError(f"{path}: a folder; expected an image file")
    if not path.is_file():
        raise ExampleError(
            f"{path}: no such file; expected an image (a path in a CSV file starts from its folder)"
        )
    if not path.stat().st_size:
        raise ExampleError(f"{path}: an empty file; expected an image")
    with Image.open(path) as image:
        yield image


def _turned(image: Image.Image) -> Image.Image:
    """The image turned and mirrored as its EXIF data says; it stays as it is if that is broken."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever the parser of a broken block stumbles over
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB without metadata, so that nothing is applied twice."""
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

    Mode I holds 32 bits, and 16 of them count where Pillow reads a 16-bit file into it. Numbers
    that do not tell their range are refused rather than guessed at.
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


def _content(picture: Picture | None, known: dict[Path, str]) -> str | None:
    """The hash of a picture's file or pixels; `known` keeps what one call has read already."""
    if picture is None:
        return None
    if isinstance(picture, Image.Image):
        try:
            pixels = picture.tobytes()
        except Exception:  # a file that was opened in part and cannot be read to its end
            return "missing"
        about = [picture.mode, *picture.size, picture.getpalette()]
        return hashlib.sha256(json.dumps(about).encode() + pixels).hexdigest()
    path = Path(picture)
    if path not in known:
        try:
            with path.open("rb") as file:
                known[path] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            known[path] = "missing"
    return known[path]
