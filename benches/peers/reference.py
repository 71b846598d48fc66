"""What the errors are measured against: float64, from the same inputs."""

import math

import torch

import published
from closed import product


def best_codes(z, e, chunk=512):
    e = e.double()
    return torch.cat([(rows.double() @ e.t()).argmax(1) for rows in z.split(chunk)])


def gradients(z, e, g, weights, setting):
    """dz and de of the published form, by autograd, without autocast."""
    z, e = (x.detach().double().requires_grad_() for x in (z, e))
    zq, _, losses = published.quantize(z, e, setting)
    total = (zq * g.double()).sum() + sum(w * loss for w, loss in zip(weights, losses))
    return torch.autograd.grad(total, (z, e))


def live_share(z, e, idx, smax, rest_p, rest_q, temperature, chunk=1024):
    """The share of tiles of 64 tokens and 64 codes in which any code has weight, the best ones aside: those that the
    backward multiplies. The thresholds are those of kernels/codebook/ibq_bwd.cu."""
    rounded_up = lambda n: -(-n // 64) * 64
    floor = lambda rest: (rest.log2() - 24 - math.log2(len(e))).clamp(min=-127) * math.log(2)
    least = torch.where(rest_p / (1 + rest_p) >= 1e-12, floor(rest_p), math.inf)
    least = torch.minimum(least, torch.where(rest_q > 0, floor(rest_q) * temperature, math.inf))
    live = total = 0
    for at in range(0, len(z), chunk):
        rows = slice(at, at + chunk)
        y = product(z[rows], e) - smax[rows, None]
        y.scatter_(1, idx[rows, None].long(), -math.inf)
        some = y > least[rows, None]
        some = torch.nn.functional.pad(some, (0, rounded_up(some.shape[1]) - some.shape[1], 0, rounded_up(len(some)) - len(some)))
        tiles = some.view(len(some) // 64, 64, -1, 64).any(3).any(1)
        live += tiles.sum().item()
        total += tiles.numel()
    return live / total


def error(got, want):
    """Relative error in the norm of the whole tensor."""
    return ((got.double() - want).norm() / want.norm()).item()
