"""Modulated group norm with SiLU in two passes, moments and result; its gradient in two, sums per channel and result."""

import torch

from ...core import device
from ...core.backend import triton
from ...core.jit import OPTIONS, cdiv, jit, narrow, power_of_two, tl
from ...core.launch import pick

LAUNCH = dict(elements=2048, num_warps=4)  # elements of a tile of a group's channels and some pixels; not tuned on a GPU yet
# Programs that fill the chip, by architecture: a group's pixels are cut for them.
PROGRAMS = ((100, None, 592), (90, None, 528), (1, None, 432), (0, None, 8))


@jit
def _place(groups, width, CHANNELS: tl.constexpr):
    """(sample and group, sample, channels, which of them there are) of this program."""
    i_bg = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, CHANNELS)
    return i_bg, i_bg // groups, i_bg % groups * width + o_c, o_c < width


@jit
def _piece(P, per):
    """[begin, end) of the pixels that this program takes."""
    begin = tl.program_id(1).to(tl.int64) * per
    return begin, tl.minimum(begin + per, P)


@jit
def _rows(x_ptr, i_b, o_c, strides):
    """Pointers to the channels' first pixels."""
    return x_ptr + i_b * strides[0] + o_c[:, None] * strides[1]


@jit
def _load(rows, o_p, stride, m):
    return tl.load(rows + o_p[None, :] * tl.cast(stride, tl.int64), mask=m, other=0.0).to(tl.float32)


@jit
def _moments(x_ptr, part_ptr, groups, width, P, per, x_strides, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """Count, mean and sum of squared deviations of a piece of a group's pixels, block by block and joined by Chan's rule.

    grid    (B groups, cdiv(P, per))
    layout  x (B, C, P), any strides; part (B groups, pieces, 3) fp32
    math    fp32; a block's deviations are from its own mean
    needs   CHANNELS a power of two, at least width = C / groups
    """
    i_bg, i_b, o_c, m_c = _place(groups, width, CHANNELS)
    x_ptr = _rows(x_ptr, i_b, o_c, x_strides)
    begin, end = _piece(P, per)
    count, mean, squares = 0.0, 0.0, 0.0
    for start in range(begin, end, PIXELS):
        o_p = start + tl.arange(0, PIXELS)
        m = m_c[:, None] & (o_p < end)[None, :]
        x = _load(x_ptr, o_p, x_strides[2], m)
        n = (tl.minimum(end - start, PIXELS) * width).to(tl.float32)
        block = tl.sum(tl.sum(x, 1), 0) / n
        d = tl.where(m, x - block, 0.0)
        rest = tl.sum(tl.sum(d, 1), 0) / n
        delta = block - mean + rest
        squares += tl.sum(tl.sum(d * d, 1), 0) - n * rest * rest + delta * delta * (count * n / (count + n))
        mean += delta * (n / (count + n))
        count += n
    part_ptr += (i_bg * tl.num_programs(1) + tl.program_id(1)) * 3
    tl.store(part_ptr, count)
    tl.store(part_ptr + 1, mean)
    tl.store(part_ptr + 2, squares)


@jit
def _channel(ptr, strides, i_b, o_c, m_c, other):
    """Values of channels o_c of sample i_b; `other` without a pointer."""
    values = tl.full(o_c.shape, other, tl.float32)
    if ptr is not None:
        values = tl.load(ptr + i_b * strides[0] + o_c * tl.cast(strides[1], tl.int64), mask=m_c, other=0.0).to(tl.float32)
    return values


@jit
def _gain_offset(weight_ptr, bias_ptr, scale_ptr, shift_ptr, vector_strides, scale_strides, shift_strides, i_b, o_c, m_c):
    """y = normal gain + offset, per channel."""
    scale = 1.0 + _channel(scale_ptr, scale_strides, i_b, o_c, m_c, 0.0)
    gain = _channel(weight_ptr, vector_strides[0], i_b, o_c, m_c, 1.0) * scale
    offset = _channel(bias_ptr, vector_strides[1], i_b, o_c, m_c, 0.0) * scale + _channel(shift_ptr, shift_strides, i_b, o_c, m_c, 0.0)
    return gain[:, None], offset[:, None]


@jit
def _apply(x_ptr, part_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, statistics_ptr, groups, width, P, per, eps, x_strides,
           y_strides, vector_strides, scale_strides, shift_strides, SILU: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """y = silu(normal gain + offset) of a piece, the group's moments joined from all pieces' in their order.

    grid    as in `_moments`
    layout  as in `_moments`; y as x; statistics (B groups, 3) fp32: mean, 0, 1 / sqrt(var + eps)
    math    fp32, rounded once
    needs   as in `_moments`
    """
    i_bg, i_b, o_c, m_c = _place(groups, width, CHANNELS)
    gain, offset = _gain_offset(weight_ptr, bias_ptr, scale_ptr, shift_ptr, vector_strides, scale_strides, shift_strides, i_b, o_c, m_c)
    count, mean, squares = 0.0, 0.0, 0.0
    for i in range(0, tl.num_programs(1)):
        base = part_ptr + (i_bg * tl.num_programs(1) + i) * 3
        n, delta = tl.load(base), tl.load(base + 1) - mean
        squares += tl.load(base + 2) + delta * delta * (count * n / (count + n))
        mean += delta * (n / (count + n))
        count += n
    rstd = 1.0 / tl.sqrt(squares / count + tl.cast(eps, tl.float32))
    if tl.program_id(1) == 0:
        tl.store(statistics_ptr + i_bg * 3, mean)
        tl.store(statistics_ptr + i_bg * 3 + 1, 0.0)
        tl.store(statistics_ptr + i_bg * 3 + 2, rstd)
    x_ptr = _rows(x_ptr, i_b, o_c, x_strides)
    y_ptr = _rows(y_ptr, i_b, o_c, y_strides)
    begin, end = _piece(P, per)
    for start in range(begin, end, PIXELS):
        o_p = start + tl.arange(0, PIXELS)
        m = m_c[:, None] & (o_p < end)[None, :]
        x = _load(x_ptr, o_p, x_strides[2], m)
        y = (x - mean) * rstd * gain + offset
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(y_ptr + o_p[None, :] * tl.cast(y_strides[2], tl.int64), narrow(y, y_ptr.dtype.element_ty), mask=m)


@jit
def _statistics(statistics_ptr, i_bg):
    """(mean, what of it float32 left over, 1 / sqrt(var + eps)) of a group."""
    statistics_ptr += i_bg * 3
    return tl.load(statistics_ptr), tl.load(statistics_ptr + 1), tl.load(statistics_ptr + 2)


@jit
def _through(dy, y, SILU: tl.constexpr):
    """dy times the slope of SiLU at y."""
    if SILU:
        gate = 1.0 / (1.0 + tl.exp(-y))
        dy = dy * gate * (1.0 + y * (1.0 - gate))
    return dy


@jit
def _sums(dy_ptr, x_ptr, statistics_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, part_ptr, groups, width, P, per, dy_strides, x_strides,
          vector_strides, scale_strides, shift_strides, SILU: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """Sums over a piece's pixels of dy, past SiLU, and of dy normal, per channel.

    grid    as in `_moments`
    layout  as in `_apply`; part (2, pieces, B groups width) fp32
    math    fp32
    needs   as in `_moments`
    """
    i_bg, i_b, o_c, m_c = _place(groups, width, CHANNELS)
    gain, offset = _gain_offset(weight_ptr, bias_ptr, scale_ptr, shift_ptr, vector_strides, scale_strides, shift_strides, i_b, o_c, m_c)
    mean, rest, rstd = _statistics(statistics_ptr, i_bg)
    x_ptr = _rows(x_ptr, i_b, o_c, x_strides)
    dy_ptr = _rows(dy_ptr, i_b, o_c, dy_strides)
    begin, end = _piece(P, per)
    sum_dy, sum_dyn = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for start in range(begin, end, PIXELS):
        o_p = start + tl.arange(0, PIXELS)
        m = m_c[:, None] & (o_p < end)[None, :]
        x = _load(x_ptr, o_p, x_strides[2], m)
        dy = _load(dy_ptr, o_p, dy_strides[2], m)
        normal = (x - mean - rest) * rstd
        dy = tl.where(m, _through(dy, normal * gain + offset, SILU), 0.0)
        sum_dy += tl.sum(dy, 1)
        sum_dyn += tl.sum(dy * normal, 1)
    step = tl.num_programs(0).to(tl.int64) * width
    part_ptr += tl.program_id(1).to(tl.int64) * step + i_b * groups * width + o_c
    tl.store(part_ptr, sum_dy, mask=m_c)
    tl.store(part_ptr + tl.num_programs(1) * step, sum_dyn, mask=m_c)


@jit
def _gradient(dy_ptr, x_ptr, statistics_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, sums_ptr, dx_ptr, groups, width, P, per,
              dy_strides, x_strides, dx_strides, vector_strides, scale_strides, shift_strides, SILU: tl.constexpr, CHANNELS: tl.constexpr,
              PIXELS: tl.constexpr):
    """dx = (dy gain - mean of that - normal times the mean of that normal) rstd.

    grid    as in `_moments`
    layout  as in `_sums`; sums (2, B groups width) fp32; dx as x
    math    fp32, rounded once
    needs   as in `_moments`
    """
    i_bg, i_b, o_c, m_c = _place(groups, width, CHANNELS)
    gain, offset = _gain_offset(weight_ptr, bias_ptr, scale_ptr, shift_ptr, vector_strides, scale_strides, shift_strides, i_b, o_c, m_c)
    mean, rest, rstd = _statistics(statistics_ptr, i_bg)
    sums_ptr += i_b * groups * width + o_c
    step = tl.num_programs(0).to(tl.int64) * width
    n = tl.cast(P, tl.float32) * width
    sum_g = tl.load(sums_ptr, mask=m_c, other=0.0)[:, None] * gain
    sum_gn = tl.load(sums_ptr + step, mask=m_c, other=0.0)[:, None] * gain
    mean_g, mean_gn = tl.sum(tl.sum(sum_g, 1), 0) / n, tl.sum(tl.sum(sum_gn, 1), 0) / n
    x_ptr = _rows(x_ptr, i_b, o_c, x_strides)
    dy_ptr = _rows(dy_ptr, i_b, o_c, dy_strides)
    dx_ptr = _rows(dx_ptr, i_b, o_c, dx_strides)
    begin, end = _piece(P, per)
    for start in range(begin, end, PIXELS):
        o_p = start + tl.arange(0, PIXELS)
        m = m_c[:, None] & (o_p < end)[None, :]
        x = _load(x_ptr, o_p, x_strides[2], m)
        dy = _load(dy_ptr, o_p, dy_strides[2], m)
        normal = (x - mean - rest) * rstd
        dx = (_through(dy, normal * gain + offset, SILU) * gain - mean_g - normal * mean_gn) * rstd
        tl.store(dx_ptr + o_p[None, :] * tl.cast(dx_strides[2], tl.int64), narrow(dx, dx_ptr.dtype.element_ty), mask=m)


def _pixels(x):
    """x as (B, C, P), or a copy where the axes of space are not one run."""
    return x.flatten(2)


def _strides(x):
    """Of sample and channel."""
    return (0, 0) if x is None else (x.stride(0) if x.dim() == 2 else 0, x.stride(-1))


def _cut(x, groups):
    """grid, the arguments that all kernels share, and their settings, for x (B, C, P)."""
    B, C, P = x.shape
    channels = power_of_two(C // groups)
    block = power_of_two(min(P, max(1, LAUNCH["elements"] // channels)))
    pieces = max(1, pick(PROGRAMS, device.architecture(x.device), C) // (B * groups))
    per = max(block, cdiv(P, pieces))
    settings = dict(CHANNELS=channels, PIXELS=block, num_warps=LAUNCH["num_warps"], **OPTIONS)
    return (B * groups, cdiv(P, per)), (groups, C // groups, P, per), settings


def _run(args, outs):
    x, groups, weight, bias, scale, shift, eps, silu = args
    y, statistics = outs
    if not x.numel():
        statistics.zero_()
        return
    x, y = _pixels(x), y.flatten(2)
    grid, shape, settings = _cut(x, groups)
    part = torch.empty((*grid, 3), dtype=torch.float32, device=x.device)
    _moments[grid](x, part, *shape, x.stride(), **settings)
    _apply[grid](x, part, weight, bias, scale, shift, y, statistics, *shape, eps, x.stride(), y.stride(),
                 (_strides(weight), _strides(bias)), _strides(scale), _strides(shift), SILU=silu, **settings)


def _run_backward(args, outs):
    dy, x, statistics, groups, weight, bias, scale, shift, _, silu, wants = args
    dx, *grads = outs
    B, C = x.shape[:2]
    if not x.numel():
        for grad in grads:
            grad.zero_()
        return
    x, dy, dx = _pixels(x), _pixels(dy), dx.flatten(2)
    grid, shape, settings = _cut(x, groups)
    part = torch.empty((2, grid[1], B * C), dtype=torch.float32, device=x.device)
    strides = ((_strides(weight), _strides(bias)), _strides(scale), _strides(shift))
    operands = (dy, x, statistics.contiguous(), weight, bias, scale, shift)
    _sums[grid](*operands, part, *shape, dy.stride(), x.stride(), *strides, SILU=silu, **settings)
    sums = part.sum(1)
    _gradient[grid](*operands, sums, dx, *shape, dy.stride(), x.stride(), dx.stride(), *strides, SILU=silu, **settings)
    sum_dy, sum_dyn = sums.view(2, B, C)
    one_plus = 1.0 if scale is None else 1.0 + scale.float()
    affine = (sum_dyn if weight is None else sum_dyn * weight.float()) + (0.0 if bias is None else sum_dy * bias.float())
    for grad, want, total in zip(grads, wants[1:], ((sum_dyn * one_plus).sum(0), (sum_dy * one_plus).sum(0), affine, sum_dy), strict=True):
        if want:
            grad.copy_(total)


FORWARD = triton(_run, plan=lambda *_: "moments by pieces of a group, then the result from their union")
BACKWARD = triton(_run_backward, plan=lambda *_: "sums per channel by pieces of a group, then the result")
