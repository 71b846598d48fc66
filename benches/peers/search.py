"""The best code of each token (largest dot product) in PyTorch and in Triton."""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def matmul_argmax(z, e):
    """Scores are stored, rounded to the type of the inputs."""
    return (z @ e.t()).argmax(1)


def wide_argmax(z, e):
    """The same for bfloat16 with the scores in float32: twice the memory, no rounding."""
    return torch.mm(z, e.t(), out_dtype=torch.float32).argmax(1)


class tf32:
    """Products of float32 matrices in TF32."""

    def __init__(self, on=True):
        self.on = on

    def __enter__(self):
        self.before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.on

    def __exit__(self, *_):
        torch.backends.cuda.matmul.allow_tf32 = self.before


if triton is not None:
    # Tiles of tokens and codes, warps, and stages of the copies of codes.
    CONFIGS = [
        triton.Config({"ROWS": rows, "CODES": codes}, num_warps=warps, num_stages=stages)
        for rows, codes, warps, stages in (
            (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 64, 8, 1), (128, 32, 8, 3),
            (64, 64, 4, 2), (64, 32, 4, 2))
    ]

    @triton.autotune(configs=CONFIGS, key=["D", "PRECISION", "SPLIT"])
    @triton.jit
    def sweep(z, e, z_low, e_low, scores, codes, m, k, per_part, D: tl.constexpr, PRECISION: tl.constexpr,
              SPLIT: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr):
        """A program keeps ROWS tokens and sweeps a part of the codes. Each lane of a row has a maximum of its own; they
        are compared once, at the end. SPLIT: tokens are z + z_low, codes e + e_low, and the product of the low parts
        is left out."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        part = tl.program_id(1)
        dim, lane = tl.arange(0, D), tl.arange(0, CODES)
        tokens = tl.load(z + row[:, None] * D + dim[None, :], mask=row[:, None] < m, other=0.0)
        if SPLIT:
            low = tl.load(z_low + row[:, None] * D + dim[None, :], mask=row[:, None] < m, other=0.0)
        best = tl.full((ROWS, CODES), float("-inf"), tl.float32)
        where = tl.zeros((ROWS, CODES), tl.int32)
        begin = part * per_part
        for at in range(begin, begin + per_part, CODES):
            code = at + lane
            tile = tl.load(e + code[:, None] * D + dim[None, :], mask=code[:, None] < k, other=0.0)
            score = tl.dot(tokens, tile.T, input_precision=PRECISION)
            if SPLIT:
                score = tl.dot(low, tile.T, score)
                tile_low = tl.load(e_low + code[:, None] * D + dim[None, :], mask=code[:, None] < k, other=0.0)
                score = tl.dot(tokens, tile_low.T, score)
            score = tl.where(code[None, :] < k, score, float("-inf"))
            better = score > best
            best = tl.where(better, score, best)
            where = tl.where(better, at, where)
        top, at = tl.max(best, 1, return_indices=True)
        first = tl.sum(tl.where(lane[None, :] == at[:, None], where, 0), 1)
        tl.store(scores + part * m + row, top, mask=row < m)
        tl.store(codes + part * m + row, first + at, mask=row < m)

    def split(x):
        high = x.to(torch.bfloat16)
        return high, (x - high.float()).to(torch.bfloat16)

    def fused(z, e, precision="tf32", parts_of_numbers=1):
        """Nothing of size M x K is stored. The codes are cut into parts if there are few tokens. With two parts of
        numbers, a product of float32 numbers is three products of bfloat16 numbers."""
        z_low, e_low = z, e
        if parts_of_numbers == 2:
            (z, z_low), (e, e_low) = split(z), split(e)
        (m, d), k = z.shape, len(e)
        parts = 1
        while triton.cdiv(m, 128) * parts < 256 and k // parts >= 1024:
            parts *= 2
        per_part = triton.cdiv(triton.cdiv(k, parts), 128) * 128
        scores = torch.empty(parts, m, device=z.device)
        codes = torch.empty(parts, m, device=z.device, dtype=torch.int32)
        sweep[lambda config: (triton.cdiv(m, config["ROWS"]), parts)](
            z, e, z_low, e_low, scores, codes, m, k, per_part, d, precision, parts_of_numbers == 2)
        if parts == 1:
            return codes[0]
        return codes.gather(0, scores.argmax(0, keepdim=True))[0]


def peers(dtype):
    """Name -> function of (z, e) for data of a type. tf32 is a setting of the process that functions set themselves."""
    compiled = torch.compile(matmul_argmax, dynamic=False)

    def in_tf32(search):
        def run(z, e):
            with tf32():
                return search(z, e)

        return run

    if dtype == torch.bfloat16:
        found = {"matmul + argmax": matmul_argmax, "matmul + argmax, float32 scores": wide_argmax,
                 "matmul + argmax, compiled": compiled}
        if triton is not None:
            found["Triton, fused"] = fused
    else:
        found = {"matmul + argmax": matmul_argmax, "matmul + argmax, tf32": in_tf32(matmul_argmax),
                 "matmul + argmax, tf32, compiled": in_tf32(torch.compile(matmul_argmax, dynamic=False))}
        if triton is not None:
            found["Triton, fused, tf32"] = fused
            found["Triton, fused, tf32x3"] = lambda z, e: fused(z, e, "tf32x3")
            found["Triton, fused, bf16 split"] = lambda z, e: fused(z, e, parts_of_numbers=2)
    return found
