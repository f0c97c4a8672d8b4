"""What a user writes has types, down to each public name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import vlmscope

CODE = Path(__file__).with_name("users_code.py")
CONFIGURATION = Path(__file__).parents[1] / "pyproject.toml"


def check(code: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(CONFIGURATION), str(code)]
    return subprocess.run(command, cwd=CONFIGURATION.parent, capture_output=True, text=True)


def test_users_code_uses_every_public_name():
    used = set(re.findall(r"vlmscope\.(\w+)", CODE.read_text("utf-8")))
    assert set(vlmscope.__all__) <= used


def test_every_public_name_has_its_type():
    done = check(CODE)
    assert done.returncode == 0, done.stdout


def test_a_users_mistakes_are_found(tmp_path):
    file = tmp_path / "mistakes.py"
    lines = [
        "import vlmscope",
        "vlmscope.sweep(1, [], [])",
        "vlmscope.Example.read()",
        "vlmscope.head_tables",
    ]
    file.write_text("\n".join(lines) + "\n")
    said = check(file).stdout
    assert 'mistakes.py:2: error: Argument 1 to "sweep" has incompatible type "int"; expected "Model"' in said
    assert 'mistakes.py:3: error: "type[Example]" has no attribute "read"' in said
    assert 'mistakes.py:4: error: Module has no attribute "head_tables"' in said
