"""GroupNorm and AdaGroupNorm against torch's layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdiff.nn import AdaGroupNorm, GroupNorm


def agree(mine, theirs, *inputs):
    """Results and gradients of the inputs."""
    sides = []
    for function in (mine, theirs):
        given = [x.clone().requires_grad_() for x in inputs]
        out = function(*given)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        sides.append([out, *(x.grad for x in given)])
    for got, want in zip(*sides, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_group_norm(silu, memory_format):
    theirs, mine = nn.GroupNorm(4, 12), GroupNorm(4, 12, silu=silu)
    nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 12, 5, 7).to(memory_format=memory_format)
    agree(mine, lambda x: F.silu(theirs(x)) if silu else theirs(x), x)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_ada_group_norm(affine, additive):
    made = AdaGroupNorm(4, 12, 6, affine=affine, additive=additive, eps=1e-3)
    assert ("weight" in made.state_dict()) == affine
    if affine:
        nn.init.normal_(made.weight), nn.init.normal_(made.bias)

    def plain(x, condition):
        vector = made.proj(condition)[..., None, None]
        if additive:
            return F.silu(F.group_norm(x + vector, 4, made.weight, made.bias, 1e-3))
        scale, shift = vector.chunk(2, 1)
        return F.silu(F.group_norm(x, 4, made.weight, made.bias, 1e-3) * (1 + scale) + shift)

    agree(made, plain, torch.randn(2, 12, 5, 7), torch.randn(2, 6))


@pytest.mark.parametrize("silu", [False, True])
def test_from_diffusers(diffusers_normalization, silu):
    theirs = diffusers_normalization.AdaGroupNorm(6, 12, 4, eps=1e-3)
    made = AdaGroupNorm.from_diffusers(theirs, silu=silu)
    agree(made, lambda x, c: F.silu(theirs(x, c)) if silu else theirs(x, c), torch.randn(2, 12, 5, 7), torch.randn(2, 6))
    with pytest.raises(ValueError, match="layer wants a condition taken as it is, got act=SiLU"):
        AdaGroupNorm.from_diffusers(diffusers_normalization.AdaGroupNorm(6, 12, 4, act_fn="silu"))
