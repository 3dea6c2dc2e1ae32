"""Modulated layer norm and gated residual, and their gradients; computed in float32 (float64 in float64)."""

import torch


def _wide(x):
    return x if x is None or x.dtype == torch.float64 else x.float()


def _rows(x):
    """(B, D) as (B, 1, D), wide."""
    return _wide(x.unsqueeze(1) if x is not None and x.dim() == 2 else x)


def _sum_to(x, like):
    """x (B, N, D), summed to the shape of like and in its dtype."""
    axes = {3: (), 2: (1,), 1: (0, 1)}[like.dim()]
    return (x.sum(axes) if axes else x).to(like.dtype)


def _normalized(x, eps):
    """(x - mean) / sqrt(var + eps) along the last axis, and 1 / sqrt(var + eps)."""
    x = _wide(x)
    x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def _affine(x, weight, bias):
    x = x if weight is None else x * _wide(weight)
    return x if bias is None else x + _wide(bias)


def layer_norm_modulate(x, shift, scale, weight, bias, eps):
    y = _affine(_normalized(x, eps)[0], weight, bias)
    y = y if scale is None else y * (1 + _rows(scale))
    y = y if shift is None else y + _rows(shift)
    return y.to(x.dtype)


def gate_residual(x, y, gate):
    return (_wide(x) + _rows(gate) * _wide(y)).to(x.dtype)


def gate_residual_norm_modulate(x, y, gate, shift, scale, weight, bias, eps):
    out = gate_residual(x, y, gate)
    return out, layer_norm_modulate(out, shift, scale, weight, bias, eps)


def gate_residual_backward(dout, y, gate):
    """Gradients of y and gate; x's is dout."""
    return (_rows(gate) * _wide(dout)).to(y.dtype), _sum_to(_wide(dout) * _wide(y), gate)


def layer_norm_modulate_backward(dh, dout, x, y, gate, shift, scale, weight, bias, eps, wants):
    """Gradients of x, y, gate, shift, scale, weight, bias; x is what is normalised, x + gate y before the norm where there is y.

    dout is a gradient that comes to x beside the norm's. What is not wanted is an empty tensor.
    """
    none = x.new_empty(0)
    normal, rstd = _normalized(x, eps)
    dh = _wide(dh)
    inner = dh if scale is None else dh * (1 + _rows(scale))
    dx = inner if weight is None else inner * _wide(weight)
    dx = rstd * (dx - dx.mean(-1, keepdim=True) - normal * (dx * normal).mean(-1, keepdim=True))
    dx = dx if dout is None else dx + _wide(dout)
    return (dx.to(x.dtype), (_rows(gate) * dx).to(y.dtype) if wants[1] else none, _sum_to(dx * _wide(y), gate) if wants[2] else none,
            _sum_to(dh, shift) if wants[3] else none, _sum_to(dh * _affine(normal, weight, bias), scale) if wants[4] else none,
            _sum_to(inner * normal, weight) if wants[5] else none, _sum_to(inner, bias) if wants[6] else none)
