"""The codebook kernels of this project, called from PyTorch: tensors' addresses and the current stream, through ctypes.

The layout of the argument structs is read from the header that the library was built with, so that this file need not
change when a field is added.
"""

import ctypes
import os
import re
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.int32: 3, torch.uint8: 4}


class View(ctypes.Structure):
    _fields_ = [
        ("ptr", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 4),
        ("ld", ctypes.c_int64),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("fault", ctypes.c_void_p),
        ("number", ctypes.c_int32),
        ("force", ctypes.c_char_p),
    ]


class Status(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_int32),
        ("cuda_error", ctypes.c_int32),
        ("op", ctypes.c_char * 32),
        ("arg", ctypes.c_char * 32),
        ("got", ctypes.c_char * 96),
        ("want", ctypes.c_char * 96),
    ]


C_TYPES = {
    "ett_view": View,
    "double": ctypes.c_double,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
}


def view(tensor):
    if not tensor.is_contiguous():
        raise ValueError("tensors of the benches are contiguous")
    dims = list(tensor.shape) + [1] * (4 - tensor.dim())
    ld = tensor.shape[-1] if tensor.dim() else 1
    return View(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.dim(), (ctypes.c_int64 * 4)(*dims), ld)


class Call:
    """A kernel with its arguments and its workspace, ready to be launched again and again."""

    def __init__(self, library, name, arguments):
        self.library, self.name = library, name
        self.keep = arguments  # the tensors must outlive the addresses
        values = {k: view(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        self.arguments = library.struct(name)(**values)
        self.function = getattr(library.dll, f"ett_{name}")
        query = getattr(library.dll, f"ett_{name}_workspace")
        query.restype = ctypes.c_int64
        self.workspace_bytes = query(ctypes.byref(self.arguments))
        if self.workspace_bytes < 0:
            self.function(ctypes.byref(self.arguments), ctypes.byref(Launch()))  # refuses, and says why
            library.fail(name)
        device = next(v.device for v in arguments.values() if isinstance(v, torch.Tensor))
        self.workspace = torch.empty(max(self.workspace_bytes, 1), dtype=torch.uint8, device=device)

    def __call__(self):
        stream = torch.cuda.current_stream().cuda_stream
        launch = Launch(stream=stream, workspace=self.workspace.data_ptr(), workspace_bytes=self.workspace_bytes)
        if self.function(ctypes.byref(self.arguments), ctypes.byref(launch)) != 0:
            self.library.fail(self.name)

    def implementation(self):
        """The implementation that the last launch of this thread used."""
        return self.library.dll.ett_last_kernel().decode()


class Library:
    def __init__(self, path=None, header=None):
        path = path or os.environ.get("ETT_LIBRARY") or KERNELS / "build/libett_kernels.so"
        header = header or os.environ.get("ETT_HEADER") or KERNELS / "include/ett_kernels.h"
        self.text = Path(header).read_text()
        self.dll = ctypes.CDLL(str(path))
        self.dll.ett_last_kernel.restype = ctypes.c_char_p
        wanted = int(re.search(r"#define ETT_ABI_VERSION (\d+)", self.text).group(1))
        if self.dll.ett_abi_version() != wanted:
            raise RuntimeError(f"{path} has interface version {self.dll.ett_abi_version()}, the header {wanted}")

    def struct(self, name):
        body = re.search(rf"typedef struct ett_{name}_args \{{(.*?)\}} ett_{name}_args;", self.text, re.S).group(1)
        fields = re.findall(r"^\s*(\w+) (\w+);", body, re.M)
        return type(name, (ctypes.Structure,), {"_fields_": [(field, C_TYPES[kind]) for kind, field in fields]})

    def has(self, name, field):
        return field in dict(self.struct(name)._fields_)

    def fail(self, name):
        status = Status()
        self.dll.ett_last_status(ctypes.byref(status))
        got, want = status.got.decode(), status.want.decode()
        raise RuntimeError(f"{name}: argument {status.arg.decode()} is {got}, wanted {want}")

    def call(self, name, **arguments):
        return Call(self, name, arguments)


class Quantizer:
    """The kernels of one IBQ quantizer, forward and backward, with all tensors allocated."""

    def __init__(self, library, z, e, g, weights, setting):
        m, d = z.shape
        k = e.shape[0]
        f32 = dict(dtype=torch.float32, device=z.device)
        one = lambda v: torch.full((1,), v, **f32)
        self.idx = torch.empty(m, dtype=torch.int32, device=z.device)
        row = {name: torch.empty(m, **f32) for name in ("smax", "rest_p", "rest_q", "xbar")}
        col, c = torch.empty(k, **f32), torch.empty(k, **f32)
        self.zq, self.dz = torch.empty_like(z), torch.empty_like(z)
        self.de = torch.empty(k, d, **f32)
        self.losses = {name: one(0.0) for name in ("quant", "sample", "avg")}
        both = dict(z=z, e=e, idx=self.idx)
        betas = dict(beta_commit=setting.beta_commit, beta_code=setting.beta_code)
        count, t = one(1 / m), dict(temperature=setting.temperature)
        cols = dict(z=z, e=e, smax=row["smax"], rest_q=row["rest_q"], col=col, **t)
        if library.has("ibq_cols", "idx"):
            cols["idx"] = self.idx
        q, s, a = (one(w) for w in weights)
        self.kernels = {
            "ibq_rows": library.call("ibq_rows", **both, **row, bad=one(0.0), **t),
            "ibq_cols": library.call("ibq_cols", **cols),
            "ibq_losses": library.call(
                "ibq_losses", **both, rest_q=row["rest_q"], xbar=row["xbar"], col=col, inv_count=count, zq=self.zq,
                c=c, **self.losses, eps=setting.eps, **betas),
            "ibq_bwd": library.call(
                "ibq_bwd", **both, **row, c=c, inv_count=count, g=g, g_quant=q, g_sample=s, g_avg=a, dz=self.dz,
                de=self.de, **t, **betas),
        }
        # One workspace serves all kernels of a stream, one after the other; the statistics stay for the backward.
        largest = max(call.workspace_bytes for call in self.kernels.values())
        self.extra_bytes = largest + 4 * (4 * m + 2 * k)
        shared = torch.empty(largest, dtype=torch.uint8, device=z.device)
        for call in self.kernels.values():
            call.workspace = shared

    def forward(self):
        for name in ("ibq_rows", "ibq_cols", "ibq_losses"):
            self.kernels[name]()

    def backward(self):
        self.de.zero_()  # the kernel adds to the codebook's gradient
        self.kernels["ibq_bwd"]()

    def __call__(self):
        self.forward()
        self.backward()
