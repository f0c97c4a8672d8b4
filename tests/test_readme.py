"""What the README shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert "encoder." in capsys.readouterr().out
    assert (tmp_path / "heads.png").exists()
    assert (tmp_path / "states.html").exists()


@pytest.mark.parametrize("command", ["demo", "sweep", "report", "models"])
def test_the_commands_of_the_readme_exist(command):
    from typer.main import get_command

    from vlmscope.cli import app

    assert f"vlmscope {command}" in README
    assert command in get_command(app).commands
