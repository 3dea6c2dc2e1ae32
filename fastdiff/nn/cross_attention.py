"""A cross-attention layer: a read or a write of RIN, an encoder's or a decoder's of a Perceiver."""

from torch import nn

from ..ops import cross_attend
from . import foreign


class CrossAttention(nn.Module):
    """target + W_o attention(W_q LN(target), W_k LN(source), W_v LN(source)).

    Shapes   target (B, M, dim), source (B, N, source_dim) -> (B, M, dim); key_lengths (B,) int64 in [0, N] hides source rows from there on
    Options  width: of queries and keys, over all heads; the smaller of dim and source_dim unless given. value_width: of values; width
             unless given. bias: of query, key, value; out_bias: of out, as bias unless given. norm, source_norm: LayerNorms of target
             and source; residual: adds the target
    State    query, key, value, out: nn.Linear; target_norm, source_norm: nn.LayerNorm, absent without norm, source_norm
    Raises   ValueError when heads divides width or value_width not
    Source   Jabri et al. 2022, section 3.1; Jaegle et al. 2021, section 3.1
    """

    def __init__(self, dim, source_dim, *, heads, width=None, value_width=None, bias=True, out_bias=None, norm=True, source_norm=True,
                 residual=True, eps=1e-5):
        super().__init__()
        width = min(dim, source_dim) if width is None else width
        value_width = width if value_width is None else value_width
        for name, size in (("width", width), ("value_width", value_width)):
            if size % heads:
                raise ValueError(f"CrossAttention: heads wants a divisor of {name} = {size}, got {heads}")
        self.options = dict(heads=heads, eps=eps, residual=residual)
        self.query, self.key = nn.Linear(dim, width, bias), nn.Linear(source_dim, width, bias)
        self.value = nn.Linear(source_dim, value_width, bias)
        self.out = nn.Linear(value_width, dim, bias if out_bias is None else out_bias)
        self.target_norm = nn.LayerNorm(dim, eps) if norm else None
        self.source_norm = nn.LayerNorm(source_dim, eps) if source_norm else None

    def forward(self, target, source, key_lengths=None):
        pair = lambda norm: norm and (norm.weight, norm.bias)
        return cross_attend(target, source, self.query.weight, self.key.weight, self.value.weight, self.out.weight,
                            q_bias=self.query.bias, k_bias=self.key.bias, v_bias=self.value.bias, out_bias=self.out.bias,
                            target_norm=pair(self.target_norm), source_norm=pair(self.source_norm), key_lengths=key_lengths, **self.options)

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

    @classmethod
    def _from(cls, layer):
        (width, dim), (value_width, source_dim) = layer.query[0].shape, layer.value[0].shape
        made = cls(dim, source_dim, width=width, value_width=value_width, norm=layer.target_norm is not None,
                   source_norm=layer.source_norm is not None, **layer.options())
        return foreign.copied(made, query=layer.query, key=layer.key, value=layer.value, out=layer.out, target_norm=layer.target_norm,
                              source_norm=layer.source_norm)

    @classmethod
    def from_rin_pytorch(cls, layer, *, residual=False):
        """A `rin_pytorch.rin_pytorch.Attention` as it is called with a context; weights are copied, norms' shifts frozen at 0.

        Options  residual: adds the target, as RIN does around the layer
        Raises   ValueError for time conditioning, qk_norm and inverted attention
        """
        return cls._from(foreign.rin_pytorch("from_rin_pytorch: layer", layer, residual))

    @classmethod
    def from_perceiver_pytorch(cls, layer, *, residual=False):
        """A `perceiver_pytorch` PreNorm of an Attention (or that alone) as it is called with a context; weights are copied.

        Options  residual: adds the target, as the models do around the layer
        Raises   ValueError for queries_contribute_kv and for dropout in training mode
        """
        return cls._from(foreign.perceiver_pytorch("from_perceiver_pytorch: layer", layer, residual))

    @classmethod
    def from_transformers(cls, layer):
        """A `transformers` PerceiverAttention, or that of a PerceiverLayer, as it is called with inputs; weights are copied.

        Raises   ValueError for dropout in training mode
        """
        return cls._from(foreign.transformers("from_transformers: layer", layer))
