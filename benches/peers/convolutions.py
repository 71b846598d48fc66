#!/usr/bin/env python3
"""Times cuDNN through PyTorch at the shapes of the convolutions in raw.json, and enters it as their peer: see README.md."""

import argparse
import json
import re
import statistics
import sys
import time

import torch
import torch.nn.functional as F

PEER = "cuDNN"


ROTATED = 2**28  # bytes of inputs that calls take turns with, so that small ones do not come from the L2 cache


def milliseconds(work, copies):
    """The median time of a call, as cargo bench measures ours: graphs of 20 calls, replayed for half a second before and after it
    begins to count, since a card under load runs at lower clocks than at the start."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(copies):
            work(i)
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), 20
    with torch.cuda.graph(graph):
        for i in range(calls):
            work(i % copies)
    times, begin = [], time.monotonic()
    while (passed := time.monotonic() - begin) < 1:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if passed >= 0.5:
            times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def image(n, channels, side):
    return torch.randn(n, channels, side, side, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)


def peer(op, shape):
    """Milliseconds of cuDNN for a row without fused parts; None: it has some, or is no convolution."""
    found = re.fullmatch(r"(\d+)x(\d+)x\d+x(\d+)(?: to (\d+))? (\d)x\d(?: stride (\d))?( \+ bias)?", shape)
    if op not in ("conv2d_fwd", "conv2d_bwd_data", "conv2d_bwd_weight") or not found:
        return None
    n, side, channels, taps = (int(found[i]) for i in (1, 2, 3, 5))
    outputs, stride = int(found[4] or channels), int(found[6] or 1)
    # As in benches/kernels/conv.rs: half of the taps, but none on one side when 3 x 3 taps have a stride of 2, and one for 4 x 4.
    padding = 1 if taps == 4 else taps // 2
    w = torch.randn(outputs, channels, taps, taps, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    size = 2 * n * side * side * (channels + outputs // stride**2)
    copies = max(1, min(20, ROTATED // size))
    xs = [image(n, channels, side) for _ in range(copies)]
    if op == "conv2d_fwd":
        return milliseconds(lambda i: F.conv2d(xs[i], w, stride=stride, padding=padding), copies)
    dys = [torch.randn_like(F.conv2d(x, w, stride=stride, padding=padding)) for x in xs]
    bias = found[7] is not None
    wanted = [op == "conv2d_bwd_data", op == "conv2d_bwd_weight", bias]
    sizes = [outputs] if bias else None
    return milliseconds(
        lambda i: torch.ops.aten.convolution_backward(
            dys[i], xs[i], w, sizes, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, wanted
        ),
        copies,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", help="raw.json of cargo bench; it is written again")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    with open(args.raw) as file:
        raw = json.load(file)
    for row in raw["rows"]:
        if row["dtype"] != "bf16":
            continue
        ms = peer(row["op"], row["shape"])
        if ms is None:
            continue
        row["peer"], row["peer_us"] = PEER, 1000 * ms
        row["faster_than_peer"] = 1000 * ms / row["median_us"]
        print(f"{row['op']:18} {row['shape']:40} {row['median_us']:9.1f} us  {PEER} {1000 * ms:9.1f} us  {row['faster_than_peer']:.2f}")
    with open(args.raw, "w") as file:
        json.dump(raw, file, indent=2)
        file.write("\n")
    print(f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {torch.cuda.get_device_name()}", file=sys.stderr)


if __name__ == "__main__":
    main()
