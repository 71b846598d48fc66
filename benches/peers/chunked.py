"""The quantizer in chunks of tokens with checkpointing: autograd makes the backward, but the tokens x codes matrices of
only one chunk exist at a time, since the backward computes them again.

One-hot products are replaced by a gather of the best codes. z and e are bfloat16, and so are the scores, as a plain
product in PyTorch returns them: at a temperature of 0.01 that is too coarse, see the README.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def soft_part(z, e, temperature):
    """Of one chunk: a value of 0 with the gradient of p e, the best codes, the sum of the entropies and sums of q."""
    scores = z @ e.t()
    idx = scores.detach().argmax(1)
    p = torch.softmax(scores.float(), 1).to(z.dtype)
    mixture = p @ e.detach()
    log_q = torch.log_softmax(scores.float() / temperature, 1)
    q = log_q.exp()
    return mixture - mixture.detach(), idx, -(q * log_q).sum(), q.sum(0)


def step(z, e, g, weights, setting, chunk, part=soft_part):
    """Forward and backward; the gradients of z and e. z and e require gradients."""
    soft, idx, entropy, col = [], [], 0.0, 0.0
    for rows in z.split(chunk):
        s, i, h, c = checkpoint(part, rows, e, setting.temperature, use_reentrant=False, preserve_rng_state=False)
        soft.append(s)
        idx.append(i)
        entropy = entropy + h
        col = col + c
    idx = torch.cat(idx)
    best = F.embedding(idx, e)
    zq = best + torch.cat(soft)
    z32, zq32, best32 = z.float(), zq.float(), best.float()
    quant = (
        torch.mean((zq32 - z32) ** 2)
        + setting.beta_commit * torch.mean((best32.detach() - z32) ** 2)
        + setting.beta_code * torch.mean((best32 - z32.detach()) ** 2)
    )
    a = col / len(z)
    avg = -torch.sum(a * torch.log(a + setting.eps))
    losses = (quant, entropy / len(z), avg)
    total = (zq * g).sum() + sum(w * loss for w, loss in zip(weights, losses))
    dz, de = torch.autograd.grad(total, (z, e))
    return zq.detach(), idx, dz, de


def compiled():
    return torch.compile(soft_part, dynamic=False)
