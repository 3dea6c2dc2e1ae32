"""Modulated group norm with SiLU, and its gradient; computed in float32 (float64 in float64)."""

import torch
import torch.nn.functional as F


def _wide(x):
    return x if x is None or x.dtype == torch.float64 else x.float()


def _channels(x):
    """(C,) or (B, C) as (1 or B, C, 1), wide."""
    return x if x is None else (_wide(x) if x.dim() == 2 else _wide(x).unsqueeze(0)).unsqueeze(-1)


def _normalized(x, groups, eps):
    """x as (B, C, pixels), normalised within groups of channels; (B, groups, 3) of mean, 0 and 1 / sqrt(var + eps)."""
    B, C = x.shape[:2]
    x = _wide(x).reshape(B, groups, C // groups, x[0, 0].numel() if B and C else 0)
    mean = x.mean((2, 3), keepdim=True)
    x = x - mean
    rstd = torch.rsqrt(x.square().mean((2, 3), keepdim=True) + eps)
    return (x * rstd).flatten(1, 2), torch.cat((mean, torch.zeros_like(mean), rstd), -1).squeeze(2)


def _affine(x, gain, offset):
    x = x if gain is None else x * gain
    return x if offset is None else x + offset


def _one_plus(scale):
    return scale if scale is None else 1 + _channels(scale)


def group_norm_modulate(x, groups, weight, bias, scale, shift, eps, silu):
    normal, statistics = _normalized(x, groups, eps)
    y = _affine(_affine(normal, _channels(weight), _channels(bias)), _one_plus(scale), _channels(shift))
    return (F.silu(y) if silu else y).reshape(x.shape).to(x.dtype), statistics


def group_norm_modulate_backward(dy, x, statistics, groups, weight, bias, scale, shift, eps, silu, wants):
    """Gradients of x, weight, bias, scale, shift; what is not wanted is an empty tensor.

    The statistics are a result of the forward pass, for kernels to use: a function of x, here computed again, so that x is all there is
    to differentiate. Their middle, 0 here, is what kernels' mean lacks.
    """
    none = x.new_empty(0)
    normal, statistics = _normalized(x, groups, eps)
    inner = _affine(normal, _channels(weight), _channels(bias))
    dy = _wide(dy).reshape(normal.shape)
    if silu:
        y = _affine(inner, _one_plus(scale), _channels(shift))
        gate = torch.sigmoid(y)
        dy = dy * gate * (1 + y * (1 - gate))
    dinner = dy if scale is None else dy * _one_plus(scale)
    split = lambda t: t.unflatten(1, (groups, -1))
    dnormal = split(dinner if weight is None else dinner * _channels(weight))
    both = split(normal)
    mean_of = lambda t: t.mean((2, 3), keepdim=True)
    dx = statistics[..., 2, None, None] * (dnormal - mean_of(dnormal) - both * mean_of(dnormal * both))
    sums = (((dinner * normal, weight, (0, 2)), (dinner, bias, (0, 2)), (dy * inner, scale, 2), (dy, shift, 2)))
    return dx.reshape(x.shape).to(x.dtype), *(t.sum(axes).to(like.dtype) if want else none
                                             for (t, like, axes), want in zip(sums, wants[1:], strict=True))
