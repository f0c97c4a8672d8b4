"""Run folders on the Hugging Face hub: pushed there as a data set with a card, and read from there."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmscope.errors import StoreError, VlmscopeError, line, shown
from vlmscope.studies.run_folder import Run, parts_of, read_manifest, read_run, table_in
from vlmscope.studies.run_writer import GROWS, differing

HUB = "hf://"
"""What the name of a folder begins with that is on the hub."""
BESIDE = (
    *("done.json", "screen.json", "agreement.json", "edges.parquet"),
    *("summary.json", "faithfulness.parquet", "circuit.csv"),
)
"""What else there may be of a run, beside `run.json` and its parts. The pictures of its examples are not
pushed: they are somebody's data."""
SITES = 20
"""How many site expressions a card names."""
_WORD = r"[A-Za-z0-9](?!\S*(--|\.\.))[\w.-]{0,95}"
_NAME = re.compile(rf"{_WORD}/{_WORD}(?<![.-])", re.ASCII)
_SHA = re.compile(r"[0-9a-f]{7,64}")
_TITLES = {
    "effects": "Effects of patches",
    "attributions": "Attributions",
    "edges": "Edges",
    "measured": "Circuits",
}


def check_name(name: str) -> str:
    """The name of a data set on the hub; raises `VlmscopeError` for what is none."""
    if not _NAME.fullmatch(name):
        raise VlmscopeError(
            f"{shown(name)} names no data set on the hub; expected OWNER/NAME, in letters, digits, . _ and -"
        )
    return name


def ready(name: str) -> None:
    """Refuse, before anything is computed, a name that is none, and a hub that cannot be reached or does not
    know who asks."""
    check_name(name)
    with _one_line(f"push to {name}") as hub:
        hub.HfApi().whoami()


def push(folder: str | os.PathLike[str], name: str, *, private: bool = True) -> str:
    """Put a finished run folder on the Hugging Face hub, as the data set OWNER/NAME; its address.

    Pushed are its tables, what was made of them, and a card that says what they are; no pictures. A data set
    that is not there yet is made, `private` or not. One that holds the same run is replaced, in one commit,
    if all that it has is in the folder. The token is that of `hf auth login`, or HF_TOKEN. `vlmscope.open`
    reads it back: `open("hf://OWNER/NAME")`.

    Raises `StoreError` for a folder that is no finished run, or a shard, and for a data set that holds
    something else, `VlmscopeError` for a name that is none, without a token, or where the hub refuses or is
    not reached.
    """
    check_name(name)
    run = read_run(folder)
    if not run.finished:
        raise StoreError(f"{run.path}: this run is not finished; run the same command again, then push it")
    if "shard" in run.spec:
        raise StoreError(f"{run.path}: is a shard; put all together with vlmscope merge, and push that")
    text = card(name, run)  # which reads all of it: nothing damaged is pushed
    table = table_in(run.spec)
    parts = [f"{place}/{part.name}" for part in parts_of(run.path) for place in (table, "baselines")]
    files = ["run.json", *parts, *(file for file in BESIDE if (run.path / file).is_file())]
    with _one_line(f"push to {name}") as hub:
        api = hub.HfApi()
        api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
        there = {*api.list_repo_files(name, repo_type="dataset")} - {".gitattributes"}
        if there:
            _check_same(hub, name, there, run)
        stale = sorted(there - {*files, "README.md"})
        operations = [hub.CommitOperationAdd(file, str(run.path / file)) for file in files]
        operations += [hub.CommitOperationAdd("README.md", text.encode())]
        operations += [hub.CommitOperationDelete(file) for file in stale]
        api.create_commit(name, operations, commit_message="A run of vlmscope", repo_type="dataset")
        return f"{hub.constants.ENDPOINT}/datasets/{name}"


def _check_same(hub: Any, name: str, there: set[str], run: Run) -> None:
    """Refuse a data set that holds anything but this run, or more of it."""
    if "run.json" not in there:
        raise StoreError(f"{name}: is a data set of other files (no run.json); choose another name")
    with tempfile.TemporaryDirectory() as folder:
        hub.hf_hub_download(name, "run.json", repo_type="dataset", local_dir=folder)
        old = read_manifest(Path(folder))["spec"]
    if differ := differing(old, run.spec, GROWS):
        raise StoreError(f"{name}: holds another run: {differ}. Choose another name")
    more = {*(old.get("sites") or [])} - {*(run.spec.get("sites") or [])}
    if more or old.get("n_examples", 0) > run.spec.get("n_examples", 0):
        raise StoreError(f"{name}: holds more of this run than {run.path}; choose another name")


def fetched(name: str) -> Path:
    """The folder of a run that was pushed, `hf://OWNER/NAME`, in the cache of the hub's library.

    Raises `StoreError` for a data set that is no run, `VlmscopeError` where it cannot be had.
    """
    own = check_name(name.removeprefix(HUB))
    with _one_line(f"read {name}") as hub:
        about = hub.HfApi().dataset_info(own)
        there = {file.rfilename for file in about.siblings or ()}
        if "run.json" not in there or not _SHA.fullmatch(about.sha or ""):
            raise StoreError(f"{name}: no run of vlmscope (no run.json); name one that was pushed")
        # A revision has its own folder: parts of two must never lie together.
        folder = Path(hub.constants.HF_HOME) / "vlmscope" / own.replace("/", "--") / about.sha
        wanted = ["run.json", "*/part-*.parquet", *BESIDE]
        hub.snapshot_download(
            own, repo_type="dataset", revision=about.sha, local_dir=folder, allow_patterns=wanted
        )
    return folder


def card(name: str, run: Run) -> str:
    """The page of a run on the hub, in Markdown: what it is, and how it is read.

    What the data and the model are called stands in a block of code, where nothing is markup.
    """
    spec, table, base = run.spec, table_in(run.spec), run.baselines()
    rows = len(run.rows())
    corrupt = spec.get("corrupt", {})
    sites = spec.get("sites") or []
    more = [f"and {len(sites) - SITES} more"] if len(sites) > SITES else []
    about: dict[str, Any] = {
        "model": spec.get("model"),
        "weights": spec.get("weights"),
        "data": spec.get("data"),
        "examples": f"{len(base):,}, of which {int(base['excluded'].sum()):,} were left out",
        "rows": f"{rows:,}",
        "corruption": " ".join(f"{key}={value}" for key, value in corrupt.items()),
        **{key: spec[key] for key in ("direction", "metric", "patch", "from", "method") if key in spec},
        "precision": f"{spec.get('dtype')} on {spec.get('device')}",
        "seed": spec.get("seed"),
        "check": run.check_line(),
        "versions": " ".join(f"{key}={value}" for key, value in spec.get("versions", {}).items()),
        "sites": sites[:SITES] + more,
    }
    block = "\n".join(
        f"    {key:<11} {line(str(one), 200)}"
        for key, value in about.items()
        for one in (value if isinstance(value, list) else [value])
    )
    return f"""---
tags:
- vlmscope
configs:
- config_name: {table}
  data_files: {table}/*.parquet
  default: true
- config_name: baselines
  data_files: baselines/*.parquet
---

# {_TITLES[table]} in a vision-language model

A run of vlmscope: the table `{table}` ({rows:,} rows), and `baselines`, a row for each example.
The pictures are not here.

{block}

To read it:

```python
import vlmscope

run = vlmscope.open("hf://{name}")
run.{table}(), run.baselines()
```

or, as a folder for the command line:

```sh
hf download {name} --repo-type dataset --local-dir my-run
```
"""


@contextmanager
def _one_line(what: str) -> Iterator[Any]:
    """The hub's library, without its bars; what it raises as one line."""
    import huggingface_hub as hub
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield hub
    except (VlmscopeError, MemoryError):
        raise
    except Exception as error:  # of any kind: its client, and what that speaks HTTP with
        said = line(str(error).strip() or type(error).__name__, 160).rstrip(".")
        status = getattr(getattr(error, "response", None), "status_code", None)
        way_out = "try again when the network and the hub are there"
        if isinstance(error, errors.OfflineModeIsEnabled):
            way_out = "take HF_HUB_OFFLINE=1 away"
        elif isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403, 404):
            way_out = "log in with a token that may do this (`hf auth login`, or HF_TOKEN), and see the name"
        raise VlmscopeError(f"cannot {what}: {said}; {way_out}") from error
    finally:
        if not were_off:
            enable_progress_bars()
