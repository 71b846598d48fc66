"""Why the quantizer keeps the winner out of its cancelling sums: the table in docs/quantizer.md.

Codes and gradients are random; the scores give all codes but the best one a total probability of `rest`. Prints the
relative error of the soft gradient dS E against float64, for four ways to compute dS = p (dP - delta).
Needs only NumPy.
"""

import numpy as np

CODES, DIM, TOKENS = 4096, 32, 64
F32 = np.float32


def bf16(x):
    """Rounds half to even to bfloat16."""
    u = np.asarray(x, F32).view(np.uint32)
    return ((u + ((u >> 16) & 1) + 0x7FFF) & 0xFFFF0000).astype(np.uint32).view(F32)


def scores(rng, rest):
    """One row of scores and its best code t, with sum_{j != t} p_j = rest."""
    s = rng.standard_normal(CODES) * 2
    t = int(rng.integers(CODES))
    s[t] = -np.inf
    s[t] = np.log(np.exp(s).sum()) + np.log((1 - rest) / rest)
    return s.astype(F32), t


def exact(s, t, e, g):
    s, e, g = (x.astype(np.float64) for x in (s, e, g))
    p = np.exp(s - s[t])
    p /= p.sum()
    d = e @ g - e[t] @ g
    return (p * (d - p @ d)) @ e


def ways(s, t, e, g):
    """The four ways, in float32 except for the probabilities of the second one, in bfloat16."""
    dp = e @ g
    x = np.exp(s - s[t])
    p = x / x.sum(dtype=F32)
    yield "delta = sum p dP", (p * (dp - (p * dp).sum(dtype=F32))) @ e
    pb = bf16(p)
    yield "the same, p rounded to bf16", (pb * (dp - (pb * dp).sum(dtype=F32))) @ e
    yield "delta = g . (sum p e)", (p * (dp - (p @ e) @ g)) @ e
    others = np.arange(CODES) != t
    rest = x[others].sum(dtype=F32)
    inv = F32(1) / (F32(1) + rest)
    d = dp - dp[t]
    delta = (x[others] * d[others]).sum(dtype=F32) * inv
    ds = x * inv * (d - delta)
    ds[t] = -inv * delta
    yield "winner kept out", ds @ e


def main():
    rng = np.random.default_rng(1)
    for rest in (0.97, 0.5, 0.1, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        error, size = {}, 0.0
        for _ in range(TOKENS):
            e = bf16(rng.standard_normal((CODES, DIM)))
            g = bf16(rng.standard_normal(DIM))
            s, t = scores(rng, rest)
            want = exact(s, t, e, g)
            size += np.square(want).sum()
            for name, got in ways(s, t, e, g):
                error[name] = error.get(name, 0.0) + np.square(got - want).sum()
        print(f"1 - p_t = {rest:5g}:", ", ".join(f"{n}: {(v / size) ** 0.5:.1e}" for n, v in error.items()))


if __name__ == "__main__":
    main()
