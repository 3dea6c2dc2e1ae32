"""A Perceiver's read of an image or a video."""

from torch import nn

from ..ops import fourier_cross_attend
from . import foreign


class FourierCrossAttention(nn.Module):
    """latents + W_o attention(W_q LN(latents), W_k LN(x), W_v LN(x)) over the pixels x = [channels | Fourier features] of a grid.

    Shapes   latents (B, M, dim), image (B, channels, *grid) with `axes` axes (2 or 3) of any sizes -> (B, M, dim)
    Options  width: of queries and keys, over all heads; the features' own unless given. value_width: of values; width unless given.
             bands, max_freq, order, eps: as in `fastdiff.ops.fourier_cross_attend`. bias: of query, key, value; out_bias: of out, as bias
             unless given; norm: LayerNorms of latents and pixels; residual: adds the latents
    State    query, key, value, out: nn.Linear; target_norm, source_norm: nn.LayerNorm, absent without norm
    Source   Jaegle et al. 2021, section 3.2
    """

    def __init__(self, dim, channels, *, bands, max_freq, axes=2, order="kind", heads=1, width=None, value_width=None, bias=True,
                 out_bias=None, norm=True, residual=True, eps=1e-5):
        super().__init__()
        features = channels + axes * (2 * bands + 1)
        width = features if width is None else width
        value_width = width if value_width is None else value_width
        self.options = dict(bands=bands, max_freq=max_freq, order=order, heads=heads, eps=eps, residual=residual)
        self.query, self.key = nn.Linear(dim, width, bias), nn.Linear(features, width, bias)
        self.value = nn.Linear(features, value_width, bias)
        self.out = nn.Linear(value_width, dim, bias if out_bias is None else out_bias)
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
    def _from(cls, layer, axes, bands, max_freq, order):
        (width, dim), (value_width, features) = layer.query[0].shape, layer.value[0].shape
        made = cls(dim, features - axes * (2 * bands + 1), bands=bands, max_freq=max_freq, axes=axes, order=order, width=width,
                   value_width=value_width, **layer.options())
        return foreign.copied(made, query=layer.query, key=layer.key, value=layer.value, out=layer.out, target_norm=layer.target_norm,
                              source_norm=layer.source_norm)

    @classmethod
    def from_perceiver_pytorch(cls, model, layer=0):
        """The read of one layer of a `perceiver_pytorch.Perceiver` that encodes its own positions; weights are copied.

        Raises   ValueError for a model whose positions are not Fourier features of a 2- or 3-dimensional grid, or with attention dropout in
                 training mode
        """
        if not model.fourier_encode_data or model.input_axis not in (2, 3):
            raise ValueError(f"from_perceiver_pytorch: model wants Fourier features of 2 or 3 axes, got fourier_encode_data="
                             f"{model.fourier_encode_data}, input_axis={model.input_axis}")
        if model.inverted_cross_attn[layer]:
            raise ValueError(f"from_perceiver_pytorch: layer wants a softmax over the pixels, got {layer}, whose attention is inverted")
        read = foreign.perceiver_pytorch("from_perceiver_pytorch: model", model.layers[layer].cross_attn, True)
        return cls._from(read, model.input_axis, model.num_freq_bands, float(model.max_freq), "axis")

    @classmethod
    def from_transformers(cls, model):
        """The read of a `transformers` PerceiverModel, or of the model that holds it as `perceiver`; weights are copied.

        Shapes   a video is (B, channels, *grid) here, frames before channels there
        Raises   ValueError for a model whose input is not pixels with Fourier features of a 2- or 3-dimensional grid, or with attention
                 dropout in training mode
        """
        model = getattr(model, "perceiver", model)
        if why := foreign.why_no_grid(getattr(model, "input_preprocessor", None)):
            raise ValueError(f"from_transformers: model wants [pixels | Fourier features] of a grid: {why}")
        read = foreign.transformers("from_transformers: model", model.encoder.cross_attention)
        positions = model.input_preprocessor.position_embeddings
        return cls._from(read, positions.num_dimensions, positions.num_bands, tuple(map(float, positions.max_resolution)), "kind")
