"""Runs on the hub: what is pushed, what its card says, how it is read back, and what is refused.

The client is the hub's own; the server is `pretend_hub`, on 127.0.0.1. Each script here is a process of its
own, since the client reads where the hub is when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretend_hub
import pytest
from models import blip, example
from pretend_hub import Hub
from test_cli import refused, run  # noqa: F401 - a fixture

import vlmscope
from vlmscope.errors import StoreError, VlmscopeError
from vlmscope.studies import pushed
from vlmscope.studies.run_folder import Run, read_run
from vlmscope.studies.run_writer import open_run

SITES = "encoder.0.resid@answer"
SWEEP = ("sweep", "--model", "toy-blip", "--data", "states", "--limit", "1", "--corrupt", "image")
SWEEP += ("--sites", SITES)
HOSTILE = "</code>\n# A title\n```\n<script>alert(1)</script> [x](y) ---\n- tag: \u202e"


def examples(count: int) -> list[vlmscope.Example]:
    return [replace(example(), id=f"e{number}") for number in range(count)]


def made(folder: Path, count: int = 2, sites: str = SITES) -> Run:
    vlmscope.sweep(blip(), examples(count), sites, out=folder)
    return read_run(folder)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with pretend_hub.served() as found:
        yield found


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """With LFS: what Xet says to its servers is not pretended."""
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": pretend_hub.TOKEN}
    return {**os.environ, **own, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}


def script(hub: Hub, home: Path, text: str, *words: object, **more: str) -> Any:
    """What a script prints last, as JSON; what its calls `said(function, *given)` is what they raise."""
    head = (
        "import json, sys, vlmscope\n"
        "def said(function, *given):\n"
        "    try:\n        return function(*given)\n"
        "    except vlmscope.VlmscopeError as error:\n        return f'{type(error).__name__}: {error}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + text, *map(str, words)],
        env=environment(hub, home, **more),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "bars and warnings are nobody's business"
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_is_pushed_with_a_card_and_read_back(hub: Hub, tmp_path: Path) -> None:
    made(tmp_path / "run")
    text = (
        "address = vlmscope.push(sys.argv[1], 'owner/my-run')\n"
        "one, other = vlmscope.open('hf://owner/my-run'), vlmscope.open(sys.argv[1])\n"
        "same = one.effects().equals(other.effects()) and one.baselines().equals(other.baselines())\n"
        "print(json.dumps([address, same, one.spec == other.spec, str(one.path)]))"
    )
    address, is_same, has_spec, path = script(hub, tmp_path / "home", text, tmp_path / "run")
    assert address == f"{hub.endpoint}/datasets/owner/my-run" and is_same and has_spec
    assert Path(path).is_relative_to(tmp_path / "home")
    found = hub.repositories["owner/my-run"]
    assert found.private
    parts = [f"{name}/part-00000{n}.parquet" for name in ("baselines", "effects") for n in (0, 1)]
    pushed_files = {file for file in found.files if not file.endswith(".parquet")}
    assert pushed_files == {".gitattributes", "README.md", "done.json", "run.json"}, "and no pictures"
    for file in set(parts) & {*found.files}:
        assert found.files[file] == (tmp_path / "run" / file).read_bytes()
    before = {*found.files}
    # more examples are further parts, in the same place; what the folder has no more is gone there, too
    found.files["effects/part-000009.parquet"] = b"of a folder that was deleted"
    made(tmp_path / "run", 3)
    assert script(hub, tmp_path / "home", text, tmp_path / "run")[1]
    assert before < {*found.files} and "effects/part-000009.parquet" not in found.files
    assert "3, of which 0 were left out" in found.files["README.md"].decode()


def test_what_a_hub_refuses_is_one_line(hub: Hub, tmp_path: Path) -> None:
    made(tmp_path / "run", 1)
    made(tmp_path / "more", 2)
    made(tmp_path / "other", 1, "encoder.1.resid@answer")
    vlmscope.sweep(blip(), examples(1), SITES, direction="noise", out=tmp_path / "noise")
    hub.repositories["owner/mine"] = pretend_hub.Repository(True, {"data.csv": b"1"})
    text = (
        "found, (run, more, other, noise) = {}, sys.argv[1:]\n"
        "vlmscope.push(more, 'owner/more')\n"
        "for folder, name in ((run, 'owner/mine'), (run, 'owner/more'), (other, 'owner/more'),\n"
        "                     (noise, 'owner/more'), (run, 'others/x')):\n"
        "    found[f'{folder[-5:]} {name}'] = said(vlmscope.push, folder, name)\n"
        "for name in ('hf://owner/mine', 'hf://owner/none'):\n"
        "    found[name] = said(vlmscope.open, name)\n"
        "import os, huggingface_hub.constants as constants\n"
        "for number, token in enumerate(('hf_wrong', '')):\n"
        "    os.environ['HF_TOKEN'] = token\n"
        "    found[f'token {number}'] = said(vlmscope.push, run, 'owner/x')\n"
        "constants.ENDPOINT = 'http://127.0.0.1:9'\n"
        "found['away'] = said(vlmscope.push, run, 'owner/x')\n"
        "print(json.dumps(found))"
    )
    names = [tmp_path / name for name in ("run", "more", "other", "noise")]
    found = script(hub, tmp_path / "home", text, *names)
    starts = {
        "owner/mine": "StoreError: owner/mine: is a data set of other files (no run.json); choose another",
        "owner/more": "StoreError: owner/more: holds more of this run than ",
        "other owner/more": "StoreError: owner/more: holds more of this run than ",
        "noise owner/more": "StoreError: owner/more: holds another run: direction is ",
        "others/x": "VlmscopeError: cannot push to others/x: 403",
        "hf://owner/mine": "StoreError: hf://owner/mine: no run of vlmscope (no run.json); name one that was",
        "hf://owner/none": "VlmscopeError: cannot read hf://owner/none: 404",
        "token 0": "VlmscopeError: cannot push to owner/x: ",
        "token 1": "VlmscopeError: cannot push to owner/x: ",
        "away": "VlmscopeError: cannot push to owner/x: ",
    }
    for name, says in found.items():
        expected = starts.get(name) or starts[name.split()[-1]]
        assert says.startswith(expected) and "\n" not in says, (name, says)
    for name in (f"{str(names[0])[-5:]} others/x", "token 0", "token 1"):
        assert "log in with a token that may do this (`hf auth login`, or HF_TOKEN)" in found[name], name
    assert found["away"].endswith("; try again when the network and the hub are there")
    assert hub.repositories["owner/mine"].files == {"data.csv": b"1"}


def test_a_command_pushes_what_it_has_made(hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlmscope", *SWEEP, "--out", str(tmp_path / "run")]
    own = environment(hub, tmp_path / "home")
    done = subprocess.run([*command, "--push", "owner/cli"], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{hub.endpoint}/datasets/owner/cli\n1 patches of 1 examples" in done.stdout
    assert "run.json" in hub.repositories["owner/cli"].files
    assert hub.asked.index("GET /api/whoami-v2") == 0 or "whoami" in hub.asked[1], "before it computes"


# --- without a server ------------------------------------------------------------------------------------


def test_nothing_is_computed_that_cannot_be_pushed(run: Any, tmp_path: Path) -> None:  # noqa: F811
    out = ("--out", tmp_path / "run")
    refused(run(*SWEEP, *out, "--push", "my-run"), "'my-run' names no data set on the hub; expected OWNER")
    refused(run(*SWEEP, *out, "--push", "a/b", "--shard", "1/2"), "--push is of a whole run; leave it to")
    refused(run(*SWEEP, *out, "--push", "a/b"), "cannot push to a/b: ")  # nothing in the tests is online
    refused(run("merge", tmp_path / "1", *out, "--push", "a b"), "'a b' names no data set on the hub")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["", "a", "a/b/c", "a/../b", "-a/b", "a/b.", "a/b--c", "a/b\n", "ä/b", "a/" + "b" * 97]
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(VlmscopeError, match="names no data set on the hub; expected OWNER/NAME"):
        pushed.check_name(name)
    assert pushed.check_name("Owner-1/my_run.v2") == "Owner-1/my_run.v2"


def test_folders_that_are_not_pushed(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        vlmscope.push(tmp_path / "none", "a/b")
    with pytest.raises(StoreError, match="not a run folder"):
        vlmscope.push(tmp_path, "a/b")
    made(tmp_path / "run")
    (tmp_path / "run" / "done.json").unlink()
    with pytest.raises(StoreError, match="this run is not finished; run the same command again"):
        vlmscope.push(tmp_path / "run", "a/b")
    vlmscope.sweep(blip(), examples(2), SITES, out=tmp_path / "shard", shard=(1, 2))
    with pytest.raises(StoreError, match="is a shard; put all together with vlmscope merge"):
        vlmscope.push(tmp_path / "shard", "a/b")
    made(tmp_path / "damaged")
    part = next((tmp_path / "damaged" / "effects").iterdir())
    part.write_bytes(part.read_bytes()[:-30])
    with pytest.raises(StoreError, match="this part is damaged"):
        vlmscope.push(tmp_path / "damaged", "a/b")


def test_what_data_is_called_is_no_markup_in_a_card(tmp_path: Path) -> None:
    spec = {"model": HOSTILE, "data": HOSTILE, "sites": [HOSTILE] * 30, "versions": {HOSTILE: HOSTILE}}
    with open_run(tmp_path / "run", spec) as writer:
        writer.finish()
    text = pushed.card("owner/name", read_run(tmp_path / "run"))
    _, head, body = text.split("---\n", 2)
    assert "script" not in head and "title" not in head.lower()
    lines = [line for line in body.splitlines() if "script" in line or "title" in line]
    assert len(lines) == 3 + pushed.SITES
    assert all(line.startswith("    ") for line in lines) and "\u202e" not in text
    assert "    sites       and 10 more" in body
