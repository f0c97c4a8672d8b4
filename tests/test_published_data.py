"""The published sets, from small trees in exactly the layouts in which they are distributed."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from vlmscope.data.example import fingerprint
from vlmscope.data.published import PUBLISHED, Built, build, mit_states, svo_probes
from vlmscope.data.published.layout import STATES as KIND_OF
from vlmscope.data.published.sampling import MISSING, UNREADABLE, Source
from vlmscope.data.questions.replacement import aligned
from vlmscope.data.questions.synonyms import near
from vlmscope.data.table import read_csv, write_csv
from vlmscope.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
ORDERS = ("answer first", "foil first")


def paint(path: Path) -> Path:
    """A tiny image whose content is told by its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = random.Random(path.name + path.parent.name).randrange(1 << 24)
    Image.new("RGB", (8, 8), (color >> 16, color >> 8 & 255, color & 255)).save(path)
    return path


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read_rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


# One small tree for each set


SVO_SUBJECTS = ("man", "woman", "dog", "horse", "king", "robot", "nurse", "elephant")
SVO_VERBS = ("ride", "feed", "wash", "lead", "paint", "pull", "kick", "visit")
SVO_OBJECTS = ("bike", "cart", "donkey", "camel", "statue", "owl", "umbrella", "truck")


def svo_cells(number: int, triplet: str, other: str, kind: str, flag: str = "True") -> dict[str, object]:
    return {
        "id": number,
        "sentence": "",
        "pos_triplet": triplet,
        "neg_triplet": other,
        "pos_url": f"http://example.com/{2 * number}.jpg",
        "neg_url": f"http://example.com/{2 * number + 1}.jpg",
        "pos_image_id": 2 * number,
        "neg_image_id": 2 * number + 1,
        **{name: flag if one == kind else "False" for one, name in svo_probes.KINDS.items()},
    }


def svo_rows(count: int) -> list[dict[str, object]]:
    rows = []
    for n in range(count):
        kind = ("subject", "verb", "object")[n % 3]
        rng = random.Random(n)
        words = [rng.sample(some, 2) for some in (SVO_SUBJECTS, SVO_VERBS, SVO_OBJECTS)]
        one = [pair[0] for pair in words]
        place = ("subject", "verb", "object").index(kind)
        other = [pair[1] if i == place else pair[0] for i, pair in enumerate(words)]
        rows.append(svo_cells(n, ",".join(one), ",".join(other), kind))
    return rows


def plant_svo(root: Path, rows: list[dict[str, object]], images: bool = True) -> Path:
    header = svo_probes.COLUMNS
    write_table(root / "svo_probes.csv", header, [[row[name] for name in header] for row in rows])
    for row in rows if images else ():
        paint(root / "images" / f"{row['pos_image_id']}.jpg")
        paint(root / "images" / f"{row['neg_image_id']}.png")
    return root


STATES = {
    "apple": "ripe unripe caramelized sliced diced small large peeled wrinkled",
    "garden hose": "coiled straight large small worn",
    "wall": "painted unpainted mossy clean dirty cracked smooth weathered tall huge",
    "shirt": "clean dirty wrinkled torn large tiny ruffled folded new",
    "river": "clear muddy murky wide narrow winding straight",
}


def plant_mit(root: Path, each: int = 4) -> Path:
    for noun, adjectives in STATES.items():
        for adjective in ["adj", *adjectives.split()]:
            for n in range(each):
                paint(root / f"{adjective} {noun}" / f"{n}.jpg")
    return root


def plant_faces(root: Path, each: int = 6, place: str = "images/train") -> Path:
    for emotion in ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"):
        for n in range(each):
            paint(root / place / emotion / f"{n}.jpg")
    return root


def plant_coco(root: Path) -> Path:
    tables = {
        "coco_qa_color.csv": ("color", "what is the color of the {}", ("red", "gray", "grey")),
        "number_train.csv": ("count", "how many {}s are on the grass", ("two", "2", "three")),
        "coco_qa_location.csv": ("x", "where is the {} sleeping", ("bed", "car", "kitchen")),
    }
    image = 220218
    for file, (suffix, question, answers) in tables.items():
        rows = []
        for noun in ("dog", "cat", "bird", "horse"):
            for n in range(9):
                rows.append((len(rows), image, question.format(noun), answers[n % 3]))
                paint(root / "train2017" / f"{image:012d}.jpg")
                image += 1
        names = [f"{one}_{suffix}" for one in ("train_image_id", "question", "answer")]
        write_table(root / file, ["", *names], rows)
    return root


def plant_clevr(root: Path) -> Path:
    things = ("large red cube", "small gray ball", "tiny blue cone")
    rows = []
    for number in range(8):
        asked = []
        for one, other in ((things[0], things[1]), (things[1], things[2])):
            left = number % 2 == 0
            for relation, holds in (
                ("left of", left),
                ("right of", not left),
                ("behind", left),
                ("in front of", not left),
            ):
                for a, b, yes in ((one, other, holds), (other, one, not holds)):
                    asked.append({"question": f"Is the {a} {relation} the {b}?", "answer": int(yes)})
        name = f"CLEVR_val_{number:06d}"
        rows.append((number, name, repr(asked)))
        paint(root / "images" / "val" / f"{name}.png")
    write_table(root / "clevr_spatial.csv", ("", "Image_IDs", "Questions_Answers"), rows)
    return root


def plant_folder(root: Path, each: int = 5) -> Path:
    for label in ("cat", "cow", "lamp", "spoon", "wheel", "owl", "egg", "onion", "fire_engine"):
        for n in range(each):
            paint(root / label / f"{n}.jpg")
    return root


PLANT: dict[str, Callable[[Path], Path]] = {
    "svo-probes": lambda root: plant_svo(root, svo_rows(90)),
    "mit-states": plant_mit,
    "faces": plant_faces,
    "coco-qa": plant_coco,
    "clevr": plant_clevr,
    "folder": plant_folder,
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: plant(tmp_path_factory.mktemp(name)) for name, plant in PLANT.items()}


@pytest.fixture(params=PUBLISHED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# What holds for every set


def test_there_is_a_tree_for_every_set() -> None:
    assert list(PLANT) == list(PUBLISHED)


def test_every_example_is_whole(roots: dict[str, Path], name: str) -> None:
    built = build(name, roots[name])
    assert len(built.examples) >= 6
    assert len({one.id for one in built.examples}) == len(built.examples)
    for one in built.examples:
        assert one.answer != one.foil and not near(one.answer, one.foil)
        assert one.clean_prompt == one.clean_prompt.strip() and one.clean_prompt.endswith("?")
        assert one.clean_image.is_file()
        assert one.corrupt_image is None or one.corrupt_image.is_file()
        assert one.clean_image != one.corrupt_image
        assert one.groups["kind"]
        if one.corrupt_prompt is not None:
            assert aligned(one.clean_prompt, one.corrupt_prompt)
            assert one.corrupt_prompt != one.clean_prompt
    assert sum(one.corrupt_prompt is not None for one in built.examples) > len(built.examples) / 2


def test_the_same_seed_draws_the_same_and_another_another(
    roots: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 24 if name == "svo-probes" else 6
    once = build(name, roots[name], limit=limit)
    assert len(once.examples) == limit
    assert fingerprint(build(name, roots[name], limit=limit, seed=1).examples) != fingerprint(once.examples)
    turn_listings_around(monkeypatch)
    assert fingerprint(build(name, roots[name], limit=limit).examples) == fingerprint(once.examples)


def turn_listings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file system: it lists what is in a folder in another order."""
    listed = Path.iterdir
    found = Path.glob
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path), reverse=True)))
    monkeypatch.setattr(Path, "glob", lambda path, what: sorted(found(path, what), reverse=True))


def test_kinds_and_orders_are_balanced(roots: dict[str, Path], name: str) -> None:
    for limit in (None, 7, 12):
        examples = build(name, roots[name], limit=limit).examples
        assert limit is None or len(examples) == limit
        for key in ("kind", "label", "order"):
            counts = Counter(one.groups[key] for one in examples if key in one.groups)
            if counts:
                allowed = 1 if limit or key == "order" else 0
                assert max(counts.values()) - min(counts.values()) <= allowed, (key, counts)
        for one in examples:
            if "order" in one.groups:
                first = one.roles["answer"] < one.roles["foil"]
                assert one.groups["order"] == ORDERS[0 if first else 1]
            else:
                assert name in ("coco-qa", "clevr")


def test_nothing_is_drawn_twice(roots: dict[str, Path], name: str) -> None:
    examples = build(name, roots[name]).examples
    assert len({(one.clean_image, one.clean_prompt) for one in examples}) == len(examples)
    pairs = [
        (frozenset((one.clean_image, one.corrupt_image)), one.clean_prompt)
        for one in examples
        if one.corrupt_image
    ]
    assert len(set(pairs)) == len(pairs)
    if name in ("svo-probes", "mit-states", "faces", "folder"):
        assert len({one.clean_image for one in examples}) == len(examples)
        again = Counter(one.corrupt_image for one in examples)
        assert max(again.values()) <= (1 if name == "svo-probes" else 2)


def test_the_csv_form_holds_every_set(roots: dict[str, Path], name: str, tmp_path: Path) -> None:
    examples = build(name, roots[name]).examples
    write_csv(tmp_path / "set.csv", examples)
    assert fingerprint(read_csv(tmp_path / "set.csv")) == fingerprint(examples)


def test_prompts_align_under_the_pieces_that_are_given(roots: dict[str, Path], name: str) -> None:
    def pieces(word: str) -> int:
        return len(word) // 5 + 1

    built = build(name, roots[name], pieces=pieces)
    corrupt = [one for one in built.examples if one.corrupt_prompt is not None]
    assert corrupt
    assert all(aligned(one.clean_prompt, one.corrupt_prompt, pieces) for one in corrupt)


def test_unreadable_images_are_replaced_and_counted(name: str, tmp_path: Path) -> None:
    root = PLANT[name](tmp_path / "root")
    images = sorted(one for one in root.rglob("*") if one.suffix in (".jpg", ".png"))
    broken = set(random.Random(0).sample(images, max(1, len(images) // 12)))
    for path in broken:
        path.write_bytes(path.read_bytes()[:40] if path.stat().st_size % 2 else b"no image")
    built = build(name, root, limit=6)
    whole = build(name, root)
    assert len(built.examples) == 6
    assert 0 < whole.dropped[UNREADABLE] <= len(broken)
    for one in whole.examples:
        assert not {one.clean_image, one.corrupt_image} & broken
    # Only what is drawn is opened.
    assert built.dropped.get(UNREADABLE, 0) <= whole.dropped[UNREADABLE]


def test_only_images_that_are_drawn_are_opened(
    roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or real(path))
    build("svo-probes", roots["svo-probes"], limit=6)
    assert len(opened) == 12


def test_sizes_are_at_most_the_published_ones(
    roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert svo_probes.SIZE == 500
    monkeypatch.setattr(svo_probes, "SIZE", 4)
    built = build("svo-probes", roots["svo-probes"])
    assert Counter(one.groups["kind"] for one in built.examples) == dict.fromkeys(svo_probes.KINDS, 4)
    assert built.dropped == {"left over: enough were drawn": 90 - 12}


# What is wrong with a folder


def test_refuses_what_is_no_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"none: no such folder; expected the folder .* {name}"):
        build(name, tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: a file; expected the folder"):
        build(name, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"empty: an empty folder; unpack {name} there"):
        build(name, tmp_path / "empty")


def test_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no published data set 'svo'; expected one of svo-probes"):
        build("svo", tmp_path)
    with pytest.raises(DataError, match="a limit of 0 leaves no examples"):
        build("faces", tmp_path, limit=0)
    with pytest.raises(DataError, match="faces: has no addresses .* only svo-probes has"):
        build("faces", tmp_path, download=True)


@pytest.mark.parametrize("asked", [one for one in PUBLISHED if one != "folder"])
@pytest.mark.parametrize("given", [one for one in PUBLISHED if one != "folder"])
def test_says_which_other_set_lies_there(roots: dict[str, Path], asked: str, given: str) -> None:
    if asked != given:
        with pytest.raises(DataError, match=rf"it looks like {given}: ask for {given}"):
            build(asked, roots[given])


def test_refuses_a_folder_of_something_else(name: str, tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError) as why:
        build(name, tmp_path)
    assert str(tmp_path) in str(why.value) and "\n" not in str(why.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("svo-probes", r"images: no image of any row .* \d+\.jpg and the like; pass --download"),
        ("mit-states", r"43 folders such as '.+' and no image in them; .* unpack mit-states again"),
        ("faces", r"7 folders of emotions, and 0 with images; .* unpack faces again"),
        ("coco-qa", r"none of the images .* train2017/000000220\d{3}\.jpg"),
        ("clevr", r"none of the images .* images/val/CLEVR_val_000000\.png; unpack CLEVR"),
        ("folder", r"0 folders with images that can be read; expected two labels or more"),
    ],
)
def test_refuses_what_is_half_unpacked(name: str, expected: str, tmp_path: Path) -> None:
    root = PLANT[name](tmp_path / "root")
    for path in root.rglob("*"):
        if path.suffix in (".jpg", ".png"):
            path.unlink()
    if name == "mit-states":
        assert len(list(root.iterdir())) == 45
        expected = expected.replace("43", str(sum(_of_a_kind(one.name) for one in root.iterdir())))
    with pytest.raises(DataError, match=expected):
        build(name, root)


def _of_a_kind(folder: str) -> bool:
    return KIND_OF.get(folder.split()[0]) in mit_states.KINDS


@pytest.mark.parametrize("name", [one for one in PUBLISHED if one != "folder"])
def test_says_why_nothing_is_left(name: str, tmp_path: Path) -> None:
    root = PLANT[name](tmp_path / "root")
    for path in root.rglob("*"):
        if path.suffix in (".jpg", ".png"):
            path.write_text("no image")
    with pytest.raises(DataError, match=rf"no example of {name} is left: .*{UNREADABLE} \("):
        build(name, root)


def test_says_which_column_is_missing(tmp_path: Path) -> None:
    write_table(tmp_path / "s" / "svo_probes.csv", ["id", "pos_triple", "neg_triplet"], [])
    with pytest.raises(DataError, match=r"no column .*pos_triplet \(is it 'pos_triple'\?\)"):
        build("svo-probes", tmp_path / "s")
    write_table(tmp_path / "c" / "clevr.csv", ["Image_ID", "Questions_Answers"], [])
    with pytest.raises(DataError, match=r"clevr\.csv: no column Image_IDs \(is it 'Image_ID'"):
        build("clevr", tmp_path / "c")
    write_table(tmp_path / "q" / "color.csv", ["train_image_id", "questions", "answer"], [[1, 2, 3]])
    with pytest.raises(DataError, match=r"color\.csv: no column question \(is it 'questions'"):
        build("coco-qa", tmp_path / "q")


def test_says_that_a_table_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "svo_probes.csv").write_bytes(b"id,\xff\xfe\n")
    with pytest.raises(DataError, match=r"svo_probes\.csv, line 1: not UTF-8 \(byte 0xff\)"):
        build("svo-probes", tmp_path)
    (tmp_path / "svo_probes.csv").write_text(",".join(svo_probes.COLUMNS) + '\n1,"a\n')
    with pytest.raises(DataError, match=r"svo_probes\.csv, line 2: not a row of a CSV file \(.+\)"):
        build("svo-probes", tmp_path)


# SVO-Probes


@pytest.mark.parametrize(
    ("kind", "triplet", "options", "expected"),
    [
        ("subject", "man,ride,horse", "man woman", "is a man or a woman riding a horse?"),
        ("verb", "man,ride,horse", "ride feed", "is the man riding or feeding the horse?"),
        ("object", "man,ride,horse", "horse bike", "is the man riding a horse or a bike?"),
        ("subject", "women,visit,university", "women men", "are women or men visiting a university?"),
        ("object", "owl,eat,apple", "apple grass", "is the owl eating an apple or grass?"),
        ("verb", "people,lie,grass", "lie sit", "are the people lying or sitting on the grass?"),
        ("object", "dog,swim,water", "water pool", "is the dog swimming in the water or the pool?"),
        ("subject", "man,play,tennis", "girl man", "is a girl or a man playing tennis?"),
        ("subject", "boy,play,ball", "boy dog", "is a boy or a dog playing with a ball?"),
        ("verb", "bird,fly,sky", "fly float", "is the bird flying or floating in the sky?"),
        ("object", "man,look at,sea", "sea horse", "is the man looking at the sea or a horse?"),
        ("subject", "baby,lay,bed", "baby cat", "is a baby or a cat lying on a bed?"),
    ],
)
def test_the_questions_read_well(kind: str, triplet: str, options: str, expected: str) -> None:
    one, two, three = triplet.split(",")
    first, second = options.split()
    assert svo_probes.ask(kind, (one, two, three), (first, second)) == expected


@pytest.mark.parametrize(
    ("kind", "triplet", "other", "why"),
    [
        ("verb", "man,talk,phone", "man,speak,phone", "the two words are near-synonyms"),
        ("subject", "man,ride,horse", "guy,ride,horse", "the two words are near-synonyms"),
        (
            "verb",
            "man,ride,horse",
            "woman,feed,horse",
            "the triplets do not differ in the flagged word alone",
        ),
        ("verb", "man,ride,horse", "man,ride,horse", "the triplets do not differ in the flagged word alone"),
        (
            "subject",
            "man,ride,horse",
            "man,feed,horse",
            "the triplets do not differ in the flagged word alone",
        ),
        ("verb", "man,ride,", "man,feed,", "a triplet lacks a part"),
        ("verb", "man,ride", "man,feed", "a triplet lacks a part"),
        ("verb", "man,pick up,ball", "man,kick,ball", "the two options need different prepositions"),
        ("verb", "man,take a look,ball", "man,kick,ball", "a verb of several words"),
        (
            "verb",
            "man,contain,ball",
            "man,kick,ball",
            "a verb without an -ing form that asks what is going on",
        ),
        ("verb", "man,sit,grass", "man,eat,grass", "the two options need different prepositions"),
        ("subject", "man,feed,dogs", "women,feed,dogs", "one subject is singular and the other plural"),
        ("subject", "dog,chase,cat", "cat,chase,cat", "a word would stand in the question twice"),
        ("object", "man,hug,dog", "man,hug,man", "a word would stand in the question twice"),
        ("verb", "man,stand,woman", "man,sit,woman", "a verb of place with a person as its object"),
        (
            "nothing",
            "man,ride,horse",
            "man,feed,horse",
            "not exactly one of subj_neg, verb_neg and obj_neg is true",
        ),
    ],
)
def test_rows_that_make_no_question_are_counted(kind: str, triplet: str, other: str, why: str) -> None:
    source = Source("svo-probes", Path())
    cells = {name: str(cell) for name, cell in svo_cells(1, triplet, other, kind).items()}
    assert svo_probes.read_rows(source, [cells]) == []
    assert source.dropped == {why: 1}


@pytest.mark.parametrize("flag", ["True", "true", "1", "1.0"])
def test_reads_flags_and_numbers_as_tables_hold_them(flag: str) -> None:
    cells = svo_cells(7, "man,ride,horse", "man,feed,horse", "verb", flag)
    cells |= {"id": "7.0", "pos_image_id": "14.0"}
    [row] = svo_probes.read_rows(Source("svo-probes", Path()), [{k: str(v) for k, v in cells.items()}])
    assert (row.name, row.kind, row.images) == ("svo-7-verb", "verb", ("14", "15"))


def test_a_row_shows_its_positive_image_and_its_words(tmp_path: Path) -> None:
    row = svo_cells(3, "girl,lie,grass", "girl,sit,grass", "verb")
    root = plant_svo(tmp_path, [row])
    [one] = build("svo-probes", root).examples
    assert (one.answer, one.foil, one.id) == ("lying", "sitting", "svo-3-verb")
    assert (one.clean_image.name, one.corrupt_image.name) == ("6.jpg", "7.png")
    said = {role: one.clean_prompt[slice(*span)] for role, span in one.roles.items()}
    assert said == {
        "answer": "lying",
        "foil": "sitting",
        "subject": "girl",
        "verb": "lying",
        "object": "grass",
    }


def test_an_image_pair_is_used_once(tmp_path: Path) -> None:
    rows = svo_rows(6)
    twin = {**rows[0], "id": 99}
    mirrored = {
        **rows[1],
        "id": 98,
        "pos_image_id": rows[1]["neg_image_id"],
        "neg_image_id": rows[1]["pos_image_id"],
    }
    built = build("svo-probes", plant_svo(tmp_path, [*rows, twin, mirrored]))
    assert built.dropped == {"the same id or image pair as an earlier row": 2}
    assert len(built.examples) == 6


def test_rows_without_images_are_counted(tmp_path: Path) -> None:
    root = plant_svo(tmp_path, svo_rows(30))
    for number in (0, 2, 4):
        (root / "images" / f"{number}.jpg").unlink()
    built = build("svo-probes", root)
    assert built.dropped["an image is not there"] == 3


def test_missing_images_of_wanted_rows_are_fetched_first(tmp_path: Path) -> None:
    """A fetch of our own stands for the network; every third image cannot be had."""
    root = plant_svo(tmp_path, svo_rows(90), images=False)
    asked: list[str] = []

    def fetch(jobs: dict[str, str], folder: Path) -> dict[str, str]:
        asked.extend(jobs)
        bad = {url: "HTTP 404" for url in jobs if int(Path(url).stem) % 5 == 0}
        for url, name in jobs.items():
            if url not in bad:
                paint(folder / f"{name}.jpg")
        return bad

    source = Source("svo-probes", root, limit=12, fetch=fetch)
    examples = svo_probes.load(source)
    assert len(examples) == 12
    assert len(asked) == len(set(asked)) < 90
    assert Counter(one.groups["kind"] for one in examples) == dict.fromkeys(svo_probes.KINDS, 4)
    assert source.dropped["an image could not be downloaded"] > 0
    nothing = plant_svo(tmp_path / "b", svo_rows(9), images=False)
    source = Source("svo-probes", nothing, fetch=lambda jobs, _: dict.fromkeys(jobs, "HTTP 404"))
    with pytest.raises(DataError, match="none could be downloaded; see download-failures.csv"):
        svo_probes.load(source)


def test_download_asks_the_downloader_and_keeps_its_log(tmp_path: Path) -> None:
    row = svo_cells(3, "girl,lie,grass", "girl,sit,grass", "verb")
    row |= {"pos_url": "file:///etc/passwd", "neg_url": "http://me:x@example.com/"}
    root = plant_svo(tmp_path, [row], images=False)
    with pytest.raises(DataError, match=r"none could be downloaded; see download-failures\.csv"):
        build("svo-probes", root, download=True)
    assert (root / "download-failures.csv").read_text().splitlines() == [
        "url,reason",
        "file:///etc/passwd,not an http or https address",
        "http://me:x@example.com/,credentials in the address",
    ]


# MIT-States


def test_the_kinds_have_the_published_sizes() -> None:
    assert len(KIND_OF) == 115
    assert Counter(KIND_OF.values()) == {"color": 21, "shape": 23, "texture": 14, "none": 57}


def test_states_of_one_noun_and_one_kind(roots: dict[str, Path]) -> None:
    built = build("mit-states", roots["mit-states"])
    for one in built.examples:
        noun = one.groups["noun"]
        assert one.clean_image.parent.name == f"{one.answer} {noun}"
        assert one.corrupt_image.parent.name == f"{one.foil} {noun}"
        assert {KIND_OF[one.answer], KIND_OF[one.foil]} == {one.groups["kind"]}
        assert one.clean_prompt in (
            f"is this {noun} {one.answer} or {one.foil}?",
            f"is this {noun} {one.foil} or {one.answer}?",
        )
        assert one.clean_prompt[slice(*one.roles["noun"])] == noun
    assert built.dropped["a folder whose adjective is 'adj', that is none"] == len(STATES)
    assert built.dropped["a folder whose adjective is of none of the three kinds"] == 2
    assert any(one.groups["noun"] == "garden hose" for one in built.examples)


def test_states_may_lie_in_a_folder_called_images(roots: dict[str, Path], tmp_path: Path) -> None:
    plant_mit(tmp_path / "images")
    here, there = (build("mit-states", root) for root in (tmp_path, roots["mit-states"]))
    assert [one.id for one in here.examples] == [one.id for one in there.examples]


def test_a_few_empty_folders_are_counted(tmp_path: Path) -> None:
    root = plant_mit(tmp_path)
    for path in (root / "ripe apple").iterdir():
        path.unlink()
    assert build("mit-states", root).dropped["a folder without images"] == 1


# Faces and folders


@pytest.mark.parametrize("place", ["train", "", "images"])
def test_faces_may_lie_in_several_places(place: str, tmp_path: Path) -> None:
    built = build("faces", plant_faces(tmp_path, place=place))
    assert len(built.examples) == 42
    assert {one.answer for one in built.examples} == {
        "angry",
        "disgusted",
        "fearful",
        "happy",
        "neutral",
        "sad",
        "surprised",
    }
    for one in built.examples:
        assert one.clean_prompt.startswith("is this person feeling ")
        assert one.answer[:3] == one.clean_image.parent.name[:3]
        assert one.foil[:3] == one.corrupt_image.parent.name[:3]


def test_labels_get_the_article_they_need(roots: dict[str, Path]) -> None:
    prompts = {one.clean_prompt for one in build("folder", roots["folder"]).examples}
    said = {tuple(half.split()[-3:]) for prompt in prompts for half in prompt[:-1].split(" or ")}
    articles = {" ".join(words).removeprefix("this ") for words in said}
    assert articles == {
        *("a cat", "a cow", "a lamp", "a spoon", "a wheel", "a fire engine"),
        *("an owl", "an egg", "an onion"),
    }


def test_a_folder_may_have_a_question_of_its_own(tmp_path: Path) -> None:
    root = plant_folder(tmp_path)
    (root / "prompt.txt").write_text("do you see {x} or {y} here?\n")
    assert {one.clean_prompt.split()[3] for one in build("folder", root).examples} <= {
        *("cat", "cow", "lamp", "spoon", "wheel", "owl", "egg", "onion", "fire")
    }
    (root / "prompt.txt").write_text("is it {x}?")
    with pytest.raises(DataError, match=r"prompt\.txt: 'is it \{x\}\?' must hold \{x\} and \{y\}"):
        build("folder", root)


def test_a_folder_needs_two_labels_that_can_be_read(tmp_path: Path) -> None:
    paint(tmp_path / "cat" / "1.jpg")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"1 folders with images that can be read \('cat'\)"):
        build("folder", tmp_path)


# COCO-QA


def test_pairs_have_the_same_question_and_other_answers(roots: dict[str, Path]) -> None:
    built = build("coco-qa", roots["coco-qa"])
    rows = {}
    for path in roots["coco-qa"].glob("*.csv"):
        for _, image, question, answer in read_rows(path):
            rows[int(image)] = (question, answer)
    assert {one.groups["kind"] for one in built.examples} == {"color", "count", "location"}
    for one in built.examples:
        clean, corrupt = (int(path.stem) for path in (one.clean_image, one.corrupt_image))
        assert rows[clean] == (one.clean_prompt.removesuffix("?"), one.answer)
        assert rows[corrupt] == (one.clean_prompt.removesuffix("?"), one.foil)
        noun = one.clean_prompt[slice(*one.roles["noun"])]
        assert noun.removesuffix("s") in ("dog", "cat", "bird", "horse")
        assert one.corrupt_prompt is None or noun not in one.corrupt_prompt


def test_photographs_may_lie_in_several_places(tmp_path: Path) -> None:
    rows = [(1, "what is the color of the dog", "red"), (2, "what is the color of the dog", "blue")]
    write_table(tmp_path / "color.csv", ("train_image_id", "question", "answer"), rows)
    paint(tmp_path / "000000000001.jpg")
    paint(tmp_path / "images" / "train2014" / "COCO_train2014_000000000002.jpg")
    built = build("coco-qa", tmp_path, limit=2)
    assert len(built.examples) == 1
    assert built.dropped["every image with another answer is already its pair, or cannot be read"] == 1


def test_the_published_color_questions(tmp_path: Path) -> None:
    table = SHARED / "coco_qa_color.csv"
    if not table.is_file():
        pytest.skip("the shared coco_qa_color.csv is not there")
    (tmp_path / table.name).symlink_to(table)
    rows = read_rows(table)
    assert len(rows) == 13_113
    for _, image, *_ in rows[:300]:
        paint(tmp_path / "train2017" / f"{int(image):012d}.jpg")
    built = build("coco-qa", tmp_path, limit=40)
    assert len(built.examples) == 40
    assert all(one.corrupt_prompt for one in built.examples)
    assert built.dropped[MISSING] > 10_000


# CLEVR


def test_pairs_of_images_answer_the_same_question_differently(roots: dict[str, Path]) -> None:
    built = build("clevr", roots["clevr"])
    assert {one.groups["kind"] for one in built.examples} == {"left", "right", "behind", "front"}
    answers = Counter(one.answer for one in built.examples)
    assert answers["yes"] == answers["no"]
    for one in built.examples:
        object_, other = (one.clean_prompt[slice(*one.roles[r])] for r in ("object", "other"))
        relation = one.clean_prompt[slice(*one.roles["relation"])]
        assert one.clean_prompt == f"Is the {object_} {relation} the {other}?"
        assert one.corrupt_prompt == f"Is the {other} {relation} the {object_}?"
        if one.corrupt_image:
            numbers = [int(path.stem[-6:]) for path in (one.clean_image, one.corrupt_image)]
            assert sum(numbers) % 2 == 1
    assert built.notes["corrupt prompts kept as they were"] == len(built.examples)


def test_a_question_without_an_image_pair_keeps_its_text_corruption(tmp_path: Path) -> None:
    asked = [
        {"question": "Is the red cube left of the ball?", "answer": 1},
        {"question": "Is the ball left of the red cube?", "answer": 0},
    ]
    write_table(tmp_path / "mine.csv", ("Image_IDs", "Questions_Answers"), [("a", repr(asked))])
    paint(tmp_path / "a.png")
    built = build("clevr", tmp_path)
    assert built.notes["without a corrupt image: no image pair"] == 2
    assert {one.corrupt_prompt for one in built.examples} == {
        "Is the red cube right of the ball?",
        "Is the ball right of the red cube?",
    }
    assert all(one.corrupt_image is None for one in built.examples)


def test_questions_that_contradict_each_other_are_counted(tmp_path: Path) -> None:
    asked = [
        {"question": "Is the cube left of the ball?", "answer": 1},
        {"question": "Is the ball left of the cube?", "answer": 1},
        {"question": "Is the cube behind the cone?", "answer": 0},
        {"question": "How many cubes are there?", "answer": 1},
    ]
    cells = [("a", repr(asked)), ("b", "__import__('os').remove('x')"), ("c", "[{'question': 'x'}]")]
    write_table(tmp_path / "clevr.csv", ("Image_IDs", "Questions_Answers"), cells)
    for one in "abc":
        paint(tmp_path / "val" / f"{one}.png")
    built = build("clevr", tmp_path)
    assert [one.clean_prompt for one in built.examples] == ["Is the cube behind the cone?"]
    assert list(built.dropped.values()) == [2, 1, 2]


def test_the_published_spatial_questions(tmp_path: Path) -> None:
    table = SHARED / "clevr_spatial.csv"
    if not table.is_file():
        pytest.skip("the shared clevr_spatial.csv is not there")
    (tmp_path / table.name).symlink_to(table)
    for _, image, _ in read_rows(table):
        paint(tmp_path / "images" / "val" / f"{image}.png")
    built = build("clevr", tmp_path, limit=400)
    assert len(built.examples) == 400
    assert all(one.corrupt_image for one in built.examples)
    assert built.notes == {"corrupt prompts kept as they were": 400}
    answers = Counter((one.groups["kind"], one.answer) for one in built.examples)
    assert set(answers.values()) == {50}


# The package


def test_the_summary_counts(roots: dict[str, Path]) -> None:
    built = build("mit-states", roots["mit-states"], limit=6)
    lines = built.summary().splitlines()
    assert lines[:3] == [
        "6 examples",
        "  kind: color 2, shape 2, texture 2",
        "  order: answer first 3, foil first 3",
    ]
    assert "left out:" in lines
    assert "       5  a folder whose adjective is 'adj', that is none" in lines
    assert Built([], {}).summary() == "0 examples"


def test_importing_data_brings_in_nothing_that_only_a_set_needs() -> None:
    script = """
import sys, vlmscope.data
sys.exit(str([m for m in ("lemminflect", "http.client", "numpy", "torch") if m in sys.modules] or ""))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert not done.stderr.strip(), done.stderr


def test_the_tables_of_words_are_part_of_a_wheel() -> None:
    root = Path(__file__).parents[1]
    about = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    package = root / "src" / "vlmscope"
    patterns = about["tool"]["setuptools"]["package-data"]["vlmscope"]
    packed = {file for pattern in patterns for file in package.glob(pattern)}
    tables = {file for file in (package / "data").rglob("*") if file.suffix not in (".py", ".pyc", "")}
    assert tables and tables <= packed
