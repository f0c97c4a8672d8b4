"""Examples, their CSV form, and pictures as people have them: real files for every case."""

from __future__ import annotations

import copy
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from vlmscope.data import example as module
from vlmscope.data.example import Example, find_roles, fingerprint
from vlmscope.data.images import open_image
from vlmscope.data.table import read_csv, write_csv
from vlmscope.errors import DataError, ExampleError, StoreError

HEADER = "clean_image_path,corrupt_image_path,clean_prompt,corrupt_prompt,correct_answer,incorrect_answer"
ROW = "a.png,b.png,Is this circle red or blue?,Is this circle pink or grey?,red,blue"


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Writes lines as a CSV file."""

    def write(*lines: str, end: str = "\n", encoding: str = "utf-8") -> Path:
        path = tmp_path / "my.csv"
        path.write_bytes("".join(line + end for line in lines).encode(encoding))
        return path

    return write


# Reading


def test_reads_the_published_columns(table: Callable[..., Path]) -> None:
    path = table(HEADER, ROW)
    [one] = read_csv(path)
    assert (one.id, one.answer, one.foil) == ("0", "red", "blue")
    assert (one.clean_image, one.corrupt_image) == (path.parent / "a.png", path.parent / "b.png")
    assert one.corrupt_prompt == "Is this circle pink or grey?"
    assert one.roles == {"answer": (15, 18), "foil": (22, 26)}
    assert (one.groups, one.masks) == ({}, {})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("index", ["", "Unnamed: 0"])
def test_reads_files_as_pandas_and_spreadsheets_write_them(
    table: Callable[..., Path], encoding: str, end: str, index: str
) -> None:
    quoted = 'é.png,b.png,"Is this ""café"", red or blue?",,red,blue'
    path = table(f"{index},{HEADER},state", f"7,{quoted},color", end=end, encoding=encoding)
    [one] = read_csv(path)
    assert one.clean_prompt == 'Is this "café", red or blue?'
    assert one.clean_image == path.parent / "é.png"
    assert (one.id, one.groups) == ("0", {"state": "color"})


def test_reads_a_cell_with_line_breaks_as_it_is(table: Callable[..., Path]) -> None:
    path = table(HEADER, 'a.png,,"USER:\n<image>\nred or blue?\n",,red,blue')
    assert read_csv(path)[0].clean_prompt == "USER:\n<image>\nred or blue?\n"


def test_needs_nothing_of_the_corrupt_input(table: Callable[..., Path]) -> None:
    header = "clean_image_path,clean_prompt,correct_answer,incorrect_answer"
    [absent] = read_csv(table(header, "a.png,red or blue?,red,blue"))
    [empty] = read_csv(table(HEADER, "a.png,,red or blue?, ,red,blue"))
    for one in (absent, empty):
        assert (one.corrupt_image, one.corrupt_prompt) == (None, None)


def test_a_further_column_is_a_group_and_where_its_words_stand_a_role(table: Callable[..., Path]) -> None:
    lines = (ROW + ",Circle,color,", ROW + ",star,shape,left")
    first, second = read_csv(table(HEADER + ",noun,kind,side", *lines))
    assert first.groups == {"noun": "Circle", "kind": "color"}
    assert first.roles["noun"] == (8, 14)
    assert second.groups == {"noun": "star", "kind": "shape", "side": "left"}
    assert set(second.roles) == {"answer", "foil"}


def test_reads_masks_and_absolute_paths(table: Callable[..., Path], tmp_path: Path) -> None:
    row = f"{tmp_path}/x/a.png" + ROW.removeprefix("a.png")
    [one] = read_csv(table(HEADER + ",mask_path,mask_path_sky,mask_path_sea", row + ",m.png,s.png,"))
    assert one.clean_image == tmp_path / "x" / "a.png"
    assert one.masks == {"object": tmp_path / "m.png", "sky": tmp_path / "s.png"}
    assert one.groups == {}


def test_skips_lines_that_hold_nothing(table: Callable[..., Path]) -> None:
    assert [one.id for one in read_csv(table(HEADER, ROW, "", ",,,,,", ROW, ""))] == ["0", "1"]


def test_a_missing_image_is_no_matter_of_the_file(table: Callable[..., Path]) -> None:
    [one] = read_csv(table(HEADER, ROW))
    with pytest.raises(ExampleError, match=r"a\.png: no such file; expected an image"):
        open_image(one.clean_image)


def test_whole_words_in_any_case_make_a_role() -> None:
    assert find_roles("Reddish or RED?", {"answer": "red"}) == {"answer": (11, 14)}
    assert find_roles("a t-shirt (new)?", {"noun": "t-shirt", "x": "(new)", "y": ""}) == {
        "noun": (2, 9),
        "x": (10, 15),
    }


# Refusing


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: no such file; expected a CSV file"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(DataError, match="a folder; expected a CSV file"):
        read_csv(tmp_path)


def test_refuses_what_is_not_utf_8(table: Callable[..., Path]) -> None:
    path = table(HEADER, ROW, "é" + ROW, encoding="latin-1")
    with pytest.raises(DataError, match=r"my\.csv, line 3: not UTF-8 \(byte 0xe9\); save .* UTF-8"):
        read_csv(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(DataError, match=r"line 3: not UTF-8 \(byte 0xe9\)"):
        read_csv(path)
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        read_csv(table(HEADER, ROW, encoding="utf-16"))


@pytest.mark.parametrize("text", ["", "\ufeff", " \n\n"])
def test_refuses_an_empty_file(table: Callable[..., Path], text: str) -> None:
    with pytest.raises(DataError, match=r"my\.csv: empty; expected a header with clean_image_path"):
        read_csv(table(text))


def test_refuses_a_header_alone(table: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="a header and no examples; expected a row"):
        read_csv(table(HEADER))


def test_names_the_columns_that_are_missing_and_the_nearest_names(table: Callable[..., Path]) -> None:
    path = table("clean_image_path,Clean_Promt,incorrect_answer", "a,b,c")
    expected = (
        r"no column clean_prompt \(is it 'Clean_Promt'\?\), correct_answer; the file has "
        "'clean_image_path', 'Clean_Promt', 'incorrect_answer'; rename or add columns"
    )
    with pytest.raises(DataError, match=expected):
        read_csv(path)


def test_knows_a_file_with_other_separators(table: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="its cells must be separated by commas"):
        read_csv(table(HEADER.replace(",", ";"), ROW.replace(",", ";")))


@pytest.mark.parametrize("extra", ["kind,kind", "clean_prompt", "mask_path,mask_path_object"])
def test_refuses_two_columns_of_one_name(table: Callable[..., Path], extra: str) -> None:
    with pytest.raises(DataError, match=r"two columns '\w+'; rename one or take it out"):
        read_csv(table(f"{HEADER},{extra}", ROW))


def test_refuses_rows_of_another_length(table: Callable[..., Path]) -> None:
    path = table(
        HEADER, '"a\nb"' + ROW.removeprefix("a.png"), "a.png,b.png,Is it a, or b?,,a,b", "a.png,b.png"
    )
    expected = (
        r"my\.csv: line 4: 7 cells where the header has 6 \(put a cell with a comma .*\); "
        "line 5: 2 cells"
    )
    with pytest.raises(DataError, match=expected):
        read_csv(path)


@pytest.mark.parametrize("cell", ['"open', '"a" b'])
def test_refuses_quotes_that_do_not_fit(table: Callable[..., Path], cell: str) -> None:
    with pytest.raises(DataError, match=r"my\.csv, line 3: not a row .* check its double quotes"):
        read_csv(table(HEADER, ROW, cell + "," + ROW))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (",b,red or blue?,,red,blue", r"clean_image_path is empty \(fill it in\)"),
        ("a,b, ,,red,blue", r"clean_prompt is empty"),
        ("a,b,red or blue?,,,", r"correct_answer is empty"),
        ("a,b,red or blue?,,red, Red", r"are both 'red' \(they must differ\)"),
    ],
)
def test_refuses_rows_that_make_no_example(table: Callable[..., Path], row: str, expected: str) -> None:
    with pytest.raises(DataError, match=rf"my\.csv: line 3: .*{expected}"):
        read_csv(table(HEADER, ROW, row))


def test_refuses_ids_that_stand_twice_or_not_at_all(table: Callable[..., Path]) -> None:
    rows = [f"{key},{ROW}" for key in ("x", "y", "x", "")]
    expected = r"line 4: the id 'x' is line 2's \(make it new\); line 5: id is empty"
    with pytest.raises(DataError, match=expected):
        read_csv(table("id," + HEADER, *rows))


def test_lists_five_bad_lines_and_counts_the_rest(table: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"line 2: .*line 6: [^;]*; and 2 more$") as caught:
        read_csv(table(HEADER, *["a,b,,,red,blue"] * 7))
    assert "\n" not in str(caught.value)


# Writing


def drawn(color: str = "red", size: tuple[int, int] = (4, 3)) -> Image.Image:
    return Image.new("RGB", size, color)


def made(key: str = "one", **changes: object) -> Example:
    prompt = "Is this circle red or blue?"
    words = {"answer": "red", "foil": "blue", "noun": "circle"}
    plain = Example(
        id=key,
        clean_image=drawn("red"),
        clean_prompt=prompt,
        answer="red",
        foil="blue",
        corrupt_image=drawn("blue"),
        corrupt_prompt='Is this "circle", pink or grey?\n',
        roles=find_roles(prompt, words),
        groups={"kind": "color"},
        masks={"object": Image.new("L", (4, 3), 255), "left hand": Image.new("1", (4, 3))},
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_an_example_made_in_python_has_the_roles_of_one_that_was_read(tmp_path: Path) -> None:
    """Options first, then roles that are given, then groups; each once, the given ones as they are."""
    prompt = "Is this Circle red or blue, a red circle?"
    groups = {"kind": "color", "noun": "circle", "answer": "this"}
    one = Example("one", drawn(), prompt, "red", "blue", groups=groups)
    wanted = {"answer": (15, 18), "foil": (22, 26), "noun": (8, 14)}
    assert list(one.roles.items()) == list(wanted.items())
    write_csv(tmp_path / "my.csv", [one])
    [back] = read_csv(tmp_path / "my.csv")
    assert list(back.roles.items()) == list(wanted.items())
    assert fingerprint([back]) == fingerprint([replace(back, groups=groups)])
    late = replace(one, roles={"verb": (0, 2), "answer": (30, 33)})
    assert list(late.roles.items()) == [
        ("answer", (30, 33)),
        ("foil", (22, 26)),
        ("verb", (0, 2)),
        ("noun", (8, 14)),
    ]
    copied = copy.deepcopy(late.roles)
    assert copied == late.roles and copied.given == late.roles.given
    assert Example(**asdict(one)).roles == one.roles
    assert Example("one", drawn(), "?", "", "").roles == {}


def test_roles_follow_the_prompt() -> None:
    """What was looked up is looked up again; what was given has to be there still."""
    one = Example("one", drawn(), "red or blue circle?", "red", "blue", roles={"answer": (0, 3)})
    assert replace(one, clean_prompt="blue or red?").roles == {"answer": (8, 11), "foil": (0, 4)}
    assert replace(one, answer="circle").roles == {"answer": (12, 18), "foil": (7, 11)}
    noun = replace(one, roles={"noun": (12, 18)})
    assert replace(noun, clean_prompt="one or more circle").roles == {"noun": (12, 18)}
    for prompt, why in (
        ("red?", r"'one': the role 'noun' is characters 12 to 18 of clean_prompt, and the prompt has 4"),
        ("red or blue square?", "'square' has taken the place of 'circle'; give the roles of this prompt"),
    ):
        with pytest.raises(ExampleError, match=why):
            replace(noun, clean_prompt=prompt)
        assert replace(noun, clean_prompt=prompt, roles={}).roles["answer"] == (0, 3)
    for span in ((-3, 2), (4, 4), (5, 3), (12, 99)):
        with pytest.raises(ExampleError, match="the prompt has 19 characters"):
            replace(one, roles={"noun": span})


def test_further_pictures(table: Callable[..., Path], tmp_path: Path) -> None:
    [one, two] = read_csv(table(HEADER + ",image_path_2,image_path_3", ROW + ",b.png,", ROW + ",,"))
    assert (one.more_images, one.groups) == ((tmp_path / "b.png",), {})
    assert two.more_images == ()
    many = made(more_images=(drawn("green"), drawn("pink")))
    write_csv(tmp_path / "new" / "set.csv", [many, replace(many, id="two", more_images=())])
    [one, two] = read_csv(tmp_path / "new" / "set.csv")
    assert [open_image(x).getpixel((0, 0)) for x in one.more_images] == [
        open_image(x).getpixel((0, 0)) for x in many.more_images
    ]
    assert two.more_images == ()
    assert fingerprint([many]) != fingerprint([replace(many, more_images=many.more_images[::-1])])


def test_what_a_picture_shows(table: Callable[..., Path], tmp_path: Path) -> None:
    [one, two] = read_csv(table(HEADER + ",shows", ROW + ',"Red, traffic light"', ROW + ","))
    assert (one.shows, one.groups, two.shows) == ({"red", "traffic light"}, {}, frozenset())
    many = [made(shows=frozenset(("red", "circle"))), made("two")]
    write_csv(tmp_path / "new.csv", many)
    assert [e.shows for e in read_csv(tmp_path / "new.csv")] == [{"red", "circle"}, frozenset()]
    assert fingerprint(many[:1]) == fingerprint([made()]), "labels, which no run reads"


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "set.csv"
    plain = Example("two", drawn(), "Red or blue?", "red", "blue")
    write_csv(path, iter([made(), plain]))
    one, two = read_csv(path)
    wanted = made()
    for name in ("id", "clean_prompt", "corrupt_prompt", "answer", "foil", "roles"):
        assert getattr(one, name) == getattr(wanted, name), name
    assert one.groups == {"kind": "color", "noun": "circle"}
    assert open_image(one.clean_image).tobytes() == drawn("red").tobytes()
    assert one.corrupt_image is not None
    assert open_image(one.corrupt_image).tobytes() == drawn("blue").tobytes()
    assert open_image(one.masks["object"]).getextrema() == ((255, 255),) * 3
    assert open_image(one.masks["left hand"]).getextrema() == ((0, 0),) * 3
    assert (two.corrupt_image, two.corrupt_prompt, two.masks) == (None, None, {})
    assert one.clean_image == path.parent / "set-images" / "00000-clean.png"
    assert not list(tmp_path.rglob("*.part"))

    write_csv(again := tmp_path / "new" / "again.csv", read_csv(path))
    assert again.read_bytes() == path.read_bytes()
    assert fingerprint(read_csv(again)) == fingerprint(read_csv(path))


def test_a_picture_that_is_a_path_stays_where_it_is(tmp_path: Path) -> None:
    inside, outside = tmp_path / "set" / "images" / "a.png", tmp_path / "b.png"
    write_csv(tmp_path / "set" / "my.csv", [made(clean_image=inside, corrupt_image=outside)])
    text = (tmp_path / "set" / "my.csv").read_text()
    assert f"one,images/a.png,{outside.as_posix()}," in text
    [one] = read_csv(tmp_path / "set" / "my.csv")
    assert (one.clean_image, one.corrupt_image) == (inside, outside)


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "I;16", "YCbCr"])
def test_writes_pictures_of_any_mode(tmp_path: Path, mode: str) -> None:
    picture = Image.new(mode, (2, 2))
    write_csv(tmp_path / "my.csv", [made(clean_image=picture)])
    [one] = read_csv(tmp_path / "my.csv")
    assert open_image(one.clean_image).tobytes() == open_image(picture).tobytes()


def test_writes_a_picture_the_way_it_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn().save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as picture:
        write_csv(tmp_path / "my.csv", [made(clean_image=picture)])
    [one] = read_csv(tmp_path / "my.csv")
    assert open_image(one.clean_image).size == (3, 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"answer": "BLUE"}, "'one': correct_answer and incorrect_answer are both 'BLUE'"),
        ({"clean_prompt": "", "roles": {}}, "'one': clean_prompt is empty"),
        ({"groups": {"id": "x"}}, "cannot be called 'id'; rename it"),
        ({"groups": {"mask_path_x": "x"}}, "cannot be called 'mask_path_x'; rename it"),
        ({"groups": {"box": "x"}}, "cannot be called 'box'; rename it"),
        ({"groups": {"noun": "star"}}, r"role 'noun' \('circle'\) has no place in a CSV file"),
        (
            {"clean_prompt": "a red or red?", "roles": {"answer": (9, 12)}},
            r"role 'answer' \('red'\) has no place in a CSV file, which holds the first occurrence",
        ),
    ],
)
def test_refuses_to_write_what_would_not_read_back(
    tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        write_csv(tmp_path / "my.csv", [made(**changes)])
    assert not (tmp_path / "my.csv").exists()


def test_refuses_to_write_twins_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'one': a second example of this id"):
        write_csv(tmp_path / "my.csv", [made(), made()])
    with pytest.raises(DataError, match="no examples to write"):
        write_csv(tmp_path / "my.csv", [])


def test_a_failed_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "my.csv"
    write_csv(path, [made()])
    before = path.read_bytes()
    with pytest.raises(DataError):
        write_csv(path, [made("new"), made("new")])
    assert path.read_bytes() == before


def test_says_why_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file: cannot be written \(Not a directory\)"):
        write_csv(tmp_path / "file" / "my.csv", [made()])


def test_replaces_nothing_that_may_be_somebodys(tmp_path: Path) -> None:
    path = tmp_path / "my.csv"
    write_csv(path, [made()])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert len(before) == 5
    write_csv(path, [made()])  # as a command that is run again does
    with pytest.raises(StoreError, match=r"my\.csv: is there, with other content; delete it or choose"):
        write_csv(path, [made(), made("two")])
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    path.unlink()
    (tmp_path / "my-images" / "00000-clean.png").write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"00000-clean\.png: is there, with other content"):
        write_csv(path, [made()])
    assert not path.exists()


# Opening pictures


def corner(picture: Image.Image, at: tuple[int, int] = (0, 0)) -> object:
    assert picture.mode == "RGB"
    return picture.getpixel(at)


def png(header: tuple[int, int, int, int], pixels: bytes, transparent: bytes = b"") -> bytes:
    """A PNG file of (width, height, bits, color type) by hand, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)),
            chunk(b"tRNS", transparent) if transparent else b"",
            chunk(b"IDAT", zlib.compress(pixels)),
            chunk(b"IEND", b""),
        )
    )


@pytest.mark.parametrize(
    ("orientation", "size", "where"),
    [(1, (4, 2), (0, 0)), (3, (4, 2), (3, 1)), (6, (2, 4), (1, 0)), (8, (2, 4), (0, 3))],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_turns_a_picture_as_its_exif_data_says(
    tmp_path: Path, orientation: int, size: tuple[int, int], where: tuple[int, int], suffix: str
) -> None:
    picture = Image.new("RGB", (4, 2), "white")
    picture.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    picture.save(path, exif=exif, **options)
    turned = open_image(path)
    assert turned.size == size
    darkest = min((turned.getpixel((x, y)), (x, y)) for x in range(size[0]) for y in range(size[1]))
    assert darkest[1] == where
    assert open_image(turned).tobytes() == turned.tobytes()


@pytest.mark.parametrize("block", [b"no such thing", b"MM\x00\x2a\x00\x00\xff\xff"])
def test_a_broken_exif_block_does_not_cost_the_picture(tmp_path: Path, block: bytes) -> None:
    drawn().save(tmp_path / "a.png", exif=b"Exif\x00\x00" + block)
    assert corner(open_image(tmp_path / "a.png")) == (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "solid", "expected"), [("RGBA", (255, 0, 0, 255), (255, 0, 0)), ("LA", (76, 255), (76, 76, 76))]
)
def test_transparency_becomes_white(
    tmp_path: Path, mode: str, solid: tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    picture = Image.new(mode, (2, 1), solid)
    picture.putpixel((0, 0), (0,) * len(solid))
    picture.save(tmp_path / "a.png")
    for source in (picture, tmp_path / "a.png"):
        assert corner(open_image(source)) == (255, 255, 255)
        assert corner(open_image(source), (1, 0)) == expected
    assert picture.mode == mode


@pytest.mark.parametrize("transparent", [1, b"\xff\x00"])
def test_a_palette_becomes_colors_and_its_transparency_white(
    tmp_path: Path, transparent: int | bytes
) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "opaque.png")
    picture.save(tmp_path / "clear.png", transparency=transparent)
    opaque, clear = open_image(tmp_path / "opaque.png"), open_image(tmp_path / "clear.png")
    assert (corner(opaque), corner(opaque, (1, 0))) == ((255, 0, 0), (0, 0, 255))
    assert (corner(clear), corner(clear, (1, 0))) == ((255, 0, 0), (255, 255, 255))


def test_a_color_that_stands_for_transparent_becomes_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png((1, 1, 8, 2), b"\0\xff\0\0", struct.pack(">HHH", 255, 0, 0)))
    opened = open_image(path)
    assert corner(opened) == (255, 255, 255)
    assert not opened.has_transparency_data


def test_what_is_applied_is_not_left_in_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png((1, 1, 16, 0), b"\0\x80\0", struct.pack(">H", 128)))
    opened = open_image(path)
    assert (corner(opened), opened.info) == ((128, 128, 128), {})
    assert corner(open_image(opened)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
    ],
)
def test_other_modes_become_rgb(
    tmp_path: Path, mode: str, color: int | tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    picture = Image.new(mode, (1, 1), color)
    assert corner(open_image(picture)) == expected
    if mode != "HSV":
        picture.save(tmp_path / "a.tif")
        assert corner(open_image(tmp_path / "a.tif")) == expected


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize(("level", "expected"), [(0, 0), (257, 1), (60000, 233), (65535, 255)])
def test_16_bits_are_scaled(tmp_path: Path, suffix: str, level: int, expected: int) -> None:
    path = tmp_path / f"a.{suffix}"
    picture = Image.new("I;16", (2, 1), level)
    picture.putpixel((1, 0), 65535)
    picture.save(path)
    opened = open_image(path)
    assert (corner(opened), corner(opened, (1, 0))) == ((expected,) * 3, (255,) * 3)


@pytest.mark.parametrize(("mode", "order"), [("I;16", "<H"), ("I;16L", "<H"), ("I;16B", ">H")])
def test_16_bits_are_scaled_in_either_byte_order(mode: str, order: str) -> None:
    picture = Image.frombytes(mode, (1, 1), struct.pack(order, 32768))
    assert corner(open_image(picture)) == (128, 128, 128)


@pytest.mark.parametrize(("mode", "level"), [("F", 0.5), ("I", 70000), ("I", 200), ("I", -1)])
def test_levels_without_a_known_white_are_refused(mode: str, level: float) -> None:
    with pytest.raises(ExampleError, match=rf"levels of mode {mode} from .* save .* 8 or 16 bits"):
        open_image(Image.new(mode, (1, 1), level))


def test_an_animation_shows_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert corner(open_image(tmp_path / "a.gif")) == (255, 0, 0)


def test_takes_a_path_as_text_and_leaves_a_picture_in_memory_alone(tmp_path: Path) -> None:
    picture = drawn()
    picture.save(tmp_path / "a.png")
    assert open_image(str(tmp_path / "a.png")).tobytes() == picture.tobytes()
    copy = open_image(picture)
    copy.putpixel((0, 0), (0, 0, 0))
    assert corner(picture) == (255, 0, 0)


def test_refuses_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name, expected in {
        "none.png": "no such file; expected an image",
        "text.png": "not an image; expected PNG, JPEG",
        "empty.png": "an empty file; expected an image",
        "": "a folder; expected an image",
    }.items():
        with pytest.raises(ExampleError, match=rf"{name}: {expected}"):
            open_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "bmp"])
def test_refuses_a_file_that_is_cut_off(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ExampleError, match=rf"a\.{suffix}: an image that cannot be decoded") as why:
        open_image(path)
    assert "\n" not in str(why.value)


def test_says_why_a_file_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    drawn().save(tmp_path / "a.png")
    monkeypatch.setattr("vlmscope.files.os.open", refuse)
    with pytest.raises(ExampleError, match=r"a\.png: cannot be read \(Permission denied\)"):
        open_image(tmp_path / "a.png")


def test_refuses_a_picture_that_was_closed(tmp_path: Path) -> None:
    drawn().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pass
    with pytest.raises(ExampleError, match="the picture in memory: an image that cannot be decoded"):
        open_image(picture)
    assert fingerprint([made(clean_image=picture)]) != fingerprint([made()])


@pytest.mark.parametrize("side", [9_500, 20_000])
def test_refuses_more_pixels_than_it_would_decode(tmp_path: Path, side: int) -> None:
    """The first size is one that Pillow warns of, the second one that it refuses itself."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png((side, side, 8, 2), b""))
    with pytest.raises(ExampleError, match=r"bomb\.png: .*more than the 89,000,000 .*make it smaller"):
        open_image(path)


def test_refuses_a_picture_without_pixels(tmp_path: Path) -> None:
    with pytest.raises(ExampleError, match=r"in memory: has no pixels \(0x5\)"):
        open_image(Image.new("RGB", (0, 5)))
    (tmp_path / "a.png").write_bytes(png((0, 1, 8, 2), b"\0"))
    with pytest.raises(ExampleError, match=r"a\.png: "):
        open_image(tmp_path / "a.png")


def test_leaves_the_global_state_alone(tmp_path: Path) -> None:
    drawn().save(tmp_path / "a.png")
    filters, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    open_image(tmp_path / "a.png")
    assert (warnings.filters, Image.MAX_IMAGE_PIXELS) == (filters, limit)


# Fingerprints


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    before = fingerprint([made()])
    assert fingerprint([made()]) == before
    assert fingerprint([made(groups={})]) == before
    for changes in (
        {"id": "x"},
        {"clean_prompt": "x", "roles": {}},
        {"corrupt_prompt": None},
        {"answer": "x"},
        {"foil": "x"},
        {"roles": {}},
        {"clean_image": drawn("blue")},
        {"clean_image": drawn("red", (3, 4))},
        {"clean_image": drawn("red").convert("L")},
        {"corrupt_image": None},
        {"masks": {}},
    ):
        assert fingerprint([made(**changes)]) != before, changes
    assert fingerprint([made("a"), made("b")]) != fingerprint([made("b"), made("a")])


def test_the_fingerprint_follows_a_file_and_not_its_name(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        drawn("red").save(tmp_path / name)
    first, second, gone = (
        fingerprint([made(clean_image=tmp_path / name)]) for name in ("a.png", "b.png", "c.png")
    )
    assert first == second != gone
    drawn("blue").save(tmp_path / "a.png")
    assert fingerprint([made(clean_image=tmp_path / "a.png")]) not in (first, gone)


def test_the_fingerprint_tells_modes_apart() -> None:
    pictures = [Image.frombytes(mode, (1, 1), b"\x01\x02\x03") for mode in ("RGB", "HSV")]
    assert len({fingerprint([made(clean_image=one)]) for one in pictures}) == 2


def test_the_fingerprint_tells_palettes_apart() -> None:
    pictures = [Image.new("P", (1, 1)) for _ in range(2)]
    pictures[0].putpalette([255, 0, 0])
    pictures[1].putpalette([0, 0, 255])
    assert len({fingerprint([made(clean_image=one)]) for one in pictures}) == 2


def test_the_fingerprint_reads_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn().save(tmp_path / "a.png")
    reads: list[str] = []
    read = module.files.read
    monkeypatch.setattr(module.files, "read", lambda *given: (reads.append("x"), read(*given))[1])
    fingerprint([made(str(number), clean_image=tmp_path / "a.png") for number in range(5)])
    assert len(reads) == 1


def test_boxes_come_and_go(tmp_path: Path) -> None:
    """`box` is the box of `object`; it is neither a group nor a role."""
    file = tmp_path / "boxes.csv"
    file.write_text(
        "clean_image_path,clean_prompt,correct_answer,incorrect_answer,box,box_left hand\n"
        'a.png,red or blue?,red,blue,"[1, 2, 30.5, 40]",0 0 9 9\n'
        "b.png,red or blue?,red,blue,,\n"
    )
    one, two = read_csv(file)
    assert one.masks == {"object": (1, 2, 30.5, 40), "left hand": (0, 0, 9, 9)}
    assert (two.masks, one.groups, one.roles.keys()) == ({}, {}, {"answer", "foil"})
    write_csv(tmp_path / "back.csv", [one, two])
    assert [e.masks for e in read_csv(tmp_path / "back.csv")] == [one.masks, {}]
    assert fingerprint([one]) != fingerprint([replace(one, masks={"object": (1, 2, 3, 4)})])


@pytest.mark.parametrize("cell", ["1 2 3", "a b c d", "5 5 5 9", "1 2 nan 4", "-1 0 2 2"])
def test_a_box_that_is_none(tmp_path: Path, cell: str) -> None:
    file = tmp_path / "boxes.csv"
    file.write_text(
        "clean_image_path,clean_prompt,correct_answer,incorrect_answer,box\n"
        f"a.png,red or blue?,red,blue,{cell}\n"
    )
    with pytest.raises(DataError, match=r"line 2: box_object is .* \(write left top right bottom"):
        read_csv(file)
