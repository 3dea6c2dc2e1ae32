"""A cross-attention layer's long side in one kernel: a read that projects keys as it meets them, a write from norm to residual."""

import math

import torch

from ...core import device
from ...core.jit import OPTIONS, aligned, cdiv, dot, jit, load_tile, narrow, power_of_two, store_tile, tl
from ...core.launch import pick, shares
from ...core.softmax import by_rows, exp, merge, place

STATISTICS = dict(ROWS=16, BLOCK_C=128, num_warps=4)
# By kernel: rows of (least architecture, largest size, settings); the size is a head's for a read, and for a write the number of columns
# of its result, whose sums are a program's registers. Chosen so that no kernel spills registers; not timed on a GPU yet. bfloat16 alone:
# float32 products run on FMA units and are the whole cost, and float16 has not the range of a projection.
LAUNCH = {
    "read": ((0, 32, dict(BLOCK_M=256, BLOCK_N=64, BLOCK_C=64, num_warps=8, num_stages=2)),
             (90, None, dict(BLOCK_M=128, BLOCK_N=64, BLOCK_C=64, num_warps=8, num_stages=2)),
             (0, None, dict(BLOCK_M=128, BLOCK_N=32, BLOCK_C=64, num_warps=8, num_stages=2))),
    "write": ((90, 256, dict(BLOCK_M=64, BLOCK_N=32, BLOCK_C=32, num_warps=8, num_stages=2)),
              (90, None, dict(BLOCK_M=32, BLOCK_N=32, BLOCK_C=32, num_warps=8, num_stages=2)),
              (0, 256, dict(BLOCK_M=64, BLOCK_N=16, BLOCK_C=32, num_warps=8, num_stages=2)),
              (0, None, dict(BLOCK_M=32, BLOCK_N=32, BLOCK_C=32, num_warps=8, num_stages=2))),
}
LARGEST = {"head": 64, "columns": 512}


@jit
def _chunk(x_ptr, start, stride, end, first, C, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, WIDTH) of a (rows, C) matrix from row `start`, column `first`; zero from row `end` and column C on."""
    o_row, o_c = tl.arange(0, ROWS), first + tl.arange(0, WIDTH)
    x_ptr += tl.cast(start, tl.int64) * stride
    mask = (o_row < end - start)[:, None] & (o_c < C)[None, :]
    return tl.load(x_ptr + (o_row.to(tl.int64)[:, None] * stride + o_c[None, :]), mask=mask, other=0.0)


@jit
def _statistics(x_ptr, stats_ptr, rows, C, stride, eps, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and 1 / standard deviation of every row.

    grid    cdiv(rows, ROWS)
    layout  x (rows, C), last stride 1; stats (2, rows) contiguous
    math    fp32; the variance from the differences to the mean
    needs   BLOCK_C a power of two
    """
    start = tl.program_id(0).to(tl.int64) * ROWS
    o_row = start + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for i_c in range(0, C, BLOCK_C):
        total += _chunk(x_ptr, start, stride, rows, i_c, C, ROWS, BLOCK_C).to(tl.float32)
    mean = tl.sum(total, 1) / C
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for i_c in range(0, C, BLOCK_C):
        d = _chunk(x_ptr, start, stride, rows, i_c, C, ROWS, BLOCK_C).to(tl.float32) - mean[:, None]
        total += tl.where((i_c + tl.arange(0, BLOCK_C) < C)[None, :], d * d, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(total, 1) / C + tl.cast(eps, tl.float32))
    tl.store(stats_ptr + o_row, mean, mask=o_row < rows)
    tl.store(stats_ptr + rows + o_row, scale, mask=o_row < rows)


@jit
def _normed(x_ptr, start, stride, end, first, C, mean, scale, gain_ptr, shift_ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`_chunk` of the LayerNorm of a matrix, rounded to its dtype, or of the matrix if there is no gain; columns from C on are 0."""
    x = _chunk(x_ptr, start, stride, end, first, C, ROWS, WIDTH)
    if gain_ptr is not None:
        o_c = first + tl.arange(0, WIDTH)
        gain = tl.load(gain_ptr + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        y = (x.to(tl.float32) - mean[:, None]) * scale[:, None] * gain[None, :] + shift[None, :]
        x = narrow(y, x_ptr.dtype.element_ty)
    return x


@jit
def _row_statistics(stats_ptr, i_b, rows, start, end, BATCH, ROWS: tl.constexpr):
    """(mean, 1 / standard deviation) of a block of rows of sample i_b; 0 from row `end` on, and without statistics."""
    mean = tl.zeros([ROWS], tl.float32)
    scale = mean
    if stats_ptr is not None:
        o_row = start + tl.arange(0, ROWS)
        mean = tl.load(stats_ptr + i_b * rows + o_row, mask=o_row < end, other=0.0)
        scale = tl.load(stats_ptr + (BATCH + i_b) * rows + o_row, mask=o_row < end, other=0.0)
    return mean, scale


@jit
def _biased(x, bias_ptr, i_h, E: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """A projection of head i_h with its bias, if there is one, in DTYPE."""
    if bias_ptr is not None:
        o_e = tl.arange(0, WIDTH)
        x += tl.load(bias_ptr + i_h * E + o_e, mask=o_e < E, other=0.0).to(tl.float32)[None, :]
    return narrow(x, DTYPE)


@jit
def _softmax_step(s, top, total, o_n, end):
    """(P, maximum, sum, what the sums so far fade by) of a running softmax in units of log 2; keys from `end` on are hidden."""
    s = tl.where((o_n < end)[None, :], s, -float("inf"))
    new = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new == -float("inf"), 0.0, new)
    p, fade = exp(s - shift[:, None], False), exp(top - shift, False)
    return p, new, total * fade + tl.sum(p, 1), fade


@jit
def _read(q_ptr, source_ptr, k_weight_ptr, v_weight_ptr, k_bias_ptr, v_bias_ptr, gain_ptr, shift_ptr, stats_ptr, lengths_ptr, parts_ptr,
          tops_ptr, totals_ptr, logit_scale, B, H, M, N, C, splits, per, q_strides, source_strides, k_stride, v_stride, lengths_stride,
          EQ: tl.constexpr, EV: tl.constexpr, WIDTH_Q: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_C: tl.constexpr):
    """What `merge` makes the attended targets of: those of a block, over source rows [per i_s, per (i_s + 1)).

    grid    B H splits cdiv(M, BLOCK_M), target blocks innermost: neighbours read the same source rows
    layout  q (B, M, H EQ), source (B, N, C), k_weight (H EQ, C), v_weight (H EV, C), last stride 1; biases, gain, shift contiguous or
            None; stats (2, B, N) from `_statistics` or None; lengths (B,) or None; parts (splits, B, H, M, EV), tops, totals contiguous
    math    a tile of LN(source) in the tensors' dtype times the head's rows of both weights, block after block of C, in fp32; k, v and P
            rounded to the tensors' dtype for the next product; running maximum and sum in fp32
    needs   WIDTH_Q >= EQ, WIDTH_V >= EV, powers of two >= 16; per % BLOCK_N = 0
    """
    start, i_s, i_bh, i_b, i_h = place(M, splits, H, BLOCK_M)
    begin = (i_s * per).to(tl.int32)
    end = tl.minimum(begin + per, N)
    if lengths_ptr is not None:
        end = tl.minimum(end, tl.load(lengths_ptr + i_b * lengths_stride).to(tl.int32))
    source_ptr += i_b * source_strides[0]
    k_weight_ptr += i_h * EQ * k_stride
    v_weight_ptr += i_h * EV * v_stride
    dtype = source_ptr.dtype.element_ty
    q = load_tile(q_ptr + i_b * q_strides[0] + i_h * EQ, start, q_strides[1], M, BLOCK_M, 0, WIDTH_Q, EQ)
    acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(begin, end, BLOCK_N):
        mean, scale = _row_statistics(stats_ptr, i_b, N, i_n, end, B, BLOCK_N)
        k = tl.zeros([BLOCK_N, WIDTH_Q], tl.float32)
        v = tl.zeros([BLOCK_N, WIDTH_V], tl.float32)
        for i_c in range(0, C, BLOCK_C):
            x = _normed(source_ptr, i_n, source_strides[1], end, i_c, C, mean, scale, gain_ptr, shift_ptr, BLOCK_N, BLOCK_C)
            k = dot(x, tl.trans(_chunk(k_weight_ptr, 0, k_stride, EQ, i_c, C, WIDTH_Q, BLOCK_C)), k)
            v = dot(x, tl.trans(_chunk(v_weight_ptr, 0, v_stride, EV, i_c, C, WIDTH_V, BLOCK_C)), v)
        k, v = _biased(k, k_bias_ptr, i_h, EQ, WIDTH_Q, dtype), _biased(v, v_bias_ptr, i_h, EV, WIDTH_V, dtype)
        s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * tl.cast(logit_scale, tl.float32)
        p, top, total, fade = _softmax_step(s, top, total, i_n + tl.arange(0, BLOCK_N), end)
        acc = dot(narrow(p, dtype), v, acc * fade[:, None])

    o_m = start + tl.arange(0, BLOCK_M)
    i_row = (i_s * B * H + i_bh) * M
    tl.store(tops_ptr + i_row + o_m, top, mask=o_m < M)
    tl.store(totals_ptr + i_row + o_m, total, mask=o_m < M)
    store_tile(parts_ptr + i_row * EV, acc, start, EV, M, BLOCK_M, 0, WIDTH_V, EV)


@jit
def _write(target_ptr, q_weight_ptr, k_ptr, v_ptr, out_weight_ptr, q_bias_ptr, out_bias_ptr, gain_ptr, shift_ptr, stats_ptr, lengths_ptr,
           out_ptr, logit_scale, B, H, M, N, D, target_strides, q_stride, k_strides, v_strides, out_stride, lengths_stride,
           RESIDUAL: tl.constexpr, EQ: tl.constexpr, EV: tl.constexpr, O: tl.constexpr, WIDTH_Q: tl.constexpr, WIDTH_V: tl.constexpr,
           WIDTH_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """A block of target rows from norm to residual, head after head.

    grid    B cdiv(M, BLOCK_M), target blocks innermost: neighbours read the same keys
    layout  target (B, M, D), q_weight (H EQ, D), k (B, N, H EQ), v (B, N, H EV), out_weight (O, H EV), last stride 1; biases, gain, shift
            contiguous or None; stats (2, B, M) from `_statistics` or None; lengths (B,) or None; out (B, M, O) contiguous
    math    as in `_read`; the attended rows of a head, rounded to the tensors' dtype, times its columns of out_weight, summed over heads
            in fp32 with bias and residual, and rounded once
    needs   as in `_read`; WIDTH_O >= O, a power of two >= 16; D = O if RESIDUAL
    """
    start, _, _, i_b, _ = place(M, 1, 1, BLOCK_M)
    end = N
    if lengths_ptr is not None:
        end = tl.load(lengths_ptr + i_b * lengths_stride).to(tl.int32)
    target_ptr += i_b * target_strides[0]
    k_ptr += i_b * k_strides[0]
    v_ptr += i_b * v_strides[0]
    dtype = target_ptr.dtype.element_ty
    mean, scale = _row_statistics(stats_ptr, i_b, M, start, M, B, BLOCK_M)
    out = tl.zeros([BLOCK_M, WIDTH_O], tl.float32)
    for i in range(H):
        i_h = tl.cast(i, tl.int64)
        q = tl.zeros([BLOCK_M, WIDTH_Q], tl.float32)
        for i_c in range(0, D, BLOCK_C):
            x = _normed(target_ptr, start, target_strides[1], M, i_c, D, mean, scale, gain_ptr, shift_ptr, BLOCK_M, BLOCK_C)
            q = dot(x, tl.trans(_chunk(q_weight_ptr + i_h * EQ * q_stride, 0, q_stride, EQ, i_c, D, WIDTH_Q, BLOCK_C)), q)
        q = _biased(q, q_bias_ptr, i_h, EQ, WIDTH_Q, dtype)
        acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for i_n in range(0, end, BLOCK_N):
            k = load_tile(k_ptr + i_h * EQ, i_n, k_strides[1], end, BLOCK_N, 0, WIDTH_Q, EQ)
            s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * tl.cast(logit_scale, tl.float32)
            p, top, total, fade = _softmax_step(s, top, total, i_n + tl.arange(0, BLOCK_N), end)
            v = load_tile(v_ptr + i_h * EV, i_n, v_strides[1], end, BLOCK_N, 0, WIDTH_V, EV)
            acc = dot(narrow(p, dtype), v, acc * fade[:, None])
        attended = narrow(acc / tl.where(total == 0, 1.0, total)[:, None], dtype)
        out = dot(attended, tl.trans(load_tile(out_weight_ptr + i_h * EV, 0, out_stride, O, WIDTH_O, 0, WIDTH_V, EV)), out)
    if out_bias_ptr is not None:
        o_o = tl.arange(0, WIDTH_O)
        out += tl.load(out_bias_ptr + o_o, mask=o_o < O, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        out += load_tile(target_ptr, start, target_strides[1], M, BLOCK_M, 0, WIDTH_O, O).to(tl.float32)
    store_tile(out_ptr + i_b * M * O, out, start, O, M, BLOCK_M, 0, WIDTH_O, O)


def _norm_arguments(x, norm, eps):
    """(gain, shift, statistics of the rows of x (B, rows, C)), or three times None without a norm."""
    if norm[0] is None:
        return None, None, None
    B, rows, C = x.shape
    stats = x.new_empty((2, B, rows), dtype=torch.float32)
    flat = x if x.stride(0) == rows * x.stride(1) or B == 1 else x.contiguous()
    if stats.numel():
        _statistics[(cdiv(B * rows, STATISTICS["ROWS"]),)](flat, stats, B * rows, C, flat.stride(1), eps, **STATISTICS, **OPTIONS)
    return *(p.contiguous() for p in norm), stats


def _widths(**sizes):
    return {f"WIDTH_{name}": power_of_two(n, least=16) for name, n in sizes.items()}


def _logit_scale(EQ):
    return EQ**-0.5 * math.log2(math.e)


def refuse(kind, x, EQ, EV, O):
    """Why the kernel of this kind, "read" or "write", does not take these sizes, or None."""
    if x.dtype != torch.bfloat16:
        return f"{str(x.dtype).removeprefix('torch.')} is computed in float32"
    if max(EQ, EV) > LARGEST["head"]:
        return f"heads of more than {LARGEST['head']} columns"
    return f"more than {LARGEST['columns']} columns in the result" if kind == "write" and O > LARGEST["columns"] else None


def read_plan(q, N, heads, V):
    """(settings, splits, per) of a read."""
    B, M, A = q.shape
    architecture = device.architecture(q.device)
    chosen = dict(pick(LAUNCH["read"], architecture, max(A, V) // heads))
    chosen["BLOCK_M"] = min(chosen["BLOCK_M"], power_of_two(M, least=64))
    return chosen, *shares(architecture, B * heads * cdiv(M, chosen["BLOCK_M"]), N, chosen["BLOCK_N"])


def read(q, source, k, v, norm, key_lengths, heads, eps, attended, lse, low):
    """Fills attended (B, M, V), lse and low (B, H, M), in float32, from projected targets q (B, M, A); k, v = (weight, bias), norm = (gain,
    shift), each a tensor or None."""
    (B, M, A), (_, N, C), V = q.shape, source.shape, v[0].shape[0]
    chosen, splits, per = read_plan(q, N, heads, V)
    EQ, EV = A // heads, V // heads
    source, k_weight, v_weight = aligned(source), aligned(k[0]), aligned(v[0])
    norm = _norm_arguments(source[..., :C], norm, eps)
    parts = lse.new_empty((splits, B, heads, M, EV))
    tops, totals = lse.new_empty((2, splits, B, heads, M)).unbind(0)
    biases = (None if b is None else b.contiguous() for b in (k[1], v[1]))
    _read[(B * heads * splits * cdiv(M, chosen["BLOCK_M"]),)](
        q, source, k_weight, v_weight, *biases, *norm, key_lengths, parts, tops, totals, _logit_scale(EQ), B, heads, M, N, C, splits, per,
        q.stride()[:2], source.stride()[:2], k_weight.stride(0), v_weight.stride(0), 0 if key_lengths is None else key_lengths.stride(0),
        EQ=EQ, EV=EV, **_widths(Q=EQ, V=EV), **chosen, **OPTIONS)
    out = attended.unflatten(-1, (heads, EV)).transpose(1, 2)
    by_rows(merge, out, parts, tops, totals, out, None, lse, low, B, heads, M, splits, out.stride()[:3], False)


def write(target, keys, values, q, out_weight, out_bias, norm, key_lengths, heads, eps, residual, out):
    """Fills out (B, M, O) from the target and the projected keys (B, N, A) and values (B, N, V); q = (weight, bias), norm as in `read`."""
    (B, M, D), (_, N, A), V, O = target.shape, keys.shape, values.shape[2], out_weight.shape[0]
    EQ, EV = A // heads, V // heads
    chosen = pick(LAUNCH["write"], device.architecture(target.device), O)
    target, q_weight, out_weight = aligned(target), aligned(q[0]), aligned(out_weight)
    gain, shift, stats = _norm_arguments(target[..., :D], norm, eps)
    q_bias, out_bias = (None if b is None else b.contiguous() for b in (q[1], out_bias))
    _write[(B * cdiv(M, chosen["BLOCK_M"]),)](
        target, q_weight, keys, values, out_weight, q_bias, out_bias, gain, shift, stats, key_lengths, out, _logit_scale(EQ), B, heads, M,
        N, D, target.stride()[:2], q_weight.stride(0), keys.stride()[:2], values.stride()[:2], out_weight.stride(0),
        0 if key_lengths is None else key_lengths.stride(0), RESIDUAL=residual, EQ=EQ, EV=EV, O=O, **_widths(Q=EQ, V=EV, O=O), **chosen,
        **OPTIONS)
