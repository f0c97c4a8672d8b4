"""The main job on what ships with the package: three sets, two corruptions, one report."""

from __future__ import annotations

from pathlib import Path

import torch

from vlmscope.data import BUILT_IN, examples
from vlmscope.model import load
from vlmscope.plots import strongest
from vlmscope.report import write_report
from vlmscope.store import read_run
from vlmscope.study import sweep

HEADS = ("encoder.*.attn.h*@*", "encoder.*.cross.h*@*", "decoder.*.cross.h*@last")
MODULES = ("vision.*.resid@image*", "encoder.*.resid@*", "decoder.*.resid@last")


def run(out: Path, limit: int) -> Path:
    """Sweep `toy-blip` over its three sets, print the strongest heads, and write the report."""
    torch.set_num_threads(1)  # the toy is so small that a second thread only gets in the way
    model = load("toy-blip", device="cpu")
    runs = []
    for name in BUILT_IN:
        for corrupt in ("image", "text"):
            folder = out / f"{name}-{corrupt}"
            table = sweep(
                model,
                examples(name, limit=limit),
                [*HEADS, *MODULES],
                corrupt,
                out=folder,
                data=name,
            )
            runs.append(folder)
            accuracy = read_run(folder).baselines()["correct"].mean()
            print(f"\n{name}, {corrupt} corrupted: {accuracy:.0%} of {limit} answers right; "
                  "the strongest heads (mean change of the logit difference):")  # fmt: skip
            heads = strongest(table[table["unit"].notna()], n=10).drop(columns="corruption")
            print(heads.to_string(index=False, float_format="{:+.2f}".format, na_rep=""))
    report = write_report(runs, out / "report.html")
    print(f"\nThe report: {report}")
    return report
