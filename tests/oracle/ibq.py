#!/usr/bin/env python3
"""Small vision tokenizers as other programs save them, with what they compute, in tests/fixtures/ibq.

    ibq.py                                  writes the fixtures (a second, no GPU)
    ibq.py --reference CHECKOUT FILE PICTURES
                                            loads a checkpoint of ours with IBQ's own code and compares what it computes

IBQ (arXiv 2412.02692) publishes checkpoints of PyTorch Lightning; Emu3.5 a bare dictionary with a configuration. The
networks here are written naively, with the names of IBQ's public checkpoints. CHECKOUT is a checkout of
TencentARC/SEED-Voken; FILE and PICTURES are written by the ignored test `exchange::tokenizer::writes_for_the_reference`.
The reference's code runs as it is, except that Lightning and the download of VGG16 are replaced by stubs.
"""

import argparse
import pathlib
import sys
import types

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "ibq"
CH, MULT, BLOCKS, Z, GROUPS = 8, [1, 1, 2], 1, 8, 4
CODES, DIM, NDF = 48, 8, 2
WIDTHS = [4, 4, 6, 6, 8]
VGG = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]


def norm(c):
    return nn.GroupNorm(GROUPS, c, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.norm1, self.conv1 = norm(i), nn.Conv2d(i, o, 3, padding=1)
        self.norm2, self.conv2 = norm(o), nn.Conv2d(o, o, 3, padding=1)
        if i != o:
            self.nin_shortcut = nn.Conv2d(i, o, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))
        p = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, 2)
        return x + self.proj_out((v @ p.transpose(1, 2)).view_as(x))


class Resample(nn.Module):
    def __init__(self, c, stride):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride, padding=0 if stride == 2 else 1)

    def forward(self, x):
        if self.conv.stride[0] == 2:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def level(i, o, blocks, attends):
    it = nn.Module()
    it.block = nn.ModuleList(Residual(i if b == 0 else o, o) for b in range(blocks))
    it.attn = nn.ModuleList(Attention(o) for _ in range(blocks if attends else 0))
    return it


def through(it, h):
    for b, block in enumerate(it.block):
        h = block(h)
        if len(it.attn):
            h = it.attn[b](h)
    return h


def middle(c):
    it = nn.Module()
    it.block_1, it.attn_1, it.block_2 = Residual(c, c), Attention(c), Residual(c, c)
    return it


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, CH, 3, padding=1)
        self.down, c, last = nn.ModuleList(), CH, len(MULT) - 1
        for l, m in enumerate(MULT):
            self.down.append(level(c, CH * m, BLOCKS, l == last))
            c = CH * m
            if l < last:
                self.down[-1].downsample = Resample(c, 2)
        self.mid, self.norm_out = middle(c), norm(c)
        self.conv_out = nn.Conv2d(c, Z, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for it in self.down:
            h = through(it, h)
            h = it.downsample(h) if hasattr(it, "downsample") else h
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        c, last = CH * MULT[-1], len(MULT) - 1
        self.conv_in, self.mid = nn.Conv2d(Z, c, 3, padding=1), middle(c)
        up = []
        for l in reversed(range(len(MULT))):
            it = level(c, CH * MULT[l], BLOCKS + 1, l == last)
            c = CH * MULT[l]
            if l > 0:
                it.upsample = Resample(c, 1)
            up.insert(0, it)
        self.up, self.norm_out = nn.ModuleList(up), norm(c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z):
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(self.conv_in(z))))
        for it in reversed(self.up):
            h = through(it, h)
            h = it.upsample(h) if hasattr(it, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h)))


def perceptual():
    """The perceptual loss with narrow blocks."""
    it, c = nn.Module(), 3
    it.scaling_layer, it.net = nn.Module(), nn.Module()
    for what, values in [("shift", [-0.030, -0.088, -0.188]), ("scale", [0.458, 0.448, 0.450])]:
        it.scaling_layer.register_buffer(what, torch.tensor(values).view(1, 3, 1, 1))
    for s, (places, width) in enumerate(zip(VGG, WIDTHS)):
        block = nn.Sequential()
        for place in places:
            block.add_module(str(place), nn.Conv2d(c, width, 3, padding=1))
            c = width
        it.net.add_module(f"slice{s + 1}", block)
        head = nn.Module()
        head.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
        it.add_module(f"lin{s}", head)
    return it.requires_grad_(False)


def discriminator():
    it, c, layers = nn.Module(), NDF, [nn.Conv2d(3, NDF, 4, 2, 1), nn.LeakyReLU(0.2)]
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * c), nn.LeakyReLU(0.2)]
        c *= 2
    it.main = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))
    return it


class Averages(nn.Module):
    """Buffers with the names of parameters, without dots."""

    def __init__(self, model, seed):
        super().__init__()
        self.register_buffer("decay", torch.tensor(0.999))
        self.register_buffer("num_updates", torch.tensor(1234, dtype=torch.int))
        noise = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            if p.requires_grad:
                other = p.detach() + 0.05 * torch.randn(p.shape, generator=noise)
                self.register_buffer(name.replace(".", ""), other)


class Tokenizer(nn.Module):
    def __init__(self, losses):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
        if losses:
            self.loss = nn.Module()
            self.loss.perceptual_loss, self.loss.discriminator = perceptual(), discriminator()
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(CODES, DIM)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(Z, DIM, 1), nn.Conv2d(DIM, Z, 1)

    def scores(self, x, unit):
        z = self.quant_conv(self.encoder(x)).permute(0, 2, 3, 1)
        e = self.quantize.embedding.weight
        if unit:
            z, e = F.normalize(z, dim=-1), F.normalize(e, dim=-1)
        return z @ e.T, e

    def run(self, x, unit=False):
        """Codes in the order of rows, and the reconstruction [B, H, W, 3], clamped."""
        scores, e = self.scores(x, unit)
        best = scores.topk(2, -1).values
        assert (best[..., 0] - best[..., 1]).min() > 1e-4, "two codes nearly tie; choose another seed"
        codes = scores.argmax(-1)
        rec = self.decoder(self.post_quant_conv(e[codes].permute(0, 3, 1, 2)))
        return codes.flatten().int(), rec.clamp(-1, 1).permute(0, 2, 3, 1).float().contiguous()


def drawn(model, seed):
    """Weights away from their initial values, so that every one of them counts."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=noise))
            else:
                p.copy_(torch.randn(p.shape, generator=noise) * (p[0].numel() if p.dim() > 2 else 1) ** -0.5)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=noise))
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=noise) + 0.5)
            elif name.endswith("num_batches_tracked"):
                b.fill_(77)
    return model


def computed(model, x, unit=False):
    with torch.no_grad():
        return model.double().run(x.double(), unit)


DDCONFIG = f"""double_z: False
z_channels: {Z}
resolution: 16
in_channels: 3
out_ch: 3
ch: {CH}
ch_mult: {MULT}  # num_down = len(ch_mult)-1
num_res_blocks: {BLOCKS}
attn_resolutions: [4]
dropout: 0.0
norm_groups: {GROUPS}
"""


def indented(text, by):
    return "".join(" " * by + line + "\n" for line in text.splitlines())


LIGHTNING = f"""seed_everything: true
trainer:
  max_epochs: 330
model:
  class_path: src.IBQ.models.ibqgan.IBQ
  init_args:
    ddconfig:
{indented(DDCONFIG, 6)}
    lossconfig:
      target: src.IBQ.modules.losses.vqperceptual.VQLPIPSWithDiscriminator
      params:
        disc_conditional: False
        disc_in_channels: 3
        disc_ndf: {NDF}
        gen_loss_weight: 0.1
        entropy_loss_weight: 0.1

    n_embed: {CODES}
    embed_dim: {DIM}
    learning_rate: 1e-4
    l2_normalize: False
    entropy_temperature: 0.02
    beta: 0.5
    use_ema: True
    resume_lr:
ckpt_path: null # to resume
"""

EMU = f"""ddconfig:
{indented(DDCONFIG, 2)}n_embed: {CODES}
embed_dim: {DIM}
beta: 0.25
use_entropy_loss: true
cosine_similarity: false
l2_normalize: true
"""


def write():
    (FIXTURES / "emu").mkdir(parents=True, exist_ok=True)
    x = torch.rand((2, 16, 24, 3), generator=torch.Generator().manual_seed(1)) * 2 - 1
    picture = x.permute(0, 3, 1, 2)
    expected = {"image": x}

    # A checkpoint of Lightning, saved after a step of an optimizer over some of the parameters.
    model = drawn(Tokenizer(losses=True), 2)
    model.model_ema = Averages(model, 3)
    optimizer = torch.optim.Adam(model.quant_conv.parameters(), lr=0.0)
    model.quant_conv(torch.zeros(1, Z, 1, 1)).sum().backward()
    optimizer.step()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    checkpoint = {
        "epoch": 3,
        "global_step": 1234,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "", "best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
    }
    torch.save(checkpoint, FIXTURES / "ibq.ckpt")
    (FIXTURES / "ibq.yaml").write_text(LIGHTNING)
    expected["raw.codes"], expected["raw.rec"] = computed(model, picture)
    with torch.no_grad():
        averages = dict(model.model_ema.named_buffers())
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(averages[name.replace(".", "")])
    expected["ema.codes"], expected["ema.rec"] = computed(model, picture)
    assert (expected["raw.codes"] != expected["ema.codes"]).any()

    # A bare dictionary with a configuration, as Emu3.5 has it.
    bare = drawn(Tokenizer(losses=False), 5)
    torch.save({name: t.clone() for name, t in bare.state_dict().items()}, FIXTURES / "emu" / "model.ckpt")
    (FIXTURES / "emu" / "config.yaml").write_text(EMU)
    expected["emu.codes"], expected["emu.rec"] = computed(bare, picture)
    expected["emu_l2.codes"], expected["emu_l2.rec"] = computed(bare, picture, unit=True)
    assert (expected["emu.codes"] != expected["emu_l2.codes"]).any()
    save_file(expected, FIXTURES / "expected.safetensors")

    # VGG16 as torchvision saves it, in both formats of PyTorch, and the heads of LPIPS.
    loss = {n.removeprefix("loss.perceptual_loss."): t for n, t in state.items() if "perceptual" in n}
    features = {}
    for name, t in loss.items():
        if name.startswith("net."):
            features["features." + name.split(".", 2)[2]] = t
    features["classifier.0.weight"], features["classifier.0.bias"] = torch.ones(4, 8), torch.ones(4)
    torch.save(features, FIXTURES / "vgg16.pth")
    torch.save(features, FIXTURES / "vgg16-legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({name: t for name, t in loss.items() if name.startswith("lin")}, FIXTURES / "heads.pth")
    torch.save(loss, FIXTURES / "lpips.pth")
    sizes = {str(p.relative_to(FIXTURES)): p.stat().st_size for p in sorted(FIXTURES.rglob("*")) if p.is_file()}
    print(*(f"{size:8} {name}" for name, size in sizes.items()), sep="\n")


def stub(name, **what):
    module = types.ModuleType(name)
    for key, value in what.items():
        setattr(module, key, value)
    sys.modules[name] = module
    return module


def instantiate(config):
    """The reference's `instantiate_from_config`, whose module needs all of Lightning."""
    module, cls = (config.get("target") or config["class_path"]).rsplit(".", 1)
    arguments = config.get("params") or config.get("init_args") or {}
    return getattr(__import__(module, fromlist=[cls]), cls)(**arguments)


def reference(checkout, file, pictures):
    import torchvision
    import yaml

    sys.path.insert(0, str(checkout))
    for name in ("lightning", "pytorch_lightning"):
        stub(name, LightningModule=nn.Module)
    stub("main", instantiate_from_config=instantiate)
    vgg16 = torchvision.models.vgg16
    torchvision.models.vgg16 = lambda pretrained=False: vgg16(weights=None)
    from src.IBQ.modules.losses import lpips

    lpips.LPIPS.load_from_pretrained = lambda self, name=None: None

    saved = torch.load(file, map_location="cpu", weights_only=True)
    state = saved["state_dict"]
    config = yaml.safe_load((checkout / "configs/IBQ/gpu/imagenet_ibqgan_1024.yaml").read_text())["model"]
    config["init_args"]["n_embed"] = len(state["quantize.embedding.weight"])
    config["init_args"]["learning_rate"] = 1e-4
    model = instantiate(config)
    loaded = model.load_state_dict(state, strict=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{file}: {len(state)} tensors, loaded with strict=True: {loaded}")
    print(f"{type(model).__module__}.{type(model).__name__}, {parameters} parameters, "
          f"{sum(k.startswith('model_ema.') for k in state)} tensors of averages, "
          f"updates {model.model_ema.num_updates.item()}, decay {model.model_ema.decay.item():.6f}")
    ours = load_file(pictures)
    x = ours["image"].permute(0, 3, 1, 2)
    model.eval()
    failed = False
    with torch.no_grad():
        for what in ("raw", "ema"):
            if what == "ema":
                model.model_ema.copy_to(model)
            z, _, (_, _, codes) = model.encode(x)
            rec = model.decode(z).clamp(-1, 1).permute(0, 2, 3, 1)
            same = (codes.int() == ours[f"{what}.codes"]).sum().item()
            error = (rec - ours[f"{what}.rec"]).abs().max().item()
            print(f"{what}: {same} of {codes.numel()} codes are the same "
                  f"({len(codes.unique())} different ones), reconstructions differ by at most {error:.1e}")
            failed |= same < codes.numel() or error > 1e-3
    return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", nargs=3, type=pathlib.Path, metavar=("CHECKOUT", "FILE", "PICTURES"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.reference:
        sys.exit(reference(*arguments.reference))
    write()


if __name__ == "__main__":
    main()
