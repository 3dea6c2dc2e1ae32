"""A self-attention layer: of RIN's or a Perceiver's latents."""

from torch import nn

from ..ops import attention
from . import foreign


class SelfAttention(nn.Module):
    """x + W_o attention(W_q LN(x), W_k LN(x), W_v LN(x)).

    Shapes   x (B, N, dim) -> (B, N, dim); key_lengths (B,) int64 in [0, N] hides rows from there on as keys
    Options  width: of queries, keys and values, over all heads; dim unless given. bias: of qkv; out_bias: of out, as bias unless given.
             norm: a LayerNorm of x; residual: adds x; causal: a row sees itself and those before it
    State    qkv, out: nn.Linear, qkv with the rows of queries, then keys, then values; norm: nn.LayerNorm, absent without norm
    Raises   ValueError when heads does not divide width
    Source   Vaswani et al. 2017, section 3.2, with the norm before
    """

    def __init__(self, dim, *, heads, width=None, bias=True, out_bias=None, norm=True, residual=True, causal=False, eps=1e-5):
        super().__init__()
        width = dim if width is None else width
        if width % heads:
            raise ValueError(f"SelfAttention: heads wants a divisor of width = {width}, got {heads}")
        self.heads, self.residual, self.causal = heads, residual, causal
        self.qkv, self.out = nn.Linear(dim, 3 * width, bias), nn.Linear(width, dim, bias if out_bias is None else out_bias)
        self.norm = nn.LayerNorm(dim, eps) if norm else None

    def forward(self, x, key_lengths=None):
        z = x if self.norm is None else self.norm(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(z).chunk(3, -1))
        y = self.out(attention(q, k, v, key_lengths=key_lengths, causal=self.causal).transpose(1, 2).flatten(2))
        return x + y if self.residual else y

    def extra_repr(self):
        return f"heads={self.heads}, residual={self.residual}, causal={self.causal}"

    @classmethod
    def _from(cls, layer):
        (width, dim), source_dim = layer.query[0].shape, layer.key[0].shape[1]
        if layer.source_norm is not None or source_dim != dim:
            layer.refuse(f"wants a self-attention, got a cross-attention from {dim} to {source_dim} channels")
        if layer.value[0].shape[0] != width:
            layer.refuse(f"wants values as wide as queries, {width}, got {layer.value[0].shape[0]}")
        if layer.out[0].shape[0] != dim:
            layer.refuse(f"wants results as wide as its input, {dim}, got {layer.out[0].shape[0]}")
        made = cls(dim, width=width, norm=layer.target_norm is not None, **layer.options())
        return foreign.copied(made, qkv=layer.qkv(), out=layer.out, norm=layer.target_norm)

    @classmethod
    def from_rin_pytorch(cls, layer, *, residual=False):
        """A `rin_pytorch.rin_pytorch.Attention` as it is called without a context; weights are copied, its norm's shift frozen at 0.

        Options  residual: adds x, as RIN does around the layer
        Raises   ValueError for time conditioning, qk_norm, inverted attention and a layer of another source
        """
        return cls._from(foreign.rin_pytorch("from_rin_pytorch: layer", layer, residual))

    @classmethod
    def from_perceiver_pytorch(cls, layer, *, residual=False):
        """A `perceiver_pytorch` PreNorm of an Attention (or that alone) as it is called without a context; weights are copied.

        Options  residual: adds x, as the models do around the layer
        Raises   ValueError for queries_contribute_kv, a layer of another source and dropout in training mode
        """
        return cls._from(foreign.perceiver_pytorch("from_perceiver_pytorch: layer", layer, residual))

    @classmethod
    def from_transformers(cls, layer):
        """A `transformers` PerceiverAttention, or that of a PerceiverLayer, as it is called without inputs; weights are copied.

        Raises   ValueError for a layer of another source, values of another width and dropout in training mode
        """
        return cls._from(foreign.transformers("from_transformers: layer", layer))
