"""The kernels in the forms that PyTorch programs expect. B batch, H heads (or height), T tokens, C channels, D head or code
dimension, K codes, V vocabulary.

Activations are float32 or bfloat16 and set the type that an operator computes in; parameters (codes, weights) are converted
inside and get gradients of their own type. Under torch.autocast the operators made of matrix products (nearest,
ibq_quantize, attention, linear_cross_entropy) convert their activations to its type, which has to be bfloat16. Norms and
cross_entropy keep the type of their input. Scores, statistics and sums are float32 in every case.
"""

import functools
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from . import ops


class Quantized(NamedTuple):
    """Of ibq_quantize: quantized tokens, indices (int64), and the losses, 0-dimensional float32 tensors."""

    zq: Tensor
    idx: Tensor
    quant: Tensor
    sample: Optional[Tensor]
    avg: Optional[Tensor]


def _activation(*tensors):
    """Activations of a matrix product in the type of autocast, else in their common type."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if dtype == torch.float16:
            raise TypeError("autocast is to float16, wanted bfloat16: torch.autocast(..., dtype=torch.bfloat16)")
    else:
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


def nearest(z: Tensor, e: Tensor, metric: str = "dot") -> Tensor:
    """Indices [..] (int64) of the best codes e [K, D] for tokens z [.., D]: largest z . e, or smallest |z - e| for "l2".

    Ties go to the smallest index. Nothing of size tokens x codes is stored.
    """
    if metric not in ("dot", "l2"):
        raise ValueError(f'metric is {metric!r}, wanted "dot" or "l2"')
    (tokens,) = _activation(z.detach())
    idx = ops.nearest(tokens.reshape(-1, z.shape[-1]), e.detach(), metric)
    return idx.long().reshape(z.shape[:-1])


def ibq_quantize(
    z: Tensor, e: Tensor, *, temperature: float = 0.01, eps: float = 1e-5, beta_commit: float = 1.0, beta_code: float = 0.25,
    entropies: bool = True,
) -> Quantized:  # fmt: skip
    """The IBQ quantizer (arXiv 2412.02692) for tokens z [.., D] and codes e [K, D], with gradients for both.

    quant = mean((zq - z)^2) + beta_commit mean((sg(e) - z)^2) + beta_code mean((e - sg(z))^2); sample and avg are the mean
    entropy of the tokens and the entropy of the mean assignment, of softmax(z e^T / temperature). The entropy loss is
    sample - avg. Nothing of size tokens x codes is stored, forward or backward.
    """
    (tokens,) = _activation(z)
    outputs = ops.ibq(tokens.reshape(-1, z.shape[-1]), e, temperature, eps, beta_commit, beta_code, entropies)
    zq, quant, sample, avg, idx = outputs[:5]
    shaped = zq.reshape(z.shape), idx.long().reshape(z.shape[:-1])
    return Quantized(*shaped, quant, *((sample, avg) if entropies else (None, None)))


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, causal: bool = False,
    scale: Optional[float] = None,
) -> Tensor:  # fmt: skip
    """Attention over S sequences that lie one after the other: q [N, H, D], k and v [Nk, kv_heads, D], offsets cu_q and
    cu_k [S + 1]; kv_heads divides H. A causal mask aligns the ends of queries and keys."""
    heads, kv_heads = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    flat = (t.flatten(1) for t in _activation(q, k, v))
    offsets = cu_q.to(torch.int32), cu_k.to(torch.int32)
    y, _ = ops.attention(*flat, *offsets, heads, kv_heads, max_q, max_k, scale, causal)
    return y.reshape(q.shape)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: Optional[float] = None) -> Tensor:
    """Attention in the layout of scaled_dot_product_attention: q [B, H, T, D], k and v [B, kv_heads, Tk, D].

    kv_heads divides H. A causal mask aligns the ends of queries and keys (SDPA's: the beginnings). Tensors that were
    [B, T, H, D] before a transposition are not copied.
    """
    (b, _, t, _), tk = q.shape, k.shape[2]
    cu_q, cu_k = (torch.arange(b + 1, dtype=torch.int32, device=q.device) * n for n in (t, tk))
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    y = attention_varlen(*flat, cu_q, cu_k, t, tk, causal=causal, scale=scale)
    return y.unflatten(0, (b, t)).transpose(1, 2)


def _targets(target, ignore_index, reduction):
    """Targets as int32 with -1 for those to ignore, and the factor on the sum of losses."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction is {reduction!r}, wanted "mean" or "sum"')
    ignored = target == ignore_index
    count = (~ignored).sum().clamp(min=1) if reduction == "mean" else ignored.new_ones(())
    return target.masked_fill(ignored, -1).to(torch.int32).reshape(-1), count.to(torch.float32).reciprocal().reshape(1)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the logits x weight^T, which are never stored: x [.., C], weight [V, C], target [..].

    The mean over no targets is 0 (PyTorch: NaN). Other negative targets than ignore_index add nothing, but count in the mean. A
    target of V or more is a fault: see check_faults.
    """
    (rows,) = _activation(x)
    return ops.linear_cross_entropy(rows.reshape(-1, x.shape[-1]), weight, *_targets(target, ignore_index, reduction))[0]


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Optional[Tensor] = None, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of logits [.., V]; weight [..] are weights of the rows, not of the classes, and not part of the mean."""
    target, scale = _targets(target, ignore_index, reduction)
    weight = None if weight is None else weight.detach().float().reshape(-1)
    return ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), target, weight, scale)[0]


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, silu: bool = True
) -> Tensor:
    """SiLU(GroupNorm(x)) of x [B, C, H, W]. The kernel works on channels_last; another layout is copied. The result is
    channels_last."""
    if x.dim() != 4:
        raise ValueError(f"x has shape {list(x.shape)}, wanted [B, C, H, W]")
    if x.shape[1] % num_groups:
        raise ValueError(f"num_groups is {num_groups}, wanted a divisor of the {x.shape[1]} channels")
    y = ops.group_norm(x.permute(0, 2, 3, 1).contiguous(), weight, bias, num_groups, eps, silu)[0]
    return y.permute(0, 3, 1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Optional[Tensor] = None):
    """RMSNorm of x [.., C], or of s = x + residual; then the result is (y, s)."""
    flat = lambda t: None if t is None else t.to(x.dtype).reshape(-1, x.shape[-1])
    y, total, _ = ops.rms_norm(flat(x), flat(residual), weight, eps)
    return y.reshape(x.shape) if residual is None else (y.reshape(x.shape), total.reshape(x.shape))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm of x [.., C] over the last dimension."""
    return ops.layer_norm(x.reshape(-1, x.shape[-1]), weight, bias, eps)[0].reshape(x.shape)
