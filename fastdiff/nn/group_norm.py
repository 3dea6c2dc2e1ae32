"""Group norms of U-Nets: with SiLU, and conditioned on a vector."""

from torch import nn

from ..ops import group_norm_modulate
from . import foreign


class GroupNorm(nn.GroupNorm):
    """silu(GN(x)), or GN(x) with silu=False, in one pass.

    Shapes   x (B, channels, *space), NCHW or channels-last memory -> the same
    State    as nn.GroupNorm
    Source   Wu & He 2018; Dhariwal & Nichol 2021, section 3
    """

    def __init__(self, groups, channels, *, eps=1e-5, affine=True, silu=True):
        super().__init__(groups, channels, eps, affine)
        self.silu = silu

    def forward(self, x, scale=None, shift=None):
        return group_norm_modulate(x, self.num_groups, self.weight, self.bias, scale, shift, eps=self.eps, silu=self.silu)

    def extra_repr(self):
        return f"{super().extra_repr()}, silu={self.silu}"


class AdaGroupNorm(GroupNorm):
    """silu(GN(x) (1 + scale) + shift), [scale | shift] = W condition + b; or silu(GN(x + W condition + b)) with additive=True.

    Shapes   x (B, channels, *space), condition (B, width) -> as x
    State    weight, bias: as nn.GroupNorm; proj: nn.Linear(width, 2 * channels), or channels with additive=True
    Source   Dhariwal & Nichol 2021, section 3
    """

    def __init__(self, groups, channels, width, *, eps=1e-5, affine=True, additive=False, silu=True):
        super().__init__(groups, channels, eps=eps, affine=affine, silu=silu)
        self.additive = additive
        self.proj = nn.Linear(width, channels if additive else 2 * channels)

    def forward(self, x, condition):
        made = self.proj(condition)
        if self.additive:
            return super().forward(x + made.view(*made.shape, *(1,) * (x.dim() - 2)))
        return super().forward(x, *made.chunk(2, 1))

    def extra_repr(self):
        return f"{super().extra_repr()}, additive={self.additive}"

    @classmethod
    def from_diffusers(cls, layer, *, silu=False):
        """A `diffusers.models.normalization.AdaGroupNorm`, whose `linear` is proj; weights are copied. silu: whether one follows the layer.

        Raises   ValueError for another layer, and one with an activation of its own
        """
        name = "from_diffusers: layer"
        linear = foreign.of(name, layer, "diffusers.models.normalization.AdaGroupNorm").linear
        if layer.act is not None:
            raise ValueError(f"{name} wants a condition taken as it is, got act={layer.act}")
        made = cls(layer.num_groups, linear.out_features // 2, linear.in_features, eps=layer.eps, affine=False, silu=silu)
        return foreign.copied(made, proj=(linear.weight, linear.bias))
