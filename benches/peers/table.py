#!/usr/bin/env python3
"""Tables and plots of a raw.json of run.py: `table.py FOLDER` writes FOLDER/table.md and, if matplotlib is there, two
PNG files."""

import json
import sys
from pathlib import Path


def ms(us):
    return f"{us / 1e3:.4g}" if us else ""


def size(count):
    if count is None:
        return ""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def percent(share):
    return f"{100 * share:.0f}%" if share else ""


def markdown(head, rows):
    lines = ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def cell(peer, memory=False):
    if peer is None:
        return ""
    if not peer["median_us"]:
        return peer["error"]
    return ms(peer["median_us"]) + (f", {size(peer['extra_bytes'])}" if memory else "")


def compared(rows, memory):
    """A line per row, a column per peer."""
    names = list(dict.fromkeys(p["name"] for row in rows for p in row["peers"]))
    own = "ours" + (", extra" if memory else "")
    live = any("live" in row for row in rows)
    head = ["shape", "type", *["live tiles"] * live, own, "of the ceiling", *names, "faster than the best sound peer"]
    body = []
    for row in rows:
        peers = {p["name"]: p for p in row["peers"]}
        own = ms(row["median_us"]) or row["error"]
        body.append([row["shape"], row["dtype"], *[percent(row.get("live")) or "0%"] * live, own + (f", {size(row['extra_bytes'])}" if memory else ""),
                     percent(row["of_ceiling"]), *(cell(peers.get(n), memory) for n in names),
                     f"{row['faster_than_peer']:.2f}" if row["faster_than_peer"] else ""])
    return markdown(head, body)


def accuracy(raw):
    gradients = [a for a in raw["accuracy"] if a["what"] == "gradients"]
    number = lambda v: f"{v:.1e}"
    text = ""
    if gradients:
        names = [n for n in gradients[0] if isinstance(gradients[0][n], dict)]
        errors = lambda a, n: [number(a[n]["dz"]), number(a[n]["de"])]
        body = [[a["case"], a["shape"], a["losses"], n, *errors(a, n)] for a in gradients for n in names]
        text += "\n## Errors of gradients against float64\n\n"
        text += markdown(["data", "shape", "terms", "form", "dz", "dE"], body)
    wrong = [a for a in raw["accuracy"] if a["what"] == "wrong codes"]
    if wrong:
        share = lambda v: "failed" if v is None else f"{100 * v:.3f}%"
        body = [[a["mode"], a["shape"], share(a["of_inputs"]), share(a["of_unrounded"])] for a in wrong]
        text += "\n## Wrong indices against float64\n\n"
        text += markdown(["search", "shape", "of the inputs", "of the data before rounding"], body)
    return text


def tables(raw):
    rows = raw["rows"]
    pick = lambda op: [r for r in rows if r["op"] == op]
    text = f"`{raw['command']}`, kernels of {raw['commit']}, {raw['device']}, PyTorch {raw['torch']}, "
    text += f"Triton {raw['triton']}. "
    text += f"Product of 8192x8192 bf16 matrices in the same run: {raw['ceilings']['product_tflops']:.0f} TFLOP/s. "
    text += "Medians in ms; extra: memory beyond inputs and outputs.\n"
    for dtype in ("bf16", "f32"):
        found = [r for r in pick("nearest") if r["dtype"] == dtype]
        if found:
            text += f"\n## Nearest code, {dtype}\n\n" + compared(found, False)
    text += "\n## IBQ, forward and backward with all losses\n\n" + compared(pick("ibq"), True)
    single = [r for r in rows if r["op"] in ("ibq_rows", "ibq_cols", "ibq_bwd")]
    body = [[r["op"], r["shape"], r["dtype"], ms(r["median_us"]), percent(r["of_ceiling"]), size(r["extra_bytes"])] for r in single]
    text += "\n## Single kernels\n\n" + markdown(["kernel", "shape", "type", "ms", "of the ceiling", "workspace"], body)
    return text + accuracy(raw)


def curves(rows, axis):
    """Name -> (x, ms, MiB) of ours and of each peer that ran."""
    found = {}
    for row in sorted(rows, key=lambda r: r[axis]):
        for p in [dict(row, name="this project's kernels"), *row["peers"]]:
            if p["median_us"]:
                xs, times, memory = found.setdefault(p["name"], ([], [], []))
                xs.append(row[axis])
                times.append(p["median_us"] / 1e3)
                memory.append(p["extra_bytes"] / 2**20)
    return {name: curve for name, curve in found.items() if len(curve[0]) > 1}


def plot(raw, folder):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    normal = [r for r in raw["rows"] if r["op"] == "ibq" and r["case"] == "z normal" and r["dtype"] == "bf16"]
    over_k = curves([r for r in normal if r["m"] == 4096], "k")
    over_m = curves([r for r in normal if r["k"] == 131072], "m")

    def panel(axes, found, which, x, y):
        for name, curve in found.items():
            axes.plot(curve[0], curve[which], marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize=8)

    title = f"IBQ forward + backward, D 256, bf16, {raw['device'].split('(')[-1].rstrip(')')}"
    if over_k:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        panel(left, over_k, 1, "codes K", "ms")
        panel(right, over_k, 2, "codes K", "extra memory, MiB")
        figure.suptitle(f"{title}, M 4096 tokens")
        figure.savefig(folder / "over_k.png", dpi=110)
    if over_m:
        figure, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
        panel(axes, over_m, 1, "tokens M", "ms")
        axes.set_title(f"{title}, K 131072 codes", fontsize=10)
        figure.savefig(folder / "over_m.png", dpi=110)


def write(folder):
    raw = json.loads((folder / "raw.json").read_text())
    (folder / "table.md").write_text(tables(raw))
    print(tables(raw))
    try:
        plot(raw, folder)
    except ImportError:
        print(f"matplotlib is missing: draw the plots elsewhere with table.py {folder}")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
