"""The ctypes layer against plain Python, with the library for the CPU (`make -C kernels shim`); needs no PyTorch.

Run by test-shim. Values are float32, references are sums of Python's floats, so that 1e-5 of the largest value is tens of
rounding errors.
"""

import ctypes
import math
import os
import random
import sys
import tempfile
import unittest
from pathlib import Path

sys.modules.setdefault("torch", None)  # only the C interface, even where PyTorch is installed
from ett_kernels import ArgumentError, FaultError, _library, library  # noqa: E402

C_TYPES = {"f32": ctypes.c_float, "i32": ctypes.c_int32}


class Buffer:
    """A tensor in a ctypes array, filled with `values` or else with NaN or -1, its rows `stride` elements apart."""

    def __init__(self, shape, values=None, dtype="f32", stride=None):
        *outer, inner = shape
        self.rows, self.inner, self.stride = math.prod(outer), inner, stride or inner
        count = self.rows * self.stride
        self.memory = (C_TYPES[dtype] * count)(*[math.nan if dtype == "f32" else -1] * count)
        strides = [1]
        for size in reversed([*outer[1:], self.stride] if outer else []):
            strides.insert(0, strides[0] * size)
        self.array = _library.Array(ctypes.addressof(self.memory), dtype, tuple(shape), tuple(strides))
        if values is not None:
            self.set(values)

    def set(self, values):
        for i, value in enumerate(values):
            self.memory[i // self.inner * self.stride + i % self.inner] = value

    def values(self):
        return [self.memory[i * self.stride + j] for i in range(self.rows) for j in range(self.inner)]

    def matrix(self):
        values = self.values()
        return [values[i : i + self.inner] for i in range(0, len(values), self.inner)]


def normal(*shape, seed, scale=1.0, stride=None):
    draw = random.Random(seed)
    return Buffer(shape, [draw.gauss(0, scale) for _ in range(math.prod(shape))], stride=stride)


def zeros(*shape):
    return Buffer(shape, [0.0] * math.prod(shape))


def run(name, **arguments):
    """Calls a kernel; raises FaultError if it reports a fault."""
    call = library.call(name, **{k: v.array if isinstance(v, Buffer) else v for k, v in arguments.items()})
    memory = ctypes.create_string_buffer(call.workspace_bytes + 256)
    fault = (ctypes.c_int64 * 4)()
    workspace = -(-ctypes.addressof(memory) // 256) * 256
    call.launch(workspace=workspace, fault=ctypes.addressof(fault), number=library.number(name))
    error = library.fault_error(bytes(fault))
    if error:
        raise error


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def softmax(row):
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


class LibraryTest(unittest.TestCase):
    def near(self, got, wanted, bound=1e-5):
        self.assertEqual(len(got), len(wanted))
        largest = max(abs(w) for w in wanted)
        for i, (g, w) in enumerate(zip(got, wanted)):
            self.assertLessEqual(abs(g - w), bound * largest, f"element {i}: {g}, wanted {w}")

    def test_layouts_are_those_of_the_header(self):
        self.assertEqual(library.dll.ett_abi_version(), library.constants["ETT_ABI_VERSION"])
        self.assertEqual(library.constants["ETT_BF16"], 2)
        sizes = dict(view=56, unary=16, status=264, launch=48, fault=32, unary_fwd_args=2 * 56 + 16)  # as common/status.c
        for name, size in sizes.items():
            self.assertEqual(ctypes.sizeof(library.struct(name)), size, name)
        for name in library.names:
            self.assertGreater(ctypes.sizeof(library.struct(name + "_args")), 0, name)

    def test_a_header_of_another_version_is_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            header = Path(folder) / "ett_kernels.h"
            header.write_text(library.text.replace("#define ETT_ABI_VERSION ", "#define ETT_ABI_VERSION 9"))
            with self.assertRaisesRegex(ImportError, "interface version"):
                _library.Library(library.path, header)

    def test_a_missing_library_is_one_sentence(self):
        named = os.environ["ETT_KERNELS_LIBRARY"]
        try:
            os.environ["ETT_KERNELS_LIBRARY"] = "/nowhere/libett_kernels.so"
            with self.assertRaisesRegex(ImportError, "ETT_KERNELS_LIBRARY names /nowhere"):
                _library.load.__wrapped__()
        finally:
            os.environ["ETT_KERNELS_LIBRARY"] = named

    def test_views(self):
        for shape, strides, stride in [
            ((4, 3), (3, 1), 3), ((4, 3), (5, 1), 5), ((2, 4, 3), (20, 5, 1), 5), ((2, 1, 3), (9, 1, 1), 9), ((3,), (1,), 3),
            ((), (), 1), ((0, 3), (3, 1), 3), ((2, 4, 3), (40, 5, 1), None), ((4, 3), (1, 4), None), ((4, 3), (0, 1), None),
            ((3,), (2,), None),
        ]:  # fmt: skip
            self.assertEqual(_library.row_stride(shape, strides), stride, (shape, strides))
        x = normal(4, 3, seed=1).array._replace(strides=(1, 4))
        with self.assertRaisesRegex(ValueError, r"argument `x` has shape \[4, 3\] and strides \[1, 4\].*contiguous copy"):
            library.view("x", x)

    def test_rms_norm_with_wide_rows(self):
        n, c, eps = 5, 12, 1e-6
        x, w = normal(n, c, seed=1, stride=20), normal(c, seed=2)
        y, rstd = Buffer((n, c), stride=16), Buffer((n,))
        run("rms_norm_fwd", x=x, w=w, y=y, rstd=rstd, eps=eps)
        scale = [1 / math.sqrt(dot(row, row) / c + eps) for row in x.matrix()]
        self.near(rstd.values(), scale)
        self.near(y.values(), [v * s * g for row, s in zip(x.matrix(), scale) for v, g in zip(row, w.values())])
        self.assertTrue(math.isnan(y.memory[c]), "the kernel wrote between the rows")

    def test_nearest(self):
        m, k, d = 9, 33, 8
        z, e = normal(m, d, seed=3), normal(k, d, seed=4)
        for metric, score in (
            ("DOT", dot),
            ("L2", lambda a, b: -sum((x - y) ** 2 for x, y in zip(a, b))),
        ):
            idx = Buffer((m,), dtype="i32")
            run("nearest", z=z, e=e, idx=idx, metric=library.constants["ETT_METRIC_" + metric])
            wanted = [max(range(k), key=lambda j: score(row, e.matrix()[j])) for row in z.matrix()]
            self.assertEqual(idx.values(), wanted)

    def test_ibq_forward_and_backward(self):
        """Against the formulas of docs/quantizer.md, where the winner is not kept out of the sums."""
        m, k, d, t, eps, commit, code = 6, 11, 8, 0.5, 1e-5, 1.0, 0.25
        z, e, g = normal(m, d, seed=5, scale=0.5), normal(k, d, seed=6, scale=0.5), normal(m, d, seed=7)
        idx, zq, c = Buffer((m,), dtype="i32"), Buffer((m, d)), Buffer((k,))
        smax, rest_p, rest_q, xbar = (Buffer((m,)) for _ in range(4))
        col, count = Buffer((k,)), Buffer((1,), [1 / m])
        losses = dict(quant=Buffer((1,)), sample=Buffer((1,)), avg=Buffer((1,)))
        both, rest = dict(z=z, e=e, idx=idx), dict(rest_q=rest_q, xbar=xbar)
        betas = dict(beta_commit=commit, beta_code=code)
        run("ibq_rows", **both, smax=smax, rest_p=rest_p, **rest, bad=zeros(1), temperature=t)
        run("ibq_cols", **both, smax=smax, rest_q=rest_q, col=col, temperature=t)
        run("ibq_losses", **both, **rest, col=col, inv_count=count, zq=zq, c=c, **losses, eps=eps, **betas)
        weights = dict(g_quant=1.0, g_sample=0.3, g_avg=-0.7)
        dz, de = Buffer((m, d)), zeros(k, d)
        run(
            "ibq_bwd", **both, smax=smax, rest_p=rest_p, **rest, c=c, inv_count=count, g=g, dz=dz, de=de, temperature=t, **betas,
            **{name: Buffer((1,), [w]) for name, w in weights.items()},
        )  # fmt: skip

        zm, em = z.matrix(), e.matrix()
        s = [[dot(a, b) for b in em] for a in zm]
        best = [max(range(k), key=row.__getitem__) for row in s]
        p, q = [softmax(row) for row in s], [softmax([x / t for x in row]) for row in s]
        a = [sum(row[j] for row in q) / m for j in range(k)]
        entropy = [-sum(x * math.log(x) for x in row) for row in q]
        difference = [[x - y for x, y in zip(em[j], row)] for j, row in zip(best, zm)]
        self.assertEqual(idx.values(), best)
        self.assertEqual(zq.matrix(), [em[j] for j in best])
        self.near(losses["quant"].values(), [(1 + commit + code) * sum(dot(x, x) for x in difference) / (m * d)])
        self.near(losses["sample"].values(), [sum(entropy) / m])
        self.near(losses["avg"].values(), [-sum(x * math.log(x + eps) for x in a)])

        wq, ws, wa = weights.values()
        slope = [-(math.log(x + eps) + x / (x + eps)) for x in a]
        dz_wanted, de_wanted = [], [[0.0] * d for _ in range(k)]
        for i, row in enumerate(zm):
            full = [x + 2 * wq / (m * d) * y for x, y in zip(g.matrix()[i], difference[i])]
            dp = [dot(full, b) for b in em]
            delta, r = dot(p[i], dp), dot(q[i], slope)
            ds = [
                p[i][j] * (dp[j] - delta) + q[i][j] / (m * t) * (-ws * (math.log(q[i][j]) + entropy[i]) + wa * (slope[j] - r))
                for j in range(k)
            ]
            direct = -(2 + 2 * commit) * wq / (m * d)
            dz_wanted += [sum(ds[j] * em[j][n] for j in range(k)) + direct * difference[i][n] for n in range(d)]
            for n in range(d):
                de_wanted[best[i]][n] += full[n] + 2 * code * wq / (m * d) * difference[i][n]
                for j in range(k):
                    de_wanted[j][n] += ds[j] * row[n]
        self.near(dz.values(), dz_wanted)
        self.near(de.values(), sum(de_wanted, []))

    def test_wrong_arguments(self):
        x, w, y = normal(3, 8, seed=1), normal(7, seed=2), Buffer((3, 8))
        arguments = dict(x=x, w=w, y=y, rstd=Buffer((3,)), eps=1e-6)
        with self.assertRaisesRegex(ArgumentError, r"rms_norm_fwd: argument `w` is .*7.*, wanted 8 elements") as caught:
            run("rms_norm_fwd", **arguments)
        self.assertEqual((caught.exception.op, caught.exception.argument), ("rms_norm_fwd", "w"))
        with self.assertRaisesRegex(TypeError, "no argument `weight`"):
            run("rms_norm_fwd", weight=w, **arguments)
        del arguments["eps"]
        with self.assertRaisesRegex(TypeError, "argument `eps` is missing"):
            run("rms_norm_fwd", **arguments)

    def test_an_index_out_of_range_is_a_fault(self):
        table, y = normal(4, 8, seed=1), Buffer((3, 8))
        with self.assertRaisesRegex(FaultError, "gather_fwd: element 2 is 70, wanted at least 0 and below 4"):
            run("gather_fwd", table=table, idx=Buffer((3,), [0, 3, 70], dtype="i32"), y=y)

    def test_the_implementation_can_be_forced(self):
        z, e, idx = normal(4, 8, seed=1), normal(5, 8, seed=2), Buffer((4,), dtype="i32")
        call = library.call("nearest", z=z.array, e=e.array, idx=idx.array, metric=0)
        with self.assertRaisesRegex(ArgumentError, "nearest"):
            call.launch(force=b"no such implementation")


if __name__ == "__main__":
    unittest.main()
