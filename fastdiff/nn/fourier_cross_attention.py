"""A Perceiver's read of an image or a video."""

import torch
from torch import nn

from ..ops import fourier_cross_attend


class FourierCrossAttention(nn.Module):
    """latents + W_o attention(W_q LN(latents), W_k LN(x), W_v LN(x)) over the pixels x = [channels | Fourier features] of a grid.

    Shapes   latents (B, M, dim), image (B, channels, *grid) with `axes` axes (2 or 3) of any sizes -> (B, M, dim)
    Options  width: of queries, keys and values, over all heads; the features' own unless given. bands, max_freq, order, eps: as in
             `fastdiff.ops.fourier_cross_attend`. bias: of the four projections; norm: LayerNorms of latents and pixels; residual:
             adds the latents
    State    query, key, value, out: nn.Linear; target_norm, source_norm: nn.LayerNorm, absent without norm
    Source   Jaegle et al. 2021, section 3.2
    """

    def __init__(self, dim, channels, *, bands, max_freq, axes=2, order="kind", heads=1, width=None, bias=True, norm=True, residual=True,
                 eps=1e-5):
        super().__init__()
        features = channels + axes * (2 * bands + 1)
        width = features if width is None else width
        self.options = dict(bands=bands, max_freq=max_freq, order=order, heads=heads, eps=eps, residual=residual)
        self.query, self.out = nn.Linear(dim, width, bias), nn.Linear(width, dim, bias)
        self.key, self.value = nn.Linear(features, width, bias), nn.Linear(features, width, bias)
        self.target_norm = nn.LayerNorm(dim, eps) if norm else None
        self.source_norm = nn.LayerNorm(features, eps) if norm else None

    def forward(self, latents, image):
        pair = lambda norm: norm and (norm.weight, norm.bias)
        return fourier_cross_attend(latents, image, self.query.weight, self.key.weight, self.value.weight, self.out.weight,
                                    q_bias=self.query.bias, k_bias=self.key.bias, v_bias=self.value.bias, out_bias=self.out.bias,
                                    target_norm=pair(self.target_norm), source_norm=pair(self.source_norm), **self.options)

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

    @classmethod
    def from_perceiver_pytorch(cls, model, layer=0):
        """The read of one layer of a `perceiver_pytorch.Perceiver` that encodes its own positions; weights are copied.

        Raises   ValueError for a model whose positions are not Fourier features of a 2- or 3-dimensional grid
        """
        if not model.fourier_encode_data or model.input_axis not in (2, 3):
            raise ValueError(f"from_perceiver_pytorch: model wants Fourier features of 2 or 3 axes, got fourier_encode_data="
                             f"{model.fourier_encode_data}, input_axis={model.input_axis}")
        read = model.layers[layer].cross_attn
        dim, features, width = read.fn.to_q.in_features, read.fn.to_kv.in_features, read.fn.to_q.out_features
        made = cls(dim, features - model.input_axis * (2 * model.num_freq_bands + 1), bands=model.num_freq_bands, axes=model.input_axis,
                   max_freq=float(model.max_freq), order="axis", heads=read.fn.heads, width=width, eps=read.norm.eps)
        made.query, made.key, made.value = (nn.Linear(n, width, bias=False) for n in (dim, features, features))
        key, value = read.fn.to_kv.weight.chunk(2)
        pairs = ((made.query.weight, read.fn.to_q.weight), (made.key.weight, key), (made.value.weight, value),
                 (made.out.weight, read.fn.to_out.weight), (made.out.bias, read.fn.to_out.bias),
                 (made.target_norm.weight, read.norm.weight), (made.target_norm.bias, read.norm.bias),
                 (made.source_norm.weight, read.norm_context.weight), (made.source_norm.bias, read.norm_context.bias))
        with torch.no_grad():
            for mine, theirs in pairs:
                mine.copy_(theirs)
        return made.to(read.fn.to_q.weight)
