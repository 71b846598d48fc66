"""A training step of ETT's language model on several GPUs in PyTorch: images a second with DDP, ZeRO or FSDP.

    export NCCL_NVLS_ENABLE=0
    torchrun --standalone --nproc-per-node 2 benches/peers/step_ranks.py                  # DDP, blocks compiled
    torchrun --standalone --nproc-per-node 2 benches/peers/step_ranks.py --how zero       # also: fsdp
    python3 benches/peers/step_ranks.py                                                   # one GPU, without communication
    torchrun --standalone --nproc-per-node 2 benches/peers/step_ranks.py --tiny --eager   # a CPU, with gloo

The model has the shape of Qwen2.5-1.5B with a tied head, and a projector in front. A picture is 1024 visual tokens, which
the projector reads, and 128 text tokens, which are predicted; everything is trained. Weights, gradients and AdamW are float32,
all products bf16; gradients are reduced in float32 (--bf16-gradients: in bf16) and clipped by their norm. Data are random.

Rank 0 prints one line of JSON. `median_us` is the time of a step, `images_per_s` that of all ranks together, `first_s` the
time of the first step, with compilation. The line of a peer that does not fit into memory has an `error` instead, and the
exit status is 1.
"""

import argparse
import json
import os
import statistics
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

PAPER = dict(width=1536, layers=28, heads=12, kv_heads=2, head_dim=128, mlp=8960, vocab=151936, codes=256, visual=1024, text=128)
TINY = dict(width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, vocab=100, codes=8, visual=16, text=6)
NAMES = dict(ddp="PyTorch DDP", zero="PyTorch DDP + ZeRO-1", fsdp="PyTorch FSDP2")
ACT = torch.bfloat16


# ------------------------------------------------------------------------------------------------
# The model: float32 weights, rounded to bf16 where they are used
# ------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RmsNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), 1e-6)


def rotation(tokens, dim, device):
    """Cosines and sines [tokens, dim] of the rotary embedding."""
    rate = 1e6 ** (-torch.arange(0, dim, 2, device=device) / dim)
    angle = torch.arange(tokens, device=device)[:, None] * rate.repeat(2)
    return angle.cos().to(ACT), angle.sin().to(ACT)


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Block(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.head_dim, width = s["head_dim"], s["width"]
        inner, shared = s["heads"] * self.head_dim, s["kv_heads"] * self.head_dim
        self.norm1, self.norm2 = RmsNorm(width), RmsNorm(width)
        self.q, self.k, self.v = Linear(width, inner), Linear(width, shared), Linear(width, shared)
        self.o = Linear(inner, width, bias=False)
        self.gate, self.up = Linear(width, s["mlp"], bias=False), Linear(width, s["mlp"], bias=False)
        self.down = Linear(s["mlp"], width, bias=False)

    def forward(self, x, cos, sin):
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def head_loss(rows, table, target):
    return F.cross_entropy(F.linear(rows, table.to(rows.dtype)).float(), target)


class Model(nn.Module):
    """Visual tokens [B, M, D] and text [B, L] -> mean cross-entropy of the text."""

    def __init__(self, s, recompute):
        super().__init__()
        self.shape, self.recompute, self.head_loss = s, recompute, head_loss
        self.projector = nn.Sequential(Linear(s["codes"], s["width"]), nn.GELU(), Linear(s["width"], s["width"]))
        self.table = nn.Parameter(torch.empty(s["vocab"], s["width"]).normal_(0.0, 0.02))
        self.blocks = nn.ModuleList(Block(s) for _ in range(s["layers"]))
        self.norm = RmsNorm(s["width"])

    def forward(self, visual, text):
        x = torch.cat([self.projector(visual), F.embedding(text, self.table).to(visual.dtype)], dim=1)
        around = rotation(x.shape[1], self.shape["head_dim"], x.device)
        for block in self.blocks:
            x = checkpoint(block, x, *around, use_reentrant=False) if self.recompute else block(x, *around)
        # Each text token is predicted from the position before it, the first from the last visual token.
        rows = x[:, visual.shape[1] - 1 : -1]
        return self.head_loss(self.norm(rows).flatten(0, 1), self.table, text.flatten())

    def compile_parts(self):
        """Compiles a block, for all of them, and the loss. Communication stays outside, between the blocks."""
        Block.forward = torch.compile(Block.forward, dynamic=False, fullgraph=True)
        self.head_loss = torch.compile(head_loss, dynamic=False, fullgraph=True)


# ------------------------------------------------------------------------------------------------
# Training on several ranks
# ------------------------------------------------------------------------------------------------


def distribute(model, device, options):
    """The model and its optimizer, as the ranks share them."""
    adam = dict(lr=4e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if not dist.is_initialized():
        return model, torch.optim.AdamW(model.parameters(), **adam)
    if options.how == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        reduce = ACT if options.bf16_gradients else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=ACT, reduce_dtype=reduce, cast_forward_inputs=False)
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for part in [*model.blocks, model]:
            fully_shard(part, mesh=mesh, mp_policy=policy)
        return model, torch.optim.AdamW(model.parameters(), **adam)

    devices = [device.index] if device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel(
        model, device_ids=devices, gradient_as_bucket_view=True, bucket_cap_mb=options.bucket_mib
    )
    if options.bf16_gradients:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        ddp.register_comm_hook(None, default_hooks.bf16_compress_hook)
    if options.how == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        own = dict(optimizer_class=torch.optim.AdamW, parameters_as_bucket_view=True)
        return ddp, ZeroRedundancyOptimizer(model.parameters(), **own, **adam)
    return ddp, torch.optim.AdamW(model.parameters(), **adam)


class Clock:
    """Time of one step after another, by the device's clock where it has one."""

    def __init__(self, device):
        self.cuda, self.marks = device.type == "cuda", []
        self.mark()

    def mark(self):
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def microseconds(self):
        if not self.cuda:
            return [1e6 * (b - a) for a, b in zip(self.marks, self.marks[1:])]
        torch.cuda.synchronize()
        return [1e3 * a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:])]


def measure(device, ranks, options):
    """The row of rank 0."""
    shape, on_gpu = (TINY if options.tiny else PAPER), device.type == "cuda"
    torch.manual_seed(0)
    with device:
        model = Model(shape, options.recompute)
        torch.manual_seed(1 + int(os.environ.get("RANK", 0)))
        visual = torch.randn(options.batch, shape["visual"], shape["codes"], dtype=ACT)
        text = torch.randint(shape["vocab"], (options.batch, shape["text"]))
    if not options.eager:
        model.compile_parts()
    module, optimizer = distribute(model, device, options)

    def step():
        loss = module(visual, text)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    begin = time.perf_counter()
    losses = [step().item()]
    first = time.perf_counter() - begin
    for _ in range(options.warm_up):
        step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(device)
    for _ in range(options.steps):
        last = step()
        clock.mark()
    times = sorted(clock.microseconds())
    median = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return dict(
        images_per_s=round(ranks * options.batch / median * 1e6, 3), median_us=round(median, 1),
        p20_us=round(times[len(times) // 5], 1), p80_us=round(times[-1 - len(times) // 5], 1), peak_gib=round(peak, 2),
        first_s=round(first, 1), losses=[losses[0], last.item()],
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--how", choices=list(NAMES), default="ddp", help="what the ranks share: with ddp only gradients")
    parser.add_argument("--batch", type=int, help="pictures of a rank; 16, or 2 with --tiny")
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before these, after the first")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--recompute", action="store_true", help="compute the blocks again in the backward pass")
    parser.add_argument("--bf16-gradients", action="store_true", help="reduce gradients in bf16, half the bytes")
    parser.add_argument("--bucket-mib", type=int, default=100, help="gradients that DDP reduces at a time")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script on a CPU")
    options = parser.parse_args()
    options.batch = options.batch or (2 if options.tiny else 16)

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    if ranks > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    # cuDNN's attention is the fastest of PyTorch's on Hopper.
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    attention = sdpa_kernel(backends, set_priority=True) if on_gpu else nullcontext()
    row = dict(
        peer=NAMES[options.how] if ranks > 1 else "PyTorch", ranks=ranks, batch=options.batch, compiled=not options.eager,
        recompute=options.recompute, bf16_gradients=options.bf16_gradients, tiny=options.tiny, torch=torch.__version__,
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
    )  # fmt: skip
    try:
        with attention:
            row |= measure(device, ranks, options)
    except torch.cuda.OutOfMemoryError:
        row["error"] = "does not fit into memory"
    if rank == 0:
        print(json.dumps(row), flush=True)
    if "error" in row:
        os._exit(1)  # other ranks may wait for this one: torchrun ends them
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
