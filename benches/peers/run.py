#!/usr/bin/env python3
"""Measures the codebook kernels beside PyTorch and Triton, on one card in one process: see README.md."""

import argparse
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import chunked
import published
import reference
import search
import table
from closed import Closed
from library import HERE, Call, Quantizer
from measure import Clock, Record, free

BF16, F32 = torch.bfloat16, torch.float32
NAMES = {BF16: "bf16", F32: "f32"}
D = 256
CLOSED, CHUNKED, PUBLISHED = "PyTorch, closed form, compiled", "PyTorch, chunks + checkpoint", "PyTorch, as published"
WEIGHTS = (1.0, 0.05, -0.05)  # gradients of the losses quant, sample and avg


@dataclass(frozen=True)
class Setting:
    temperature: float = 0.01
    eps: float = 1e-5
    beta_commit: float = 1.0
    beta_code: float = 0.25


SETTING = Setting()


def normal(*shape, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator)


def near(m, k, sigma, scale=1.0, seed=1):
    """Tokens around codes: z = e_c + sigma n, with c uniform and the elements of e and n of deviation scale."""
    e = scale * normal(k, D, seed=seed + 1)
    c = torch.randint(k, (m,), device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    return e[c] + sigma * scale * normal(m, D, seed=seed), e


def independent(m, k, spread, seed=1):
    return spread * normal(m, D, seed=seed), normal(k, D, seed=seed + 1)


CASES = {
    "z 1e-4 normal": lambda m, k: independent(m, k, 1e-4),
    "z normal": lambda m, k: independent(m, k, 1.0),
    "z near codes, sigma 1": lambda m, k: near(m, k, 1.0),
    "z near codes, sigma 3": lambda m, k: near(m, k, 3.0),
    "z near codes, sigma 4": lambda m, k: near(m, k, 4.0),
    "0.25 (z near codes, sigma 0.5)": lambda m, k: near(m, k, 0.5, 0.25),
    "0.25 (z near codes, sigma 1)": lambda m, k: near(m, k, 1.0, 0.25),
}


def chunk_of(m, k):
    """Tokens of a chunk: scores of 1 GiB in float32, at most 4096 tokens."""
    return min(m, 4096, max(64, 2**28 // k))


class Bench:
    def __init__(self, record, quick):
        self.record, self.quick = record, quick
        self.closed, self.functions = {}, {}

    def once(self, name, make):
        """Compiled functions are made once, since PyTorch keeps their code per function."""
        if name not in self.functions:
            self.functions[name] = make()
        return self.functions[name]

    def ceiling(self):
        a, b = (normal(8192, 8192, seed=s).to(BF16) for s in (1, 2))
        return 2 * 8192**3 / Clock(0.5).time(lambda: a @ b)["median_us"] / 1e6

    def nearest(self, m, k, dtype):
        z, e = (x.to(dtype) for x in independent(m, k, 1.0))
        idx = torch.empty(m, dtype=torch.int32, device="cuda")
        arguments = dict(z=z, e=e, idx=idx, metric=0)
        ours = Call("nearest", **arguments)
        sound = {"Triton, fused", "matmul + argmax, float32 scores"}
        if dtype == F32:
            sound = {"Triton, fused, tf32x3", "Triton, fused, bf16 split", "matmul + argmax"}
        functions = self.once(dtype, lambda: search.peers(dtype))
        peers = [(name, lambda f=f: f(z, e)) for name, f in functions.items()]
        self.record.row("nearest", f"M {m} K {k} D {D} dot", NAMES[dtype], ours, 2 * m * k * D, peers, sound,
                        extra_bytes=ours.workspace_bytes, implementation=ours.implementation())
        free()

    def quantizer(self, case, m, k, peers, parts=False, dtype=BF16):
        z, e = CASES[case](m, k)
        g = normal(m, D, seed=9) / m
        z_in, e_in, g_in = (x.to(dtype) for x in (z, e, g))
        ours = Quantizer(z_in, e_in, g_in, WEIGHTS, SETTING)
        ours()
        rows = ours.kernels["ibq_rows"].keep
        live = reference.live_share(z_in, e_in, *(rows[n] for n in ("idx", "smax", "rest_p", "rest_q")), SETTING.temperature)
        free()
        chunk = chunk_of(m, k)
        closed = self.once(("closed", chunk), lambda: Closed(SETTING, chunk))
        leaf = lambda x: x.detach().requires_grad_()

        def make(name):
            if name == CLOSED:
                return lambda: closed.step(z_in, e_in, g_in, WEIGHTS)
            if name.startswith(CHUNKED):
                part = self.once("chunked", chunked.compiled) if "compiled" in name else chunked.soft_part
                zl, el = leaf(z_in), leaf(e_in)
                return lambda: chunked.step(zl, el, g_in, WEIGHTS, SETTING, chunk, part)
            form = self.once("published", published.compiled) if "compiled" in name else published.quantize
            zl, el = leaf(z), leaf(e)
            return lambda: published.step(zl, el, g, WEIGHTS, SETTING, form)

        shape = f"M {m} K {k} D {D}, {case}"
        unit = 2 * m * k * D
        self.record.row("ibq", shape, NAMES[dtype], ours, 6 * unit, [(name, make(name)) for name in peers], {CLOSED},
                        extra_bytes=ours.extra_bytes, m=m, k=k, case=case, live=live)
        if parts:
            ours()
            for part, units in (("ibq_rows", 1), ("ibq_cols", 1), ("ibq_bwd", 4)):
                kernel = ours.kernels[part]
                self.record.row(part, shape, NAMES[dtype], kernel, units * unit, extra_bytes=kernel.workspace_bytes,
                                m=m, k=k, case=case)
        free()

    def gradient_errors(self, case, m, k):
        """All losses; then the soft path of z alone, which the other terms hide."""
        z, e = (x.to(BF16) for x in CASES[case](m, k))
        g = (normal(m, D, seed=9) / m).to(BF16)
        chunk = chunk_of(m, k)
        for weights, what in ((WEIGHTS, "all losses"), ((0.0, 0.0, 0.0), "soft path alone")):
            want = reference.gradients(z, e, g, weights, SETTING)
            free()
            ours = Quantizer(z, e, g, weights, SETTING)
            ours()
            closed = Closed(SETTING, chunk, compiled=False).step(z, e, g, weights)
            zl, el = z.float().requires_grad_(), e.float().requires_grad_()
            plain = published.step(zl, el, g.float(), weights, SETTING)
            part = chunked.step(z.detach().requires_grad_(), e.detach().requires_grad_(), g, weights, SETTING, chunk)
            row = dict(what="gradients", case=case, shape=f"M {m} K {k} D {D}", losses=what)
            for name, dz, de in (("ours", ours.dz, ours.de), (CLOSED, *closed[2:]), (CHUNKED, *part[2:]),
                                 (PUBLISHED + ", bf16 autocast", *plain[2:])):
                row[name] = dict(dz=reference.error(dz, want[0]), de=reference.error(de, want[1]))
            self.record.accuracy.append(row)
            self.record.write()
            print(row, flush=True)
            del want, closed, plain, part, ours
            free()

    def wrong_codes(self, m, k):
        """Shares of wrong indices: of the inputs as given to the search, and of the float32 data before rounding."""
        z, e = independent(m, k, 1.0)
        true = reference.best_codes(z, e)
        for dtype in (BF16, F32):
            a, b = z.to(dtype), e.to(dtype)
            rounded = reference.best_codes(a, b)
            idx = torch.empty(m, dtype=torch.int32, device="cuda")
            ours = Call("nearest", z=a, e=b, idx=idx, metric=0)

            def own(_z, _e):
                ours()
                return idx

            functions = {"ours": own, **self.once(dtype, lambda: search.peers(dtype))}
            for name, f in functions.items():
                row = dict(what="wrong codes", mode=f"{NAMES[dtype]}: {name}",
                           shape=f"M {m} K {k} D {D}", of_inputs=None, of_unrounded=None, error=None)
                try:
                    found = f(a, b)
                    row["of_inputs"], row["of_unrounded"] = (
                        (found != t).double().mean().item() for t in (rounded, true))
                except Exception as failure:
                    row["error"] = f"{type(failure).__name__}: {str(failure)[:120]}"
                self.record.accuracy.append(row)
                print(row, flush=True)
            self.record.write()
            free()


def shapes(quick):
    """Tokens and codes of the search; tokens and codes of the curves."""
    if quick:
        return [1024], [16384, 131072], [1024, 2048], [1024, 131072]
    over_k = [1 << n for n in (10, 12, 14, 16, 17, 18, 19, 20)]
    return [1024, 4096, 16384], [16384, 131072, 262144], [256, 1024, 4096, 16384, 65536], over_k


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("peers"), help="folder for raw.json, table.md and the plots")
    parser.add_argument("--quick", action="store_true", help="a few small shapes")
    parser.add_argument("--tokens", type=Path, help="measure only these tokens and codes, which train.py --save wrote")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which peers are left out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record(args.out, args.quick, args.limit)
    torch._dynamo.config.cache_size_limit = 64  # a compiled form per shape
    bench = Bench(record, args.quick)
    git = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record.head = dict(
        command="benches/peers/run.py" + " --quick" * args.quick + f" --tokens {args.tokens}" * bool(args.tokens),
        commit=os.environ.get("ETT_COMMIT") or git.stdout.strip(),
        device=f"cuda:0 ({torch.cuda.get_device_name()})", torch=torch.__version__,
        triton=search.triton.__version__ if search.triton else None,
        ceilings=dict(product_tflops=bench.ceiling()))
    print(record.head, flush=True)
    tokens, codes, over_m, over_k = shapes(args.quick)
    few, many, fixed = tokens[0], tokens[-1], min(4096, tokens[-1])
    published_forms = [PUBLISHED + ", compiled, bf16 autocast", PUBLISHED + ", bf16 autocast"]

    if args.tokens:
        saved = torch.load(args.tokens, map_location="cuda")
        if saved["z"].shape[1] != D:
            raise SystemExit(f"{args.tokens} has tokens of {saved['z'].shape[1]} dimensions, wanted {D}: train.py --dim {D}")
        case, (z, e) = "z of a trained tokenizer", (saved[name].float() for name in ("z", "e"))
        CASES[case] = lambda m, k: (z, e)
        bench.quantizer(case, len(z), len(e), [CLOSED], parts=True)
        table.write(args.out)
        return

    bench.wrong_codes(fixed, 131072)
    for case in ("z normal", "0.25 (z near codes, sigma 0.5)"):
        bench.gradient_errors(case, 1024, 16384)
    for m in tokens:
        for k in codes:
            bench.nearest(m, k, BF16)
    bench.nearest(many, 131072, F32)
    for case in CASES:
        others = [CHUNKED + ", compiled", CHUNKED, *published_forms] if case == "z normal" else []
        bench.quantizer(case, many, 131072, [CLOSED, *others], parts=case in ("z normal", "z 1e-4 normal"))
    if few != many:
        bench.quantizer("z 1e-4 normal", few, 131072, [CLOSED])
    bench.quantizer("z 1e-4 normal", many, 131072, [CLOSED], parts=True, dtype=F32)
    curve = {(fixed, k) for k in over_k} | {(m, 131072) for m in over_m}
    for m, k in sorted(curve - {(many, 131072)}):
        bench.quantizer("z normal", m, k, [CLOSED, CHUNKED, *published_forms])
    table.write(args.out)


if __name__ == "__main__":
    main()
