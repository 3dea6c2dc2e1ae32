"""A Perceiver's read with its features written out, and attention over a grid as the textbook writes it."""

import torch
import torch.nn.functional as F


def axis_features(n, bands, max_freq, like):
    """(n, 2 bands + 1) in like's dtype: sines, cosines, position of each of n places on [-1, 1]; frequencies 1 to max_freq / 2."""
    places = torch.arange(n, dtype=torch.float64, device=like.device) * (2.0 / max(n - 1, 1)) - 1.0
    angles = torch.pi * places[:, None] * torch.linspace(1.0, max_freq / 2, bands, dtype=torch.float64, device=like.device)
    return torch.cat((torch.sin(angles), torch.cos(angles), places[:, None]), 1).to(like.dtype)


def columns(axes, bands, order):
    """The column of each axis' sines, cosines and position among all position features, axis after axis."""
    if order == "axis":
        return list(range(axes * (2 * bands + 1)))
    sines = [[axes + a * bands + k for k in range(bands)] for a in range(axes)]
    return [c for a in range(axes) for c in (*sines[a], *(s + axes * bands for s in sines[a]), a)]


def features(image, bands, max_freq, order):
    """(B, pixels, C + features): every pixel's channels, then its position features."""
    B, _, *space = image.shape
    grid = [axis_features(n, bands, f, image) for n, f in zip(space, max_freq, strict=True)]
    spread = [x.view(*(n if i == a else 1 for i, n in enumerate(space)), 2 * bands + 1).expand(*space, -1) for a, x in enumerate(grid)]
    order = columns(len(space), bands, order)
    positions = torch.cat(spread, -1)[..., [order.index(c) for c in range(len(order))]].flatten(0, -2)
    return torch.cat((image.flatten(2).transpose(1, 2), positions.expand(B, -1, -1)), -1)


def fourier_cross_attend(latents, image, q_weight, k_weight, v_weight, out_weight, *, bands, max_freq, order="kind", heads=1, q_bias=None,
                         k_bias=None, v_bias=None, out_bias=None, target_norm=None, source_norm=None, eps=1e-6, residual=True):
    space = image.dim() - 2
    max_freq = max_freq if isinstance(max_freq, tuple | list) else (max_freq,) * space
    source = features(image, bands, max_freq, order)
    target = latents if target_norm is None else F.layer_norm(latents, latents.shape[-1:], *target_norm, eps)
    source = source if source_norm is None else F.layer_norm(source, source.shape[-1:], *source_norm, eps)
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)
    q, k = split(F.linear(target, q_weight, q_bias)), split(F.linear(source, k_weight, k_bias))
    v = split(F.linear(source, v_weight, v_bias))
    p = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1)
    out = F.linear((p @ v).transpose(1, 2).flatten(2), out_weight, out_bias)
    return latents + out if residual else out


def _scores(u, rows, columns, planes):
    """(B, H, M, R, W)."""
    s = torch.einsum("bhmk,bkrw->bhmrw", u, planes[:, :-1])
    return s + (rows.unsqueeze(-1) + columns.unsqueeze(-2)) * planes[:, None, None, -1]


def _softmax(s):
    return torch.softmax(s.flatten(-2), -1).view_as(s)


def _sums(p, planes):
    weights = p * planes[:, None, None, -1]
    return torch.einsum("bhmrw,bkrw->bhmk", p, planes[:, :-1]), weights.sum(-1), weights.sum(-2)


def grid_attention(u, rows, columns, planes):
    """(sums, row_sums, column_sums, lse, lse_low) of the softmax P over all pixels; lse_low is what rounding lse left over (here 0)."""
    s = _scores(u, rows, columns, planes)
    lse = torch.logsumexp(s.flatten(-2), -1)
    return *_sums(_softmax(s), planes), lse, torch.zeros_like(lse)


def grid_attention_tangent(u, rows, columns, planes, du, drows, dcolumns, dplanes):
    """Tangents of (sums, row_sums, column_sums, lse)."""
    p = _softmax(_scores(u, rows, columns, planes))
    ds = _scores(du, drows, dcolumns, planes) + _scores(u, rows, columns, dplanes)
    dlse = (p * ds).sum((-2, -1))
    dp = p * (ds - dlse[..., None, None])
    moved, own = _sums(dp, planes), _sums(p, dplanes)
    return *(a + b for a, b in zip(moved, own, strict=True)), dlse


def grid_attention_backward(dsums, drow_sums, dcolumn_sums, u, rows, columns, planes, sums, row_sums, column_sums, lse, lse_low,
                            planes_grad):
    """Gradients (du, drows, dcolumns, dplanes); dplanes is empty unless wanted."""
    p = _softmax(_scores(u, rows, columns, planes))
    dp = _scores(dsums, drow_sums, dcolumn_sums, planes)
    ds = p * (dp - (p * dp).sum((-2, -1), keepdim=True))
    du, drows, dcolumns = _sums(ds, planes)
    if not planes_grad:
        return du, drows, dcolumns, planes.new_empty(0)
    spread = lambda a, b: a.unsqueeze(-1) + b.unsqueeze(-2)
    pixels = torch.einsum("bhmrw,bhmk->bkrw", ds, u) + torch.einsum("bhmrw,bhmk->bkrw", p, dsums)
    position = (ds * spread(rows, columns) + p * spread(drow_sums, dcolumn_sums)).sum((1, 2))
    return du, drows, dcolumns, torch.cat((pixels, position.unsqueeze(1)), 1)
