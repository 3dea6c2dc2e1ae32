"""A Perceiver's read of an image: attention over pixels and their Fourier position features, which are never formed (NOTES.md)."""

from math import prod

import torch
import torch.nn.functional as F

from ...core.backend import cpu
from ...core.check import dims, fail, flag, integers, number, option, pair, tensor
from ...core.contract import contract, without_autocast
from ..linear import linear
from . import reference, triton

_ORDERS = ("kind", "axis")


def _sizes(op, u, rows, columns, planes):
    sizes = dims(op, u=(u, "B H M K"), rows=(rows, "B H M R"), columns=(columns, "B H M W"), planes=(planes, "B P R W"))
    if sizes["P"] != sizes["K"] + 1:
        fail(op, f"planes wants K + 1 = {sizes['K'] + 1} of them, got {sizes['P']}")


def _outputs(u, rows, columns, planes):
    _sizes("grid_attention", u, rows, columns, planes)
    return *(x.new_empty(x.shape) for x in (u, rows, columns)), u.new_empty(u.shape[:3]), u.new_empty(u.shape[:3])


def _backward_outputs(dsums, drow_sums, dcolumn_sums, u, rows, columns, planes, sums, row_sums, column_sums, lse, lse_low, planes_grad):
    op = "grid_attention_backward"
    _sizes(op, u, rows, columns, planes)
    dims(op, u=(u, "B H M K"), dsums=(dsums, "B H M K"), sums=(sums, "B H M K"), lse=(lse, "B H M"), lse_low=(lse_low, "B H M"))
    dims(op, rows=(rows, "B H M R"), drow_sums=(drow_sums, "B H M R"), row_sums=(row_sums, "B H M R"), columns=(columns, "B H M W"),
         dcolumn_sums=(dcolumn_sums, "B H M W"), column_sums=(column_sums, "B H M W"))
    return *(x.new_empty(x.shape) for x in (u, rows, columns)), planes.new_empty(planes.shape if planes_grad else (0,))


def _refuse(u, *_):
    return None if u.dtype == torch.float32 else f"computes in float32, and {u.dtype} was asked for"


def _plan(u, rows, columns, planes, *_):
    scores = prod(u.shape[:3]) * rows.shape[3] * columns.shape[3]
    return (f"positions factored into {rows.shape[3]} rows and {columns.shape[3]} columns: {planes.shape[1]} multiplications for each of "
            f"{scores} scores")


GRID = contract(
    "grid_attention(Tensor u, Tensor rows, Tensor columns, Tensor planes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", outputs=_outputs,
    reference=reference.grid_attention, module=__name__,
    backends=(triton.FORWARD, cpu("grid_attention", dtypes=None, refuse=_refuse, plan=_plan)))
BACKWARD = contract(
    "grid_attention_backward(Tensor dsums, Tensor drow_sums, Tensor dcolumn_sums, Tensor u, Tensor rows, Tensor columns, Tensor planes, "
    "Tensor sums, Tensor row_sums, Tensor column_sums, Tensor lse, Tensor lse_low, bool planes_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    outputs=_backward_outputs, reference=reference.grid_attention_backward, module=__name__,
    backends=(triton.BACKWARD, cpu("grid_attention_backward", dtypes=None, refuse=_refuse)))


def _save(ctx, args, outs):
    ctx.mark_non_differentiable(*outs[3:])
    return *args, *outs


def _backward(ctx, *douts):
    saved = ctx.saved_tensors  # once: under checkpointing a second look is refused
    args, outs = saved[:4], saved[4:]
    if all(d is None for d in douts[:3]):
        return (None,) * 4
    douts = [torch.zeros_like(y) if d is None else d for d, y in zip(douts[:3], outs, strict=False)]
    grads = BACKWARD(*douts, *args, *outs, ctx.wants[3])
    return *grads[:3], grads[3] if ctx.wants[3] else None


def _jvp(ctx, *tangents):
    args = ctx.saved_tensors[:4]
    tangents = (torch.zeros_like(x) if d is None else d for d, x in zip(tangents, args, strict=True))
    return *reference.grid_attention_tangent(*args, *tangents)[:3], None, None


GRID.autograd(save=_save, backward=_backward, jvp=_jvp)


GRID.vmap_batch()
BACKWARD.vmap_batch()


def _check(latents, image, q_weight, k_weight, v_weight, out_weight, biases, norms, bands, max_freq, order, heads, eps, residual):
    """max_freq as one float per axis; refuses what does not fit together."""
    op = "fourier_cross_attend"
    needed = dict(latents=latents, image=image, q_weight=q_weight, k_weight=k_weight, v_weight=v_weight, out_weight=out_weight)
    for name, x in needed.items():
        tensor(op, name, x)
    sizes = dims(op, latents=(latents, "B M D"), q_weight=(q_weight, "A D"), k_weight=(k_weight, "A F"), v_weight=(v_weight, "V F"),
                 out_weight=(out_weight, "O V"), **{name: (x, axis) for (name, x), axis in zip(biases.items(), "AAVO", strict=True)})
    space = image.dim() - 2
    if space not in (2, 3):
        fail(op, f"image wants 4 or 5 dimensions (B, C, 2 or 3 of space), got {image.dim()}: {tuple(image.shape)}; positions on a line or "
                 "on no grid do not factor: attend to their features")
    dims(op, latents=(latents, "B M D"), image=(image, "B C h w" if space == 2 else "B C t h w"))
    for name, norm in norms.items():
        beside = {"q_weight": (q_weight, "A D")} if name == "target_norm" else {"k_weight": (k_weight, "A F")}
        dims(op, **beside, **{f"{name}[{i}]": (x, "D" if name == "target_norm" else "F") for i, x in enumerate(pair(op, name, norm))})
    (bands,), (heads,) = integers(op, "bands", bands), integers(op, "heads", heads)
    option(op, "order", order, _ORDERS)
    wanted = image.shape[1] + space * (2 * bands + 1)
    if sizes["F"] != wanted:
        fail(op, f"k_weight wants F = C + axes (2 bands + 1) = {wanted}, got {tuple(k_weight.shape)}")
    for name, axis in (("q_weight", "A"), ("v_weight", "V")):
        if sizes[axis] % heads:
            fail(op, f"heads wants a divisor of {name}'s {sizes[axis]} rows, got {heads}")
    if flag(op, "residual", residual) and sizes["O"] != sizes["D"]:
        fail(op, f"out_weight wants O = D = {sizes['D']} rows for the residual, got {tuple(out_weight.shape)}")
    number(op, "eps", eps, least=0)
    each = tuple(max_freq) if isinstance(max_freq, tuple | list) else (max_freq,) * space
    if len(each) != space:
        fail(op, f"max_freq wants a float or {space} of them, got {max_freq!r}")
    return tuple(number(op, "max_freq", f) for f in each)


def _scale(image, grid, eps):
    """1 / standard deviation, (B, *space), of every pixel's channels and position features; in float64."""
    width = image.shape[1] + sum(x.shape[1] for x in grid)
    image, total, squares = image.double(), 0.0, 0.0
    for axis, x in enumerate(grid):
        shape = [-1 if i == axis else 1 for i in range(len(grid))]
        total, squares = total + x.double().sum(1).view(shape), squares + x.double().square().sum(1).view(shape)
    mean = (image.sum(1) + total) / width
    return torch.rsqrt((image.square().sum(1) + squares) / width - mean.square() + eps)


def _read(u, image, grid, norm, eps):
    """sum_j P_j x_j, P = softmax(u x), over the (normalised, not yet scaled) features x_j of the pixels: (B, H, M, F).

    A LayerNorm's centring is a projection: applied to u and to the sum, it need not be to the pixels.
    """
    C, space = image.shape[1], image.shape[2:]
    if norm:
        u = u - u.mean(-1, keepdim=True)
        scale = _scale(image, grid, eps).unsqueeze(1)
        planes = torch.cat((image * scale, scale), 1).to(u.dtype)
    else:
        planes = torch.cat((image, torch.ones_like(image[:, :1])), 1)
    tables = [linear(part, x) for part, x in zip(u[..., C:].split([x.shape[1] for x in grid], -1), grid, strict=True)]
    rows = tables[0] if len(tables) == 2 else (tables[0].unsqueeze(-1) + tables[1].unsqueeze(-2)).flatten(-2)
    sums, row_sums, column_sums = GRID(u[..., :C], rows, tables[-1], planes.flatten(2, -2))[:3]
    leading = [row_sums] if len(tables) == 2 else [row_sums.unflatten(-1, space[:2]).sum(-1), row_sums.unflatten(-1, space[:2]).sum(-2)]
    position = [linear(weights, x.T) for weights, x in zip((*leading, column_sums), grid, strict=True)]
    x = torch.cat((sums, *position), -1)
    return x - x.mean(-1, keepdim=True) if norm else x


def fourier_cross_attend(latents, image, q_weight, k_weight, v_weight, out_weight, *, bands, max_freq, order="kind", heads=1, q_bias=None,
                         k_bias=None, v_bias=None, out_bias=None, target_norm=None, source_norm=None, eps=1e-6, residual=True):
    """latents + W_o attention(W_q LN(latents), W_k LN(x), W_v LN(x)), x = [channels | Fourier position features] of each pixel of a grid.

    Shapes   latents (B, M, D); image (B, C, h, w) or (B, C, t, h, w), any strides; weights as in nn.Linear: q (A, D), k (A, F), v (V, F),
             out (O, V), F = C + axes (2 bands + 1), heads divides A and V -> (B, M, O), O = D with the residual
    Options  positions of an axis run from -1 to 1; frequencies, in half periods over that, from 1 to max_freq / 2 (a float, or one per
             axis); order of the position features: "kind" (all positions, all sines, all cosines; DeepMind, transformers) or "axis" (sines,
             cosines, position of each axis; perceiver-pytorch); *_norm = (weight, bias) of a LayerNorm, or None for none
    Dtypes   float32, float16, bfloat16, float64; all equal; computed in float32 (float64 for float64)
    Grads    latents, image, weights, biases, norms; every order. k_bias moves all scores of a query alike: its gradient is 0
    Raises   ValueError naming the argument, what was wanted and what was given; TypeError for a non-tensor
    Source   Jaegle et al. 2021, section 3.2; the scores' positional part separates over the axes, exactly
    """
    biases = dict(q_bias=q_bias, k_bias=k_bias, v_bias=v_bias, out_bias=out_bias)
    norms = dict(target_norm=target_norm, source_norm=source_norm)
    max_freq = _check(latents, image, q_weight, k_weight, v_weight, out_weight, biases, norms, bands, max_freq, order, heads, eps, residual)
    dtype, space = latents.dtype, image.shape[2:]
    wide = lambda x: x if x is None or x.dtype == torch.float64 else x.float()
    latents, image, q_weight, k_weight, v_weight, out_weight, q_bias, v_bias, out_bias = map(
        wide, (latents, image, q_weight, k_weight, v_weight, out_weight, q_bias, v_bias, out_bias))
    with without_autocast(latents):
        z = latents
        if target_norm is not None:  # with the affine part apart: layer_norm adds its gradient up by threads
            gain, shift = map(wide, target_norm)
            z = F.layer_norm(latents, latents.shape[-1:], eps=eps) * gain + shift
        if prod(space):
            # Columns of k and v with each axis' features together, in the order of reference.axis_features.
            C = image.shape[1]
            inner = [*range(C), *(C + c for c in reference.columns(len(space), bands, order))]
            gain, shift = (None, None) if source_norm is None else (wide(x)[inner] for x in source_norm)
            q = linear(z, q_weight, q_bias)
            width = q.shape[-1] // heads
            parts = zip((q * width**-0.5).split(width, -1), k_weight[:, inner].split(width), strict=True)
            u = torch.stack([linear(a, w.T) for a, w in parts], 1)
            grid = [reference.axis_features(n, bands, f, u) for n, f in zip(space, max_freq, strict=True)]
            x = _read(u if gain is None else u * gain, image, grid, gain is not None, eps)
            x = x if gain is None else x * gain + shift
            parts = zip(x.unbind(1), v_weight[:, inner].split(v_weight.shape[0] // heads), strict=True)
            v = torch.cat([linear(a, w) for a, w in parts], -1)
            v = v if v_bias is None else v + v_bias
        else:
            v = z.new_zeros((*z.shape[:2], v_weight.shape[0]))
        out = linear(v, out_weight, out_bias)
        if k_bias is not None:
            out = out + 0 * k_bias.sum()
        return (latents + out if residual else out).to(dtype)
