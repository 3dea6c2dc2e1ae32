"""perceiver-pytorch: its attention, and a Perceiver's read of an image whole."""

import torch

from ...ops import attention, fourier_cross_attend
from .rule import Rule, dropout_note, hidden, own_dropout_note, watched


def _attention(plain):
    def forward(self, x, context=None, mask=None, **options):
        dropout = getattr(self, "dropout", None)
        if any(options.values()) or x.device.type not in ("cpu", "cuda") or (self.training and dropout is not None and dropout.p > 0):
            return plain(self, x, context, mask, **options)
        source = x if context is None else context
        if context is not None and getattr(self, "queries_contribute_kv", False):
            source = torch.cat((x, context), 1)
            if mask is not None:
                mask = torch.cat((mask.new_ones(x.shape[:2]), mask), -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), *self.to_kv(source).chunk(2, -1)))
        bias = None
        if mask is not None:
            q, bias = hidden(q, mask.flatten(1)[:, None, None])
        return self.to_out(attention(q, k, v, bias=bias, scale=self.scale).transpose(1, 2).flatten(2))

    return forward


def _model(plain):
    def forward(self, data, mask=None, return_embeddings=False, block_outputs=None, return_hiddens=False):
        reads = [block.cross_attn for block in self.layers]
        if (mask is not None or block_outputs is not None or return_hiddens
                or watched(*self.layers, *(m for r in reads for m in r.modules())) or data.dim() != self.input_axis + 2
                or data.device.type not in ("cpu", "cuda") or (self.training and any(r.fn.dropout.p > 0 for r in reads))):
            return plain(self, data, mask, return_embeddings, block_outputs, return_hiddens)
        x, image = self.latents.expand(data.shape[0], -1, -1), data.movedim(-1, 1)
        for block, read in zip(self.layers, reads, strict=True):
            k, v = read.fn.to_kv.weight.chunk(2)
            x = fourier_cross_attend(
                x, image, read.fn.to_q.weight, k, v, read.fn.to_out.weight, bands=self.num_freq_bands, max_freq=float(self.max_freq),
                order="axis", heads=read.fn.heads, out_bias=read.fn.to_out.bias, target_norm=(read.norm.weight, read.norm.bias),
                source_norm=(read.norm_context.weight, read.norm_context.bias), eps=read.norm.eps)
            x = block.cross_ff(x) + x
            for attend, feed in block.self_attns:
                x = attend(x) + x
                x = feed(x) + x
        return x if return_embeddings else self.to_logits(x)

    return forward


def _positions_that_factor(m):
    if not m.fourier_encode_data or m.input_axis not in (2, 3):
        return "its input is no grid of pixels with Fourier features of 2 or 3 axes"
    if m.has_attn_residual or any(m.inverted_cross_attn):
        return "attention residuals or inverted attention"
    return None


_ATTENTION = {"forward": _attention, "note": own_dropout_note, "inputs": frozenset(("x", "context", "mask", "inverted_attention")),
                  "options": frozenset(("query_dim", "context_dim", "heads", "dim_head", "dropout", "queries_contribute_kv"))}

RULES = (
    Rule("perceiver_pytorch.perceiver_pytorch", "Attention", **_ATTENTION),
    Rule("perceiver_pytorch.perceiver_pytorch", "Perceiver", _model, refuse=_positions_that_factor,
         note=lambda m: dropout_note(*(block.cross_attn.fn.dropout for block in m.layers)),
         inputs=frozenset("data mask return_embeddings block_outputs return_hiddens".split()),
         options=frozenset("num_freq_bands depth max_freq input_channels input_axis num_latents latent_dim cross_heads latent_heads "
                           "cross_dim_head latent_dim_head num_classes attn_dropout ff_dropout weight_tie_layers fourier_encode_data "
                           "self_per_cross_attn final_classifier_head inverted_cross_attn attn_residual attn_residual_rank".split())),
    Rule("perceiver_pytorch.perceiver_io", "Attention", **_ATTENTION),
    Rule("perceiver_pytorch.experimental", "LinearAttention", leave="linear attention: it has no softmax over scores of queries and keys"),
)
