"""a gelu(b) for [a | b] = x along the last axis, and its gradient; computed in float32 (float64 in float64)."""

import math

import torch
import torch.nn.functional as F


def _halves(x):
    return (x if x.dtype == torch.float64 else x.float()).chunk(2, -1)


def geglu(x, approximate):
    a, b = _halves(x)
    return (a * F.gelu(b, approximate=approximate)).to(x.dtype)


def geglu_backward(dy, x, approximate):
    """gelu(b) = b P(b), P = (1 + erf(b / sqrt 2)) / 2 or (1 + tanh u) / 2, u = sqrt(2 / pi) (b + 0.044715 b^3)."""
    a, b = _halves(x)
    dy = dy.to(a.dtype)
    if approximate == "tanh":
        root = math.sqrt(2 / math.pi)
        tanh = torch.tanh(root * (b + 0.044715 * b * b * b))
        slope = (1 + tanh) / 2 + b * (1 - tanh * tanh) / 2 * root * (1 + 3 * 0.044715 * b * b)
    else:
        slope = (1 + torch.erf(b / math.sqrt(2))) / 2 + b * torch.exp(-b * b / 2) / math.sqrt(2 * math.pi)
    return torch.cat((dy * F.gelu(b, approximate=approximate), dy * a * slope), -1).to(x.dtype)
