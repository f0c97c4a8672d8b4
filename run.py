#!/usr/bin/env python3
"""Set up and go, from nothing but Python 3.11 with pip and venv.

    python3 run.py demo    install into .venv where that is still to do, then run `vlmscope demo`
    python3 run.py check   the same, then lint, format, types and tests

Whatever follows is passed on: to `vlmscope demo`, or to pytest.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
STAMP = VENV / "installed"
OLDEST = (3, 11)

CHECKS = {
    "lint": ("ruff", "check", "."),
    "format": ("ruff", "format", "--check", "."),
    "types": ("mypy",),
    # Each worker takes half of the files, so that what a module makes is made once.
    "tests": ("pytest", "-n", "2", "--dist", "worksteal"),
}


def tool(name: str) -> str:
    """The path of a program that `set_up` installs."""
    return str(BIN / name)


def wanted() -> str:
    """What the stamp says once the installation matches the files that it was made from."""
    files = (ROOT / "pyproject.toml", ROOT / "constraints.txt")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def set_up() -> None:
    """Install the package, editable, with the versions it was tested with.

    The stamp is written last, so a broken installation is done again.
    """
    if STAMP.is_file() and STAMP.read_text() == wanted():
        return
    print(f"Installing into {VENV.name} (once; a few minutes) ...", flush=True)
    venv.create(VENV, with_pip=True)
    pip = [tool("python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-c", "constraints.txt", "-e", ".[test]"], cwd=ROOT, check=True)
    # For tests of processors that also read videos; beside the environment, since importing it fails
    # where torch is a CPU build, unless the tests help.
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(VENV / "torchvision"), "torchvision==0.28.0"],
        cwd=ROOT,
        check=True,
    )
    STAMP.write_text(wanted())


def demo(arguments: list[str]) -> int:
    return subprocess.run([tool("vlmscope"), "demo", *arguments]).returncode


def check(arguments: list[str]) -> int:
    """Run every check, also after one has failed, and say at the end which did."""
    failed = []
    for name, command in CHECKS.items():
        print(f"== {name}: {' '.join(command)}", flush=True)
        extra = arguments if name == "tests" else []
        if subprocess.run([tool(command[0]), *command[1:], *extra], cwd=ROOT).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def main() -> int:
    commands = {"demo": demo, "check": check}
    if sys.version_info < OLDEST:
        print(f"vlmscope needs Python 3.11 or newer; this is {sys.version.split()[0]}.")
        return 2
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print((__doc__ or "").strip())
        return 2
    try:
        set_up()
    except subprocess.CalledProcessError:
        print("The installation failed; pip's message above says why. Run the command again.")
        return 1
    return commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
