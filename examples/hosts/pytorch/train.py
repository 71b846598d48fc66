#!/usr/bin/env python3
"""Trains a small convolutional IBQ autoencoder twice on the same pictures, from the same seed: with the quantizer in its
published form and with the kernels. Writes the losses, the peak memory and the time of a step to OUT/train.json and, with
matplotlib, OUT/train.png.

    examples/fetch-easy-vqa.sh
    examples/hosts/pytorch/train.py --pictures data/easy-vqa/train --out runs/pytorch

Everything is float32 without TF32, so that the two runs may be compared; with --bf16 both run under autocast, where the
published form also rounds its scores to bfloat16. Rounding makes a token choose another code now and then, after which two
runs differ for good: --reference adds a run of the published form in float64, from which both are equally far if only
rounding tells them apart.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import ett_kernels
import plot
from published import PublishedQuantizer

DEVICE = torch.device("cpu" if ett_kernels.library.on_cpu else "cuda")
FORMS = ("published", "ett_kernels")
REFERENCE = "published, float64"
LOSSES = ("total", "reconstruction", "quantization", "entropy")


def load_pictures(folder, size, most):
    """The first pictures of a folder and its subfolders by name, [N, 3, size, size] bytes."""
    files = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg"))[:most]
    if not files:
        raise SystemExit(f"{folder} has no PNG or JPEG files; examples/fetch-easy-vqa.sh fetches some into data/easy-vqa")
    pictures = [numpy.asarray(Image.open(f).convert("RGB").resize((size, size))) for f in files]
    return torch.from_numpy(numpy.stack(pictures)).permute(0, 3, 1, 2).to(DEVICE)


class Autoencoder(nn.Module):
    """Pictures [B, 3, H, W], tokens [B, dim, H/4, W/4]."""

    def __init__(self, quantizer, width, dim):
        super().__init__()
        block = lambda c: [nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1)]
        down = lambda c, o: nn.Conv2d(c, o, 4, stride=2, padding=1)
        up = lambda c, o: [nn.Upsample(scale_factor=2), nn.Conv2d(c, o, 3, padding=1)]
        self.encoder = nn.Sequential(down(3, width), *block(width), down(width, 2 * width), *block(2 * width),
                                     nn.GroupNorm(8, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, dim, 1))  # fmt: skip
        self.quantize = quantizer
        self.decoder = nn.Sequential(nn.Conv2d(dim, 2 * width, 3, padding=1), *block(2 * width), *up(2 * width, width),
                                     *block(width), *up(width, width), nn.GroupNorm(8, width), nn.SiLU(),
                                     nn.Conv2d(width, 3, 3, padding=1))  # fmt: skip

    def forward(self, x):
        zq, (quant, _, _, entropy), _ = self.quantize(self.encoder(x))
        return self.decoder(zq), quant, entropy


def train(form, pictures, args):
    torch.manual_seed(args.seed)
    if form == "ett_kernels":
        quantizer = ett_kernels.nn.IBQQuantizer(args.codes, args.dim, use_entropy_loss=True)
    else:
        quantizer = PublishedQuantizer(args.codes, args.dim)
    dtype = torch.float64 if form == REFERENCE else torch.float32
    model = Autoencoder(quantizer, args.width, args.dim).to(DEVICE, dtype)
    model.quantize.embedding.weight.data.mul_(args.spread)
    # A warm-up and a large eps, so that gradients of the size of rounding errors make no steps.
    tokens = {}
    model.quantize.register_forward_hook(lambda _, inputs, __: tokens.update(z=inputs[0]))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate, betas=(0.9, 0.99), eps=1e-5)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / args.warmup))
    draw = torch.Generator().manual_seed(args.seed)
    cuda = DEVICE.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []
    for _ in range(args.steps):
        batch = torch.randint(len(pictures), (args.batch,), generator=draw).to(DEVICE)
        synchronize()
        start = time.perf_counter()
        x = pictures[batch].to(dtype) / 127.5 - 1
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.bf16 and form != REFERENCE):
            y, quant, entropy = model(x)
            reconstruction = F.l1_loss(y.to(dtype), x)
            total = reconstruction + quant + args.entropy * entropy
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        warmup.step()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        losses.append([float(v.detach()) for v in (total, reconstruction, quant, entropy)])
    if args.save and form == "ett_kernels":
        z = tokens["z"].detach().movedim(1, -1).flatten(0, -2)
        torch.save(dict(z=z.cpu(), e=model.quantize.embedding.weight.detach().cpu()), args.save)
    return dict(
        losses=dict(zip(LOSSES, zip(*losses))),
        ms_per_step=statistics.median(times[len(times) // 10 :]),  # without the first steps
        peak_mib=torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
    )


def differences(losses, others):
    """Of each loss, the largest difference of two runs, relative to the largest value."""
    largest = lambda values: max(abs(v) for v in values)
    return {name: largest([x - y for x, y in zip(losses[name], others[name])]) / largest(others[name]) for name in LOSSES}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of PNG or JPEG files")
    parser.add_argument("--out", type=Path, default=Path("runs/pytorch"), help="folder for the results")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast in both runs")
    parser.add_argument("--save", type=Path, help="file for the last tokens and the codes, for benches/peers/run.py --tokens")
    parser.add_argument("--reference", action="store_true", help="a further run in float64; needs twice the memory")
    for name, value in dict(steps=100, batch=32, codes=65536, dim=256, size=64, width=128, most=2000, seed=0, warmup=30).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in dict(rate=3e-5, entropy=0.05, spread=0.1).items():
        parser.add_argument(f"--{name}", type=float, default=value)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pictures = load_pictures(args.pictures, args.size, args.most)
    tokens = args.batch * (args.size // 4) ** 2
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    what = f"{tokens} tokens, {args.codes} codes of {args.dim}, {'bf16 autocast' if args.bf16 else 'f32'}"
    result = dict(what=what, device=device, torch=torch.__version__, pictures=len(pictures), forms={})
    result["arguments"] = {k: v for k, v in vars(args).items() if k not in ("pictures", "out", "save")}
    train("ett_kernels", pictures, argparse.Namespace(**vars(args) | dict(steps=2)))  # loads libraries
    for form in (*FORMS, REFERENCE) if args.reference else FORMS:
        result["forms"][form] = run = train(form, pictures, args)
        last = {name: round(values[-1], 5) for name, values in run["losses"].items()}
        memory = f"{run['peak_mib']:.0f} MiB, " if run["peak_mib"] else ""
        print(f"{form}: {run['ms_per_step']:.2f} ms a step, {memory}losses {last}", flush=True)
    forms = result["forms"]
    pairs = [(form, REFERENCE) for form in FORMS] if args.reference else [FORMS]
    result["differences"] = {f"{a} from {b}": differences(forms[a]["losses"], forms[b]["losses"]) for a, b in pairs}
    for pair, values in result["differences"].items():
        print(f"{pair}: largest differences of the losses, relative to their largest value, {values}")
    (args.out / "train.json").write_text(json.dumps(result, indent=1))
    try:
        plot.draw(args.out)
    except ImportError:
        print(f"matplotlib is missing: plot.py {args.out} draws the plot elsewhere")


if __name__ == "__main__":
    main()
