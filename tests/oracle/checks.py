"""Checks of the twin: python checks.py

Compares the results of autograd and library calls in twin.py with formulas written out by hand, with finite
differences, or with the parameter counts of the published model.
"""

import copy
import math

import torch
from safetensors.torch import load_file

import twin
from make_fixtures import BASE, CASES, FIXTURES, config_of

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def close(a, b, bound=1e-12):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    error = ((a - b).norm() / b.norm().clamp_min(1e-300)).item()
    assert error < bound, f"relative error {error:.2e}, bound {bound:.0e}"


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def load_case(name):
    directory = FIXTURES / name
    return (
        twin.load_config(directory / "config.toml"),
        load_file(directory / "weights.safetensors"),
        load_file(directory / "batch.safetensors"),
        load_file(directory / "expected.safetensors"),
    )


# ------------------------------------------------------------------------------------------------
# Quantizer: the closed form of its backward, against autograd
# ------------------------------------------------------------------------------------------------


def closed_form(z, codebook, g_out, q, w_q, w_s, w_a):
    """Gradients of sum(g_out * z_q) + w_q L_quant + w_s H_sample + w_a H_avg, with the winner kept out of the sums."""
    tokens, dim = z.shape
    scores = z @ codebook.T
    ind = scores.argmax(dim=1)
    rows = torch.arange(tokens)
    e = codebook[ind]
    count = tokens * dim
    # The value of z_q is e; the derivative of mean((z_q - z)^2) with respect to z_q is added to the incoming gradient.
    g = g_out + w_q * 2.0 * (e - z) / count

    p = torch.softmax(scores, dim=1)
    dp = g @ codebook.T
    dp = dp - dp[rows, ind][:, None]
    delta = (p * dp).sum(dim=1, keepdim=True)
    d_scores = p * (dp - delta)

    log_q = scores / q["temperature"] - torch.logsumexp(scores / q["temperature"], dim=1, keepdim=True)
    qq = log_q.exp()
    usage = qq.mean(dim=0)
    h = -(qq * log_q).sum(dim=1, keepdim=True)
    c = -(torch.log(usage + q["entropy_eps"]) + usage / (usage + q["entropy_eps"]))
    r = (qq * c).sum(dim=1, keepdim=True)
    d_scores = d_scores + qq * (-w_s * (log_q + h) + w_a * (c - r)) / (tokens * q["temperature"])

    to_z, to_e = (1.0, q["beta"]) if q["beta_on"] == "codebook" else (q["beta"], 1.0)
    dz = d_scores @ codebook + w_q * 2.0 * (1.0 + to_z) * (z - e) / count
    de = d_scores.T @ z
    de.index_add_(0, ind, g + w_q * 2.0 * to_e * (e - z) / count)
    return dz, de


def normalised_backward(x, grad):
    """The gradient through x / |x|, row by row."""
    norm = x.norm(dim=1, keepdim=True)
    unit = x / norm
    return (grad - unit * (unit * grad).sum(dim=1, keepdim=True)) / norm


@check
def quantizer_backward_is_the_closed_form():
    for metric in ["dot", "l2norm"]:
        for beta_on in ["codebook", "commitment"]:
            for temperature in [0.01, 0.05, 1.0]:
                q = dict(BASE["quantizer"], metric=metric, beta_on=beta_on, beta=0.3, temperature=temperature)
                z, codebook = normal(1, 50, q["dim"]).requires_grad_(), (0.7 * normal(2, q["codes"], q["dim"]))
                codebook[1] = codebook[0] + 0.01 * codebook[2]
                codebook.requires_grad_()
                g_out = 0.1 * normal(3, 50, q["dim"])
                w_q, w_s, w_a = 0.25, 0.05, -0.04
                out = twin.quantize(z, codebook, {"quantizer": q})
                loss = (g_out * out["z_q"]).sum() + w_q * out["quant"] + w_s * out["ent_sample"] + w_a * out["ent_avg"]
                dz, de = torch.autograd.grad(loss, [z, codebook])
                z, codebook = z.detach(), codebook.detach()
                if metric == "dot":
                    want_z, want_e = closed_form(z, codebook, g_out, q, w_q, w_s, w_a)
                else:
                    unit_z, unit_e = (x / x.norm(dim=1, keepdim=True) for x in (z, codebook))
                    want_z, want_e = closed_form(unit_z, unit_e, g_out, q, w_q, w_s, w_a)
                    want_z, want_e = normalised_backward(z, want_z), normalised_backward(codebook, want_e)
                close(dz, want_z)
                close(de, want_e)


@check
def quantizer_values():
    for name in CASES:
        cfg, weights, _, expected = load_case(name)
        codebook = weights["quantize.embedding.weight"].double()
        if cfg["quantizer"]["metric"] == "l2norm":
            codebook = codebook / codebook.norm(dim=1, keepdim=True)
            close(expected["act.z"].norm(dim=1), torch.ones(len(expected["act.z"]), dtype=torch.float64))
        close(expected["act.zq"], codebook[expected["act.ind"].long()])


# ------------------------------------------------------------------------------------------------
# Shapes
# ------------------------------------------------------------------------------------------------


@check
def paper_sizes_have_the_published_parameter_counts():
    cfg = copy.deepcopy(BASE)
    cfg["tokenizer"] |= dict(ch=128, ch_mult=[1, 1, 2, 2, 4], num_res_blocks=4, z_channels=256)
    cfg["quantizer"] |= dict(codes=131072, dim=256)
    cfg["discriminator"] |= dict(ndf=64)
    cfg["lpips"] |= dict(widths=[64, 128, 256, 512, 512])
    cfg["llm"] |= dict(vocab=151936, width=1536, layers=28, heads=12, kv_heads=2, head_dim=128, mlp=8960)
    shapes = twin.parameter_shapes(cfg)

    def count(*prefixes):
        return sum(math.prod(s) for n, s in shapes.items() if n.startswith(prefixes))

    assert count("encoder.") == 46_752_256
    assert count("decoder.") == 59_903_875
    assert count("quantize.") == 33_554_432
    assert count("quant_conv.", "post_quant_conv.") == 131_584
    assert count(*twin.TOKENIZER) == 140_342_147
    assert count("model.") == 1_543_714_304
    assert count("loss.perceptual_loss.net.") == 14_714_688  # VGG16's features


class Recorder(dict):
    """A dictionary that records which keys are read."""

    def __init__(self, items):
        super().__init__(items)
        self.used = set()

    def __getitem__(self, key):
        self.used.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        if key in self:
            self.used.add(key)
        return super().get(key, default)


@check
def the_forward_pass_reads_every_weight():
    for name in ["dot", "l2norm", "vq"]:
        cfg, weights, batch, _ = load_case(name)
        W = Recorder({n: w.double() for n, w in weights.items()})
        image = batch["input.image"].double().permute(0, 3, 1, 2)
        twin.generator_side(W, lambda _: W, image, batch["input.text"].long(), cfg)
        assert W.used == W.keys(), W.keys() - W.used


# ------------------------------------------------------------------------------------------------
# Tokenizer parts
# ------------------------------------------------------------------------------------------------


@check
def group_norm_and_residual_block_by_hand():
    cfg, weights, _, _ = load_case("dot")
    W = {n: w.double() for n, w in weights.items()}
    name, groups, eps = "encoder.down.2.block.0", cfg["tokenizer"]["norm_groups"], cfg["tokenizer"]["norm_eps"]
    x = normal(4, 2, W[f"{name}.norm1.weight"].numel(), 5, 4)

    def norm(part, x):
        parts = []
        for chunk in x.chunk(groups, dim=1):
            mean = chunk.mean(dim=(1, 2, 3), keepdim=True)
            parts.append((chunk - mean) / (chunk.square().mean(dim=(1, 2, 3), keepdim=True) - mean**2 + eps).sqrt())
        weight, bias = W[f"{name}.{part}.weight"], W[f"{name}.{part}.bias"]
        return torch.cat(parts, dim=1) * weight[:, None, None] + bias[:, None, None]

    def conv(part, x):
        weight, bias = W[f"{name}.{part}.weight"], W[f"{name}.{part}.bias"]
        pad = weight.shape[2] // 2
        padded = torch.zeros(*x.shape[:2], x.shape[2] + 2 * pad, x.shape[3] + 2 * pad, dtype=x.dtype)
        padded[:, :, pad : pad + x.shape[2], pad : pad + x.shape[3]] = x
        out = bias[None, :, None, None].expand(x.shape[0], -1, *x.shape[2:]).clone()
        for i in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                window = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
                out += torch.einsum("oc,bchw->bohw", weight[:, :, i, j], window)
        return out

    y = norm("norm1", x)
    y = conv("conv1", y / (1 + torch.exp(-y)))
    y = norm("norm2", y)
    y = conv("conv2", y / (1 + torch.exp(-y)))
    close(twin.res_block(W, name, x, cfg), conv("nin_shortcut", x) + y)


@check
def attention_block_by_hand():
    cfg, weights, _, _ = load_case("dot")
    W = {n: w.double() for n, w in weights.items()}
    name = "encoder.mid.attn_1"
    channels = W[f"{name}.norm.weight"].numel()
    x = normal(5, 1, channels, 3, 2)
    y = twin.group_norm(W, f"{name}.norm", x, cfg)[0].reshape(channels, 6)
    q, k, v = (W[f"{name}.{p}.weight"][:, :, 0, 0] @ y + W[f"{name}.{p}.bias"][:, None] for p in "qkv")
    out = torch.zeros_like(y)
    for i in range(6):
        weights_i = torch.exp(torch.stack([q[:, i] @ k[:, j] / channels**0.5 for j in range(6)]))
        out[:, i] = sum(weights_i[j] * v[:, j] for j in range(6)) / weights_i.sum()
    out = W[f"{name}.proj_out.weight"][:, :, 0, 0] @ out + W[f"{name}.proj_out.bias"][:, None]
    close(twin.attn_block(W, name, x, cfg), x + out.reshape(x.shape))


@check
def perceptual_gradient_survives_dead_features():
    f = normal(6, 1, 3, 2, 2).relu()
    f[:, :, 0, 0] = 0.0
    f.requires_grad_()
    unit = twin.unit_features(f)
    (grad,) = torch.autograd.grad((unit * normal(7, *f.shape)).sum(), f)
    assert grad.isfinite().all() and (grad[:, :, 0, 0] == 0).all() and (unit[:, :, 0, 0] == 0).all()
    close(unit[0, :, 1, 1].norm(), 1.0, 1e-9)


# ------------------------------------------------------------------------------------------------
# Language model
# ------------------------------------------------------------------------------------------------


@check
def rope_is_a_rotation_in_the_complex_plane():
    theta, half = 1e6, 3
    x = normal(8, 1, 2, 9, 2 * half)
    z = torch.complex(x[..., :half], x[..., half:])
    for t in range(9):
        for i in range(half):
            angle = t / theta ** (2 * i / (2 * half))
            z[:, :, t, i] *= complex(math.cos(angle), math.sin(angle))
    close(twin.rope(x, theta), torch.cat([z.real, z.imag], dim=-1))


@check
def rms_norm_by_hand():
    x, weight = normal(9, 4, 7), normal(10, 7)
    want = torch.stack([row / math.sqrt(sum(v.item() ** 2 for v in row) / 7 + 1e-6) * weight for row in x])
    close(twin.rms_norm(weight, x, 1e-6), want)


@check
def language_model_attention_by_hand_and_causal():
    cfg, weights, _, _ = load_case("vq")
    llm = cfg["llm"]
    W = {n: w.double() for n, w in weights.items()}
    name, heads, kv_heads, size = "model.layers.0.self_attn", llm["heads"], llm["kv_heads"], llm["head_dim"]
    x = normal(11, 1, 6, llm["width"])
    part = {p: x[0] @ W[f"{name}.{p}_proj.weight"].T + W[f"{name}.{p}_proj.bias"] for p in "qkv"}
    rows = torch.zeros(6, heads * size, dtype=torch.float64)
    for h in range(heads):
        shared = h // (heads // kv_heads)
        q = twin.rope(part["q"][None, None, :, h * size : (h + 1) * size], llm["rope_theta"])[0, 0]
        k = twin.rope(part["k"][None, None, :, shared * size : (shared + 1) * size], llm["rope_theta"])[0, 0]
        v = part["v"][:, shared * size : (shared + 1) * size]
        for t in range(6):
            e = torch.exp(k[: t + 1] @ q[t] / size**0.5)
            rows[t, h * size : (h + 1) * size] = e @ v[: t + 1] / e.sum()
    close(twin.self_attention(W, name, x, llm)[0], rows @ W[f"{name}.o_proj.weight"].T)

    visual, text = normal(12, 1, 4, llm["width"]), torch.tensor([[1, 2, 3, 4]])
    other = torch.tensor([[1, 2, 9, 9]])
    a, b = twin.text_logits(W, visual, text, cfg), twin.text_logits(W, visual, other, cfg)
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.equal(a[:, 3], b[:, 3])


@check
def projector_by_hand():
    for name in ["dot", "l2norm"]:
        cfg, weights, _, _ = load_case(name)
        W = {n: w.double() for n, w in weights.items()}
        x = normal(13, 5, cfg["quantizer"]["dim"])
        y = x
        if cfg["projector"]["norm"]:
            centred = x - x.mean(dim=1, keepdim=True)
            y = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
            y = y * W["projector.norm.weight"] + W["projector.norm.bias"]
        y = y @ W["projector.fc1.weight"].T + W["projector.fc1.bias"]
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        close(twin.projector(W, x, cfg), y @ W["projector.fc2.weight"].T + W["projector.fc2.bias"])


# ------------------------------------------------------------------------------------------------
# The step
# ------------------------------------------------------------------------------------------------


@check
def losses_add_up():
    for name in CASES:
        cfg, _, batch, expected = load_case(name)
        weight, loss = cfg["loss"], {n: expected[f"loss.{n}"].item() for n in twin.LOSSES}
        entropy = weight["entropy"] * (loss["ent_sample"] - loss["ent_avg"])
        vq = sum(weight[n] * loss[n] for n in ["rec", "quant", "lpips", "gan"]) + entropy
        alpha = weight["alpha"] if cfg["train"]["arm"] == "ett" else 0.0
        assert math.isclose(loss["vq"], vq, abs_tol=1e-13)
        assert math.isclose(loss["total"], loss["cap"] + alpha * vq, abs_tol=1e-13)
        assert math.isclose(loss["d_loss"], loss["d_hinge"] + weight["lecam"] * loss["d_lecam"], abs_tol=1e-13)
        logits, text = expected["act.text_logits"], batch["input.text"].long()
        log_p = logits - logits.exp().sum(dim=-1, keepdim=True).log()
        close(-log_p.gather(2, text[..., None]).mean(), loss["cap"])
        if "act.rec" in expected:
            close((expected["act.rec"] - batch["input.image"].double()).abs().mean(), loss["rec"])


@check
def adam_by_hand():
    for name in CASES:
        cfg, weights, _, expected = load_case(name)
        train = cfg["train"]
        for key, grad in expected.items():
            if key.startswith("grad."):
                parameter = key.removeprefix("grad.")
                want = weights[parameter].double() - train["lr"] * grad / (grad.abs() + train["adam_eps"])
                close(expected[f"after.{parameter}"], want)


@check
def finite_differences_agree_where_no_gradient_is_stopped():
    """Central differences in one random direction per parameter, for all parameters but encoder and codebook."""
    for name in ["dot", "l2norm", "vq", "embed", "index"]:
        cfg, weights, batch, expected = load_case(name)
        W = {n: w.double() for n, w in weights.items()}
        image, text = batch["input.image"].double().permute(0, 3, 1, 2), batch["input.text"].long()
        stepped = {n.removeprefix("after."): v for n, v in expected.items() if n.startswith("after.loss.")}

        def total(W):
            return twin.generator_side(W, lambda _: stepped, image, text, cfg)[0]["total"]

        def d_loss(W):
            rec = expected["act.rec"].permute(0, 3, 1, 2)
            *_, real, fake = twin.discriminator_losses(W, image, rec, cfg)
            rate = 1.0 - cfg["discriminator"]["lecam_decay"]
            ema_real, ema_fake = (rate * ema for ema in averages)
            lecam = (real - ema_fake).relu().square().mean() + (ema_real - fake).relu().square().mean()
            hinge = (1 - real).relu().mean() / 2 + (1 + fake).relu().mean() / 2
            return hinge + cfg["loss"]["lecam"] * lecam

        if "act.rec" in expected:
            *_, real, fake = twin.discriminator_losses(W, image, expected["act.rec"].permute(0, 3, 1, 2), cfg)
            averages = real.mean(), fake.mean()
        tested = [
            *["decoder.conv_in.weight", "decoder.mid.attn_1.k.weight", "decoder.up.0.block.0.norm1.weight"],
            *["decoder.conv_out.bias", "post_quant_conv.weight", "projector.fc1.weight", "projector.norm.weight"],
            *["projector.fc2.bias", "visual_embed.weight", "model.embed_tokens.weight", "model.norm.weight"],
            *["model.layers.0.self_attn.k_proj.bias", "model.layers.1.mlp.gate_proj.weight"],
            *["loss.discriminator.main.0.weight", "loss.discriminator.main.5.weight", "loss.discriminator.main.9.bias"],
        ]
        for index, parameter in enumerate(tested):
            if f"grad.{parameter}" not in expected:
                continue
            function = d_loss if parameter.startswith("loss.") else total
            direction = normal(100 + index, *W[parameter].shape)
            # Parameters of the discriminator and the decoder are followed by kinks (ReLU, max-pool): a small step.
            step = 1e-7
            plus = function(W | {parameter: W[parameter] + step * direction})
            minus = function(W | {parameter: W[parameter] - step * direction})
            want = (expected[f"grad.{parameter}"] * direction).sum()
            assert abs((plus - minus) / (2 * step) - want) < 1e-6 * max(1.0, abs(want)), (name, parameter)


# ------------------------------------------------------------------------------------------------
# Steps of several ranks
# ------------------------------------------------------------------------------------------------


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def of_kind(tensors, prefix):
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@check
def one_rank_or_synchronised_ranks_make_the_usual_step():
    for name in ["dot", "l2norm"]:
        cfg, weights, batch, expected = load_case(name)
        step = twin.training_step(cfg, weights, batch, ranks=1)
        for key, want in expected.items():
            assert relative(step[key].double(), want.double()) < 1e-9 or want.norm() < 1e-12, (name, key)
    cfg, weights, batch, expected = load_case("ranks")
    one = twin.training_step(cfg, weights, batch)
    cfg["discriminator"]["sync"] = True
    synchronised = twin.training_step(cfg, weights, batch, ranks=2)
    assert one.keys() == synchronised.keys() and all(torch.equal(one[key], synchronised[key]) for key in one)

    # Statistics of their own change everything that depends on the discriminator, and nothing else.
    for key in ["loss.gan", "loss.d_hinge", "loss.d_lecam", "grad.decoder.conv_out.weight", "grad.loss.discriminator.main.0.weight"]:
        assert relative(expected[key], one[key]) > 1e-3, key
    for key in ["loss.cap", "loss.ent_avg", "act.rec", "grad.model.embed_tokens.weight"]:
        assert relative(expected[key], one[key]) < 1e-12, key


def rank_alone(cfg, W, stepped, image, text, total, others_usage):
    """A rank with its own pictures and texts: its shares of the discriminator's loss and of the total loss. Sums over its
    pictures, tokens and patches are divided by the counts of all `total` pictures. Only the entropy of the average code
    distribution is no sum over ranks: `others_usage` is the sum of the distributions of the other ranks' tokens. `stepped`
    has the updated discriminator."""
    share, weight, q = len(image) / total, cfg["loss"], cfg["quantizer"]
    z, grid = twin.encode(W, image, cfg)
    codebook = W["quantize.embedding.weight"]
    out = twin.quantize(z, codebook, cfg)
    rec = twin.decode(W, out["z_q"], grid, cfg)

    real, fake = twin.discriminator(W, image), twin.discriminator(W, rec.detach())
    rate, patches = 1.0 - cfg["discriminator"]["lecam_decay"], real.numel() / share
    averages = rate * real.detach().mean(), rate * fake.detach().mean()
    lecam = ((real - averages[1]).relu() ** 2).sum() / patches + ((averages[0] - fake).relu() ** 2).sum() / patches
    hinge = ((1 - real).relu().sum() + (1 + fake).relu().sum()) / (2 * patches)

    usage = others_usage + torch.softmax(z @ codebook.T / q["temperature"], dim=1).sum(dim=0)
    usage = usage / (len(z) / share)
    ent_avg = -(usage * torch.log(usage + q["entropy_eps"])).sum()
    logits = twin.discriminator(stepped, rec).mean(dim=(1, 2, 3))
    vq = (
        weight["rec"] * (image - rec).abs().sum() / (image.numel() / share)
        + weight["lpips"] * twin.lpips(W, image, rec).sum() / total
        + weight["gan"] * torch.log1p(torch.exp(-logits)).sum() / total
        + share * (weight["quant"] * out["quant"] + weight["entropy"] * out["ent_sample"])
        - weight["entropy"] * ent_avg
    )
    visual = twin.projector(W, out["z_q"], cfg).reshape(len(image), grid[0] * grid[1], -1)
    log_p = torch.log_softmax(twin.text_logits(W, visual, text, cfg), dim=-1)
    cap = -log_p.gather(2, text[..., None]).sum() / (text.numel() / share)
    return hinge + weight["lecam"] * lecam, cap + weight["alpha"] * vq


@check
def the_gradient_of_a_step_is_the_sum_over_ranks_that_compute_alone():
    cfg, weights, batch, expected = load_case("ranks")
    generator, discriminator = twin.trained_names(cfg, weights)
    W = {n: w.double().requires_grad_(n in generator + discriminator) for n, w in weights.items()}
    images, texts = batch["input.image"].double().permute(0, 3, 1, 2), batch["input.text"].long()
    total, temperature = len(images), cfg["quantizer"]["temperature"]
    stepped = {n: v for n, v in of_kind(expected, "after.").items() if n in discriminator}

    def usage(image):
        z, _ = twin.encode(W, image, cfg)
        return torch.softmax(z @ W["quantize.embedding.weight"].T / temperature, dim=1).sum(dim=0).detach()

    shares = list(zip(images.chunk(2), texts.chunk(2)))
    sums = {n: torch.zeros_like(W[n]) for n in generator + discriminator}
    for (image, text), (other, _) in [shares, shares[::-1]]:
        d_loss, loss = rank_alone(cfg, W, stepped, image, text, total, usage(other))
        for n, g in (twin.gradients(d_loss, W, discriminator) | twin.gradients(loss, W, generator)).items():
            sums[n] += g
    for n, got in sums.items():
        want = expected[f"grad.{n}"]
        assert (got - want).norm() < 1e-10 * want.norm() + 1e-14, (n, relative(got, want))


@check
def clipping_and_the_state_of_the_first_rank_by_hand():
    cfg, weights, batch, expected = load_case("ranks")
    clipped = load_file(FIXTURES / "ranks" / "clipped.safetensors")
    W, train = {n: w.double() for n, w in weights.items()}, cfg["train"]
    for key, names in [("norm.disc", twin.DISCRIMINATOR), ("norm.main", (*twin.TOKENIZER, *twin.LANGUAGE))]:
        grads = {n: g for n, g in of_kind(expected, "grad.").items() if n.startswith(names)}
        norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
        # The updated discriminator is another one with clipping, and with it the gradient of the decoder.
        close(clipped[key], norm, 1e-12 if key == "norm.disc" else 1e-2)
        assert norm > 2 * train["clip"], (key, norm)
        for n, g in grads.items():
            if key == "norm.disc" or n.startswith("model."):
                g = g * train["clip"] / (clipped[key] + 1e-6)
                close(clipped[f"after.{n}"], W[n] - train["lr"] * g / (g.abs() + train["adam_eps"]))

    image = batch["input.image"][:2].double().permute(0, 3, 1, 2)
    rec = expected["act.rec"][:2].permute(0, 3, 1, 2)
    stepped = {n: v for n, v in of_kind(clipped, "after.").items() if n.startswith(twin.DISCRIMINATOR)}
    mean, var = 0.0, 1.0
    for weights_of_the_pass, pictures in [(W, image), (W, rec), (stepped, rec)]:
        x = torch.nn.functional.conv2d(
            pictures, *(weights_of_the_pass[f"loss.discriminator.main.0.{p}"] for p in ["weight", "bias"]), stride=2, padding=1
        )
        x = torch.where(x > 0, x, 0.2 * x)
        x = torch.nn.functional.conv2d(x, weights_of_the_pass["loss.discriminator.main.2.weight"], stride=2, padding=1)
        mean = 0.9 * mean + 0.1 * x.mean(dim=(0, 2, 3))
        var = 0.9 * var + 0.1 * x.var(dim=(0, 2, 3), unbiased=True)
    close(clipped["state.loss.discriminator.main.3.running_mean"], mean)
    close(clipped["state.loss.discriminator.main.3.running_var"], var)
    rate = 1.0 - cfg["discriminator"]["lecam_decay"]
    averages = [rate * twin.discriminator(W, x).mean() for x in (image, rec)]
    close(clipped["state.loss.lecam_ema"], torch.stack(averages))


@check
def the_tokenizer_stage_is_a_part_of_the_step():
    expected = load_file(FIXTURES / "ranks" / "expected.safetensors")
    tokenizer = load_file(FIXTURES / "ranks" / "tokenizer.safetensors")
    for key, value in tokenizer.items():
        if key.startswith(("act.", "grad.loss.", "loss.")) and key not in ("loss.cap", "loss.total"):
            assert torch.equal(value, expected[key]), key
    assert tokenizer["loss.cap"] == 0.0 and tokenizer["loss.total"] == tokenizer["loss.vq"]
    # Only L_vq reaches the decoder, with a weight of alpha in one stage and of 1 in the other.
    alpha = load_case("ranks")[0]["loss"]["alpha"]
    for key in [k for k in tokenizer if k.startswith(("grad.decoder.", "grad.post_quant_conv."))]:
        assert (expected[key] - alpha * tokenizer[key]).norm() < 1e-11 * expected[key].norm() + 1e-14, key
    assert not any(k.startswith(("grad.model.", "grad.projector.")) for k in tokenizer)


@check
def configurations_are_those_of_the_cases():
    for name, (*_, changes) in CASES.items():
        assert twin.load_config(FIXTURES / name / "config.toml") == config_of(changes)


def main():
    torch.set_num_threads(1)
    for function in CHECKS:
        function()
        print("ok", function.__name__)


if __name__ == "__main__":
    main()
