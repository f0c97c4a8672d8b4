"""Results on disk: what is committed is safe, what is not is computed again."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmscope.errors import ExampleError, StoreError
from vlmscope.studies import run_writer
from vlmscope.studies.run_folder import BASELINES, EFFECTS, read_run
from vlmscope.studies.run_writer import add_pictures, open_run

SPEC = {"model": "toy", "seed": 0, "corrupt": {"kind": "image"}, "sites": ["encoder.*.resid@*"]}


def effects(index: int, rows: int = 4) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "example": f"e{index}",
            "corruption": "image",
            "site": [f"encoder.{r}.resid@1" for r in range(rows)],
            "tower": "encoder",
            "layer": range(rows),
            "kind": "resid",
            "unit": None,
            "position": [1, None, 3, 4][:rows],
            "token": "red",
            "role": [None, "answer", None, None][:rows],
            "slot": ["0", "answer", "answer+1", "readout"][:rows],
            "p_patched": 0.5,
            "p_restored": 0.1 / (index + 1),
            "p_change": 0.1,
            "logit_diff": [r * 0.1 + index for r in range(rows)],
            "ld_change": 0.2,
            "value": 0.3,
            "effect": [None, 0.5, 0.25, 1.0][:rows],
        }
    )


def baselines(index: int, excluded: bool = False) -> pd.DataFrame:
    seen = None if excluded else 0.75
    return pd.DataFrame(
        {
            "example": [f"e{index}"],
            "corruption": "image",
            "p_clean": [seen],
            "p_corrupt": [seen],
            "ld_clean": [seen],
            "ld_corrupt": [seen],
            "value_clean": [seen],
            "value_corrupt": [seen],
            "answer_token": [None if excluded else "red"],
            "foil_token": [None if excluded else "blue"],
            "predicted": [None if excluded else "red"],
            "correct": [None if excluded else True],
            "excluded": excluded,
            "reason": ["no answer in the prompt" if excluded else None],
        }
    )


def write(path: Path, indices: range | list[int], each: bool = False) -> None:
    with open_run(path, SPEC) as run:
        for index in indices:
            if index not in run.done:
                run.add(index, effects(index), baselines(index))
            if each:
                run.flush()
        run.finish()


def files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", SPEC, {"towers": {"encoder": {"layers": 3}}}) as run:
        run.add(0, effects(0), baselines(0))
        run.add(1, pd.DataFrame(), baselines(1, excluded=True))
        run.finish()
    run = read_run(tmp_path / "run")
    assert run.finished
    assert run.spec == SPEC
    assert run.description["towers"]["encoder"]["layers"] == 3
    table = run.effects()
    assert list(table.columns) == EFFECTS.names
    assert len(table) == 4
    assert table["position"].isna().tolist() == [False, True, False, False]
    assert table["role"].tolist()[1] == "answer"
    assert table["unit"].isna().all()
    pd.testing.assert_series_equal(table["logit_diff"], effects(0)["logit_diff"])
    rows = run.baselines()
    assert list(rows.columns) == BASELINES.names
    assert rows["excluded"].tolist() == [False, True]
    assert rows["correct"].isna().tolist() == [False, True]
    counts = json.loads((tmp_path / "run/done.json").read_text())
    assert counts == {"examples": 2, "excluded": 1, "baselines": 2, "effects": 4}


def test_the_files_have_the_columns_and_types_that_are_promised(tmp_path: Path) -> None:
    write(tmp_path, [0])
    for name, schema in (("effects", EFFECTS), ("baselines", BASELINES)):
        stored = pq.read_schema(tmp_path / name / "part-000000.parquet")
        assert stored.remove_metadata().equals(schema)
    assert list(pd.read_parquet(tmp_path / "effects").columns) == EFFECTS.names


def test_an_unusable_effect_is_null_but_a_metric_that_is_nan_stays_nan(tmp_path: Path) -> None:
    table = effects(0).assign(effect=[float("nan"), None, 1.0, 2.0], p_patched=float("nan"))
    with open_run(tmp_path, SPEC) as run:
        run.add(0, table, baselines(0))
    stored = pq.read_table(tmp_path / "effects/part-000000.parquet")
    assert stored["effect"].null_count == 2
    assert stored["p_patched"].null_count == 0


def test_the_order_is_that_of_the_examples_whatever_the_parts(tmp_path: Path) -> None:
    write(tmp_path / "one", range(5))
    write(tmp_path / "many", [3, 0, 4, 2, 1], each=True)
    assert len(list((tmp_path / "many/effects").iterdir())) == 5
    one, many = read_run(tmp_path / "one"), read_run(tmp_path / "many")
    pd.testing.assert_frame_equal(one.effects(), many.effects())
    pd.testing.assert_frame_equal(one.baselines(), many.baselines())


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from test_store import SPEC, baselines, effects
    from vlmscope import files
    from vlmscope.studies.run_writer import open_run
    with open_run({path!r}, SPEC) as run:
        run.add(0, effects(0), baselines(0)); run.flush()
        run.add(2, effects(2), baselines(2)); run.flush()
        write = files.write
        def die(file, content, ends=None):
            if file.parent.name == "baselines":
                file.with_name(".x.tmp").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, content, ends)
        files.write = die
        run.add(1, effects(1), baselines(1)); run.flush()
"""


def test_a_run_killed_between_two_files_goes_on_to_the_same_table(tmp_path: Path) -> None:
    path = tmp_path / "killed"
    script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), path=str(path))
    ended = subprocess.run([sys.executable, "-c", script], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert "effects/part-000002.parquet" in files(path)
    assert "baselines/.x.tmp" in files(path)
    assert read_run(path).effects()["example"].unique().tolist() == ["e0", "e2"]
    assert not read_run(path).finished
    with open_run(path, SPEC) as run:
        assert set(run.done) == {0, 2}
        assert "effects/part-000002.parquet" not in files(path)
        assert "baselines/.x.tmp" not in files(path)
    write(path, range(4))
    write(tmp_path / "whole", range(4))
    pd.testing.assert_frame_equal(read_run(path).effects(), read_run(tmp_path / "whole").effects())


def test_an_exception_loses_nothing_that_was_computed(tmp_path: Path) -> None:
    def interrupted() -> None:
        with open_run(tmp_path, SPEC) as run:
            run.add(0, effects(0), baselines(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_run(tmp_path).baselines()["example"].tolist() == ["e0"]
    assert not read_run(tmp_path).finished


def test_rows_are_written_at_once_and_then_from_time_to_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(run_writer.time, "monotonic", lambda: now[0])
    written = []
    with open_run(tmp_path, SPEC) as run:
        for index in range(160):
            now[0] += 0.25
            run.add(index, effects(index), baselines(index))
            if len(list((tmp_path / "baselines").iterdir())) > len(written):
                written.append(now[0])
    # The first example, then after one second, two, four, eight, and every ten.
    assert written == [0.25, 1.5, 3.75, 8.0, 16.25, 26.5, 36.75]


def test_many_rows_are_written_before_it_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_writer, "ROWS", 8)
    with open_run(tmp_path, SPEC) as run:
        for index, done in enumerate([{0}, {0}, {0, 1, 2}]):
            run.add(index, effects(index), baselines(index))
            assert set(run.done) == done


def test_adding_to_a_finished_run_takes_the_mark_away_until_it_is_finished_again(tmp_path: Path) -> None:
    write(tmp_path, [0])
    with open_run(tmp_path, SPEC) as run:
        run.add(1, effects(1), baselines(1))
        run.flush()
        assert not read_run(tmp_path).finished
        run.finish()
    assert read_run(tmp_path).finished


def test_another_specification_is_refused_with_what_differs(tmp_path: Path) -> None:
    write(tmp_path, [0])
    other = SPEC | {"seed": 1, "corrupt": {"kind": "text"}, "limit": 3}
    expected = (
        'corrupt.kind is "image" there, "text" here; limit is absent there, 3 here. '
        "Choose another --out or delete the folder"
    )
    with pytest.raises(StoreError, match=r"seed is 0 there, 1 here") as caught:
        open_run(tmp_path, other)
    assert all(piece in str(caught.value) for piece in expected.split("; "))
    assert "model" not in str(caught.value)


def test_a_specification_is_compared_as_json(tmp_path: Path) -> None:
    open_run(tmp_path, {"sites": ("a", "b"), "name": "f\udc80"}).close()
    open_run(tmp_path, {"sites": ["a", "b"], "name": "f\udc80"}, {"not": "compared"}).close()


def test_places_that_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="is a file; a run needs a folder"):
        open_run(tmp_path / "file", SPEC)
    with pytest.raises(StoreError, match="not empty, and not a run folder"):
        open_run(tmp_path / "full", SPEC)
    assert files(tmp_path / "full") == ["thesis.tex"]
    with pytest.raises(StoreError, match="not a run folder"):
        read_run(tmp_path / "full")
    with pytest.raises(StoreError, match="no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"cannot be written \(Not a directory\)"):
        open_run(tmp_path / "file/run", SPEC)


def test_a_run_killed_before_run_json_can_start(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.tmp").write_text('{"spec"')
    open_run(tmp_path, SPEC).close()
    assert files(tmp_path) == [".lock", "run.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": "vlmscope-run-3", "spec": {"mo', "is damaged .not JSON."),
        ("[]", "not a JSON object"),
        ('{"format": "vlmscope-run-3"}', "is damaged .no spec."),
        ('{"format": "vlmscope-run-9", "spec": {}}', "use the version of vlmscope that wrote it"),
    ],
)
def test_a_damaged_run_json(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        read_run(tmp_path)
    with pytest.raises(StoreError, match=message):
        open_run(tmp_path, SPEC)


@pytest.mark.parametrize("name", ["effects", "baselines"])
@pytest.mark.parametrize("harm", ["truncated", "empty", "foreign", "flipped", "missing"])
def test_a_damaged_part_is_named_and_can_be_computed_again(tmp_path: Path, name: str, harm: str) -> None:
    if (name, harm) == ("baselines", "missing"):
        pytest.skip("a part without baselines is an uncommitted one")
    write(tmp_path, range(3), each=True)
    whole = read_run(tmp_path).effects()
    part = tmp_path / name / "part-000001.parquet"
    content = bytearray(part.read_bytes())
    if harm == "truncated":
        part.write_bytes(content[: len(content) // 2])
    elif harm == "empty":
        part.write_bytes(b"")
    elif harm == "foreign":
        pd.DataFrame({"a": [1]}).to_parquet(part)
    elif harm == "missing":
        part.unlink()
    else:
        content[40] ^= 0xFF
        part.write_bytes(content)
    with pytest.raises(StoreError, match=r"part-000001.parquet: this part is .*computed anew"):
        _ = read_run(tmp_path).effects(), read_run(tmp_path).baselines()
    (tmp_path / "baselines/part-000001.parquet").unlink()
    write(tmp_path, range(3))
    pd.testing.assert_frame_equal(read_run(tmp_path).effects(), whole)


def test_a_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    write(tmp_path, [0])
    whole = read_run(tmp_path).effects()
    part = tmp_path / "effects/part-000000.parquet"
    content = part.read_bytes()
    found = 0
    for at in range(4, len(content) // 2, 11):
        part.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            pd.testing.assert_frame_equal(read_run(tmp_path).effects(), whole)
        except StoreError:
            found += 1
    assert found > 20


def test_a_damaged_part_is_found_when_a_run_is_continued(tmp_path: Path) -> None:
    write(tmp_path, [0])
    (tmp_path / "effects/part-000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="this part is damaged"):
        open_run(tmp_path, SPEC)


@pytest.mark.parametrize("fails", ["effects", "baselines"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    sync = os.fsync

    def full(descriptor: int) -> None:
        if f"/{fails}/." in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    write(tmp_path, [0])
    before = files(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"disk is full\. What was written before is safe; free"):
        write(tmp_path, [1])
    monkeypatch.undo()
    assert files(tmp_path) == before
    assert read_run(tmp_path).finished
    write(tmp_path, range(2))
    assert len(read_run(tmp_path).effects()) == 8


def test_a_full_disk_does_not_hide_the_error_that_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def ended() -> None:
        with open_run(tmp_path, SPEC) as run:
            run.add(0, effects(0), baselines(0))
            run.add(1, effects(1), baselines(1))
            monkeypatch.setattr(os, "fsync", full)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        ended()
    monkeypatch.undo()
    assert "the disk is full" in caught.value.__notes__[0]


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    hold = f"from vlmscope.studies.run_writer import open_run; held = open_run({str(tmp_path)!r}, {SPEC!r}); "
    hold += "print('open', flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", hold], stdin=pipe, stdout=pipe) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"open\n"
        with pytest.raises(StoreError, match="another process is writing it"):
            open_run(tmp_path, SPEC)
        assert len(read_run(tmp_path).effects()) == 0
        first.kill()
    open_run(tmp_path, SPEC).close()


def test_wrong_tables_are_refused(tmp_path: Path) -> None:
    with open_run(tmp_path, SPEC) as run:
        with pytest.raises(ValueError, match=r"wrong columns \['extra'\]"):
            run.add(0, effects(0).assign(extra=1), baselines(0))
        with pytest.raises(ValueError, match="column 'site' lacks 4 values"):
            run.add(0, effects(0).assign(site=None), baselines(0))
        run.add(0, effects(0), baselines(0))
        with pytest.raises(ValueError, match="example 0 is already in"):
            run.add(0, effects(0), baselines(0))


def test_pictures_are_kept_small_and_come_back(tmp_path: Path) -> None:
    Image.new("RGB", (800, 400), "red").save(tmp_path / "red.png")
    example = {
        "id": "a/../b",
        "clean_image": tmp_path / "red.png",
        "corrupt_image": Image.new("L", (10, 10)),
        "clean_prompt": "Is it <b>red</b>?",
        "corrupt_prompt": None,
        "answer": "red",
        "foil": "blue",
        "roles": {"answer": (1, 2)},
    }
    with open_run(tmp_path / "run", SPEC) as run:
        add_pictures(run.path, 12, example)
        add_pictures(run.path, 3, {"id": "b", "answer": "x"})
        with pytest.raises(ExampleError, match=r"run.json: not an image"):
            add_pictures(run.path, 4, {"id": "b", "clean_image": tmp_path / "run/run.json"})
    first, second = read_run(tmp_path / "run").pictures()
    assert first == {"index": 3, "id": "b", "answer": "x"} | dict.fromkeys(("clean_image", "corrupt_image"))
    assert (second["index"], second["id"]) == (12, "a/../b")
    assert second["clean_prompt"] == "Is it <b>red</b>?"
    assert "corrupt_prompt" not in second
    with (
        Image.open(io.BytesIO(second["clean_image"])) as clean,
        Image.open(io.BytesIO(second["corrupt_image"])) as corrupt,
    ):
        assert clean.size == (384, 192)
        assert corrupt.size == (10, 10)


def test_a_folder_that_is_removed_does_not_come_back_without_its_manifest(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", SPEC)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StoreError, match="is gone"):
        run.add(0, effects(0), baselines(0))
    run.close()
    assert not (tmp_path / "run").exists()


def test_reading_needs_no_torch() -> None:
    code = "import sys, vlmscope.studies.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
