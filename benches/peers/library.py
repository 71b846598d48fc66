"""The codebook kernels of this project on PyTorch's tensors, by the C interface of examples/hosts/pytorch. Calls are prepared
once, with their workspace, and launched again and again; that package's operators do both each time."""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "examples/hosts/pytorch"))
from ett_kernels import library, ops  # noqa: E402
from ett_kernels._library import Array  # noqa: E402


class Call:
    """A kernel with its arguments and its workspace, ready to be launched."""

    def __init__(self, name, **arguments):
        self.keep = arguments  # the tensors must outlive the addresses
        tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        arrays = {k: Array(v.data_ptr(), ops.DTYPES[v.dtype], v.shape, v.stride()) for k, v in tensors.items()}
        self.prepared = library.call(name, **arguments | arrays)
        self.workspace_bytes = self.prepared.workspace_bytes
        device = next(iter(tensors.values())).device
        self.workspace = torch.empty(max(self.workspace_bytes, 1), dtype=torch.uint8, device=device)

    def __call__(self):
        self.prepared.launch(torch.cuda.current_stream().cuda_stream, self.workspace.data_ptr())

    def implementation(self):
        """The implementation that the last launch of this thread used."""
        return library.implementation()


class Quantizer:
    """The kernels of one IBQ quantizer, forward and backward, with all tensors allocated."""

    def __init__(self, z, e, g, weights, setting):
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
        q, s, a = (one(w) for w in weights)
        self.kernels = {
            "ibq_rows": Call("ibq_rows", **both, **row, bad=one(0.0), **t),
            "ibq_cols": Call("ibq_cols", **both, smax=row["smax"], rest_q=row["rest_q"], col=col, **t),
            "ibq_losses": Call(
                "ibq_losses", **both, rest_q=row["rest_q"], xbar=row["xbar"], col=col, inv_count=count, zq=self.zq,
                c=c, **self.losses, eps=setting.eps, **betas),
            "ibq_bwd": Call(
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
