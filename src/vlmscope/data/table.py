"""Tables as CSV files: the one reader, and the form of examples, named as in the published NOTICE code."""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from vlmscope import files
from vlmscope.data.example import Box, Example, Picture, check_text
from vlmscope.data.images import open_image, png
from vlmscope.errors import DataError, ExampleError, shown

COLUMNS = (
    *("clean_image_path", "corrupt_image_path", "clean_prompt", "corrupt_prompt"),
    *("correct_answer", "incorrect_answer"),
)
"""The columns of the CSV form, besides `id`, masks, groups and roles."""
NEEDED = tuple(name for name in COLUMNS if not name.startswith("corrupt"))
"""The corrupt input may be absent or empty, and a foil empty: not every corruption or metric needs them, and
those that do say so."""
PROMPTS = ("clean_prompt", "corrupt_prompt")
"""Taken with the blanks around them, which a model's tokens may depend on."""
MASK, BOX, SHOWS, MORE = "mask_path", "box", "shows", "image_path"
"""Columns of the mask of `object` or the box around it (`left top right bottom`, in pixels of the clean
image), with `_NAME` those of NAME; of the words for what the clean image shows, with commas between them;
and, as `image_path_2`, `image_path_3`…, of the further pictures."""
COLUMNS_AT_MOST = 1000
"""Each column may be a role, which is looked for in every prompt."""
SHOWN = 5
"""How many bad lines of a CSV an error lists."""

# Pandas leaves its index unnamed and reads it back so.
_INDEX = re.compile(r"(Unnamed: [\d.]+)?")
_MORE = MORE + "_([2-9]|[1-9][0-9]{1,8})"
_NO_GROUP = re.compile(
    rf"id|{SHOWS}|{'|'.join(COLUMNS)}|({MASK}|{BOX}|{MORE})(_.*)?|{_INDEX.pattern}", re.DOTALL
)


def read_csv(path: Path | str) -> list[Example]:
    """The examples in a CSV file, in its order.

    The columns are `COLUMNS`, the published NOTICE code's own; the two of the corrupt input may be absent,
    and their cells empty. `id` is optional: by default an example's id is the number of its row, counted
    from 0 as pandas does. `mask_path` and `mask_path_NAME` give masks, `box` and `box_NAME` boxes instead;
    `image_path_2`, `image_path_3`… (any number from 2 on) are further pictures of an example, the same in
    both runs; `shows` are words for what the clean image shows. Every further column is a group, and where
    its words stand in the clean prompt also a role of that name; the roles `answer` and `foil` are always
    looked up. Columns without a name, as pandas writes an index, are left out. Image paths are relative to
    the file's folder, and are not opened here.

    Raises `DataError` where the file as a whole cannot be trusted: it is missing or not UTF-8, a column is
    missing, there twice or named as none can be, a row has too many or too few cells, an empty one that
    every example needs or a control character in a text, an id stands twice, or an answer is its own foil.

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
    lines = _read_cells(path, COLUMNS)
    _, header = next(lines, (1, []))
    short = {MASK: f"{MASK}_object", BOX: f"{BOX}_object"}
    names = [short.get(name.strip(), name.strip()) for name in header]
    _check_columns(path, names, NEEDED, "rename or add columns")
    for name in names:
        if re.fullmatch(rf"{MORE}(_.*)?|({MASK}|{BOX})_", name) and not re.fullmatch(_MORE, name):
            raise DataError(
                f"{path}: no picture or object is called {shown(name)}; further pictures are {MORE}_2, "
                f"{MORE}_3 and so on, masks {MASK}_NAME, boxes {BOX}_NAME: rename the column"
            )

    def make(number: int, cells: Sequence[str]) -> Example:
        if len(cells) != len(names):
            raise ValueError(_other_length(cells, names))
        return example_of(path.parent, {"id": str(number)} | dict(zip(names, cells, strict=True)))

    rows = ((line, partial(make, number, cells)) for number, (line, cells) in enumerate(lines))
    examples = list(checked(f"{path}", rows, "line", "make it new"))
    if not examples:
        raise DataError(f"{path}: a header and no examples; expected a row for each example")
    return examples


def checked(
    name: str, rows: Iterable[tuple[int, Callable[[], Example]]], row: str, way_out: str
) -> Iterator[Example]:
    """The examples of all rows; raises `DataError` in the end for those that make none, or have an id of
    another one."""
    problems: list[str] = []
    first: dict[str, int] = {}
    for number, make in rows:
        try:
            example = make()
            earlier = first.setdefault(example.id, number)
            if earlier != number:
                raise ValueError(f"the id {shown(example.id)} is {row} {earlier}'s ({way_out})")
            yield example
        except (ValueError, ExampleError) as problem:
            problems.append(f"{row} {number}: {problem}")
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(f"{name}: {'; '.join(problems[:SHOWN])}{more}")


def write_csv(path: Path | str, examples: Iterable[Example]) -> None:
    """Write examples as the CSV file that `read_csv` reads back.

    Pictures in memory become PNG files in the folder `<stem>-images` next to the file; a picture that is a
    path stays where it is (relative to the file where it lies below its folder). Roles become columns that
    hold their words. The file itself is written last. Cells are written as they are, those too that a
    spreadsheet would compute ("=1+1"): this is data, which is read back.

    Raises `DataError` for an example that the form cannot hold, such as a role whose words stand in the
    prompt a second time and mean the later place, or a picture whose name is not UTF-8, and `StoreError` if
    one of the files is there with other content (a CSV file does not say who made it, so none is replaced),
    or cannot be written.
    """
    path = Path(path)
    files.claim_file(path)
    rows: list[dict[str, str]] = []
    ids = set[str]()
    pictures: dict[Path, Image.Image] = {}
    for number, example in enumerate(examples):
        row = _row(path, number, example, pictures)
        _check_row(row, example, duplicate=example.id in ids)
        ids.add(example.id)
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no examples to write; expected at least one")
    columns = list(dict.fromkeys(("id", *COLUMNS, *(name for row in rows for name in row))))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    missing = [file for file, picture in pictures.items() if not files.is_kept(file, partial(_png, picture))]
    is_new = not files.is_kept(path, lambda: content)
    if any(file.parent.is_symlink() for file in missing):
        folder = missing[0].parent
        raise DataError(f"{folder}: a link, through which nothing is written; delete or rename it")
    for file in missing:
        files.write(file, _png(pictures[file]))
    if is_new:
        files.write(path, content)


def read_table(
    path: Path, columns: Sequence[str], rename: Callable[[str], str] = str.strip
) -> list[dict[str, str]]:
    """The rows of any CSV file that has these columns (and maybe others).

    `rename` is called with the names in the header. Raises `DataError` where the file cannot be read, a row
    has too many or too few cells, or a column is there twice or not at all, with the name that is nearest.
    """
    lines = _read_cells(path, columns)
    _, header = next(lines, (1, []))
    names = [rename(name) for name in header]
    _check_columns(path, names, columns, f"expected {', '.join(columns)}")
    rows: list[dict[str, str]] = []
    for line, cells in lines:
        if len(cells) != len(names):
            raise DataError(f"{path}: line {line}: {_other_length(cells, names)}")
        rows.append({name: cell.strip() for name, cell in zip(names, cells, strict=True)})
    if not rows:
        raise DataError(f"{path}: a header and no rows; expected some below it")
    return rows


def _read_cells(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows that hold anything, the header first, each with the number of the line on which it begins."""
    try:
        text = files.read(path, "a CSV file").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}); save the file as CSV in UTF-8"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(
            f"{path}, line {line}: not text (a byte of zeros, as in UTF-16); save the file as CSV in UTF-8"
        )
    if not text.strip():
        raise DataError(f"{path}: empty; expected a header with {', '.join(columns)}")
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


def _check_columns(path: Path, names: Sequence[str], needed: Sequence[str], way_out: str) -> None:
    """Refuse a table that lacks a column, the error names the nearest that is there; or has odd ones."""
    if len(names) > COLUMNS_AT_MOST:
        raise DataError(f"{path}: {len(names):,} columns; expected at most {COLUMNS_AT_MOST:,}")
    if odd := [name for name in names if not name.isprintable()]:
        raise DataError(f"{path}: a column {shown(odd[0])}, with characters that are not seen; rename it")
    count = Counter(name for name in names if not _INDEX.fullmatch(name))
    if twice := [name for name in count if count[name] > 1]:
        raise DataError(f"{path}: two columns {shown(twice[0])}; rename one or take it out")
    missing = [name for name in needed if name not in names]
    if not missing:
        return
    others = {name.lower(): name for name in names if name not in COLUMNS}
    near = {name: difflib.get_close_matches(name.lower(), others, n=1, cutoff=0.8) for name in missing}
    lacks = [f"{name} (is it {shown(others[near[name][0]])}?)" if near[name] else name for name in missing]
    named = ", ".join(map(shown, count)) or "none"
    commas = " (its cells must be separated by commas)" if len(names) == 1 else ""
    raise DataError(f"{path}: no column {', '.join(lacks)}; the file has {named}{commas}; {way_out}")


def _other_length(cells: Sequence[str], names: Sequence[str]) -> str:
    return (
        f"{len(cells)} cells where the header has {len(names)} "
        "(put a cell with a comma or a line break in double quotes)"
    )


def example_of(folder: Path, row: Mapping[str, str]) -> Example:
    """The example in a row; raises `ValueError` or `ExampleError` with what is wrong if it makes none."""
    cells = {name: cell if name in PROMPTS else cell.strip() for name, cell in row.items() if cell.strip()}
    if empty := [name for name in ("id", *NEEDED) if name not in cells and name != "incorrect_answer"]:
        raise ValueError(f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty (fill it in)")
    for name in ("id", *PROMPTS, "correct_answer", "incorrect_answer"):
        check_text(name, cells.get(name, ""))
    answer, foil = cells["correct_answer"], cells.get("incorrect_answer", "")
    if answer.casefold() == foil.casefold():
        raise ValueError(f"correct_answer and incorrect_answer are both {shown(answer)} (they must differ)")
    masks: dict[str, Picture | Box] = {}
    for name, cell in cells.items():
        if name.startswith(f"{MASK}_"):
            if name.replace(MASK, BOX, 1) in cells:
                raise ValueError(f"{name} and {name.replace(MASK, BOX, 1)} are both filled (leave one)")
            masks[name.removeprefix(f"{MASK}_")] = folder / cell
        elif name.startswith(f"{BOX}_"):
            masks[name.removeprefix(f"{BOX}_")] = _box(name, cell)
    corrupt_image = cells.get("corrupt_image_path")
    more = sorted(int(found[1]) for found in (re.fullmatch(_MORE, name) for name in cells) if found)
    words = (word.strip() for word in cells.get(SHOWS, "").casefold().split(","))
    return Example(
        id=cells["id"],
        clean_image=folder / cells["clean_image_path"],
        clean_prompt=cells["clean_prompt"],
        answer=answer,
        foil=foil,
        corrupt_image=folder / corrupt_image if corrupt_image else None,
        corrupt_prompt=cells.get("corrupt_prompt"),
        groups={name: cell for name, cell in cells.items() if not _NO_GROUP.fullmatch(name)},
        masks=masks,
        more_images=tuple(folder / cells[f"{MORE}_{n}"] for n in more),
        shows=frozenset(filter(None, words)),
    )


def _box(name: str, cell: str) -> Box:
    """The four numbers of a cell; raises `ValueError` if they are no box."""
    try:
        left, top, right, bottom = map(float, re.split(r"[,;\s]+", cell.strip("()[] ")))
        if 0 <= left < right < math.inf and 0 <= top < bottom < math.inf:
            return left, top, right, bottom
    except ValueError:
        pass
    raise ValueError(f"{name} is {shown(cell)} (write left top right bottom, in pixels)")


def _row(path: Path, number: int, example: Example, pictures: dict[Path, Image.Image]) -> dict[str, str]:
    """The cells of an example; its pictures in memory are added to `pictures`, by their files."""

    def place(picture: Picture | None, name: str) -> str:
        if picture is None:
            return ""
        if isinstance(picture, Image.Image):
            file = path.with_name(f"{path.stem}-images") / f"{number:05d}-{name}.png"
            pictures[file] = picture
            return file.relative_to(path.parent).as_posix()
        here, there = path.parent.absolute(), Path(picture).absolute()
        return (there.relative_to(here) if there.is_relative_to(here) else there).as_posix()

    row = {
        "id": example.id,
        "clean_image_path": place(example.clean_image, "clean"),
        "corrupt_image_path": place(example.corrupt_image, "corrupt"),
        "clean_prompt": example.clean_prompt,
        "corrupt_prompt": example.corrupt_prompt or "",
        "correct_answer": example.answer,
        "incorrect_answer": example.foil,
    }
    for n, picture in enumerate(example.more_images, 2):
        row[f"{MORE}_{n}"] = place(picture, f"image{n}")
    for n, (name, mask) in enumerate(example.masks.items()):
        if isinstance(mask, tuple):
            row[f"{BOX}_{name}"] = " ".join(f"{x:.10g}" for x in mask)
        else:
            row[f"{MASK}_{name}"] = place(mask, f"mask{n}")
    if example.shows:
        row[SHOWS] = ", ".join(sorted(example.shows))
    for name, span in example.roles.items():
        if name not in ("answer", "foil"):
            row[name] = example.clean_prompt[slice(*span)]
    return row | dict(example.groups)


def _check_row(row: Mapping[str, str], example: Example, duplicate: bool) -> None:
    """Refuse an example that would not come back as it is."""
    where = f"example {shown(example.id)}"
    if duplicate:
        raise DataError(f"{where}: a second example of this id; make it new")
    for name in (*example.roles, *example.groups):
        if _NO_GROUP.fullmatch(name) or name != name.strip() or not name.isprintable():
            raise DataError(f"{where}: a role or group cannot be called {shown(name)}; rename it")
    for name, cell in row.items():
        if not files.is_text(cell):
            raise DataError(f"{where}: {name} {shown(cell)} is not UTF-8; rename it")
    try:
        back = example_of(Path(), row)
    except (ValueError, ExampleError) as problem:
        raise DataError(f"{where}: {problem}") from None
    if lost := [name for name, span in example.roles.items() if back.roles.get(name) != span]:
        word = example.clean_prompt[slice(*example.roles[lost[0]])]
        raise DataError(
            f"{where}: role {shown(lost[0])} ({shown(word)}) has no place in a CSV file, which holds the "
            "first occurrence of one whole word or phrase and no other group of the same name; "
            "change the prompt or the role"
        )


def _png(picture: Image.Image) -> bytes:
    """A picture in memory as a PNG file that `open_image` reads as the same pixels."""
    plain = picture.mode in ("1", "L", "RGB") and not picture.info and not picture.getexif()
    return png(picture if plain else open_image(picture))
