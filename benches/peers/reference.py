"""What the errors are measured against: float64, from the same inputs."""

import torch

import published


def best_codes(z, e, chunk=512):
    e = e.double()
    return torch.cat([(rows.double() @ e.t()).argmax(1) for rows in z.split(chunk)])


def gradients(z, e, g, weights, setting):
    """dz and de of the published form, by autograd, without autocast."""
    z, e = (x.detach().double().requires_grad_() for x in (z, e))
    zq, _, losses = published.quantize(z, e, setting)
    total = (zq * g.double()).sum() + sum(w * loss for w, loss in zip(weights, losses))
    return torch.autograd.grad(total, (z, e))


def error(got, want):
    """Relative error in the norm of the whole tensor."""
    return ((got.double() - want).norm() / want.norm()).item()
