"""PatchEmbed and Unpatch against a convolution and a linear layer with the attributes of timm's, diffusers' and DiT's modules."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdiff.nn import PatchEmbed, Unpatch


class StandIn(nn.Module):
    """What the loaders read of timm's and diffusers' PatchEmbed, and its output."""

    def __init__(self, norm, bias=True, position=None, **convolution):
        super().__init__()
        self.proj, self.flatten, self.norm = nn.Conv2d(3, 40, 4, **dict(stride=4) | convolution, bias=bias), True, norm
        if position is not None:
            self.register_buffer("pos_embed", position)

    def forward(self, x):
        y = self.proj(x).flatten(2).transpose(1, 2)
        return y + self.pos_embed if hasattr(self, "pos_embed") else y


@pytest.fixture
def image():
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
def test_from_timm(image, bias):
    theirs = StandIn(nn.Identity(), bias)
    ours = PatchEmbed.from_timm(theirs)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)
    ours.load_state_dict(theirs.state_dict())


def test_from_diffusers(image):
    theirs = StandIn(None, position=torch.randn(1, 24, 40))
    ours = PatchEmbed.from_diffusers(theirs)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-5, atol=1e-5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with pytest.raises(ValueError, match="position wants N = 12"):
        ours(image[..., :12])


def test_gradients_of_a_convolution(image):
    theirs = StandIn(nn.Identity())
    ours = PatchEmbed.from_timm(theirs)
    for module in (ours, theirs):
        module(image).square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="from_timm: module wants a projection with"):
        PatchEmbed.from_timm(StandIn(nn.Identity(), stride=2))
    with pytest.raises(ValueError, match="from_timm: module wants flattened tokens"):
        PatchEmbed.from_timm(StandIn(nn.LayerNorm(40)))
    with pytest.raises(ValueError, match="from_diffusers: module wants flattened tokens"):
        PatchEmbed.from_diffusers(StandIn(nn.LayerNorm(40)))
    with pytest.raises(ValueError, match="from_linear: patch wants a product that divides 16"):
        Unpatch.from_linear(nn.Linear(8, 16), 3)


def test_unpatch_is_the_end_of_a_dit():
    final = SimpleNamespace(linear=nn.Linear(48, 2 * 2 * 8))
    tokens = torch.randn(2, 15, 48)
    image = final.linear(tokens).reshape(2, 3, 5, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 6, 10)
    torch.testing.assert_close(Unpatch.from_linear(final.linear, 2)(tokens, (3, 5)), image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes, patch", [(1, 4), (3, (1, 2, 4))])
def test_axes(axes, patch):
    module = PatchEmbed(3, 10, patch, axes=axes)
    x = torch.randn(1, 3, *(8,) * axes)
    torch.testing.assert_close(module(x), module.proj(x).flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
