"""The IBQ quantizer as its authors publish it, in plain PyTorch: the peer of train.py and of the tests.

Every tokens x codes matrix is a tensor, and autograd makes the backward.
"""

import torch
from torch import nn
from torch.nn import functional as F


def quantize(z, e, temperature=0.01, eps=1e-5, beta_commit=1.0, beta_code=0.25):
    """Of tokens z [M, D] and codes e [K, D]: quantized tokens, indices, and the losses quant, sample and avg."""
    scores = z @ e.t()
    p = scores.softmax(1)
    idx = p.argmax(1)
    hard = torch.zeros_like(p).scatter_(1, idx[:, None], 1.0)
    zq = (hard - p.detach() + p) @ e
    best = hard @ e
    quant = F.mse_loss(zq, z) + beta_commit * F.mse_loss(best.detach(), z) + beta_code * F.mse_loss(best, z.detach())
    q, log_q = (scores / temperature).softmax(1), (scores / temperature).log_softmax(1)
    sample = -(q * log_q).sum(1).mean()
    a = q.mean(0)
    return zq, idx, quant, sample, -(a * (a + eps).log()).sum()


class PublishedQuantizer(nn.Module):
    """With the interface of ett_kernels.nn.IBQQuantizer, entropies included."""

    def __init__(self, n_e, e_dim, beta=0.25, entropy_temperature=0.01):
        super().__init__()
        self.beta, self.entropy_temperature = beta, entropy_temperature
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z):
        tokens = z.movedim(1, -1)
        flat = tokens.reshape(-1, tokens.shape[-1])
        zq, idx, quant, sample, avg = quantize(flat, self.embedding.weight, self.entropy_temperature, beta_code=self.beta)
        return zq.view(tokens.shape).movedim(-1, 1), (quant, sample, avg, sample - avg), (None, None, idx)
