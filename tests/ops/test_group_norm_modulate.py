"""What is peculiar to group_norm_modulate: memory formats, cuts of large groups and images, means far from zero."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff.ops import group_norm_modulate


def _image(*shape, mean=0.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64) + mean).float()


def _modulated(x, groups, weight, bias, scale, shift):
    channels = (..., *(None,) * (x.dim() - 2))
    return F.silu(F.group_norm(x, groups, weight, bias) * (1 + scale[channels]) + shift[channels])


FORMATS = [((2, 12, 5), None), ((2, 64, 33, 65), torch.contiguous_format), ((2, 64, 33, 65), torch.channels_last),
           ((1, 8, 3, 20, 30), torch.channels_last_3d), ((1, 6, 70, 80), torch.channels_last), ((1, 4, 100, 110), torch.contiguous_format)]


@pytest.mark.parametrize(("shape", "memory"), FORMATS)
@pytest.mark.parametrize("mean", (0.0, 1e3))
def test_formats(shape, memory, mean):
    """The result and its gradient lie as x does, whatever the cotangent's layout; groups and images are cut in several pieces."""
    x = _image(*shape, mean=mean)
    x = (x if memory is None else x.contiguous(memory_format=memory)).requires_grad_()
    B, C = shape[:2]
    small = [s.requires_grad_() for s in (_image(C), _image(C), _image(B, C), _image(B, C))]
    y = group_norm_modulate(x, 2, *small)
    wide = [t.detach().double().requires_grad_() for t in (x, *small)]
    exact = _modulated(wide[0], 2, *wide[1:])
    assert y.stride() == x.stride()
    assert (y - exact).abs().max() < 1e-6 * exact.abs().max()
    dy = _image(*shape)
    ours, theirs = torch.autograd.grad(y, (x, *small), dy), torch.autograd.grad(exact, wide, dy.double())
    assert ours[0].stride() == x.stride()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 3e-6 * b.abs().max()


@pytest.mark.parametrize("memory", (torch.contiguous_format, torch.channels_last))
def test_first_pixels_are_no_measure_of_the_mean(memory):
    x = _image(1, 32, 64, 64)
    x[:, :, :5] = 1e4
    x = x.contiguous(memory_format=memory)
    exact = F.group_norm(x.double(), 4)
    assert (group_norm_modulate(x, 4, None, None, silu=False) - exact).abs().max() < 1e-6 * exact.abs().max()


def test_expanded_cotangent():
    x = _image(2, 8, 6, 7).requires_grad_()
    ours, = torch.autograd.grad(group_norm_modulate(x, 2, None, None).sum(), x)
    plain, = torch.autograd.grad(F.silu(F.group_norm(x, 2)).sum(), x)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)


def test_refusals():
    x = _image(2, 8, 6, 7)
    with pytest.raises(ValueError, match="group_norm_modulate: groups wants a divisor of C = 8, got 3"):
        group_norm_modulate(x, 3, None, None)
    with pytest.raises(ValueError, match="scale has C = 7, but x has C = 8"):
        group_norm_modulate(x, 2, None, None, torch.ones(2, 7))
    with pytest.raises(ValueError, match="x wants 3 to 5 dimensions"):
        group_norm_modulate(x[0, 0], 2, None, None)
