"""A small, naive float64 twin of ETT in PyTorch: one training step of the semantic stage or of the tokenizer stage.

It is a reference for comparisons, so it is written for readability and not for speed: the score matrix
S = z E^T and both softmaxes are materialised, the straight-through estimator is written as in IBQ
(`hard - softmax.detach() + softmax`), and autograd computes every gradient.

    ETT  End-to-End Vision Tokenizer Tuning                                arXiv 2505.10562
    IBQ  Scalable Image Tokenization with Index Backpropagation Quantization   arXiv 2412.02692

Letters: B batch, H W image height and width, h w height and width of the token grid, M = B*h*w visual tokens,
D code dimension, K codes, C width of the language model, L text tokens of a sample, V vocabulary.
A step may be that of several ranks, each with an equal share of the pictures. Sums over all pictures are then sums over
ranks, so that the batch is computed as a whole; only BatchNorm and LeCAM see `groups` shares one at a time.
Parameters are in one dictionary `W` with the names of the public checkpoints; convolution weights
are [out, in, kh, kw], linear weights [out, in]. Images are [B, H, W, 3] in files and [B, 3, H, W] in the model.
"""

import math
import tomllib

import torch
import torch.nn.functional as F

# VGG16 without its classifier: torchvision's `features` index of every convolution, per slice.
VGG_SLICES = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]

# PatchGAN: (index of the convolution, index of its BatchNorm or None, stride, LeakyReLU follows).
PATCHGAN = [(0, None, 2, True), (2, 3, 2, True), (5, 6, 2, True), (8, 9, 1, True), (11, None, 1, False)]

# Constants that are not configuration values.
BATCH_NORM_EPS = 1e-5
LEAKY_SLOPE = 0.2
LPIPS_EPS = 1e-10
L2NORM_EPS = 1e-12
LAYER_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1

LOSSES = ["cap", "rec", "lpips", "gan", "quant", "ent_sample", "ent_avg", "d_hinge", "d_lecam", "vq", "total", "d_loss"]


def load_config(path):
    with open(path, "rb") as file:
        return tomllib.load(file)


# ------------------------------------------------------------------------------------------------
# Names and shapes of all parameters
# ------------------------------------------------------------------------------------------------


def parameter_shapes(cfg):
    """Public name -> shape of every parameter of the model that `cfg` describes, in file order."""
    shapes = {}

    def affine(name, channels):
        shapes[f"{name}.weight"] = (channels,)
        shapes[f"{name}.bias"] = (channels,)

    def conv(name, c_in, c_out, kernel, bias=True):
        shapes[f"{name}.weight"] = (c_out, c_in, kernel, kernel)
        if bias:
            shapes[f"{name}.bias"] = (c_out,)

    def linear(name, c_in, c_out, bias):
        shapes[f"{name}.weight"] = (c_out, c_in)
        if bias:
            shapes[f"{name}.bias"] = (c_out,)

    def res_block(name, c_in, c_out):
        affine(f"{name}.norm1", c_in)
        conv(f"{name}.conv1", c_in, c_out, 3)
        affine(f"{name}.norm2", c_out)
        conv(f"{name}.conv2", c_out, c_out, 3)
        if c_in != c_out:
            conv(f"{name}.nin_shortcut", c_in, c_out, 1)

    def attn_block(name, channels):
        affine(f"{name}.norm", channels)
        for part in ["q", "k", "v", "proj_out"]:
            conv(f"{name}.{part}", channels, channels, 1)

    def middle(name, channels):
        res_block(f"{name}.block_1", channels, channels)
        attn_block(f"{name}.attn_1", channels)
        res_block(f"{name}.block_2", channels, channels)

    tok = cfg["tokenizer"]
    blocks, z_channels, dim = tok["num_res_blocks"], tok["z_channels"], cfg["quantizer"]["dim"]
    widths = [tok["ch"] * mult for mult in tok["ch_mult"]]
    last = len(widths) - 1

    conv("encoder.conv_in", 3, tok["ch"], 3)
    current = tok["ch"]
    for level, width in enumerate(widths):
        for i in range(blocks):
            res_block(f"encoder.down.{level}.block.{i}", current, width)
            current = width
            if level == last:
                attn_block(f"encoder.down.{level}.attn.{i}", width)
        if level != last:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    middle("encoder.mid", current)
    affine("encoder.norm_out", current)
    conv("encoder.conv_out", current, z_channels, 3)
    conv("quant_conv", z_channels, dim, 1)

    shapes["quantize.embedding.weight"] = (cfg["quantizer"]["codes"], dim)

    conv("post_quant_conv", dim, z_channels, 1)
    conv("decoder.conv_in", z_channels, current, 3)
    middle("decoder.mid", current)
    for level in reversed(range(len(widths))):
        for i in range(blocks + 1):
            res_block(f"decoder.up.{level}.block.{i}", current, widths[level])
            current = widths[level]
            if level == last:
                attn_block(f"decoder.up.{level}.attn.{i}", current)
        if level != 0:
            conv(f"decoder.up.{level}.upsample.conv", current, current, 3)
    affine("decoder.norm_out", current)
    conv("decoder.conv_out", current, 3, 3)

    ndf = cfg["discriminator"]["ndf"]
    channels = [3, ndf, 2 * ndf, 4 * ndf, 8 * ndf, 1]
    for stage, (index, norm, _, _) in enumerate(PATCHGAN):
        conv(f"loss.discriminator.main.{index}", channels[stage], channels[stage + 1], 4, bias=norm is None)
        if norm is not None:
            affine(f"loss.discriminator.main.{norm}", channels[stage + 1])

    lpips = "loss.perceptual_loss"
    shapes[f"{lpips}.scaling_layer.shift"] = (1, 3, 1, 1)
    shapes[f"{lpips}.scaling_layer.scale"] = (1, 3, 1, 1)
    current = 3
    for s, (indices, width) in enumerate(zip(VGG_SLICES, cfg["lpips"]["widths"], strict=True)):
        for index in indices:
            conv(f"{lpips}.net.slice{s + 1}.{index}", current, width, 3)
            current = width
        shapes[f"{lpips}.lin{s}.model.1.weight"] = (1, width, 1, 1)

    llm = cfg["llm"]
    width, head_dim = llm["width"], llm["head_dim"]
    shapes["model.embed_tokens.weight"] = (llm["vocab"], width)
    for i in range(llm["layers"]):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        linear(f"{layer}.self_attn.q_proj", width, llm["heads"] * head_dim, bias=True)
        linear(f"{layer}.self_attn.k_proj", width, llm["kv_heads"] * head_dim, bias=True)
        linear(f"{layer}.self_attn.v_proj", width, llm["kv_heads"] * head_dim, bias=True)
        linear(f"{layer}.self_attn.o_proj", llm["heads"] * head_dim, width, bias=False)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
        linear(f"{layer}.mlp.gate_proj", width, llm["mlp"], bias=False)
        linear(f"{layer}.mlp.up_proj", width, llm["mlp"], bias=False)
        linear(f"{layer}.mlp.down_proj", llm["mlp"], width, bias=False)
    shapes["model.norm.weight"] = (width,)

    if cfg["train"]["arm"] == "index":
        shapes["visual_embed.weight"] = (cfg["quantizer"]["codes"], width)
    else:
        if cfg["projector"]["norm"]:
            affine("projector.norm", dim)
        linear("projector.fc1", dim, width, bias=True)
        linear("projector.fc2", width, width, bias=True)
    return shapes


TOKENIZER = ("encoder.", "quant_conv.", "quantize.", "post_quant_conv.", "decoder.")
RECONSTRUCTION = ("post_quant_conv.", "decoder.")
DISCRIMINATOR = ("loss.discriminator.",)
LANGUAGE = ("model.", "projector.", "visual_embed.")


def vq_losses_on(cfg):
    """Whether the step has L_vq, and with it the decoder, LPIPS and the discriminator."""
    return cfg["train"]["arm"] == "ett" and cfg["loss"]["alpha"] != 0


def trained_names(cfg, names, stage="semantic"):
    """The parameters trained by the generator-side optimizer, and those trained by the discriminator's."""
    generator = [n for n in names if n.startswith(LANGUAGE)] if stage == "semantic" else []
    discriminator = []
    if cfg["train"]["arm"] == "ett":
        generator += [n for n in names if n.startswith(TOKENIZER) and (vq_losses_on(cfg) or not n.startswith(RECONSTRUCTION))]
    if vq_losses_on(cfg):
        discriminator = [n for n in names if n.startswith(DISCRIMINATOR)]
    return generator, discriminator


# ------------------------------------------------------------------------------------------------
# Tokenizer: encoder and decoder of a VQGAN
# ------------------------------------------------------------------------------------------------


def conv2d(W, name, x, stride=1, padding=0):
    return F.conv2d(x, W[f"{name}.weight"], W[f"{name}.bias"], stride=stride, padding=padding)


def group_norm(W, name, x, cfg):
    tok = cfg["tokenizer"]
    return F.group_norm(x, tok["norm_groups"], W[f"{name}.weight"], W[f"{name}.bias"], eps=tok["norm_eps"])


def res_block(W, name, x, cfg):
    y = conv2d(W, f"{name}.conv1", F.silu(group_norm(W, f"{name}.norm1", x, cfg)), padding=1)
    y = conv2d(W, f"{name}.conv2", F.silu(group_norm(W, f"{name}.norm2", y, cfg)), padding=1)
    if f"{name}.nin_shortcut.weight" in W:
        x = conv2d(W, f"{name}.nin_shortcut", x)
    return x + y


def attn_block(W, name, x, cfg):
    """One head over all h*w positions, not causal, scale 1/sqrt(channels)."""
    batch, channels, height, width = x.shape
    y = group_norm(W, f"{name}.norm", x, cfg)
    q, k, v = (conv2d(W, f"{name}.{part}", y).flatten(2).transpose(1, 2) for part in "qkv")  # [B, h*w, c]
    attention = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(channels), dim=-1)
    y = (attention @ v).transpose(1, 2).reshape(batch, channels, height, width)
    return x + conv2d(W, f"{name}.proj_out", y)


def middle(W, name, x, cfg):
    x = res_block(W, f"{name}.block_1", x, cfg)
    x = attn_block(W, f"{name}.attn_1", x, cfg)
    return res_block(W, f"{name}.block_2", x, cfg)


def encoder(W, image, cfg):
    """Image [B, 3, H, W] -> features [B, z_channels, h, w]."""
    tok = cfg["tokenizer"]
    last = len(tok["ch_mult"]) - 1
    x = conv2d(W, "encoder.conv_in", image, padding=1)
    for level in range(last + 1):
        for i in range(tok["num_res_blocks"]):
            x = res_block(W, f"encoder.down.{level}.block.{i}", x, cfg)
            if level == last:
                x = attn_block(W, f"encoder.down.{level}.attn.{i}", x, cfg)
        if level != last:
            x = F.pad(x, (0, 1, 0, 1))  # one column on the right, one row at the bottom
            x = conv2d(W, f"encoder.down.{level}.downsample.conv", x, stride=2)
    x = middle(W, "encoder.mid", x, cfg)
    return conv2d(W, "encoder.conv_out", F.silu(group_norm(W, "encoder.norm_out", x, cfg)), padding=1)


def encode(W, image, cfg):
    """Image -> quantizer input [M, D] (image by image, row by row, not yet normalised) and the grid (h, w)."""
    z = conv2d(W, "quant_conv", encoder(W, image, cfg))
    return z.permute(0, 2, 3, 1).reshape(-1, cfg["quantizer"]["dim"]), tuple(z.shape[2:])


def decode(W, z_q, grid, cfg):
    """Quantized tokens [M, D] -> reconstruction [B, 3, H, W], unclamped."""
    tok = cfg["tokenizer"]
    last = len(tok["ch_mult"]) - 1
    x = z_q.reshape(-1, *grid, cfg["quantizer"]["dim"]).permute(0, 3, 1, 2)
    x = conv2d(W, "decoder.conv_in", conv2d(W, "post_quant_conv", x), padding=1)
    x = middle(W, "decoder.mid", x, cfg)
    for level in reversed(range(last + 1)):
        for i in range(tok["num_res_blocks"] + 1):
            x = res_block(W, f"decoder.up.{level}.block.{i}", x, cfg)
            if level == last:
                x = attn_block(W, f"decoder.up.{level}.attn.{i}", x, cfg)
        if level != 0:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = conv2d(W, f"decoder.up.{level}.upsample.conv", x, padding=1)
    return conv2d(W, "decoder.conv_out", F.silu(group_norm(W, "decoder.norm_out", x, cfg)), padding=1)


# ------------------------------------------------------------------------------------------------
# Quantizer
# ------------------------------------------------------------------------------------------------


def quantize(z, codebook, cfg):
    """Quantize z [M, D] with codebook [K, D].

    Returns a dictionary: `z` (as the scores use it), `ind`, `z_q`, the unweighted losses `quant`, `ent_sample`,
    `ent_avg`, and `scores` [M, K], whose argmax is `ind`.
    """
    q = cfg["quantizer"]
    if q["metric"] == "l2norm":
        z = F.normalize(z, dim=1, eps=L2NORM_EPS)
        codebook = F.normalize(codebook, dim=1, eps=L2NORM_EPS)
    else:
        assert q["metric"] == "dot"
    if q["kind"] == "vq":
        return quantize_vq(z, codebook, q)
    assert q["kind"] == "ibq"

    scores = z @ codebook.T
    p = torch.softmax(scores, dim=1)
    ind = scores.argmax(dim=1)
    hard = F.one_hot(ind, q["codes"]).to(z.dtype)
    onehot = hard - p.detach() + p
    z_q = onehot @ codebook
    e = codebook[ind]

    beta_commitment, beta_codebook = {"codebook": (1.0, q["beta"]), "commitment": (q["beta"], 1.0)}[q["beta_on"]]
    quant = (
        (z_q - z).square().mean()
        + beta_commitment * (e.detach() - z).square().mean()
        + beta_codebook * (e - z.detach()).square().mean()
    )

    log_q = torch.log_softmax(scores / q["temperature"], dim=1)
    ent_sample = -(log_q.exp() * log_q).sum(dim=1).mean()
    usage = log_q.exp().mean(dim=0)
    ent_avg = -(usage * torch.log(usage + q["entropy_eps"])).sum()
    return dict(z=z, ind=ind, z_q=z_q, quant=quant, ent_sample=ent_sample, ent_avg=ent_avg, scores=scores)


def quantize_vq(z, codebook, q):
    """The plain VQ baseline: nearest code by squared distance, beta on the commitment term, no entropies."""
    assert q["beta_on"] == "commitment"
    distances = (z[:, None, :] - codebook[None, :, :]).square().sum(dim=2)
    ind = distances.argmin(dim=1)
    e = codebook[ind]
    z_q = z + (e - z).detach()
    quant = q["beta"] * (e.detach() - z).square().mean() + (e - z.detach()).square().mean()
    zero = z.new_zeros(())
    return dict(z=z, ind=ind, z_q=z_q, quant=quant, ent_sample=zero, ent_avg=zero, scores=-distances)


# ------------------------------------------------------------------------------------------------
# Perceptual loss and discriminator
# ------------------------------------------------------------------------------------------------


def unit_features(f):
    """f / (|f| + eps) over channels; zero, with zero gradient, if all channels are zero."""
    square = f.square().sum(dim=1, keepdim=True)
    alive = square > 0
    norm = torch.sqrt(torch.where(alive, square, 1.0))
    return torch.where(alive, f / (norm + LPIPS_EPS), 0.0)


def vgg_features(W, image):
    name = "loss.perceptual_loss"
    x = (image - W[f"{name}.scaling_layer.shift"]) / W[f"{name}.scaling_layer.scale"]
    features = []
    for s, indices in enumerate(VGG_SLICES):
        if s > 0:
            x = F.max_pool2d(x, kernel_size=2, stride=2)
        for index in indices:
            x = F.relu(conv2d(W, f"{name}.net.slice{s + 1}.{index}", x, padding=1))
        features.append(x)
    return features


def lpips(W, image, reconstruction):
    """LPIPS distance of every image, [B]."""
    distance = 0.0
    for s, (a, b) in enumerate(zip(vgg_features(W, image), vgg_features(W, reconstruction))):
        difference = (unit_features(a) - unit_features(b)).square()
        head = W[f"loss.perceptual_loss.lin{s}.model.1.weight"]
        distance = distance + F.conv2d(difference, head).mean(dim=(1, 2, 3))
    return distance


def running_statistics(cfg):
    """BatchNorm's running statistics before the first step, by public name."""
    running, names = {}, [norm for _, norm, _, _ in PATCHGAN if norm is not None]
    for norm, channels in zip(names, [2, 4, 8]):
        size = channels * cfg["discriminator"]["ndf"]
        running[f"loss.discriminator.main.{norm}.running_mean"] = torch.zeros(size, dtype=torch.float64)
        running[f"loss.discriminator.main.{norm}.running_var"] = torch.ones(size, dtype=torch.float64)
    return running


def discriminator(W, image, running=None):
    """Patch logits [B, 1, h', w']; BatchNorm in training mode, with the statistics of this batch alone, which are added to
    `running`."""
    x, running = image, running or {}
    for index, norm, stride, activation in PATCHGAN:
        name = f"loss.discriminator.main.{index}"
        x = F.conv2d(x, W[f"{name}.weight"], W.get(f"{name}.bias"), stride=stride, padding=1)
        if norm is not None:
            name = f"loss.discriminator.main.{norm}"
            averages = running.get(f"{name}.running_mean"), running.get(f"{name}.running_var")
            affine = W[f"{name}.weight"], W[f"{name}.bias"]
            x = F.batch_norm(x, *averages, *affine, training=True, momentum=BATCH_NORM_MOMENTUM, eps=BATCH_NORM_EPS)
        if activation:
            x = F.leaky_relu(x, LEAKY_SLOPE)
    return x


def patch_logits(W, image, groups=1, running=None):
    """The logits of all images, where each of `groups` equal shares has statistics of its own. `running` are those of the
    first."""
    first, *others = image.chunk(groups)
    return torch.cat([discriminator(W, first, running), *(discriminator(W, share) for share in others)])


def averages_after(logits, cfg, groups=1):
    """LeCAM's averages of the shares, which start at 0, after an update with the share's mean logit: as large as `logits`."""
    decay = cfg["discriminator"]["lecam_decay"]
    averages = [(decay * 0.0 + (1.0 - decay) * share.detach().mean()).expand_as(share) for share in logits.chunk(groups)]
    return torch.cat(averages)


def discriminator_losses(W, image, reconstruction, cfg, groups=1, running=None):
    """Hinge and LeCAM terms, unweighted, and the two maps of logits."""
    real = patch_logits(W, image, groups, running)
    fake = patch_logits(W, reconstruction.detach(), groups, running)
    hinge = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    ema_real, ema_fake = averages_after(real, cfg, groups), averages_after(fake, cfg, groups)
    lecam = F.relu(real - ema_fake).square().mean() + F.relu(ema_real - fake).square().mean()
    return hinge, lecam, real, fake


def generator_loss(W, reconstruction, groups=1, running=None):
    """Sigmoid cross-entropy against 1 of every image's mean logit."""
    logits = patch_logits(W, reconstruction, groups, running).mean(dim=(1, 2, 3))
    return F.softplus(-logits).mean()


# ------------------------------------------------------------------------------------------------
# Projector and language model (Qwen2)
# ------------------------------------------------------------------------------------------------


def linear(W, name, x):
    return F.linear(x, W[f"{name}.weight"], W.get(f"{name}.bias"))


def projector(W, z_q, cfg):
    if cfg["projector"]["norm"]:
        weight, bias = W["projector.norm.weight"], W["projector.norm.bias"]
        z_q = F.layer_norm(z_q, weight.shape, weight, bias, eps=LAYER_NORM_EPS)
    return linear(W, "projector.fc2", F.gelu(linear(W, "projector.fc1", z_q)))


def rms_norm(weight, x, eps):
    return weight * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps))


def rope(x, theta):
    """Rotary embedding of x [B, heads, T, head_dim], positions 0..T, half-split pairs, angles in float64."""
    tokens, head_dim = x.shape[-2:]
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(half, dtype=x.dtype) * 2.0 / head_dim)
    angles = torch.arange(tokens, dtype=x.dtype)[:, None] * frequencies[None, :]
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def self_attention(W, name, x, llm):
    batch, tokens, _ = x.shape

    def heads(part, count):
        return linear(W, f"{name}.{part}", x).reshape(batch, tokens, count, llm["head_dim"]).transpose(1, 2)

    q = rope(heads("q_proj", llm["heads"]), llm["rope_theta"])
    k = rope(heads("k_proj", llm["kv_heads"]), llm["rope_theta"])
    v = heads("v_proj", llm["kv_heads"])
    group = llm["heads"] // llm["kv_heads"]  # consecutive query heads share one key/value head
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) / math.sqrt(llm["head_dim"])
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(diagonal=1)
    attention = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    return linear(W, f"{name}.o_proj", (attention @ v).transpose(1, 2).reshape(batch, tokens, -1))


def language_model(W, x, cfg):
    """Input rows [B, T, C] -> logits [B, T, V]; the head is the embedding table."""
    llm = cfg["llm"]
    for i in range(llm["layers"]):
        layer = f"model.layers.{i}"
        x = x + self_attention(W, f"{layer}.self_attn", rms_norm(W[f"{layer}.input_layernorm.weight"], x, llm["rms_eps"]), llm)
        y = rms_norm(W[f"{layer}.post_attention_layernorm.weight"], x, llm["rms_eps"])
        gated = F.silu(linear(W, f"{layer}.mlp.gate_proj", y)) * linear(W, f"{layer}.mlp.up_proj", y)
        x = x + linear(W, f"{layer}.mlp.down_proj", gated)
    return F.linear(rms_norm(W["model.norm.weight"], x, llm["rms_eps"]), W["model.embed_tokens.weight"])


def text_logits(W, visual, text, cfg):
    """The logits [B, L, V] that predict text [B, L] after visual rows [B, h*w, C], each at the position before."""
    rows = torch.cat([visual, W["model.embed_tokens.weight"][text]], dim=1)
    before = visual.shape[1] - 1
    return language_model(W, rows, cfg)[:, before : before + text.shape[1]]


# ------------------------------------------------------------------------------------------------
# One training step
# ------------------------------------------------------------------------------------------------


def adam_step(W, grads, lr, betas, eps, clip=0.0):
    """The parameters after one Adam step with fresh moments, without warm-up or weight decay. If `clip` is not 0, the
    gradients are first scaled so that their norm, over all parameters together, is at most `clip`."""
    after = {name: W[name].detach().clone() for name in grads}
    for name, parameter in after.items():
        parameter.grad = grads[name].detach().clone()
    if clip > 0:
        torch.nn.utils.clip_grad_norm_(after.values(), clip)
    for parameter in after.values():
        torch.optim.Adam([parameter], lr=lr, betas=tuple(betas), eps=eps).step()
    return after


def norm_of(grads):
    return torch.sqrt(sum(grad.square().sum() for grad in grads.values()))


def gradients(loss, W, names):
    return dict(zip(names, torch.autograd.grad(loss, [W[name] for name in names])))


def generator_side(W, stepped_discriminator, image, text, cfg, groups=1, running=None):
    """All losses but the discriminator's own; those of the tokenizer stage if `text` is None. Returns (losses, activations)."""
    weights, arm = cfg["loss"], cfg["train"]["arm"]
    zero = torch.zeros((), dtype=torch.float64)
    losses = {name: zero for name in ["cap", "rec", "lpips", "gan", "quant", "ent_sample", "ent_avg", "vq"]}

    z, grid = encode(W, image, cfg)
    quantized = quantize(z, W["quantize.embedding.weight"], cfg)
    act = {"z": quantized["z"], "ind": quantized["ind"], "zq": quantized["z_q"]}

    if vq_losses_on(cfg):
        reconstruction = decode(W, quantized["z_q"], grid, cfg)
        act["rec"] = reconstruction.permute(0, 2, 3, 1)
        losses["rec"] = (image - reconstruction).abs().mean()
        losses["lpips"] = lpips(W, image, reconstruction).mean()
        losses["gan"] = generator_loss(stepped_discriminator(reconstruction), reconstruction, groups, running)
        for name in ["quant", "ent_sample", "ent_avg"]:
            losses[name] = quantized[name]
        losses["vq"] = (
            weights["rec"] * losses["rec"]
            + weights["quant"] * losses["quant"]
            + weights["lpips"] * losses["lpips"]
            + weights["gan"] * losses["gan"]
        )
        if cfg["quantizer"]["kind"] == "ibq":
            losses["vq"] = losses["vq"] + weights["entropy"] * (losses["ent_sample"] - losses["ent_avg"])

    if text is None:
        return losses | {"total": losses["vq"]}, act
    if arm == "index":
        visual = W["visual_embed.weight"][quantized["ind"]]
    else:
        visual = projector(W, quantized["z_q"], cfg)
    visual = visual.reshape(len(image), grid[0] * grid[1], cfg["llm"]["width"])
    act["text_logits"] = text_logits(W, visual, text, cfg)
    losses["cap"] = F.cross_entropy(act["text_logits"].flatten(0, 1), text.flatten())

    losses["total"] = losses["cap"] + weights["alpha"] * losses["vq"] if vq_losses_on(cfg) else losses["cap"]
    return losses, act


def training_step(cfg, weights, batch, ranks=1, stage="semantic", clip=0.0):
    """One step in float64. Returns the tensors of an `expected.safetensors`, and besides them `norm.*` and `state.*`.

    With `discriminator.sync`, or with one rank, BatchNorm and LeCAM see the whole batch at a time."""
    generator_names, discriminator_names = trained_names(cfg, weights, stage)
    assert stage == "semantic" or discriminator_names, "the tokenizer stage always has the losses of the tokenizer"
    trained = {*generator_names, *discriminator_names}
    W = {name: value.double().requires_grad_(name in trained) for name, value in weights.items()}
    image = batch["input.image"].double().permute(0, 3, 1, 2)
    text = batch["input.text"].long() if stage == "semantic" else None
    train, loss_weights = cfg["train"], cfg["loss"]
    groups = 1 if cfg["discriminator"].get("sync", False) else ranks
    running = running_statistics(cfg)
    zero = torch.zeros((), dtype=torch.float64)
    d = {"losses": {name: zero for name in ["d_hinge", "d_lecam", "d_loss"]}, "grads": {}, "after": {}, "state": {}}

    def stepped_discriminator(reconstruction):
        """The discriminator's own step; the generator losses then use the updated weights as constants."""
        hinge, lecam, real, fake = discriminator_losses(W, image, reconstruction, cfg, groups, running)
        d_loss = hinge + loss_weights["lecam"] * lecam
        d["losses"] = {"d_hinge": hinge, "d_lecam": lecam, "d_loss": d_loss}
        d["grads"] = gradients(d_loss, W, discriminator_names)
        d["after"] = adam_step(W, d["grads"], train["lr"], train["disc_betas"], train["adam_eps"], clip)
        of_the_first = [averages_after(logits, cfg, groups).flatten()[0] for logits in (real, fake)]
        d["state"] = running | {"loss.lecam_ema": torch.stack(of_the_first)}
        return d["after"]

    losses, act = generator_side(W, stepped_discriminator, image, text, cfg, groups, running)
    grads = gradients(losses["total"], W, generator_names)
    after = adam_step(W, grads, train["lr"], train["betas"], train["adam_eps"], clip)
    norms = {"main": norm_of(grads)} | ({"disc": norm_of(d["grads"])} if d["grads"] else {})

    losses, grads, after = losses | d["losses"], grads | d["grads"], after | d["after"]
    out = {f"loss.{name}": losses[name].reshape(1) for name in LOSSES}
    out |= {f"act.{name}": value.to(torch.int32) if name == "ind" else value for name, value in act.items()}
    out |= {f"grad.{name}": value for name, value in grads.items()}
    out |= {f"after.{name}": value for name, value in after.items()}
    out |= {f"norm.{name}": value.reshape(1) for name, value in norms.items()}
    out |= {f"state.{name}": value for name, value in d["state"].items()}
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in out.items()}
