"""What a person may type by mistake: each word is read within its limits, and nothing is written before."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from vlmscope.cli.main import main

LONG = "x" * 5000
SWEEP = "sweep --model toy-blip --data states --limit 1 --corrupt noise --out out --sites".split()
SITE = "encoder.0.resid@answer"


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Run a command line in a folder with a picture; the line that refuses it, with nothing new behind it."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 48), "red").save("a.png")
    os.mkfifo("pipe")
    Path("device").symlink_to(os.devnull)

    def go(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["vlmscope", *words])
        start = time.monotonic()
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr().err
        assert end.value.code in (1, 2) and said.startswith("error: ") and said.count("\n") == 1, said
        assert len(said) <= 401 and said[:-1].isprintable() and "bug" not in said
        assert time.monotonic() - start < 60
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "device", "pipe"]
        return said

    return go


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--noise-scale", "nan", "--noise-scale is 'nan'; expected a number"),
        ("--noise-scale", "inf", "--noise-scale is 'inf'; expected a number"),
        ("--noise-scale", "1e999", "expected a number"),
        ("--noise-scale", "-1", "the scale of the noise is '-1.0'; expected a number from 0 to 1000"),
        ("--noise-scale", "0", "noise of scale 0 changes nothing"),
        (
            "--draws",
            "1" + "0" * 12,
            "--draws is '1000000000000'; expected a whole number from 0 to 1,000,000",
        ),
        ("--draws", "1001", "draws of noise is '1001'; expected a whole number from 1 to 1,000"),
        ("--seed", "-1", "--seed is '-1'; expected a whole number from 0 to 4,294,967,295"),
        ("--seed", "9" * 5000, "expected a whole number from 0 to 4,294,967,295"),
        ("--limit", "0", "--limit is '0'; expected a whole number from 1"),
        ("--limit", "-5", "--limit is '-5'; expected a whole number from 1"),
        ("--limit", "1_0", "--limit is '1_0'"),
        ("--limit", "1.0", "--limit is '1.0'"),
        ("--check", "nan", "--check is 'nan'"),
        ("--metric", "LD", "--metric is 'LD'; expected ld or p or logprob or kl; did you mean 'ld'?"),
        ("--dtype", "8bit", "float32 or bfloat16 or float16 or 4bit"),
        ("--dtype", "4bit\0", "expected float64"),
        ("--device", "nonsense", "no device 'nonsense' here; expected cpu"),
        ("--device", "", "--device is empty"),
        ("--model", "toy-blp", "did you mean 'toy-blip'?"),
        ("--model", "BLIP-VQA", "no model 'BLIP-VQA': not a folder, not a Hugging Face id (owner/name)"),
        ("--model", "a.png", "'a.png' is no folder; expected a folder written by save_pretrained"),
        ("--model", "pipe", "'pipe' is no folder"),
        ("--model", ".", "config.json: no such file; expected"),
        ("--model", "https://huggingface.co/a/b", "no model 'https://huggingface.co/a/b'"),
        ("--model", "a" * 200 + "/" + "b" * 50, "no model 'aaaa"),
        ("--model", LONG, "longer than the name of a file can be"),
        ("--model", "a\0b", "expected UTF-8 text without NUL"),
        ("--data", "stats", "no data set 'stats'"),
        ("--data", "stats", "did you mean 'states'?"),
        ("--out", "a.png", "is a file; a run needs a folder"),
        ("--out", "a.png/x", "cannot be written (Not a directory)"),
        ("--out", "device", "is a file; a run needs a folder"),
        ("--out", "", "--out is empty"),
        ("--out", LONG, "longer than the name of a file can be"),
    ],
)
def test_values_that_an_option_cannot_have(refused, flag, value, words):
    line = [*SWEEP, SITE]
    if flag in line:
        line[line.index(flag) + 1] = value
        flags = line
    else:
        flags = [*line, flag, value]
    assert words in refused(*flags)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sweep --limit 2 --limit 3", "--limit is given twice; give it once"),
        ("sweep --limit --seed 3", "--limit needs a value (--limit=VALUE where it begins with --)"),
        ("sweep --sites --seed 3", "--sites needs a value"),
        ("sweep --out", "--out needs a value"),
        ("sweep --lim 3", "No such option: --lim"),
        ("sweep -limit 3", "No such option"),
        ("swep --limit 3", "No such command 'swep'. Did you mean 'sweep'?"),
        ("neurons finds", "Did you mean 'find'?"),
        ("neurons find --gate=1", "'--gate' does not take a value"),
        ("models toy-blip states:0", "unexpected 'states:0'; expected vlmscope models [OPTIONS] [model]"),
        ("models toy-blip --example states:²", "has no example"),
        (
            "generate --model toy-llava --image a.png --prompt a --other a.png",
            "name both --patch and --other",
        ),
        (
            "neurons describe --model toy-llava --data states --limit 2 --neuron 3.² --out out",
            "bad neuron '3.",
        ),
        (
            "neurons describe --model toy-llava --data states --limit 2 --neuron 9.1 --out out",
            "no neuron 9.1",
        ),
        ("neurons find --model toy-blp --image a.png --prompt a --out out", "did you mean 'toy-blip'?"),
        ("notice --model toy-blp --data states --out out", "did you mean 'toy-blip'?"),
        (
            "notice --model toy-blip --data states --position verb --out out",
            "no example has a position 'verb'",
        ),
        (
            "neurons edit --model toy-llava --data states --from a --to b --question hm --out e.safetensors",
            "the question 'hm' needs one {}, where the object stands",
        ),
        ("neurons perturb --model toy-llava --data states --word a --rounds 0 --out out", "--rounds is '0'"),
        ("data folder --root . --out a.png", "expected a name that ends in .csv"),
        ("data folder --root . --out device", "expected a name that ends in .csv"),
    ],
)
def test_lines_that_are_none(refused, line, words):
    assert words in refused(*line.split())


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ("decoder.*.mlp@all scale 0", "an edit is of one layer and unit; 'decoder.*.mlp@all' names 4: give"),
        ("decoder.2.mlp@all scale nan", "the value of an edit is 'nan'; expected a number from"),
        ("decoder.2.mlp@all scale 1e999", "the value of an edit is 'inf'"),
        ("decoder.2.mlp@all + decoder.3.mlp scale 0", "no position; expected tower.layer.kind"),
        ("decoder.2.mlp@all double 2", "expected 'SITE set|add|scale NUMBER'"),
        (LONG, "bad edit 'xxxx"),
    ],
)
def test_edits_that_cannot_be_made(refused, edit, words):
    assert words in refused(*"generate --model toy-llava --image a.png --prompt a --edit".split(), edit)


def test_a_sum_is_one_edit(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (48, 48), "red").save(picture)
    line = f"generate --model toy-llava --image {picture} --prompt a --edit".split()
    monkeypatch.setattr(sys, "argv", ["vlmscope", *line, "decoder.2.mlp@all + decoder.3.mlp@all scale 0"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code and "with 1 edit:" in capsys.readouterr().out


def test_a_folder_with_more_examples_says_so(monkeypatch, capsys, tmp_path):
    line = f"sweep --model toy-blip --data states --corrupt image --sites {SITE} --out {tmp_path / 'out'}"
    for limit, last in ((3, "checked: "), (2, "the folder holds 3 examples (this command asked for 2)")):
        monkeypatch.setattr(sys, "argv", ["vlmscope", *line.split(), "--limit", str(limit)])
        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().out.splitlines()[-1].startswith(last)
