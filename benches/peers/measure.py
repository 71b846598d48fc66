"""Times, memory and rows."""

import gc
import json
import math
import statistics
import time

import torch


def free():
    gc.collect()
    torch.cuda.empty_cache()


def tensors(results):
    for r in results if isinstance(results, (tuple, list)) else (results,):
        if isinstance(r, torch.Tensor):
            yield r


class Clock:
    """Device times of single calls. Before each, a buffer larger than the L2 cache is rewritten, and the device is kept
    busy until the host has queued the call, so that neither launches nor Python count."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.flush = torch.empty(64 << 20, dtype=torch.float32, device="cuda")

    def host_seconds(self, call):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        queued = time.perf_counter() - begin
        torch.cuda.synchronize()
        return queued, time.perf_counter() - begin

    def once(self, call, wait):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(int(wait * 2e9))
        begin.record()
        call()
        end.record()
        return begin, end

    def time(self, call):
        """Median and the 20th and 80th percentiles in us, after two calls and 30 ms of warm-up."""
        call()
        queued, whole = self.host_seconds(call)
        wait = min(2 * queued + 1e-4, 0.05)
        for _ in range(min(200, math.ceil(0.03 / whole))):
            call()
        events = []
        count = max(5, min(50, int(self.seconds / (whole + wait))))
        for _ in range(count):
            events.append(self.once(call, wait))
            if whole > 0.01:
                torch.cuda.synchronize()  # at most a few calls of large temporaries are queued
        torch.cuda.synchronize()
        times = sorted(1e3 * begin.elapsed_time(end) for begin, end in events)
        at = lambda f: times[round(f * (len(times) - 1))]
        return dict(median_us=statistics.median(times), p20_us=at(0.2), p80_us=at(0.8))


def extra_bytes(call):
    """The most memory allocated during a call, without what was there before and without its results."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return peak - before - sum(r.numel() * r.element_size() for r in tensors(results))


class Record:
    """Rows of raw.json, which is written after each."""

    def __init__(self, folder, quick, limit):
        self.folder, self.end = folder, time.monotonic() + limit
        self.clock = Clock(0.1 if quick else 0.3)
        self.head, self.rows, self.accuracy = {}, [], []

    def peer(self, name, call):
        """The measurements of a peer, or why there are none."""
        if time.monotonic() > self.end:
            return dict(name=name, median_us=None, error="not run: out of time")
        try:
            result = dict(name=name, extra_bytes=extra_bytes(call), **self.clock.time(call), error=None)
        except torch.cuda.OutOfMemoryError:
            result = dict(name=name, median_us=None, error="does not fit into memory")
        except Exception as e:  # a peer that fails is a row, the others still run
            text = str(e).strip().splitlines() or [""]
            result = dict(name=name, median_us=None, error=f"{type(e).__name__}: {text[0][:120]}")
        free()
        return result

    def row(self, op, shape, dtype, call, flop, peers=(), sound=(), **more):
        """Measures ours and the peers; the peer of the row is the fastest of the sound ones."""
        ours = self.peer("ours", call)
        found = [self.peer(name, run) for name, run in peers]
        timed = [p for p in found if p["median_us"] and p["name"] in sound]
        best = min(timed, key=lambda p: p["median_us"], default=None)
        us = ours["median_us"]
        tflops = flop / us / 1e6 if us else None
        row = dict(
            op=op, shape=shape, dtype=dtype, median_us=us, p20_us=ours.get("p20_us"), p80_us=ours.get("p80_us"),
            bound="product", tflops=tflops, of_ceiling=tflops / self.head["ceilings"]["product_tflops"] if us else None,
            tbs=None, peer=best["name"] if best else None, peer_us=best["median_us"] if best else None,
            faster_than_peer=best["median_us"] / us if best and us else None, error=ours["error"], **more, peers=found)
        self.rows.append(row)
        self.write()
        print(line(row), flush=True)
        return row

    def write(self):
        all_of = dict(self.head, rows=self.rows, accuracy=self.accuracy)
        (self.folder / "raw.json").write_text(json.dumps(all_of, indent=1) + "\n")


def line(row):
    cell = lambda p: f"{p['name']} " + (f"{p['median_us'] / 1e3:.3f}" if p["median_us"] else f"({p['error']})")
    ours = dict(name="ours", median_us=row["median_us"], error=row["error"])
    return f"{row['op']} {row['shape']} {row['dtype']}, ms: " + "; ".join(cell(p) for p in [ours, *row["peers"]])
