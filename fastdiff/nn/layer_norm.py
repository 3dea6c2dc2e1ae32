"""Layer norms conditioned on a vector, as at the boundaries of a diffusion transformer's sublayers."""

import copy

import torch.nn.functional as F
from torch import nn

from ..core.check import fail
from ..ops import layer_norm_modulate
from . import foreign

_PACKAGE = "diffusers.models.normalization"


class AdaLayerNorm(nn.Module):
    """LN(x) (1 + scale) + shift, [shift | scale | others] = W silu(condition) + b.

    Shapes   x (B, N, dim), condition (B, width), or (width,) for all samples -> (B, N, dim); with chunks > 2 a tuple of that and the
             others, each (B, dim)
    Options  width: dim unless given; chunks: vectors that W makes, at least 2, 6 for adaLN-Zero; first: "shift" or "scale", which of the
             two W makes first; affine: the norm's own weight and bias; emb: a module that makes the condition from forward's further
             arguments, which without it are the condition
    State    linear: nn.Linear(width, chunks * dim); norm: nn.LayerNorm, weight and bias with affine alone; emb: as diffusers' AdaLayerNorm,
             AdaLayerNormZero, AdaLayerNormZeroSingle and AdaLayerNormContinuous
    Raises   ValueError for chunks below 2 and an unknown first
    Source   Peebles & Xie 2023, section 3.2
    """

    def __init__(self, dim, width=None, *, chunks=2, first="shift", affine=False, bias=True, eps=1e-6, emb=None):
        super().__init__()
        if chunks < 2:
            fail("AdaLayerNorm", f"chunks wants at least 2, got {chunks}")
        if first not in ("shift", "scale"):
            fail("AdaLayerNorm", f"first wants 'shift' or 'scale', got {first!r}")
        self.chunks, self.first, self.emb = chunks, first, emb
        self.linear = nn.Linear(dim if width is None else width, chunks * dim, bias)
        self.norm = nn.LayerNorm(dim, eps, affine)

    def forward(self, x, *condition, **options):
        condition, = condition if self.emb is None else (self.emb(*condition, **options),)
        made = self.linear(F.silu(condition))
        shift, scale, *others = made.expand(len(x), made.shape[-1]).chunk(self.chunks, -1)
        if self.first == "scale":
            shift, scale = scale, shift
        y = layer_norm_modulate(x, shift, scale, self.norm.weight, self.norm.bias, eps=self.norm.eps)
        return (y, *others) if others else y

    def extra_repr(self):
        return f"chunks={self.chunks}, first={self.first!r}"

    @classmethod
    def from_diffusers(cls, layer):
        """diffusers' AdaLayerNorm, AdaLayerNormZero, AdaLayerNormZeroSingle or AdaLayerNormContinuous; weights and `emb` are copied.

        Raises   ValueError for another layer, and one whose norm is no nn.LayerNorm
        """
        name = "from_diffusers: layer"
        foreign.of(name, layer, *(f"{_PACKAGE}.AdaLayerNorm{kind}" for kind in ("", "Zero", "ZeroSingle", "Continuous")))
        norm, linear, emb = layer.norm, layer.linear, getattr(layer, "emb", None)
        if type(norm) is not nn.LayerNorm:
            raise ValueError(f"{name} wants a layer with an nn.LayerNorm, got {norm}")
        dim, kind = norm.normalized_shape[0], type(layer).__name__
        first = "scale" if kind == "AdaLayerNormContinuous" or getattr(layer, "chunk_dim", 1) == 0 else "shift"
        made = cls(dim, linear.in_features, chunks=linear.out_features // dim, first=first, affine=norm.elementwise_affine,
                   bias=linear.bias is not None, eps=norm.eps, emb=copy.deepcopy(emb))
        return foreign.copied(made, linear=(linear.weight, linear.bias), norm=(norm.weight, norm.bias) if norm.elementwise_affine else None)
