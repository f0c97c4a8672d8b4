"""Folders of results that somebody else has made, or that were damaged on their way."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from frame import Case
from PIL import Image

TOY = "--data states --model toy-blip"
MADE = {
    "run": f"sweep {TOY} --limit 6 --sites encoder.*.cross.h*@answer --sites encoder.*.resid@text* "
    "--sites vision.*.resid@image* --corrupt image --out run",
    "circuits": "circuits run --out circuits",
    "heads": f"heads {TOY} --limit 6 --sites encoder.1.cross.h*@answer --out heads",
    "tracing": f"tracing {TOY} --limit 4 --kinds cross --windows 1 --repeats 2 --out tracing",
    "lens": "lens --model toy-llava --data states --limit 2 --sites decoder.3.resid@image* --out lens",
    "attribution": "attribute --model toy-llava --data states --limit 2 --sites decoder.*.attn.h*@readout "
    "--sites decoder.3.attn@readout<image* --out attribution",
    "edges": "edges --model toy-llava --data states --limit 2 --corrupt image --out edges",
    "knockout": "knockout --model toy-llava --data states --limit 2 --sites decoder.1/3.attn@last<image "
    "--out knockout",
    "steer": f"steer {TOY} --limit 4 --sites encoder.0.resid@last --corrupt image --random 2 "
    "--said 1 --out steer",
    "probe": "probe --model toy-blip --data states --limit 24 --sites encoder.0.resid@last --label kind "
    "--shuffles 2 --out probe",
    "notice": f"notice {TOY} --limit 4 --out notice",
    "find": "neurons find --model toy-llava --data states --limit 3 --top 10 --out find",
    "describe": "neurons describe --model toy-llava --data states --limit 3 --neuron 3.48 --out describe",
}
"""The commands that make a good folder of each kind."""
BY_HAND = """
from vlmscope.neurons.results import Assessed, Perturbed
import pandas as pd
from PIL import Image
about = {"model": "toy-llava", "weights": "abc", "words": ["heart"]}
row = {"word": "heart", "k": 1, "how": "zero", "round": 1, "set": "top", "drop_log_p": 0.5, "drop_p": 0.25}
row |= {"ci_low": 0.1, "ci_high": 0.4, "lost": 0.5, "n": 8}
Perturbed(about, pd.DataFrame([row, row | {"set": "random"}])).save("perturb")
names = ["measure", "value", "low", "high", "n", "before", "random"]
measures = pd.DataFrame([("generality", 0.5, 0.25, 0.75, 8, 0.0, 0.125)], columns=names)
said = {"example": ["a", "b"], "prompt": "what?", "before": ["heart", "cross"], "after": "cross"}
captions = pd.DataFrame(said | {"has": [True, False], "took": [True, False], "same": [False, True]})
columns = pd.DataFrame([(3, 48, 1.5, 0.5)], columns=["layer", "neuron", "length", "change"])
objects = pd.DataFrame([("chair_i", 0.5, 0.25, 0.5)], columns=["measure", "before", "after", "random"])
edited = {"model": "toy-llava", "weights": "abc", "from": "heart", "to": "cross", "size": 1.5}
pictures = {name: Image.new("RGB", (8, 8)) for name in "ab"}
Assessed(edited, measures, captions, columns, objects, pictures).save("edit")
import vlmscope
asked = vlmscope.examples("states", limit=1)[0]
said = vlmscope.explain(vlmscope.load("toy-llava"), asked.clean_image, asked.clean_prompt)
said.save("explanation")
"""
"""Those that take a minute to make, from values; and one that no command makes."""
IGNORED = (
    "report",
    "explain.html",
    "edges.parquet",
    "data/",
    ".lock",
    "heads.csv",
    "tracing.csv",
    "sites.txt",
    "direction.safetensors",
)
"""Files that no command reads again, by what is in their path."""


def good_folders(top: Path) -> Path:
    """A good folder of each kind, made once; `VLMSCOPE_FUZZ_FOLDERS` names a folder that keeps them."""
    folder = Path(os.environ.get("VLMSCOPE_FUZZ_FOLDERS", top / "good"))
    if not (folder / "done").exists():
        folder.mkdir(exist_ok=True, parents=True)
        commands = "".join(f"run({command.split()!r})\n" for command in MADE.values())
        start = "from vlmscope.cli.main import app\nrun = lambda argv: app(argv, standalone_mode=False)\n"
        script = start + commands + BY_HAND
        subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True)
        (folder / "done").touch()
    return folder


def list_anew(file: Path) -> None:
    """List a file as it is in the manifest of its folder, as whoever forges one would."""
    for place in file.parents[:2]:
        for manifest in place.glob("*.json"):
            about, name = json.loads(manifest.read_bytes()), str(file.relative_to(place))
            if name in about.get("files", {}):
                about["files"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
                manifest.write_text(json.dumps(about))


# --- what can be wrong with a file -----------------------------------------------------------------------


def truncated(random: Random, file: Path) -> bool:
    content = file.read_bytes()
    file.write_bytes(content[: random.randrange(len(content) - 3)])
    return file.suffix != ".csv" or len(content) > 0


def halved(random: Random, file: Path) -> bool:
    """The first lines of a CSV file, as a table of fewer rows."""
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: random.randrange(1, max(2, len(lines)))]) if len(lines) > 1 else b"")
    return True


def altered(random: Random, file: Path) -> bool:
    """Another digit in a CSV file."""
    content = bytearray(file.read_bytes())
    at = [n for n, byte in enumerate(content) if chr(byte).isdigit()]
    if not at:
        return emptied(random, file)
    one = random.choice(at)
    content[one] = random.choice([byte for byte in b"0123456789" if byte != content[one]])
    file.write_bytes(content)
    return True


def emptied(random: Random, file: Path) -> bool:
    file.write_bytes(b"")
    return True


def overwritten(random: Random, file: Path) -> bool:
    content = bytearray(file.read_bytes())
    start = random.randrange(len(content))
    content[start : start + 200] = random.randbytes(200)
    file.write_bytes(content)
    return True


def other_format(random: Random, file: Path) -> bool:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "JPEG")
    table = io.BytesIO()
    pd.DataFrame({"a": [1, 2]}).to_parquet(table)
    texts = [b"a,b\n1,2\n", b"{}", b"[]", b"null", b"\x00" * 50, b"PK\x03\x04"]
    held = [buffer.getvalue(), table.getvalue(), *texts]
    file.write_bytes(random.choice(held))
    return True


def a_folder(random: Random, file: Path) -> bool:
    file.unlink()
    file.mkdir()
    return True


def a_pipe(random: Random, file: Path) -> bool:
    file.unlink()
    os.mkfifo(file)
    return True


def a_device(random: Random, file: Path) -> bool:
    file.unlink()
    file.symlink_to(random.choice(["/dev/zero", "/dev/tty", "/dev/null"]))
    return True


def a_link(random: Random, file: Path) -> bool:
    kept = file.with_name(f"{file.name}.elsewhere")
    file.rename(kept)
    file.symlink_to(kept.absolute() if random.random() < 0.5 else kept.name)
    return True


def a_loop(random: Random, file: Path) -> bool:
    file.unlink()
    file.symlink_to(file.name)
    return True


def endless(random: Random, file: Path) -> bool:
    file.unlink()
    with file.open("wb") as stream:
        stream.truncate(5 * 2**30)
    return True


def missing(random: Random, file: Path) -> bool:
    if file.name in ("measures.csv", "objects.csv"):  # not every folder has them
        return emptied(random, file)
    file.unlink()
    return True


MAY_BE_NULL = ("model", "weights", "corrupt", "description", "check", "scale", "to")
STRANGE: list[Any] = [
    None,
    "x",
    "<script>alert(1)</script>",
    -1,
    10**400,
    1.5,
    True,
    [],
    {},
    [[]],
    {"a": 1},
    "x" * 10**6,
    [None],
    float("inf"),
]


def _places(content: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    held = content.items() if isinstance(content, dict) else enumerate(content)
    for key, inner in held:
        yield (*way, key)
        if isinstance(inner, (dict, list)):
            yield from _places(inner, (*way, key))


def strange_json(random: Random, file: Path) -> bool:
    """A value of another type at any place of a JSON file."""
    content = json.loads(file.read_text("utf-8"))
    way = random.choice(list(_places(content)))
    inner = content
    for key in way[:-1]:
        inner = inner[key]
    old = inner[way[-1]]
    new = random.choice([one for one in STRANGE[way[-1] in MAY_BE_NULL :] if type(one) is not type(old)])
    if old is None or (isinstance(old, float) and isinstance(new, (int, float))):
        new = [1]
    inner[way[-1]] = new
    file.write_text(json.dumps(content))
    return True


def lacking_json(random: Random, file: Path) -> bool:
    content = json.loads(file.read_text("utf-8"))
    optional = (
        "check description family weights examples top variant gain files id clean_prompt answer foil "
        "from to".split()
    )
    key = random.choice([key for key in content if key not in optional or "noise" in content] or ["id"])
    content[key] = [1]
    if key != "id":
        del content[key]
    file.write_text(json.dumps(content))
    return True


def odd_json(random: Random, file: Path) -> bool:
    text = file.read_text("utf-8")
    key = next(iter(json.loads(text)))
    held = [
        "[" * 100_000,
        '{"a":' * 50_000,
        text.replace("{", f'{{"{key}": 1,', 1),
        text.replace("{", '{"n": ' + "9" * 5000 + ",", 1),
        "﻿" + text,
        text + text,
        text.replace("\n", "\x00"),
    ]
    file.write_text(random.choice(held))
    return True


def odd_csv(random: Random, file: Path) -> bool:
    """A cell, a column or a row of a CSV file that is none of its writer's."""
    table = pd.read_csv(file, dtype=str, keep_default_na=False)
    text = random.choice(["wide", "narrow", "rename", "twice", "cell", "long", "short", "quote"])
    lines = table.to_csv(index=False).splitlines(keepends=True)
    if text == "wide":
        table["more"] = "1"
    elif text == "narrow" and len(table):
        table = table.drop(columns=random.choice(list(table)))
    elif text == "rename":
        table = table.rename(columns={random.choice(list(table)): "<b>"})
    elif text == "twice":
        table = pd.concat([table, table[[table.columns[0]]]], axis=1)
    elif text == "cell" and len(table):
        numbers = [c for c in table if table[c].map(_is_number).any()]
        if not numbers:
            return missing(random, file)
        bad = [
            "x",
            "9" * 5000,
            "<script>alert(1)</script>",
            "1e999",
            "0x10",
            "1_0",
            "٣",
            "-inf",
            "1;2",
            "--1",
        ]
        table.loc[random.randrange(len(table)), random.choice(numbers)] = random.choice(bad)
    elif text == "long" and len(lines) > 1:
        lines[1] = lines[1].rstrip("\n") + ",1\n"
    elif text == "short" and len(lines) > 1:
        lines[1] = lines[1].rpartition(",")[0] + "\n"
    elif text == "quote":
        lines[-1] = '"' + lines[-1]
    else:
        return missing(random, file)
    content = "".join(lines) if text in ("long", "short", "quote") else table.to_csv(index=False)
    file.write_text(content)
    return True


def _is_number(text: str) -> bool:
    try:
        return bool(str(float(text)))
    except ValueError:
        return False


def odd_table(random: Random, file: Path) -> bool:
    """A column of a Parquet file of another name or type, or with values that none can have."""
    table = pq.read_table(file)
    frame, about = table.to_pandas(), table.schema.metadata
    name = random.choice(list(frame))
    what = random.choice(["wide", "narrow", "rename", "text", "null", "value", "list", "none"])
    if what == "wide":
        frame["more"] = 1
    elif what == "narrow":
        frame = frame.drop(columns=name)
    elif what == "rename":
        frame = frame.rename(columns={name: "<b>"})
    elif what == "text":
        if frame[name].isna().all():  # nulls are of no type
            return missing(random, file)
        is_text = pd.api.types.is_string_dtype(frame[name])
        frame[name] = range(len(frame)) if is_text else frame[name].astype(str)
    elif what == "null":
        name = next(c for c in ("tower", "example", "site", "kind") if c in frame)
        frame[name] = None
    elif what == "list":
        frame[name] = [[1]] * len(frame)
    elif what == "none":
        name = next((c for c in ("tower", "kind") if c in frame), None)
        if name is None:
            return missing(random, file)
        frame[name] = "<script>"
    else:
        name = random.choice(
            [c for c in ("layer", "head", "row", "column", "position") if c in frame] or ["n"]
        )
        if name not in frame or not pd.api.types.is_numeric_dtype(frame[name]):
            return missing(random, file)
        frame[name] = random.choice([-1, 2**31 - 1])
    made = pa.Table.from_pandas(frame, preserve_index=False)
    schema = table.schema.remove_metadata()
    if made.schema.names == schema.names and what in ("value", "none"):
        made = made.cast(schema)
    pq.write_table(made.replace_schema_metadata(about), file)
    return True


def a_bomb(random: Random, file: Path) -> bool:
    """A small Parquet file of very many rows."""
    schema = pq.read_schema(file)
    many = pa.chunked_array([pa.nulls(2**22, type=schema[0].type)] * 64)
    made = pa.table(dict.fromkeys(schema.names, many)).replace_schema_metadata(schema.metadata)
    pq.write_table(made, file, compression="zstd")
    return True


def a_large_picture(random: Random, file: Path) -> bool:
    Image.new("1", (30_000, 30_000)).save(file)
    return True


Harm = Callable[[Random, Path], bool]
ANY: tuple[Harm, ...] = (emptied, other_format, a_folder, a_pipe, a_device, a_link, a_loop, endless)
BY_SUFFIX: dict[str, tuple[Harm, ...]] = {
    ".json": (strange_json, strange_json, strange_json, lacking_json, odd_json, odd_json),
    ".csv": (odd_csv, odd_csv, odd_csv, missing, halved, altered),
    ".parquet": (truncated, overwritten, odd_table, odd_table, odd_table, a_bomb),
    ".png": (truncated, a_large_picture),
    ".toml": (),
}


# --- what can be wrong with a folder ------------------------------------------------------------------------


def part_twice(folder: Path) -> None:
    """A part, copied under another part's name: its examples would count twice."""
    for name in ("effects", "baselines"):
        part = folder / name / "part-000000.parquet"
        shutil.copy(part, part.with_name("part-000001.parquet"))


def effects_alone(folder: Path) -> None:
    """Baselines of other examples than the effects."""
    part = folder / "baselines" / "part-000000.parquet"
    table = pq.read_table(part)
    names = pa.array([f"other {n}" for n in range(table.num_rows)])
    pq.write_table(table.set_column(0, table.schema.field(0), names), part)


def picture_elsewhere(folder: Path) -> None:
    """A picture that is a link to a private file."""
    private = folder.parent / "private.png"
    Image.new("RGB", (5, 5)).save(private)
    picture = folder / "examples" / "0000-clean.png"
    picture.unlink()
    picture.symlink_to(private)


def examples_elsewhere(folder: Path) -> None:
    (folder / "examples").rename(folder.parent / "private")
    (folder / "examples").symlink_to(folder.parent / "private")


def baselines_elsewhere(folder: Path) -> None:
    (folder / "baselines").rename(folder.parent / "private")
    (folder / "baselines").symlink_to(folder.parent / "private")


WHOLE = (part_twice, effects_alone, picture_elsewhere, examples_elsewhere, baselines_elsewhere)


def run_elsewhere(folder: Path) -> None:
    (folder / "runs" / "states-image").rename(folder.parent / "private")
    (folder / "runs" / "states-image").symlink_to(folder.parent / "private")


def runs_in_a_loop(folder: Path) -> None:
    (folder / "runs" / "loop").symlink_to(folder)


def fixed(top: Path, good: Path) -> Iterator[Case]:
    """Faults that were found once."""
    harms = [("run", harm) for harm in WHOLE] + [("notice", run_elsewhere), ("notice", runs_in_a_loop)]
    for kind, harm in harms:
        for command in (("report", "r.html"), ("circuits", "c")):
            if command[0] == "circuits" and harm in (picture_elsewhere, examples_elsewhere):
                continue
            folder = top / f"fixed-{kind}-{harm.__name__}-{command[0]}" / "here"
            folder.mkdir(parents=True)
            shutil.copytree(good / kind, folder / kind, symlinks=True)
            harm(folder / kind)
            yield Case(
                f"{command[0]} {kind}: {harm.__name__}", [command[0], kind, "--out", command[1]], folder
            )
    for name, out in (("figures", "r.html"), ("page", "r.html"), ("folder", "."), ("file", "f/r.html")):
        folder = top / f"fixed-out-{name}" / "here"
        folder.mkdir(parents=True)
        shutil.copytree(good / "run", folder / "run")
        if name == "figures":
            (folder / "r-figures").mkdir()
            (folder / "r-figures" / "thesis.png").write_bytes(b"mine")
        elif name == "page":
            (folder / "r.html").write_text("<title>my page</title>")
        elif name == "file":
            (folder / "f").touch()
        yield Case(f"report --out: {name}", ["report", "run", "--out", out], folder)


def cases(random: Random, top: Path) -> Iterator[Case]:
    good = good_folders(top)
    yield from fixed(top, good)
    kinds = ["run", *MADE, "perturb", "edit", "explanation"]
    number = 0
    while True:
        kind = random.choice(kinds)
        number += 1
        folder = top / f"case-{number}" / "here"
        folder.mkdir(parents=True)
        made = Path(shutil.copytree(good / kind, folder / kind))
        held = [file for file in sorted(made.rglob("*")) if file.is_file()]
        file = random.choice([f for f in held if not _is_ignored(f.relative_to(made), kind)])
        harm = random.choice(ANY + BY_SUFFIX.get(file.suffix, ()) * 2)
        what = f"{kind}/{file.relative_to(made)}: {harm.__name__}"
        try:
            harm(random, file)
        except StopIteration:
            emptied(random, file)
        argv = ["report", kind, "--out", "r.html"]
        # What is odd in itself is odd under the right digest, too; other values of a table need not be.
        if (
            file.suffix != ".json"
            and file.is_file()
            and harm not in (halved, altered, endless, overwritten)
            and random.random() < 0.7
        ):
            list_anew(file)
        is_of_run = kind == "run" or (kind == "notice" and "faithfulness" not in file.parts)
        is_table = is_of_run and "examples" not in file.parts and file.suffix == ".parquet"
        if is_table and "heads.parquet" not in file.name and random.random() < 0.4:
            argv = ["circuits", kind, "--out", "c"]
        if kind == "run" and file.suffix != ".png" and random.random() < 0.2:
            expected = good / "run"
            is_same = partial(same_effects, made, expected)
            yield Case(f"sweep on {what}", MADE["run"].split(), folder, ("run",), is_same)
            continue
        if kind == "find" and random.random() < 0.4:
            words = "--model toy-llava --data states --limit 3 --word heart --found find --out p"
            argv = ["neurons", "perturb", *words.split()]
        yield Case(f"{argv[0]} {what}", argv, folder, may_change=("p",))


def same_effects(made: Path, good: Path, out: str) -> bool:
    """Whether a run that went on has the rows of the good one."""
    from vlmscope.errors import StoreError
    from vlmscope.studies.run_folder import read_run

    one, other = read_run(made), read_run(good)
    try:
        return one.effects().equals(other.effects()) and one.baselines().equals(other.baselines())
    except StoreError:  # of a run that is whole only the parts' indices are read, so whoever reads it is told
        return f"{other.patches()} patches of {other.ran()} examples in run" in out


def _is_ignored(file: Path, kind: str) -> bool:
    path = f"{kind}/{file}"
    if kind == "tracing" and "repeats" in path and ("00/baselines" not in path and "00/run.json" not in path):
        return True  # of the repeats a report reads the first one's baselines
    is_left = kind == "notice" and (
        file.name in ("selection.csv", "selection.json", "notice.toml") or "patches" in path
    )
    return is_left or any(part in path for part in IGNORED if part != "heads.csv") or file.name == "heads.csv"
