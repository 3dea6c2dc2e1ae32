"""Modulated layer norm, gated residual, and both in one pass; their gradients in two: row statistics, then columns with their sums."""

import torch

from ...core import device
from ...core.backend import triton
from ...core.jit import OPTIONS, cdiv, jit, load_tile, narrow, power_of_two, rows, store_tile, tl
from ...core.launch import pick

# Widest block of columns; elements of a program's tile; columns and rows of a tile of the backward pass. Not tuned on a GPU yet.
LAUNCH = dict(width=8192, elements=4096, columns=128, rows=8, num_warps=4)
# Programs that fill the chip, by architecture: what the backward pass cuts rows for.
PROGRAMS = ((100, None, 592), (90, None, 528), (1, None, 432), (0, None, 4))


@jit
def _row(x_ptr, strides, i_b, start, N, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns from FIRST of rows from `start` of sample i_b, in fp32; strides of sample and row, 0 where there is no such axis."""
    return load_tile(x_ptr + i_b * strides[0], start, strides[1], N, ROWS, FIRST, WIDTH, D).to(tl.float32)


@jit
def _input(x_ptr, y_ptr, gate_ptr, x_strides, y_strides, gate_strides, i_b, start, N, ROWS: tl.constexpr, FIRST: tl.constexpr,
           WIDTH: tl.constexpr, D: tl.constexpr):
    """x, or x + gate y as it is rounded in memory."""
    x = _row(x_ptr, x_strides, i_b, start, N, ROWS, FIRST, WIDTH, D)
    if y_ptr is not None:
        y = _row(y_ptr, y_strides, i_b, start, N, ROWS, FIRST, WIDTH, D)
        gate = _row(gate_ptr, gate_strides, i_b, start, N, ROWS, FIRST, WIDTH, D)
        x = narrow(x + gate * y, x_ptr.dtype.element_ty).to(tl.float32)
    return x


@jit
def _scaled(x, scale_ptr, scale_strides, i_b, start, N, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """x (1 + scale)."""
    if scale_ptr is not None:
        x = x * (1.0 + _row(scale_ptr, scale_strides, i_b, start, N, ROWS, FIRST, WIDTH, D))
    return x


@jit
def _affine(x, weight_ptr, bias_ptr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """x weight + bias."""
    o_d = FIRST + tl.arange(0, WIDTH)
    if weight_ptr is not None:
        x = x * tl.load(weight_ptr + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        x = x + tl.load(bias_ptr + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    return x


@jit
def _deviations(x, mean, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """x - mean, 0 from column D on."""
    return tl.where((FIRST + tl.arange(0, WIDTH) < D)[None, :], x - mean[:, None], 0.0)


@jit
def _forward(x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr, out_ptr, h_ptr, N, eps, x_strides, y_strides, gate_strides,
             shift_strides, scale_strides, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """out = x + gate y; h = LN(out) (1 + scale) + shift. Without y: of x. Without h: no norm.

    grid    B cdiv(N, ROWS), row blocks innermost
    layout  (B, N, D) with last stride 1; strides are of sample and row, 0 for an axis that an operand lacks; out, h contiguous
    math    fp32; deviations from the rounded mean, whose own mean corrects it; out rounded before its norm
    needs   WIDTH a power of two; the first WIDTH columns stay in registers, what is beyond is loaded for every pass
    """
    blocks = tl.cdiv(N, ROWS)
    pid = tl.program_id(0).to(tl.int64)
    i_b, start = pid // blocks, pid % blocks * ROWS
    z = _input(x_ptr, y_ptr, gate_ptr, x_strides, y_strides, gate_strides, i_b, start, N, ROWS, 0, WIDTH, D)
    if y_ptr is not None:
        store_tile(out_ptr + i_b * N * D, z, start, D, N, ROWS, 0, WIDTH, D)
        for FIRST in tl.static_range(WIDTH, D, WIDTH):
            more = _input(x_ptr, y_ptr, gate_ptr, x_strides, y_strides, gate_strides, i_b, start, N, ROWS, FIRST, WIDTH, D)
            store_tile(out_ptr + i_b * N * D, more, start, D, N, ROWS, FIRST, WIDTH, D)
    if h_ptr is not None:
        total = tl.sum(z, 1)
        for FIRST in tl.static_range(WIDTH, D, WIDTH):
            total += tl.sum(_input(x_ptr, y_ptr, gate_ptr, x_strides, y_strides, gate_strides, i_b, start, N, ROWS, FIRST, WIDTH, D), 1)
        mean = total / D
        d = _deviations(z, mean, 0, WIDTH, D)
        total, squares = tl.sum(d, 1), tl.sum(d * d, 1)
        for FIRST in tl.static_range(WIDTH, D, WIDTH):
            more = _input(x_ptr, y_ptr, gate_ptr, x_strides, y_strides, gate_strides, i_b, start, N, ROWS, FIRST, WIDTH, D)
            more = _deviations(more, mean, FIRST, WIDTH, D)
            total, squares = total + tl.sum(more, 1), squares + tl.sum(more * more, 1)
        rest = total / D
        rstd = 1.0 / tl.sqrt(squares / D - rest * rest + tl.cast(eps, tl.float32))
        for FIRST in tl.static_range(0, D, WIDTH):
            if FIRST > 0:
                z = _input(x_ptr, y_ptr, gate_ptr, x_strides, y_strides, gate_strides, i_b, start, N, ROWS, FIRST, WIDTH, D)
                d = _deviations(z, mean, FIRST, WIDTH, D)
            h = _affine((d - rest[:, None]) * rstd[:, None], weight_ptr, bias_ptr, FIRST, WIDTH, D)
            h = _scaled(h, scale_ptr, scale_strides, i_b, start, N, ROWS, FIRST, WIDTH, D)
            if shift_ptr is not None:
                h += _row(shift_ptr, shift_strides, i_b, start, N, ROWS, FIRST, WIDTH, D)
            store_tile(h_ptr + i_b * N * D, h, start, D, N, ROWS, FIRST, WIDTH, D)


@jit
def _statistics(dh_ptr, x_ptr, scale_ptr, weight_ptr, row_ptr, N, eps, dh_strides, x_strides, scale_strides, D: tl.constexpr,
                WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Per row: mean, what it lacks, 1 / sqrt(var + eps), and the means of g and g normal, g = dh (1 + scale) weight.

    grid    B cdiv(N, ROWS), row blocks innermost
    layout  as in `_forward`; row (5, B N) fp32
    math    fp32, as in `_forward`
    needs   as in `_forward`
    """
    blocks = tl.cdiv(N, ROWS)
    pid = tl.program_id(0).to(tl.int64)
    i_b, start = pid // blocks, pid % blocks * ROWS
    total = tl.zeros([ROWS], tl.float32)
    for FIRST in tl.static_range(0, D, WIDTH):
        total += tl.sum(_row(x_ptr, x_strides, i_b, start, N, ROWS, FIRST, WIDTH, D), 1)
    mean = total / D
    total, squares = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    sum_g, sum_gd = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for FIRST in tl.static_range(0, D, WIDTH):
        d = _deviations(_row(x_ptr, x_strides, i_b, start, N, ROWS, FIRST, WIDTH, D), mean, FIRST, WIDTH, D)
        g = _row(dh_ptr, dh_strides, i_b, start, N, ROWS, FIRST, WIDTH, D)
        g = _affine(_scaled(g, scale_ptr, scale_strides, i_b, start, N, ROWS, FIRST, WIDTH, D), weight_ptr, None, FIRST, WIDTH, D)
        total, squares, sum_g, sum_gd = total + tl.sum(d, 1), squares + tl.sum(d * d, 1), sum_g + tl.sum(g, 1), sum_gd + tl.sum(g * d, 1)
    rest = total / D
    rstd = 1.0 / tl.sqrt(squares / D - rest * rest + tl.cast(eps, tl.float32))
    o_n = start + tl.arange(0, ROWS)
    size = tl.num_programs(0).to(tl.int64) // blocks * N
    row_ptr += i_b * N + o_n
    m_n = o_n < N
    tl.store(row_ptr, mean, mask=m_n)
    tl.store(row_ptr + size, rest, mask=m_n)
    tl.store(row_ptr + 2 * size, rstd, mask=m_n)
    tl.store(row_ptr + 3 * size, sum_g / D, mask=m_n)
    tl.store(row_ptr + 4 * size, (sum_gd - sum_g * rest) / D * rstd, mask=m_n)


@jit
def _per_row(row_ptr, size, i, start, end, ROWS: tl.constexpr):
    o_n = start + tl.arange(0, ROWS)
    return tl.load(row_ptr + i * size + o_n, mask=o_n < end, other=0.0)[:, None]


@jit
def _columns(dh_ptr, dout_ptr, x_ptr, y_ptr, gate_ptr, scale_ptr, weight_ptr, bias_ptr, row_ptr, dx_ptr, dy_ptr, dgate_ptr, dshift_ptr,
             dscale_ptr, part_ptr, B, N, per, dh_strides, dout_strides, x_strides, y_strides, gate_strides, scale_strides,
             TOKEN_SCALE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """dz = dout + the gradient through the norm, dx = dz, dy = gate dz; gradients per token, and partial sums for the others.

    grid    (B cdiv(N, per), cdiv(D, WIDTH)): row pieces innermost
    layout  as in `_statistics`; dx, dy, and dgate, dshift, dscale where they are per token, contiguous; part (5, B cdiv(N, per), D) fp32:
            sums of dh, dh normal, the same of dh (1 + scale) with TOKEN_SCALE, and dz y
    math    fp32; sums over a piece's rows in their order
    needs   row and dh null without a norm; WIDTH a power of two
    """
    pieces = tl.cdiv(N, per)
    piece = tl.program_id(0).to(tl.int64)
    i_b, begin = piece // pieces, piece % pieces * per
    end = tl.minimum(begin + per, N)
    first = tl.program_id(1) * WIDTH
    rows, size = tl.cast(B, tl.int64) * N, D - first
    o_d = tl.arange(0, WIDTH)
    m_d = o_d < size
    weight, bias = tl.full([WIDTH], 1.0, tl.float32), tl.zeros([WIDTH], tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + first + o_d, mask=m_d, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first + o_d, mask=m_d, other=0.0).to(tl.float32)
    sum_dh, sum_dhn = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    sum_g, sum_gn, sum_dzy = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for start in range(begin, end, ROWS):
        o_n = start + tl.arange(0, ROWS)
        o_nd = (i_b * N + o_n)[:, None] * D + first + o_d[None, :]
        m_nd = (o_n < end)[:, None] & m_d[None, :]
        dz = tl.zeros([ROWS, WIDTH], tl.float32)
        if dh_ptr is not None:
            dh = _tile(dh_ptr, dh_strides, i_b, o_n, first, o_d, m_nd)
            mean, rest = _per_row(row_ptr + i_b * N, rows, 0, start, end, ROWS), _per_row(row_ptr + i_b * N, rows, 1, start, end, ROWS)
            rstd = _per_row(row_ptr + i_b * N, rows, 2, start, end, ROWS)
            normal = (_tile(x_ptr, x_strides, i_b, o_n, first, o_d, m_nd) - mean - rest) * rstd
            normal = tl.where(m_nd, normal, 0.0)
            g = dh
            if scale_ptr is not None:
                g = dh * (1.0 + _tile(scale_ptr, scale_strides, i_b, o_n, first, o_d, m_nd))
            mean_g, mean_gn = _per_row(row_ptr + i_b * N, rows, 3, start, end, ROWS), _per_row(row_ptr + i_b * N, rows, 4, start, end, ROWS)
            dz = (g * weight[None, :] - mean_g - normal * mean_gn) * rstd
            sum_dh += tl.sum(dh, 0)
            sum_dhn += tl.sum(dh * normal, 0)
            if TOKEN_SCALE:
                sum_g += tl.sum(g, 0)
                sum_gn += tl.sum(g * normal, 0)
            if dshift_ptr is not None:
                tl.store(dshift_ptr + o_nd, narrow(dh, dshift_ptr.dtype.element_ty), mask=m_nd)
            if dscale_ptr is not None:
                dscale = dh * (normal * weight[None, :] + bias[None, :])
                tl.store(dscale_ptr + o_nd, narrow(dscale, dscale_ptr.dtype.element_ty), mask=m_nd)
        if dout_ptr is not None:
            dz += _tile(dout_ptr, dout_strides, i_b, o_n, first, o_d, m_nd)
        if dx_ptr is not None:
            tl.store(dx_ptr + o_nd, narrow(dz, dx_ptr.dtype.element_ty), mask=m_nd)
        if y_ptr is not None:
            gate = _tile(gate_ptr, gate_strides, i_b, o_n, first, o_d, m_nd)
            if dy_ptr is not None:
                tl.store(dy_ptr + o_nd, narrow(gate * dz, dy_ptr.dtype.element_ty), mask=m_nd)
            dgate = tl.where(m_nd, dz * _tile(y_ptr, y_strides, i_b, o_n, first, o_d, m_nd), 0.0)
            sum_dzy += tl.sum(dgate, 0)
            if dgate_ptr is not None:
                tl.store(dgate_ptr + o_nd, narrow(dgate, dgate_ptr.dtype.element_ty), mask=m_nd)
    step = tl.cast(B, tl.int64) * pieces * D
    part_ptr += piece * D + first + o_d
    tl.store(part_ptr, sum_dh, mask=m_d)
    tl.store(part_ptr + step, sum_dhn, mask=m_d)
    if TOKEN_SCALE:
        tl.store(part_ptr + 2 * step, sum_g, mask=m_d)
        tl.store(part_ptr + 3 * step, sum_gn, mask=m_d)
    tl.store(part_ptr + 4 * step, sum_dzy, mask=m_d)


@jit
def _tile(x_ptr, strides, i_b, o_n, first, o_d, m_nd):
    """Rows o_n and columns first + o_d of sample i_b, in fp32."""
    x_ptr += i_b * strides[0] + first
    return tl.load(x_ptr + o_n[:, None] * tl.cast(strides[1], tl.int64) + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)


def _strides(x):
    """Of sample and row; 0 for an axis that x lacks."""
    return (0, 0) if x is None or x.dim() == 1 else (x.stride(0), x.stride(1) if x.dim() == 3 else 0)


def _rows(*tensors):
    return [None if x is None else rows(x) for x in tensors]


def _cut(N, D):
    """(WIDTH, ROWS) of a program that sees whole rows."""
    width = min(power_of_two(D), LAUNCH["width"])
    return width, power_of_two(min(N, max(1, LAUNCH["elements"] // width)))


def _launch_forward(x, y, gate, shift, scale, weight, bias, eps, out, h):
    B, N, D = x.shape
    if not x.numel():
        return
    x, y, gate, shift, scale, weight, bias = _rows(x, y, gate, shift, scale, weight, bias)
    width, block = _cut(N, D)
    _forward[(B * cdiv(N, block),)](x, y, gate, shift, scale, weight, bias, out, h, N, eps, *map(_strides, (x, y, gate, shift, scale)), D=D,
                                    WIDTH=width, ROWS=block, num_warps=LAUNCH["num_warps"], **OPTIONS)


def _run_norm(args, outs):
    x, *modulation = args
    _launch_forward(x, None, None, *modulation, None, outs[0])


def _run_gate(args, outs):
    _launch_forward(*args, None, None, None, None, 0.0, outs[0], None)


def _run_both(args, outs):
    _launch_forward(*args, *outs)


def _launch_backward(dh, dout, x, y, gate, shift, scale, weight, bias, eps, dx, dy, grads):
    """grads: of gate, shift, scale, weight, bias, written; None where not wanted."""
    like = y if x is None else x
    B, N, D = like.shape
    dgate, dshift, dscale, dweight, dbias = grads
    if not like.numel():
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    dh, dout, x, y, gate, scale, weight, bias = _rows(dh, dout, x, y, gate, scale, weight, bias)
    row = None
    if dh is not None:
        row = torch.empty((5, B * N), dtype=torch.float32, device=like.device)
        width, block = _cut(N, D)
        _statistics[(B * cdiv(N, block),)](dh, x, scale, weight, row, N, eps, _strides(dh), _strides(x), _strides(scale), D=D, WIDTH=width,
                                           ROWS=block, num_warps=LAUNCH["num_warps"], **OPTIONS)
    width = min(power_of_two(D), LAUNCH["columns"])
    block = power_of_two(min(N, LAUNCH["rows"]))
    programs = pick(PROGRAMS, device.architecture(like.device), N)
    per = max(block, cdiv(N, max(1, programs // (B * cdiv(D, width)))))
    pieces, token = cdiv(N, per), scale is not None and scale.dim() == 3
    part = torch.empty((5, B, pieces, D), dtype=torch.float32, device=like.device)
    own = lambda grad: grad if grad is not None and grad.dim() == 3 else None
    _columns[(B * pieces, cdiv(D, width))](
        dh, dout, x, y, gate, scale, weight, bias, row, dx, dy, own(dgate), own(dshift), own(dscale), part, B, N, per,
        *map(_strides, (dh, dout, x, y, gate, scale)), TOKEN_SCALE=token, D=D, WIDTH=width, ROWS=block, num_warps=LAUNCH["num_warps"],
        **OPTIONS)
    sum_dh, sum_dhn, sum_g, sum_gn, sum_dzy = part.sum(2)
    one_plus = 1.0 if scale is None or token else 1.0 + scale.float()
    affine = (sum_dhn if weight is None else sum_dhn * weight.float()) + (0.0 if bias is None else sum_dh * bias.float())
    sums = ((dgate, lambda: sum_dzy), (dshift, lambda: sum_dh), (dscale, lambda: affine),
            (dweight, lambda: sum_gn.sum(0) if token else (sum_dhn * one_plus).sum(0)),
            (dbias, lambda: sum_g.sum(0) if token else (sum_dh * one_plus).sum(0)))
    for grad, made in sums:
        if grad is not None and grad.dim() < 3:
            grad.copy_(made())


def _run_norm_backward(args, outs):
    *args, wants = args
    dx, dy, *grads = (out if i == 0 or wants[i] else None for i, out in enumerate(outs))
    _launch_backward(*args, dx, dy, grads)


def _run_gate_backward(args, outs):
    dout, y, gate = args
    _launch_backward(None, dout, None, y, gate, None, None, None, None, 0.0, None, outs[0], (outs[1], None, None, None, None))


_PLAN, _BACKWARD_PLAN = "one kernel over blocks of rows", "row statistics, then columns with partial sums, added in their order"
NORM, GATE, BOTH = (triton(run, plan=lambda *_: _PLAN) for run in (_run_norm, _run_gate, _run_both))
NORM_BACKWARD, GATE_BACKWARD = (triton(run, plan=lambda *_: _BACKWARD_PLAN) for run in (_run_norm_backward, _run_gate_backward))
