#!/usr/bin/env python3
"""Draws FOLDER/train.png from FOLDER/train.json, as train.py does; needs matplotlib alone.

usage: plot.py FOLDER
"""

import json
import sys
from pathlib import Path

STYLES = {
    "published": dict(color="tab:orange", linewidth=4, alpha=0.5),
    "ett_kernels": dict(color="tab:blue", linewidth=1.8),
    "published, float64": dict(color="black", linewidth=1, linestyle=":"),
}


def draw(folder):
    from matplotlib import pyplot

    result = json.loads((Path(folder) / "train.json").read_text())
    forms = result["forms"]
    figure, (curve, memory, speed) = pyplot.subplots(1, 3, figsize=(11, 3.6), width_ratios=(3, 1, 1), layout="constrained")
    for name in ("reconstruction", "quantization"):
        for form, run in forms.items():
            curve.plot(run["losses"][name], label=f"{name}, {form}", **STYLES[form])
    curve.set(xlabel="step", ylabel="loss", yscale="log", title=result["what"])
    curve.legend(fontsize=8)
    for axis, key, title in ((memory, "peak_mib", "peak memory, MiB"), (speed, "ms_per_step", "ms a step")):
        bars = {form: run[key] or 0 for form, run in forms.items() if "float64" not in form}
        axis.bar_label(axis.bar(list(bars), list(bars.values()), color=["tab:orange", "tab:blue"]), fmt="%.0f")
        axis.margins(y=0.1)  # room for the numbers
        axis.set_title(title)
    figure.suptitle(result["device"], fontsize=9)
    figure.savefig(Path(folder) / "train.png", dpi=120)


if __name__ == "__main__":
    draw(sys.argv[1])
