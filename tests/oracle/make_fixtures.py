"""Writes the fixtures under tests/fixtures, or checks the committed ones.

    python make_fixtures.py            # write every case and MANIFEST.sha256
    python make_fixtures.py ranks      # write this case only, and MANIFEST.sha256
    python make_fixtures.py --check    # run the twin on the committed inputs, compare with the committed outputs

Each case is a directory with config.toml, weights.safetensors, batch.safetensors (the inputs, float32 and
int32) and expected.safetensors (the twin's outputs, float64); those of several ranks have more outputs. The twin
reads the inputs back from these files, so that the outputs depend on nothing else.
"""

import argparse
import copy
import hashlib
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import twin

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
INPUTS = ["config.toml", "weights.safetensors", "batch.safetensors"]

BASE = {
    "tokenizer": dict(ch=4, ch_mult=[1, 2, 2], num_res_blocks=1, z_channels=8, norm_groups=2, norm_eps=1e-6),
    "quantizer": dict(
        kind="ibq", codes=24, dim=6, metric="dot", beta=0.25, beta_on="codebook", temperature=0.01, entropy_eps=1e-5
    ),
    "lpips": dict(widths=[4, 6, 8, 8, 8]),
    "discriminator": dict(ndf=4, lecam_decay=0.999),
    "llm": dict(
        vocab=40, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=24, rms_eps=1e-6, rope_theta=1e6
    ),
    "projector": dict(norm=False),
    "loss": dict(alpha=0.25, rec=1.0, quant=1.0, lpips=1.0, gan=0.1, entropy=0.05, lecam=0.05),
    "train": dict(arm="ett", lr=4e-5, betas=[0.9, 0.95], adam_eps=1e-8, disc_betas=[0.5, 0.9]),
}

# name -> (seed, batch, height, width, text tokens, changes to BASE)
CASES = {
    "dot": (22, 2, 32, 32, 7, {"tokenizer": dict(ch_mult=[1, 2, 3]), "discriminator": dict(ndf=3)}),
    "l2norm": (
        12, 1, 32, 48, 6,
        {
            "tokenizer": dict(ch_mult=[2, 1, 2], z_channels=6),
            "quantizer": dict(codes=10, dim=5, metric="l2norm", beta=0.3, beta_on="commitment", temperature=0.05),
            "lpips": dict(widths=[4, 5, 6, 7, 8]),
            "projector": dict(norm=True),
            "loss": dict(alpha=0.5, rec=0.9, quant=1.1, lpips=0.8, gan=0.2, entropy=0.07, lecam=0.06),
            "train": dict(lr=1e-4, betas=[0.8, 0.97], adam_eps=1e-7, disc_betas=[0.4, 0.95]),
        },
    ),
    "vq": (
        13, 2, 32, 32, 5,
        {
            "tokenizer": dict(ch_mult=[1, 1, 2, 2], num_res_blocks=2),
            "quantizer": dict(kind="vq", codes=16, beta_on="commitment"),
            "llm": dict(width=12, heads=3, kv_heads=1, head_dim=6),
        },
    ),
    "alpha0": (22, 2, 32, 32, 6, {"loss": dict(alpha=0.0)}),
    "embed": (15, 2, 32, 32, 6, {"projector": dict(norm=True), "train": dict(arm="embed")}),
    "index": (16, 2, 32, 32, 6, {"train": dict(arm="index")}),
    "ranks": (
        17, 4, 24, 32, 5,
        {
            "tokenizer": dict(ch_mult=[1, 1, 2]),
            "quantizer": dict(codes=20, temperature=0.1),
            "lpips": dict(widths=[4, 4, 4, 4, 4]),
            # Averages that matter in the first step, in which they start at 0.
            "discriminator": dict(ndf=2, lecam_decay=0.4, sync=False),
            "llm": dict(vocab=24, width=12, layers=1, heads=2, kv_heads=1, head_dim=6, mlp=16),
            "loss": dict(gan=0.3, entropy=0.3, lecam=0.5),
            # Gradients so small that Adam depends on their size, and thus on clipping.
            "train": dict(lr=1e-3, adam_eps=1e-3, clip=0.2),
        },
    ),
}  # fmt: skip

# Cases that are the step of several ranks.
RANKS = {"ranks": 2}

# Keys that not every case has.
OPTIONAL = {"discriminator": {"sync"}, "train": {"clip"}}


# ------------------------------------------------------------------------------------------------
# Inputs
# ------------------------------------------------------------------------------------------------


def config_of(changes):
    cfg = copy.deepcopy(BASE)
    for section, values in changes.items():
        assert values.keys() <= cfg[section].keys() | OPTIONAL.get(section, set())
        cfg[section] |= values
    return cfg


def toml_text(cfg):
    def value(v):
        if isinstance(v, bool):
            return str(v).lower()
        if isinstance(v, str):
            return f'"{v}"'
        return repr(v)

    sections = (f"[{name}]\n" + "".join(f"{k} = {value(v)}\n" for k, v in keys.items()) for name, keys in cfg.items())
    return "\n".join(sections)


def to_grid(x):
    """Rounds to multiples of 2^-14, so that the inputs do not depend on the last bits of a math library."""
    return torch.from_numpy(np.round(np.asarray(x, dtype=np.float64) * 2**14) / 2**14).float()


def random_image(rng, batch, height, width):
    """A few smooth waves plus noise, mapped into (-1, 1)."""
    y, x = np.mgrid[0:height, 0:width] / 32.0
    image = 0.25 * rng.standard_normal((batch, height, width, 3))
    for b in range(batch):
        for c in range(3):
            for _ in range(6):
                fy, fx, phase = rng.uniform(-3, 3), rng.uniform(-3, 3), rng.uniform(0, 2 * np.pi)
                image[b, :, :, c] += rng.uniform(0.1, 0.6) * np.cos(2 * np.pi * (fy * y + fx * x) + phase)
    return to_grid(np.tanh(image))


def random_text(rng, batch, tokens, vocab):
    """Token ids with one repetition inside every sample."""
    text = rng.integers(0, vocab, size=(batch, tokens))
    text[:, -2] = text[:, 0]
    return torch.from_numpy(text.astype(np.int32))


def random_weight(rng, name, shape):
    normal = rng.standard_normal(shape)
    fan_in = int(np.prod(shape[1:])) or 1
    if name.endswith("scaling_layer.shift"):
        return np.array([-0.030, -0.088, -0.188]).reshape(shape)
    if name.endswith("scaling_layer.scale"):
        return np.array([0.458, 0.448, 0.450]).reshape(shape)
    if ".lin" in name:  # the LPIPS heads are not negative
        return rng.uniform(0.1, 1.0, shape)
    if len(shape) == 1:
        return 1.0 + 0.15 * normal if name.endswith("weight") else 0.1 * normal
    if "perceptual_loss" in name:
        return normal * np.sqrt(2.0 / fan_in)
    if name == "model.embed_tokens.weight":
        return 0.4 * normal
    if name == "visual_embed.weight":
        return 0.5 * normal
    if name == "decoder.conv_out.weight":
        return 0.6 * normal / np.sqrt(fan_in)
    if name == "loss.discriminator.main.11.weight":  # logits on both sides of the hinge
        return 3.0 * normal / np.sqrt(fan_in)
    return 1.2 * normal / np.sqrt(fan_in)


def random_weights(rng, cfg, image):
    weights = {name: to_grid(random_weight(rng, name, s)) for name, s in twin.parameter_shapes(cfg).items()}
    set_quantizer(rng, cfg, weights, image)
    return weights


def set_quantizer(rng, cfg, weights, image):
    """Chooses quant_conv and the codebook from the data, so that neither softmax is flat or one-hot everywhere.

    quant_conv partly whitens the encoder's features and mixes them at random; a third of the codes are close to
    another code, which gives the sharp softmax of the entropies near ties.
    """
    q = cfg["quantizer"]
    W = {name: value.double() for name, value in weights.items()}
    h = twin.encoder(W, image.double().permute(0, 3, 1, 2), cfg).permute(0, 2, 3, 1).flatten(0, 2)
    mean, n = h.mean(dim=0), h.shape[1]
    covariance = (h - mean).T @ (h - mean) / len(h)
    covariance += 0.02 * covariance.trace() / n * torch.eye(n, dtype=h.dtype)
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance))
    mix = torch.from_numpy(rng.standard_normal((q["dim"], n))) / np.sqrt(n)
    weight = mix @ whiten
    bias = -weight @ mean + 0.1 * torch.from_numpy(rng.standard_normal(q["dim"]))
    weights["quant_conv.weight"] = to_grid(weight[:, :, None, None])
    weights["quant_conv.bias"] = to_grid(bias)

    if q["kind"] == "vq":  # codes near the data
        rows = rng.choice(len(h), size=q["codes"], replace=False)
        codebook = (h @ weight.T + bias)[rows].numpy() + 0.3 * rng.standard_normal((q["codes"], q["dim"]))
    else:
        codebook = 1.25 * rng.standard_normal((q["codes"], q["dim"]))
        pairs = q["codes"] // 6
        codebook[1 : 2 * pairs : 2] = codebook[0 : 2 * pairs : 2] + q["temperature"] * rng.standard_normal((pairs, q["dim"]))
    weights["quantize.embedding.weight"] = to_grid(codebook)


# ------------------------------------------------------------------------------------------------
# Cases
# ------------------------------------------------------------------------------------------------


def outputs(name):
    """The files of outputs of a case."""
    return ["expected.safetensors"] + (["tokenizer.safetensors", "clipped.safetensors"] if name in RANKS else [])


def run_case(name, directory):
    """The inputs of a case, and the contents of its outputs."""
    cfg = twin.load_config(directory / "config.toml")
    weights = load_file(directory / "weights.safetensors")
    batch = load_file(directory / "batch.safetensors")
    assert {n: tuple(w.shape) for n, w in weights.items()} == twin.parameter_shapes(cfg)

    def step(kinds, **how):
        out = twin.training_step(cfg, weights, batch, RANKS.get(name, 1), **how)
        return {key: value for key, value in out.items() if key.startswith(kinds)}

    usual = ("loss.", "act.", "grad.", "after.")
    found = {"expected.safetensors": step(usual)}
    if name in RANKS:
        found["tokenizer.safetensors"] = step(usual, stage="tokenizer")
        found["clipped.safetensors"] = step(("loss.", "norm.", "after.", "state."), clip=cfg["train"]["clip"])
    return cfg, weights, batch, found


def save(tensors, path):
    save_file(tensors, path)
    path.chmod(0o644)


def write_case(name, directory):
    seed, batch, height, width, tokens, changes = CASES[name]
    cfg = config_of(changes)
    rng = np.random.default_rng(seed)
    image = random_image(rng, batch, height, width)
    text = random_text(rng, batch, tokens, cfg["llm"]["vocab"])
    weights = random_weights(rng, cfg, image)

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.toml").write_text(toml_text(cfg))
    save(weights, directory / "weights.safetensors")
    save({"input.image": image, "input.text": text}, directory / "batch.safetensors")
    assert twin.load_config(directory / "config.toml") == cfg
    cfg, weights, batch, found = run_case(name, directory)
    report(name, cfg, weights, batch, found["expected.safetensors"])
    for file in outputs(name):
        save(found[file], directory / file)


def report(name, cfg, weights, batch, expected):
    """Prints statistics that show what a case covers, and fails if its indices or gradients are fragile."""
    q = cfg["quantizer"]
    W = {n: w.double() for n, w in weights.items()}
    image = batch["input.image"].double().permute(0, 3, 1, 2)
    z, _ = twin.encode(W, image, cfg)
    scores = twin.quantize(z, W["quantize.embedding.weight"], cfg)["scores"]
    top = scores.topk(2, dim=1).values
    gap = (top[:, 0] - top[:, 1]).min().item()

    def quantiles(x):
        return " ".join(f"{v:.3f}" for v in torch.quantile(x, torch.tensor([0, 0.1, 0.5, 0.9, 1.0], dtype=x.dtype)))

    print(f"{name}: {len(z)} tokens, {len(expected['act.ind'].unique())} of {q['codes']} codes used, smallest top-2 gap {gap:.2e}")
    if q["kind"] == "ibq":
        print("  p_top min 10% 50% 90% max:", quantiles(scores.softmax(dim=1).max(dim=1).values))
        print("  q_top min 10% 50% 90% max:", quantiles((scores / q["temperature"]).softmax(dim=1).max(dim=1).values))
    print("  losses:", " ".join(f"{n} {expected['loss.' + n].item():.5g}" for n in twin.LOSSES))
    if "act.rec" in expected:
        rec = expected["act.rec"].permute(0, 3, 1, 2)
        _, _, real, fake = twin.discriminator_losses(W, image, rec, cfg)
        inactive = ((real > 1).double().mean().item(), (fake < -1).double().mean().item())
        dead = [((f == 0).all(dim=1)).double().mean().item() for f in twin.vgg_features(W, rec)]
        print(f"  rec std {rec.std():.3f}; patch logits std {real.std():.3f} {fake.std():.3f},", end=" ")
        print(f"beyond the hinge {inactive[0]:.2f} {inactive[1]:.2f}")
        print("  all-zero VGG features per layer:", " ".join(f"{d:.3f}" for d in dead))
    grads = {n[5:]: g for n, g in expected.items() if n.startswith("grad.")}
    for prefix in ["encoder.", "quant_conv.", "quantize.", "post_quant_conv.", "decoder.", "loss.d", "model.", "projector.", "visual_"]:
        parts = [g.flatten() for n, g in grads.items() if n.startswith(prefix)]
        if parts:
            flat = torch.cat(parts)
            print(f"  grad {prefix:17} {len(flat):6} elements, rms {flat.square().mean().sqrt():.3e}")
    assert gap > 1e-4
    assert all(t.isfinite().all() for t in expected.values())
    for n, g in grads.items():
        # A constant added to all keys of an unrotated attention changes nothing: its exact gradient is zero.
        assert g.abs().max() > 1e-9 or n.endswith(".k.bias"), n


def manifest():
    """The checksums of all cases, and of the files that files.py, ibq.py and llm.py write."""
    lines = []
    found = [path for folder in ("files", "ibq", "llm") for path in (FIXTURES / folder).rglob("*") if path.is_file()]
    others = [path.relative_to(FIXTURES).as_posix() for path in found]
    for path in sorted([f"{case}/{file}" for case in CASES for file in INPUTS + outputs(case)] + others):
        lines.append(f"{hashlib.sha256((FIXTURES / path).read_bytes()).hexdigest()}  {path}\n")
    return "".join(lines)


def check():
    """Compares a fresh run with every committed case: indices exactly, the rest to 1e-11 in norm."""
    failures = []
    if (FIXTURES / "MANIFEST.sha256").read_text() != manifest():
        failures.append("MANIFEST.sha256 does not fit the files")
    for name, file in [(name, file) for name in CASES for file in outputs(name)]:
        *_, found = run_case(name, FIXTURES / name)
        fresh, expected = found[file], load_file(FIXTURES / name / file)
        if fresh.keys() != expected.keys():
            failures.append(f"{name}/{file}: other tensors")
            continue
        worst = 0.0
        for key, value in expected.items():
            # The 0.1 is for tensors that are zero up to rounding.
            error = ((fresh[key] - value).double().norm() / (value.double().norm() + 0.1)).item()
            worst = max(worst, error)
            if error > (0 if key == "act.ind" else 1e-11):
                failures.append(f"{name}/{file}: {key} is off by {error:.1e}")
        print(f"{name}/{file}: {len(expected)} tensors, worst relative error {worst:.1e}")
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", choices=[[], *CASES], help="write only these; all if none is named")
    parser.add_argument("--check", action="store_true", help="compare the committed fixtures with a fresh run; write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if arguments.check:
        sys.exit(check())
    for name in arguments.cases or CASES:
        write_case(name, FIXTURES / name)
    (FIXTURES / "MANIFEST.sha256").write_text(manifest())


if __name__ == "__main__":
    main()
