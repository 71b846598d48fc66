"""Modules with the interfaces of published ones."""

from torch import Tensor, nn
from torch.nn import functional as F

from .functional import ibq_quantize


class IBQQuantizer(nn.Module):
    """The IBQ quantizer, in place of SEED-Voken's `IndexPropagationQuantize`: same arguments, results and state dict.

    Nothing of size tokens x codes is stored. In float32, or in bfloat16 under autocast, with scores in float32 in both
    cases; switch autocast off around the call to compare codes at float32 precision.
    """

    def __init__(
        self, n_e, e_dim, beta=0.25, use_entropy_loss=False, remap=None, unknown_index="random", cosine_similarity=False,
        entropy_temperature=0.01, sample_minimization_weight=1.0, batch_maximization_weight=1.0, l2_normalize=False,
    ):  # fmt: skip
        super().__init__()
        if remap is not None:
            raise NotImplementedError(f"remap is {remap!r}, wanted None: the kernels compare with all codes")
        if cosine_similarity:
            raise NotImplementedError(
                "cosine_similarity is set, which the published quantizer accepts and ignores: leave it out to train as that "
                "does, or pass l2_normalize=True to compare normalised tokens and codes"
            )
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.use_entropy_loss, self.entropy_temperature = use_entropy_loss, entropy_temperature
        self.sample_minimization_weight = sample_minimization_weight
        self.batch_maximization_weight = batch_maximization_weight
        self.l2_normalize = l2_normalize
        self.embedding = nn.Embedding(n_e, e_dim)

    def codebook(self):
        e = self.embedding.weight
        return F.normalize(e, dim=-1) if self.l2_normalize else e

    def forward(self, z, temp=None, return_logits=False):
        """z [B, C, H, W], or [B, C, ..]: zq of the same shape; the quantization loss, with entropies the tuple
        (quantization loss, sample entropy, average entropy, entropy loss); and (None, None, indices [B*H*W])."""
        if temp not in (None, 1.0):
            raise NotImplementedError(f"temp is {temp}, wanted None or 1: codes are chosen by the largest score")
        if return_logits:
            raise NotImplementedError("return_logits is set, but the logits, tokens x codes, are never stored")
        if z.dim() < 2 or z.shape[1] != self.e_dim:
            raise ValueError(f"z has shape {list(z.shape)}, wanted [B, {self.e_dim}, ..]")
        tokens = z.movedim(1, -1)
        if self.l2_normalize:
            tokens = F.normalize(tokens, dim=-1)
        found = ibq_quantize(
            tokens, self.codebook(), temperature=self.entropy_temperature, beta_code=self.beta, entropies=self.use_entropy_loss
        )
        diff = found.quant
        if self.use_entropy_loss:
            entropy = self.sample_minimization_weight * found.sample - self.batch_maximization_weight * found.avg
            diff = (found.quant, found.sample, found.avg, entropy)
        return found.zq.movedim(-1, 1), diff, (None, None, found.idx.flatten())

    def get_codebook_entry(self, indices: Tensor, shape=None) -> Tensor:
        """Codes [.., C] of indices; with shape (B, H, W, C) as [B, C, H, W]."""
        entries = F.embedding(indices, self.codebook())
        return entries if shape is None else entries.view(shape).movedim(-1, 1).contiguous()

    def extra_repr(self):
        return f"n_e={self.n_e}, e_dim={self.e_dim}, beta={self.beta}, use_entropy_loss={self.use_entropy_loss}"
