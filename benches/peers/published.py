"""The IBQ quantizer as its authors publish it: every tokens x codes matrix is a tensor, autograd makes the backward.

For flattened tokens z [M, D] and the codebook e [K, D], both float32 parameters or activations; matrix products run in
bfloat16 under autocast, softmaxes in float32.
"""

import torch


def quantize(z, e, setting):
    """Quantized tokens, indices and the three losses."""
    scores = z @ e.t()
    p = torch.softmax(scores, 1)
    idx = p.argmax(1)
    hard = torch.zeros_like(p).scatter_(1, idx[:, None], 1.0)
    one_hot = hard - p.detach() + p
    zq = one_hot @ e
    best = hard @ e
    quant = (
        torch.mean((zq - z) ** 2)
        + setting.beta_commit * torch.mean((best.detach() - z) ** 2)
        + setting.beta_code * torch.mean((best - z.detach()) ** 2)
    )
    x = scores / setting.temperature
    q = torch.softmax(x, 1)
    log_q = torch.log_softmax(x + setting.eps, 1)
    sample = -torch.mean(torch.sum(q * log_q, 1))
    a = q.mean(0)
    avg = -torch.sum(a * torch.log(a + setting.eps))
    return zq, idx, (quant, sample, avg)


def step(z, e, g, weights, setting, quantize=quantize):
    """Forward and backward; the gradients of z and e. z and e require gradients."""
    with torch.autocast(z.device.type, torch.bfloat16):
        zq, idx, losses = quantize(z, e, setting)
    total = (zq * g).sum() + sum(w * loss for w, loss in zip(weights, losses))
    dz, de = torch.autograd.grad(total, (z, e))
    return zq.detach(), idx, dz, de


def compiled():
    # Inductor builds the one-hot matrix in the wrong type under autocast if it may replace the scatter.
    return torch.compile(quantize, dynamic=False, options={"optimize_scatter_upon_const_tensor": False})
