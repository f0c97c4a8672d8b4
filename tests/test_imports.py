"""The direction of imports, what must stay light, and the public names.

The layers are read from the picture in docs/architecture.md, so the page cannot go stale.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmscope

SOURCE = Path(vlmscope.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
FILES = sorted(SOURCE.rglob("*.py"))

TOP = ("__init__", "__main__")
"""Above the picture: what a user imports or starts, which may use everything below."""

LIGHT = ("cli", "data", "report", "notice", "stats", "layout", "sites")
LIGHT += tuple(
    f"studies.{name}" for name in ("run_folder", "run_writer", "tables", "known", "circuits", "workers")
)
HEAVY = ("torch", "transformers", "scipy.stats")

PUBLIC = """Direction Edit Example Inputs Model Noise Pair Pattern Site VlmscopeError WeightEdit __version__
    attribute baselines compare edges edited examples explain faithfulness flow_table head_table inpaint
    knockout lens load merge open probe push read_csv read_run steer sweep token_table trace
    write_csv write_report""".split()


def read_layers(title: str) -> dict[str, int]:
    """The height of each module in the picture under a title; neighbours on a line have the same."""
    picture = re.search(rf"## {title}\n.*?```\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert picture, f"no picture under '## {title}' in {PAGE.name}"
    lines = picture[1].strip().splitlines()
    return {name.strip(): len(lines) - depth for depth, line in enumerate(lines) for name in line.split("|")}


LAYERS = read_layers("Layers")


def part_of(file: Path) -> str:
    """The name in the picture to which a source file belongs."""
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def imported(source: str, package: str) -> Iterator[str]:
    """The full names of all that a source file imports, anywhere in it.

    >>> list(imported("import os.path; from . import a", "vlmscope.data"))
    ['os.path', 'vlmscope.data.a']
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_parts(source: str, package: str = "vlmscope") -> set[str]:
    """The parts of vlmscope that a source file imports; `__init__` for a name of its top.

    >>> sorted(own_parts("from vlmscope import load, sites; from vlmscope.errors import DataError"))
    ['__init__', 'errors', 'sites']
    """
    parts = set()
    for name in imported(source, package):
        first, _, rest = name.partition(".")
        if first == "vlmscope" and rest != "__version__":
            part = rest.split(".")[0]
            module = part in LAYERS or (SOURCE / part / "__init__.py").is_file()
            module = module or (SOURCE / f"{part}.py").is_file()
            parts.add(part if part and module else "__init__")
    return parts


def package_of(file: Path) -> str:
    return ".".join(["vlmscope", *file.relative_to(SOURCE).parts[:-1]])


def wrong_imports(part: str, others: set[str]) -> list[str]:
    """What a part of the picture imports from its own height or from above."""
    return sorted(
        other
        for other in others - {part}
        if part not in TOP and (other in TOP or LAYERS[other] >= LAYERS[part])
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_run_downward(file: Path) -> None:
    part, others = part_of(file), own_parts(file.read_text("utf-8"), package_of(file))
    strangers = ({part} | others) - set(LAYERS) - set(TOP)
    assert not strangers, f"not in the picture in docs/architecture.md: {sorted(strangers)}"
    assert not wrong_imports(part, others), f"{part} must not import these"


@pytest.mark.parametrize("room", ["studies"])
def test_imports_run_downward_inside_a_room(room: str) -> None:
    heights = read_layers(f"Inside `{room}`")
    for file in sorted((SOURCE / room).rglob("*.py")):
        part = file.relative_to(SOURCE / room).with_suffix("").parts[0]
        names = (n.split(".") for n in imported(file.read_text("utf-8"), package_of(file)))
        others = {name[2] for name in names if name[:2] == ["vlmscope", room] and len(name) > 2}
        assert part == "__init__" or {part} | others <= set(heights), f"not in the picture: {part}, {others}"
        wrong = [other for other in others - {part} if heights[other] >= heights[part]]
        assert not wrong, f"{room}/{part} must not import {wrong}"


def test_the_check_sees_imports_upward_sideways_and_hidden() -> None:
    hidden = "def f():\n    from vlmscope.patching.engine import patch\n"
    assert wrong_imports("models", own_parts(hidden)) == ["patching"]
    assert wrong_imports("data", own_parts("from vlmscope import stats")) == ["stats"]
    assert wrong_imports("data", own_parts("from ..studies import x", "vlmscope.data")) == ["studies"]
    assert wrong_imports("cli", own_parts("from vlmscope import load")) == ["__init__"]
    assert wrong_imports("cli", own_parts("from vlmscope import __version__, report")) == []
    assert wrong_imports("data", own_parts("from vlmscope.data import drawn")) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_only_what_runs_models_imports_transformers(file: Path) -> None:
    names = {name.split(".")[0] for name in imported(file.read_text("utf-8"), package_of(file))}
    assert part_of(file) in ("runs", "models", "checkpoint") or "transformers" not in names


@pytest.mark.parametrize(
    ("pattern", "home"),
    [
        (
            r"register_(forward|full_backward)\w*hook|register_\w*_hook|ALL_ATTENTION_FUNCTIONS",
            "runs/hooks.py",
        ),
        (r"\.hf\(|family\.generate\(|\bmodel\.hf\.generate\(", "runs/forward.py"),
        (r"\bid\(", ""),
        (r"mallopt", "cli/"),
    ],
)
def test_each_touches_transformers_in_one_file(pattern: str, home: str) -> None:
    """Hooks and attention functions in one, calls of a model in another; nothing is keyed by `id`."""
    found = {
        str(file.relative_to(SOURCE))
        for file in FILES
        if re.search(pattern, code_of(file.read_text("utf-8")))
    }
    assert all(home and name.startswith(home) for name in found), found


def code_of(source: str) -> str:
    """A source without its texts and comments.

    >>> code_of("x = f('id(3)', 4) # id(4)")
    'x=f(,4)'
    """
    texts = (tokenize.STRING, tokenize.COMMENT)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    words = [token.string for token in tokens if token.type not in texts]
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(words)).strip()


@pytest.mark.parametrize("file", sorted((SOURCE / "data").rglob("*.py")), ids=lambda file: file.name)
def test_data_stands_on_files_and_errors_alone(file: Path) -> None:
    assert own_parts(file.read_text("utf-8"), package_of(file)) <= {"data", "files", "errors"}


def test_light_modules_bring_in_no_heavy_ones() -> None:
    """In a process of its own, one after the other, so that the first to blame is named."""
    script = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module("vlmscope." + name)
    brought = [heavy for heavy in {HEAVY} if heavy in sys.modules]
    if brought:
        sys.exit(f"vlmscope.{{name}} brings in {{brought}}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_brings_in_no_heavy_module() -> None:
    script = f"import sys, vlmscope; sys.exit(str([m for m in {HEAVY} if m in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert not done.stderr.strip(), done.stderr


def test_the_public_names() -> None:
    assert sorted(vlmscope.__all__) == PUBLIC
    for name in vlmscope.__all__:
        assert getattr(vlmscope, name) is not None, name
    assert set(vlmscope.__all__) <= set(dir(vlmscope))


def test_the_version_is_the_one_that_is_installed() -> None:
    from importlib.metadata import version

    assert vlmscope.__version__ == version("vlmscope")
