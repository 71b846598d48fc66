"""The quantizer with the forward and backward of docs/quantizer.md written out, in chunks of tokens. With
torch.compile the strongest sound form in PyTorch that we know.

z and e are bfloat16 (or all is float32), scores float32, the winner is kept out of the sums that cancel. Only the
statistics of rows and columns are kept between forward and backward: five products of all tokens with all codes in total.
"""

from dataclasses import dataclass

import torch


def product(a, b, out=torch.float32):
    """a b^T of bfloat16 matrices with sums in float32, not rounded unless out says so; of wider ones, in their type."""
    if out == a.dtype or a.dtype != torch.bfloat16:
        return a @ b.t()
    return torch.mm(a, b.t(), out_dtype=out) if a.is_cuda else (a.float() @ b.float().t()).to(out)


def row_statistics(s, temperature):
    """Best codes, their scores, rest_p, rest_q and xbar of each row, and the sum of q over the rows."""
    smax, idx = s.max(1)
    other = torch.arange(s.shape[1], device=s.device)[None, :] != idx[:, None]
    y = s - smax[:, None]
    x = y * (1 / temperature)
    p = torch.where(other, torch.exp(y), 0.0)
    q = torch.exp(x)
    rest = torch.where(other, q, 0.0)
    rest_q = rest.sum(1)
    xbar = (rest * x).sum(1) / (1 + rest_q)
    col = (q / (1 + rest_q)[:, None]).sum(0)
    return idx, smax, p.sum(1), rest_q, xbar, col


def score_gradient(s, dp, dp_best, c, c_best, smax, rest_p, rest_q, xbar, temperature, ws, wa, grad_type):
    """dS of a chunk in grad_type. ws and wa, tensors, are the weights of the entropies divided by M T."""
    y = s - smax[:, None]
    x = y * (1 / temperature)
    p = torch.exp(y) / (1 + rest_p)[:, None]
    q = torch.exp(x) / (1 + rest_q)[:, None]
    # Both differences are exactly 0 for the best code, which therefore adds nothing to the sums.
    dp = dp.to(s.dtype) - dp_best[:, None]
    c = c[None, :] - c_best[:, None]
    delta = (p * dp).sum(1, keepdim=True)
    r = (q * c).sum(1, keepdim=True)
    ds = p * (dp - delta) + q * (wa * (c - r) - ws * (x - xbar[:, None]))
    return ds.to(grad_type)


@dataclass
class Statistics:
    idx: torch.Tensor
    smax: torch.Tensor
    rest_p: torch.Tensor
    rest_q: torch.Tensor
    xbar: torch.Tensor
    c: torch.Tensor


class Closed:
    def __init__(self, setting, chunk, compiled=True):
        self.setting, self.chunk = setting, chunk
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self.row_statistics, self.score_gradient = wrap(row_statistics), wrap(score_gradient)

    def forward(self, z, e):
        s, m = self.setting, len(z)
        parts, col = [], 0.0
        for rows in z.split(self.chunk):
            *part, sums = self.row_statistics(product(rows, e), s.temperature)
            parts.append(part)
            col = col + sums
        idx, smax, rest_p, rest_q, xbar = (torch.cat(p) for p in zip(*parts))
        zq = e[idx]
        wide = smax.dtype
        quant = (1 + s.beta_commit + s.beta_code) * ((zq.to(wide) - z.to(wide)) ** 2).mean()
        sample = (torch.log1p(rest_q) - xbar).mean()
        a = col / m
        log_a = torch.log(a + s.eps)
        avg = -(a * log_a).sum()
        c = -(log_a + a / (a + s.eps))
        return zq, (quant, sample, avg), Statistics(idx, smax, rest_p, rest_q, xbar, c)

    def backward(self, z, e, g, weights, kept):
        s, (m, d) = self.setting, z.shape
        wq, ws, wa = weights
        wide = kept.smax.dtype
        # Tensors, so that a compiled function serves all their values.
        ws, wa = (torch.full((), w / (m * s.temperature), dtype=wide, device=z.device) for w in (ws, wa))
        difference = e[kept.idx].to(wide) - z.to(wide)
        g = g.to(wide) + (2 * wq / (m * d)) * difference
        dz = (-(2 + 2 * s.beta_commit) * wq / (m * d)) * difference
        de = torch.zeros(e.shape, dtype=wide, device=e.device)
        de.index_add_(0, kept.idx, g + (2 * s.beta_code * wq / (m * d)) * difference)
        g = g.to(z.dtype)
        for at in range(0, m, self.chunk):
            rows = slice(at, at + self.chunk)
            idx = kept.idx[rows]
            dp = product(g[rows], e, z.dtype)
            ds = self.score_gradient(
                product(z[rows], e), dp, dp.gather(1, idx[:, None])[:, 0].to(wide), kept.c, kept.c[idx],
                kept.smax[rows], kept.rest_p[rows], kept.rest_q[rows], kept.xbar[rows], s.temperature, ws, wa, z.dtype)
            del dp
            dz[rows] += product(ds, e.t())
            de += product(ds.t(), z[rows].t())
        return dz.to(z.dtype), de

    def step(self, z, e, g, weights):
        zq, _, kept = self.forward(z, e)
        dz, de = self.backward(z, e, g, weights, kept)
        return zq, kept.idx, dz, de
