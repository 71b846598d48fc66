"""The kernels as PyTorch operators, torch.ops.ett_kernels.*: each forward and each backward is one operator with a fake
implementation, so that torch.compile and torch.export see through them.

Operators are strict about shapes (kernels/include/ett_kernels.h); functional.py has the usual PyTorch forms. The first
argument sets the activation type, f32 or bf16. Parameters may have another float type and get gradients of their own
type, rounded once from sums in f32. Statistics that a backward needs are outputs without gradients.
"""

import contextlib
from typing import Optional

import torch
from torch import Tensor

from ._library import Array, load, row_stride

LIBRARY = load()
DTYPES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.int32: "i32", torch.uint8: "u8"}
F32, I32 = torch.float32, torch.int32
_faults = {}  # by device: an ett_fault


def _fault(device):
    if device not in _faults:
        with torch.inference_mode(False):
            _faults[device] = torch.zeros(32, dtype=torch.uint8, device=device)
        # Kernels on other streams write there, too.
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(device).synchronize()
    return _faults[device]


def check_faults():
    """Waits for the devices; raises FaultError if a kernel found an index or target out of range since the last call.

    The kernels treat such elements as absent. They cannot raise by themselves, since a launch does not wait.
    """
    for device, memory in _faults.items():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        error = LIBRARY.fault_error(bytes(memory.tolist()))
        if error is not None:
            memory.zero_()
            raise error


def launch(name, **arguments):
    """Launches ett_<name> on the current stream with a workspace from PyTorch's allocator.

    The allocator follows the order of the stream, so the workspace and copies made here may be freed before the kernel runs.
    """
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    device = next(iter(tensors.values())).device
    cuda = device.type == "cuda"
    if cuda == LIBRARY.on_cpu or device.type not in ("cpu", "cuda"):
        where = "the CPU" if LIBRARY.on_cpu else "CUDA devices"
        raise ValueError(f"{name}: tensors are on {device}, wanted {where}, for which {LIBRARY.path} is built")
    for argument, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name}: argument `{argument}` is on {tensor.device}, wanted {device} as the first")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: argument `{argument}` is {tensor.dtype}, wanted float32 or bfloat16: convert it first")
        if tensor.dim() > 4 or row_stride(tensor.shape, tensor.stride()) is None:
            tensors[argument] = tensor = tensor.contiguous()
        arguments[argument] = Array(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.shape, tensor.stride())
    with torch.cuda.device(device) if cuda else contextlib.nullcontext():
        call = LIBRARY.call(name, **arguments)
        stream = torch.cuda.current_stream().cuda_stream if cuda else None
        # 256 bytes more, since memory of the CPU may be less aligned than the kernels want it.
        memory = torch.empty(call.workspace_bytes + 256, dtype=torch.uint8, device=device) if call.workspace_bytes else None
        workspace = None if memory is None else -(-memory.data_ptr() // 256) * 256
        call.launch(stream, workspace, _fault(device).data_ptr(), LIBRARY.number(name))


def define(fake, setup=None, backward=None):
    """Decorator: an operator ett_kernels::<name> with its fake implementation and its gradient."""

    def register(function):
        operator = torch.library.custom_op(f"ett_kernels::{function.__name__}", function, mutates_args=())
        operator.register_fake(fake)
        if backward is not None:
            operator.register_autograd(backward, setup_context=setup)
        return operator

    return register


def gradient(grad, like):
    """A gradient for an operator: zeros where none came back."""
    return torch.zeros_like(like) if grad is None else grad


def keep(ctx, tensors, statistics, **numbers):
    """What a backward reads."""
    ctx.save_for_backward(*tensors, *statistics)
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    ctx.numbers = numbers


# ---- quantizer ----


@define(lambda z, e, metric: z.new_empty(z.shape[0], dtype=I32))
def nearest(z: Tensor, e: Tensor, metric: str) -> Tensor:
    """z [M, D], e [K, D]: the index of the best code of each token, by "dot" or "l2"."""
    idx = z.new_empty(z.shape[0], dtype=I32)
    metric = LIBRARY.constants["ETT_METRIC_" + metric.upper()]
    launch("nearest", z=z, e=e.to(z.dtype), idx=idx, metric=metric)
    return idx


def _ibq_backward_fake(g, g_quant, g_sample, g_avg, z, e, *rest):
    return z.new_empty(z.shape), e.new_empty(e.shape if rest[-1] else (0,))


@define(_ibq_backward_fake)
def ibq_backward(
    g: Tensor, g_quant: Tensor, g_sample: Tensor, g_avg: Tensor, z: Tensor, e: Tensor, idx: Tensor, smax: Tensor,
    rest_p: Tensor, rest_q: Tensor, xbar: Tensor, c: Tensor, temperature: float, beta_commit: float, beta_code: float,
    entropies: bool, codebook: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dz, and de if codebook."""
    dz = z.new_empty(z.shape)
    de = z.new_zeros(e.shape if codebook else (0,), dtype=F32)
    entropy = dict(rest_q=rest_q, xbar=xbar, c=c, g_sample=g_sample, g_avg=g_avg) if entropies else {}
    launch(
        "ibq_bwd", z=z, e=e.to(z.dtype), idx=idx, smax=smax, rest_p=rest_p, inv_count=_inverse(z), g=g, g_quant=g_quant, dz=dz,
        de=de if codebook else None, temperature=temperature, beta_commit=beta_commit, beta_code=beta_code, **entropy,
    )  # fmt: skip
    return dz, de.to(e.dtype)


def _inverse(z):
    return torch.full((1,), 1 / max(z.shape[0], 1), dtype=F32, device=z.device)


def _ibq_outputs(z, e, temperature, eps, beta_commit, beta_code, entropies):
    (m, _), k = z.shape, e.shape[0]
    new = lambda *shape, present=True: z.new_empty(shape if present else (0,), dtype=F32)
    scalars = new(), new(present=entropies), new(present=entropies)
    rows = new(m), new(m), new(m, present=entropies), new(m, present=entropies)
    return z.new_empty(z.shape), *scalars, z.new_empty(m, dtype=I32), *rows, new(k, present=entropies)


def _ibq_setup(ctx, inputs, output):
    z, e, temperature, _, beta_commit, beta_code, entropies = inputs
    keep(ctx, (z, e), output[4:], temperature=temperature, beta_commit=beta_commit, beta_code=beta_code, entropies=entropies)


def _ibq_gradient(ctx, g, *others):
    z, e, idx, smax, *rest = ctx.saved_tensors
    losses = [gradient(grad, smax.new_empty(())) for grad in others[:3]]
    numbers = ctx.numbers | dict(codebook=ctx.needs_input_grad[1])
    dz, de = ibq_backward(gradient(g, z), *losses, z, e, idx, smax, *rest, **numbers)
    return dz, de if ctx.needs_input_grad[1] else None, None, None, None, None, None


@define(_ibq_outputs, _ibq_setup, _ibq_gradient)
def ibq(
    z: Tensor, e: Tensor, temperature: float, eps: float, beta_commit: float, beta_code: float, entropies: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """zq [M, D], the losses quant, sample and avg, idx [M], then the statistics smax, rest_p, rest_q, xbar and c.

    Without entropies sample, avg, rest_q, xbar and c are empty.
    """
    outputs = _ibq_outputs(z, e, temperature, eps, beta_commit, beta_code, entropies)
    zq, quant, sample, avg, idx, smax, rest_p, rest_q, xbar, c = outputs
    both = dict(z=z, e=e.to(z.dtype), idx=idx)
    row, cols, losses = {}, {}, {}
    if entropies:
        row = dict(rest_q=rest_q, xbar=xbar)
        cols = dict(col=torch.empty_like(c))
        losses = dict(c=c, sample=sample, avg=avg)
    bad = torch.zeros(1, dtype=F32, device=z.device)
    launch("ibq_rows", **both, smax=smax, rest_p=rest_p, bad=bad, temperature=temperature, **row)
    if entropies:
        launch("ibq_cols", **both, smax=smax, rest_q=rest_q, temperature=temperature, **cols)
    launch(
        "ibq_losses", **both, **row, **cols, **losses, inv_count=_inverse(z), zq=zq, quant=quant, eps=eps,
        beta_commit=beta_commit, beta_code=beta_code,
    )  # fmt: skip
    return outputs


# ---- attention ----


@define(lambda dy, q, k, v, *rest: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)))
def attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, heads: int, kv_heads: int,
    max_q: int, max_k: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    launch(
        "attention_bwd", dy=dy, q=q, k=k, v=v, y=y, lse=lse, cu_q=cu_q, cu_k=cu_k, dq=dq, dk=dk, dv=dv, heads=heads,
        kv_heads=kv_heads, head_dim=q.shape[1] // heads, max_q=max_q, max_k=max_k, scale=scale, causal=causal,
    )  # fmt: skip
    return dq, dk, dv


def _attention_setup(ctx, inputs, output):
    q, k, v, cu_q, cu_k, *numbers = inputs
    keep(ctx, (q, k, v, cu_q, cu_k, output[0]), output[1:], all=numbers)


def _attention_gradient(ctx, dy, _):
    q, k, v, cu_q, cu_k, y, lse = ctx.saved_tensors
    grads = attention_backward(gradient(dy, q), q, k, v, y, lse, cu_q, cu_k, *ctx.numbers["all"])
    return *grads, *[None] * 8


@define(lambda q, k, v, cu_q, cu_k, heads, *rest: (q.new_empty(q.shape), q.new_empty(q.shape[0], heads, dtype=F32)),
        _attention_setup, _attention_gradient)  # fmt: skip
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, heads: int, kv_heads: int, max_q: int, max_k: int,
    scale: float, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [N, heads * D], k and v [Nk, kv_heads * D], cu_q and cu_k [S + 1] int32: y [N, heads * D] and lse [N, heads]."""
    y, lse = q.new_empty(q.shape), q.new_empty(q.shape[0], heads, dtype=F32)
    launch(
        "attention_fwd", q=q, k=k, v=v, cu_q=cu_q, cu_k=cu_k, y=y, lse=lse, heads=heads, kv_heads=kv_heads,
        head_dim=q.shape[1] // heads, max_q=max_q, max_k=max_k, scale=scale, causal=causal,
    )  # fmt: skip
    return y, lse


# ---- losses ----


@define(lambda g, x, w, target, scale, lse, weights: (x.new_empty(x.shape), w.new_empty(w.shape if weights else (0,))))
def linear_cross_entropy_backward(
    g: Tensor, x: Tensor, w: Tensor, target: Tensor, scale: Tensor, lse: Tensor, weights: bool
) -> tuple[Tensor, Tensor]:
    """dx, and dw if weights."""
    dx, dw = x.new_empty(x.shape), x.new_zeros(w.shape if weights else (0,), dtype=F32)
    arguments = dict(x=x, w=w.to(x.dtype), target=target, scale=scale, lse=lse, g=g, dx=dx)
    launch("linear_xent_bwd", **arguments, dw=dw if weights else None)
    return dx, dw.to(w.dtype)


def _linear_gradient(ctx, g, _):
    *saved, lse = ctx.saved_tensors
    weights = ctx.needs_input_grad[1]
    dx, dw = linear_cross_entropy_backward(gradient(g, lse.new_empty(())), *saved, lse, weights)
    return dx, dw if weights else None, None, None


def _loss_outputs(x):
    return x.new_empty((), dtype=F32), x.new_empty(x.shape[0], dtype=F32)


def _loss_setup(ctx, inputs, output):
    keep(ctx, inputs, output[1:])


@define(lambda x, w, target, scale: _loss_outputs(x), _loss_setup, _linear_gradient)
def linear_cross_entropy(x: Tensor, w: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, C], w [V, C], target [N] int32 (negative: left out), scale [1] f32: the scaled sum of losses, and lse [N]."""
    loss, lse = _loss_outputs(x)
    launch("linear_xent_fwd", x=x, w=w.to(x.dtype), target=target, scale=scale, lse=lse, loss=loss)
    return loss, lse


@define(lambda g, logits, *rest: logits.new_empty(logits.shape))
def cross_entropy_backward(
    g: Tensor, logits: Tensor, target: Tensor, weight: Optional[Tensor], scale: Tensor, lse: Tensor
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    launch("xent_bwd", logits=logits, target=target, weight=weight, scale=scale, lse=lse, g=g, dlogits=dlogits)
    return dlogits


def _cross_entropy_gradient(ctx, g, _):
    *saved, lse = ctx.saved_tensors
    return cross_entropy_backward(gradient(g, lse.new_empty(())), *saved, lse), None, None, None


@define(lambda logits, target, weight, scale: _loss_outputs(logits), _loss_setup, _cross_entropy_gradient)
def cross_entropy(logits: Tensor, target: Tensor, weight: Optional[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V], target [N] int32 (negative: left out), weight [N] f32, scale [1] f32: scaled sum of losses, lse [N]."""
    loss, lse = _loss_outputs(logits)
    loss.zero_()  # the kernel adds to it
    launch("xent_fwd", logits=logits, target=target, weight=weight, scale=scale, lse=lse, loss=loss)
    return loss, lse


# ---- norms ----


def _norm_setup(ctx, inputs, output):
    x, w, b, *_ = inputs
    keep(ctx, (x, w, b), output[1:], last=inputs[-1])  # silu of the GroupNorm


def _parameter_gradients(x, *parameters):
    """Zeroed sums in f32, to which the kernels add."""
    return [x.new_zeros(p.shape, dtype=F32) for p in parameters]


@define(lambda dy, x, w, b, *rest: (x.new_empty(x.shape), w.new_empty(w.shape), b.new_empty(b.shape)))
def group_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, (dw, db) = x.new_empty(x.shape), _parameter_gradients(x, w, b)
    parameters = dict(w=w.to(x.dtype), b=b.to(x.dtype))
    launch("group_norm_bwd", dy=dy, x=x, **parameters, mean=mean, rstd=rstd, dx=dx, dw=dw, db=db, silu=silu)
    return dx, dw.to(w.dtype), db.to(b.dtype)


def _group_norm_outputs(x, groups):
    return x.new_empty(x.shape), *(x.new_empty(x.shape[0], groups, dtype=F32) for _ in range(2))


def _group_norm_gradient(ctx, dy, *_):
    x, *saved = ctx.saved_tensors
    return *group_norm_backward(gradient(dy, x), x, *saved, ctx.numbers["last"]), None, None, None


@define(lambda x, w, b, groups, *rest: _group_norm_outputs(x, groups), _norm_setup, _group_norm_gradient)
def group_norm(x: Tensor, w: Tensor, b: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, H, W, C], w and b [C]: y, mean and rstd [B, groups]."""
    y, mean, rstd = _group_norm_outputs(x, groups)
    launch("group_norm_fwd", x=x, w=w.to(x.dtype), b=b.to(x.dtype), y=y, mean=mean, rstd=rstd, eps=eps, silu=silu)
    return y, mean, rstd


@define(lambda dy, x, w, b, *rest: (x.new_empty(x.shape), w.new_empty(w.shape), b.new_empty(b.shape)))
def layer_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, (dw, db) = x.new_empty(x.shape), _parameter_gradients(x, w, b)
    launch("layer_norm_bwd", dy=dy, x=x, w=w.to(x.dtype), mean=mean, rstd=rstd, dx=dx, dw=dw, db=db)
    return dx, dw.to(w.dtype), db.to(b.dtype)


def _layer_norm_outputs(x):
    return x.new_empty(x.shape), *(x.new_empty(x.shape[0], dtype=F32) for _ in range(2))


def _layer_norm_gradient(ctx, dy, *_):
    x, *saved = ctx.saved_tensors
    return *layer_norm_backward(gradient(dy, x), x, *saved), None


@define(lambda x, w, b, eps: _layer_norm_outputs(x), _norm_setup, _layer_norm_gradient)
def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C], w and b [C]: y, mean and rstd [N]."""
    y, mean, rstd = _layer_norm_outputs(x)
    launch("layer_norm_fwd", x=x, w=w.to(x.dtype), b=b.to(x.dtype), y=y, mean=mean, rstd=rstd, eps=eps)
    return y, mean, rstd


@define(lambda dy, dsum, s, w, rstd: (s.new_empty(s.shape), w.new_empty(w.shape)))
def rms_norm_backward(dy: Tensor, dsum: Optional[Tensor], s: Tensor, w: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, (dw,) = s.new_empty(s.shape), _parameter_gradients(s, w)
    launch("rms_norm_bwd", dy=dy, dsum=dsum, x=s, w=w.to(s.dtype), rstd=rstd, dx=dx, dw=dw)
    return dx, dw.to(w.dtype)


def _rms_norm_outputs(x, residual):
    return x.new_empty(x.shape), x.new_empty((0,) if residual is None else x.shape), x.new_empty(x.shape[0], dtype=F32)


def _rms_norm_setup(ctx, inputs, output):
    x, residual, w, _ = inputs
    keep(ctx, (x if residual is None else output[1], w), output[2:], residual=residual is not None)


def _rms_norm_gradient(ctx, dy, dsum, _):
    s, w, rstd = ctx.saved_tensors
    residual = ctx.numbers["residual"]
    dx, dw = rms_norm_backward(gradient(dy, s), dsum if residual else None, s, w, rstd)
    return dx, dx if residual else None, dw, None


@define(lambda x, residual, w, eps: _rms_norm_outputs(x, residual), _rms_norm_setup, _rms_norm_gradient)
def rms_norm(x: Tensor, residual: Optional[Tensor], w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual [N, C], w [C]: y, the sum x + residual (empty without a residual) and rstd [N]."""
    y, total, rstd = _rms_norm_outputs(x, residual)
    with_residual = {} if residual is None else dict(residual=residual, sum=total)
    launch("rms_norm_fwd", x=x, w=w.to(x.dtype), y=y, rstd=rstd, eps=eps, **with_residual)
    return y, total, rstd
