"""Attention by blocks, forward and backward. Where one side is short, programs share the long side, and a second kernel merges in order."""

import math

import torch

from ...core import device
from ...core.backend import triton
from ...core.jit import OPTIONS, aligned, cdiv, dot, jit, load_tile, narrow, padded, power_of_two, store_tile, tl, unit_of
from ...core.launch import pick, shares
from ...core.softmax import LOG2E, LOW, add, by_rows, exp, log_sum_exp, merge, place, store_low, two_floats

LARGEST = 512


def _table(*parts):
    """Launch rows of (least architecture, {largest head size: (BLOCK_M, BLOCK_N, num_warps, num_stages)})."""
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return tuple((least, largest, dict(zip(names, row, strict=True))) for least, sizes in parts for largest, row in sizes.items())


# By pass and element size. Chosen so that no kernel spills registers and shared memory fits (tests/test_triton.py compiles them all);
# not timed on a GPU yet. fp32 runs on FMA units, which hold whole rows of an operand in registers: its blocks are small.
LAUNCH = {
    "forward": {
        2: _table((90, {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 320: (64, 32, 8, 2), None: (32, 32, 8, 2)}),
                  (0, {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), None: (32, 32, 8, 2)})),
        4: _table((0, {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), None: (32, 16, 8, 1)})),
    },
    "query gradients": {
        2: _table((0, {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2), 320: (32, 32, 8, 2), None: (32, 16, 8, 2)})),
        4: _table((0, {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 320: (32, 16, 8, 2), None: (16, 16, 8, 2)})),
    },
    "key gradients": {
        2: _table((0, {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (64, 32, 8, 2), 320: (32, 32, 8, 2), None: (32, 16, 8, 1)})),
        4: _table((0, {128: (32, 32, 8, 2), None: (16, 16, 8, 1)})),
    },
}
STATISTICS = dict(ROWS=16, num_warps=4)


@jit
def _logits(s, logit_scale, bias_ptr, bias_strides, o_m, o_n, M, N, end, CAUSAL: tl.constexpr, MASK: tl.constexpr, NATURAL: tl.constexpr):
    """scale s + bias, -inf where the query may not see the key; o_m, o_n broadcast to s, bias_ptr stands at (b, h).

    In units of log 2 (logit_scale = scale log2(e)) unless NATURAL: the change of units would cost fp32 a rounding of the whole logit.
    """
    s = s * tl.cast(logit_scale, tl.float32)
    if bias_ptr is not None:
        o_bias = o_m.to(tl.int64) * bias_strides[2] + o_n.to(tl.int64) * bias_strides[3]
        bias = tl.load(bias_ptr + o_bias, mask=(o_m < M) & (o_n < N), other=0.0).to(tl.float32)
        s += bias if NATURAL else bias * LOG2E
    if MASK:
        m_s = o_n < end
        if CAUSAL:
            m_s = m_s & (o_n <= o_m + (N - M))
        s = tl.where(m_s, s, -float("inf"))
    return s


@jit
def _keys(i_s, per, lengths_ptr, lengths_stride, i_b, start, M, N, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """[begin, end): the keys of share i_s that some query of the block at `start` sees."""
    begin = (i_s * per).to(tl.int32)
    end = tl.minimum(begin + per, N)
    if lengths_ptr is not None:
        end = tl.minimum(end, tl.load(lengths_ptr + i_b * lengths_stride).to(tl.int32))
    if CAUSAL:
        end = tl.minimum(end, start + BLOCK_M + (N - M))
    return begin, end


@jit
def _forward(q_ptr, k_ptr, v_ptr, bias_ptr, lengths_ptr, out_ptr, out_low_ptr, lse_ptr, low_ptr, logit_scale, B, H, M, N, splits,
             per, q_strides, k_strides, v_strides, bias_strides, lengths_stride, out_strides, SHARED: tl.constexpr, CAUSAL: tl.constexpr,
             MASK: tl.constexpr, NATURAL: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, E: tl.constexpr,
             PADDED: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out, lse of a block of queries over the keys [per i_s, per (i_s + 1)); if SHARED, what `merge` makes them of.

    grid    B H splits cdiv(M, BLOCK_M), query blocks innermost: neighbours read the same keys
    layout  q, k, v (B, H, rows, E), out (splits, B, H, M, E), any strides but the last, which is 1; out_low (B, H, M, E) or None,
            lse, low (splits, B, H, M) contiguous; bias (B, H, M, N), any strides, or None; lengths (B,) or None. Strides of inputs of
            four axes are given in UNITs, those of outputs in OUT_UNITs; inputs have PADDED columns, zero from column E on
    math    S = q k^T in fp32; running maximum and sum, P rounded to q's dtype for P v, out normalised at the end, 0
            without a key; if SHARED out is left as the sum, and the maximum and the sum of P stand for lse and low
    needs   E1 + E2 >= E, each a power of two >= 16 (E2 may be 0); MASK unless every block of keys is seen whole; per % BLOCK_N = 0
    """
    start, i_s, i_bh, i_b, i_h = place(M, splits, H, BLOCK_M)
    o_m = start + tl.arange(0, BLOCK_M)
    q_ptr += (i_b * q_strides[0] + i_h * q_strides[1]) * UNIT
    k_ptr += (i_b * k_strides[0] + i_h * k_strides[1]) * UNIT
    v_ptr += (i_b * v_strides[0] + i_h * v_strides[1]) * UNIT
    if bias_ptr is not None:
        bias_ptr += i_b * bias_strides[0] + i_h * bias_strides[1]

    begin, end = _keys(i_s, per, lengths_ptr, lengths_stride, i_b, start, M, N, CAUSAL, BLOCK_M)
    q1 = load_tile(q_ptr, start, q_strides[2], M, BLOCK_M, 0, E1, PADDED, UNIT)
    acc1 = tl.zeros([BLOCK_M, E1], tl.float32)
    if E2:
        q2 = load_tile(q_ptr, start, q_strides[2], M, BLOCK_M, E1, E2, PADDED, UNIT)
        acc2 = tl.zeros([BLOCK_M, E2], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(begin, end, BLOCK_N):
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        s = dot(q1, tl.trans(load_tile(k_ptr, i_n, k_strides[2], end, BLOCK_N, 0, E1, PADDED, UNIT)), s)
        if E2:
            s = dot(q2, tl.trans(load_tile(k_ptr, i_n, k_strides[2], end, BLOCK_N, E1, E2, PADDED, UNIT)), s)
        s = _logits(s, logit_scale, bias_ptr, bias_strides, o_m[:, None], (i_n + tl.arange(0, BLOCK_N))[None, :], M, N, end, CAUSAL, MASK,
                    NATURAL)
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == -float("inf"), 0.0, new)
        p = exp(s - shift[:, None], NATURAL)
        fade = exp(top - shift, NATURAL)
        total = total * fade + tl.sum(p, 1)
        p = narrow(p, q_ptr.dtype.element_ty)
        acc1 = dot(p, load_tile(v_ptr, i_n, v_strides[2], end, BLOCK_N, 0, E1, PADDED, UNIT), acc1 * fade[:, None])
        if E2:
            acc2 = dot(p, load_tile(v_ptr, i_n, v_strides[2], end, BLOCK_N, E1, E2, PADDED, UNIT), acc2 * fade[:, None])
        top = new

    o_lse = (i_s * B * H + i_bh) * M + o_m
    if SHARED:
        tl.store(lse_ptr + o_lse, top, mask=o_m < M)
        tl.store(low_ptr + o_lse, total, mask=o_m < M)
    else:
        lse, low = log_sum_exp(top, total, NATURAL)
        tl.store(lse_ptr + o_lse, lse, mask=o_m < M)
        tl.store(low_ptr + o_lse, low, mask=o_m < M)
        total = tl.where(total == 0, 1.0, total)[:, None]
        acc1 = acc1 / total
        if E2:
            acc2 = acc2 / total
    out_ptr += (i_s * out_strides[0] + i_b * out_strides[1] + i_h * out_strides[2]) * OUT_UNIT
    store_tile(out_ptr, acc1, start, out_strides[3], M, BLOCK_M, 0, E1, E, OUT_UNIT)
    store_low(out_low_ptr, acc1, i_bh, start, M, BLOCK_M, 0, E1, E)
    if E2:
        store_tile(out_ptr, acc2, start, out_strides[3], M, BLOCK_M, E1, E2, E, OUT_UNIT)
        store_low(out_low_ptr, acc2, i_bh, start, M, BLOCK_M, E1, E2, E)


@jit
def _product_of_rows(product, x_ptr, x_stride, y_ptr, y_stride, start, M, ROWS: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
                     PADDED: tl.constexpr, UNIT: tl.constexpr):
    """product + x y^T of a block of rows."""
    x = load_tile(x_ptr, start, x_stride, M, ROWS, 0, E1, PADDED, UNIT)
    product = dot(x, tl.trans(load_tile(y_ptr, start, y_stride, M, ROWS, 0, E1, PADDED, UNIT)), product)
    if E2:
        x = load_tile(x_ptr, start, x_stride, M, ROWS, E1, E2, PADDED, UNIT)
        product = dot(x, tl.trans(load_tile(y_ptr, start, y_stride, M, ROWS, E1, E2, PADDED, UNIT)), product)
    return product


@jit
def _statistics(dout_ptr, out_ptr, out_low_ptr, lse_ptr, low_ptr, dlse_ptr, stats_ptr, B, H, M, dout_strides, out_strides,
                out_low_strides, dlse_strides, NATURAL: tl.constexpr, UNIT: tl.constexpr, PADDED: tl.constexpr, E1: tl.constexpr,
                E2: tl.constexpr, ROWS: tl.constexpr):
    """What both gradient kernels need of a query: its log-sum-exp, and delta = sum_e dout out, which they take off its row of dP; and dlse.

    grid    B H cdiv(M, ROWS), row blocks innermost
    layout  dout, out, out_low (B, H, M, E), last stride 1, out_low may be None; lse, low (B, H, M) contiguous; dlse (B, H, M), any
            strides, or None; stats (4, B, H, M) contiguous: the log-sum-exp as two floats, in the logits' units (inf, 0 without a
            key), delta, dlse
    math    delta from the diagonal of dout out^T, a product like dP's: for a query that sees one key they are equal, and dS is 0
    needs   as in `_forward`
    """
    start, _, i_bh, i_b, i_h = place(M, 1, H, ROWS)
    o_row = tl.arange(0, ROWS)
    o_m = start + o_row
    m_m = o_m < M
    lse = tl.load(lse_ptr + i_bh * M + o_m, mask=m_m, other=0.0).to(tl.float64)
    lse += tl.load(low_ptr + i_bh * M + o_m, mask=m_m, other=0.0).to(tl.float64)
    if not NATURAL:
        lse = lse * LOG2E
    lse, low = two_floats(tl.where(lse == -float("inf"), float("inf"), lse))
    dout_ptr += (i_b * dout_strides[0] + i_h * dout_strides[1]) * UNIT
    out_ptr += (i_b * out_strides[0] + i_h * out_strides[1]) * UNIT
    product = tl.zeros([ROWS, ROWS], tl.float32)
    if out_low_ptr is not None:
        out_low_ptr += (i_b * out_low_strides[0] + i_h * out_low_strides[1]) * UNIT
        product = _product_of_rows(product, dout_ptr, dout_strides[2], out_low_ptr, out_low_strides[2], start, M, ROWS, E1, E2, PADDED,
                                   UNIT) * (1.0 / LOW)
    product = _product_of_rows(product, dout_ptr, dout_strides[2], out_ptr, out_strides[2], start, M, ROWS, E1, E2, PADDED, UNIT)
    delta = tl.sum(tl.where(o_row[:, None] == o_row[None, :], product, 0.0), 1)
    dlse = tl.zeros([ROWS], tl.float32)
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + i_b * dlse_strides[0] + i_h * dlse_strides[1] + o_m * dlse_strides[2], mask=m_m, other=0.0)
    rows = tl.cast(B, tl.int64) * H * M
    stats_ptr += i_bh * M
    tl.store(stats_ptr + o_m, lse, mask=m_m)
    tl.store(stats_ptr + rows + o_m, low, mask=m_m)
    tl.store(stats_ptr + 2 * rows + o_m, delta, mask=m_m)
    tl.store(stats_ptr + 3 * rows + o_m, dlse, mask=m_m)


@jit
def _load_statistics(stats_ptr, rows, o_m, M):
    """(log-sum-exp, its low part, delta, dlse) of queries o_m; inf, which makes their P 0, beyond the last."""
    return (tl.load(stats_ptr + o_m, mask=o_m < M, other=float("inf")), tl.load(stats_ptr + rows + o_m, mask=o_m < M, other=0.0),
            tl.load(stats_ptr + 2 * rows + o_m, mask=o_m < M, other=0.0), tl.load(stats_ptr + 3 * rows + o_m, mask=o_m < M, other=0.0))


@jit
def _query_gradients(dout_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lengths_ptr, stats_ptr, dq_ptr, ds_ptr, scale, logit_scale, B, H, M, N,
                     splits, per, dout_strides, q_strides, k_strides, v_strides, bias_strides, lengths_stride, dq_strides,
                     CAUSAL: tl.constexpr, MASK: tl.constexpr, NATURAL: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
                     E: tl.constexpr, PADDED: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr):
    """dq of a block of queries from the keys [per i_s, per (i_s + 1)), and their part of dS.

    grid    B H splits cdiv(M, BLOCK_M), query blocks innermost: neighbours read the same keys
    layout  as in `_forward`; dq (splits, B, H, M, E), last stride 1; stats from `_statistics`; ds (B, H, M, N) contiguous or None,
            written where a block is visited
    math    P = exp(S - lse), dS = P (dout v^T - delta + dlse), dq = scale dS k; dS rounded to q's dtype for the product
    needs   as in `_forward`
    """
    start, i_s, i_bh, i_b, i_h = place(M, splits, H, BLOCK_M)
    o_m = start + tl.arange(0, BLOCK_M)
    dout_ptr += (i_b * dout_strides[0] + i_h * dout_strides[1]) * UNIT
    q_ptr += (i_b * q_strides[0] + i_h * q_strides[1]) * UNIT
    k_ptr += (i_b * k_strides[0] + i_h * k_strides[1]) * UNIT
    v_ptr += (i_b * v_strides[0] + i_h * v_strides[1]) * UNIT
    if bias_ptr is not None:
        bias_ptr += i_b * bias_strides[0] + i_h * bias_strides[1]

    begin, end = _keys(i_s, per, lengths_ptr, lengths_stride, i_b, start, M, N, CAUSAL, BLOCK_M)
    lse, low, delta, dlse = _load_statistics(stats_ptr + i_bh * M, tl.cast(B, tl.int64) * H * M, o_m, M)
    q1 = load_tile(q_ptr, start, q_strides[2], M, BLOCK_M, 0, E1, PADDED, UNIT)
    dout1 = load_tile(dout_ptr, start, dout_strides[2], M, BLOCK_M, 0, E1, PADDED, UNIT)
    dq1 = tl.zeros([BLOCK_M, E1], tl.float32)
    if E2:
        q2 = load_tile(q_ptr, start, q_strides[2], M, BLOCK_M, E1, E2, PADDED, UNIT)
        dout2 = load_tile(dout_ptr, start, dout_strides[2], M, BLOCK_M, E1, E2, PADDED, UNIT)
        dq2 = tl.zeros([BLOCK_M, E2], tl.float32)
    for i_n in range(begin, end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        k1 = load_tile(k_ptr, i_n, k_strides[2], end, BLOCK_N, 0, E1, PADDED, UNIT)
        s = dot(q1, tl.trans(k1), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        dp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        dp = dot(dout1, tl.trans(load_tile(v_ptr, i_n, v_strides[2], end, BLOCK_N, 0, E1, PADDED, UNIT)), dp)
        if E2:
            k2 = load_tile(k_ptr, i_n, k_strides[2], end, BLOCK_N, E1, E2, PADDED, UNIT)
            s = dot(q2, tl.trans(k2), s)
            dp = dot(dout2, tl.trans(load_tile(v_ptr, i_n, v_strides[2], end, BLOCK_N, E1, E2, PADDED, UNIT)), dp)
        s = _logits(s, logit_scale, bias_ptr, bias_strides, o_m[:, None], o_n[None, :], M, N, end, CAUSAL, MASK, NATURAL)
        ds = exp((s - lse[:, None]) - low[:, None], NATURAL) * ((dp - delta[:, None]) + dlse[:, None])
        if ds_ptr is not None:
            o_ds = (i_bh * M + o_m)[:, None] * N + o_n[None, :]
            tl.store(ds_ptr + o_ds, narrow(ds, ds_ptr.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < end)[None, :])
        ds = narrow(ds, q_ptr.dtype.element_ty)
        dq1 = dot(ds, k1, dq1)
        if E2:
            dq2 = dot(ds, k2, dq2)

    scale = tl.cast(scale, tl.float32)
    dq_ptr += (i_s * dq_strides[0] + i_b * dq_strides[1] + i_h * dq_strides[2]) * OUT_UNIT
    store_tile(dq_ptr, dq1 * scale, start, dq_strides[3], M, BLOCK_M, 0, E1, E, OUT_UNIT)
    if E2:
        store_tile(dq_ptr, dq2 * scale, start, dq_strides[3], M, BLOCK_M, E1, E2, E, OUT_UNIT)


@jit
def _key_gradients(dout_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lengths_ptr, stats_ptr, dk_ptr, dv_ptr, scale, logit_scale, B, H, M, N, splits,
                   per, dout_strides, q_strides, k_strides, v_strides, bias_strides, lengths_stride, dk_strides, dv_strides,
                   CAUSAL: tl.constexpr, MASK: tl.constexpr, NATURAL: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
                   E: tl.constexpr, PADDED: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dk, dv of a block of keys from the queries [per i_s, per (i_s + 1)).

    grid    B H splits cdiv(N, BLOCK_N), key blocks innermost: neighbours read the same queries
    layout  as in `_query_gradients`; dk, dv (splits, B, H, N, E), last stride 1
    math    P^T and dS^T from k q^T and v dout^T, so that neither is transposed; dv = P^T dout, dk = scale dS^T q
    needs   as in `_forward`; per % BLOCK_M = 0
    """
    start, i_s, i_bh, i_b, i_h = place(N, splits, H, BLOCK_N)
    o_n = start + tl.arange(0, BLOCK_N)
    dout_ptr += (i_b * dout_strides[0] + i_h * dout_strides[1]) * UNIT
    q_ptr += (i_b * q_strides[0] + i_h * q_strides[1]) * UNIT
    k_ptr += (i_b * k_strides[0] + i_h * k_strides[1]) * UNIT
    v_ptr += (i_b * v_strides[0] + i_h * v_strides[1]) * UNIT
    if bias_ptr is not None:
        bias_ptr += i_b * bias_strides[0] + i_h * bias_strides[1]

    begin = (i_s * per).to(tl.int32)
    last = tl.minimum(begin + per, M)
    end = N
    if lengths_ptr is not None:
        end = tl.load(lengths_ptr + i_b * lengths_stride).to(tl.int32)
        last = tl.where(start < end, last, begin)
    if CAUSAL:  # the first query that sees key n is n - (N - M)
        begin = tl.maximum(begin, (start - (N - M)) // BLOCK_M * BLOCK_M)

    k1 = load_tile(k_ptr, start, k_strides[2], end, BLOCK_N, 0, E1, PADDED, UNIT)
    v1 = load_tile(v_ptr, start, v_strides[2], end, BLOCK_N, 0, E1, PADDED, UNIT)
    dk1 = tl.zeros([BLOCK_N, E1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, E1], tl.float32)
    if E2:
        k2 = load_tile(k_ptr, start, k_strides[2], end, BLOCK_N, E1, E2, PADDED, UNIT)
        v2 = load_tile(v_ptr, start, v_strides[2], end, BLOCK_N, E1, E2, PADDED, UNIT)
        dk2 = tl.zeros([BLOCK_N, E2], tl.float32)
        dv2 = tl.zeros([BLOCK_N, E2], tl.float32)
    for i_m in range(begin, last, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        lse, low, delta, dlse = _load_statistics(stats_ptr + i_bh * M, tl.cast(B, tl.int64) * H * M, o_m, M)
        q1 = load_tile(q_ptr, i_m, q_strides[2], M, BLOCK_M, 0, E1, PADDED, UNIT)
        dout1 = load_tile(dout_ptr, i_m, dout_strides[2], M, BLOCK_M, 0, E1, PADDED, UNIT)
        s = dot(k1, tl.trans(q1), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        dp = dot(v1, tl.trans(dout1), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        if E2:
            q2 = load_tile(q_ptr, i_m, q_strides[2], M, BLOCK_M, E1, E2, PADDED, UNIT)
            dout2 = load_tile(dout_ptr, i_m, dout_strides[2], M, BLOCK_M, E1, E2, PADDED, UNIT)
            s = dot(k2, tl.trans(q2), s)
            dp = dot(v2, tl.trans(dout2), dp)
        s = _logits(s, logit_scale, bias_ptr, bias_strides, o_m[None, :], o_n[:, None], M, N, end, CAUSAL, MASK, NATURAL)
        p = exp((s - lse[None, :]) - low[None, :], NATURAL)
        ds = narrow(p * ((dp - delta[None, :]) + dlse[None, :]), q_ptr.dtype.element_ty)
        p = narrow(p, q_ptr.dtype.element_ty)
        dv1 = dot(p, dout1, dv1)
        dk1 = dot(ds, q1, dk1)
        if E2:
            dv2 = dot(p, dout2, dv2)
            dk2 = dot(ds, q2, dk2)

    scale = tl.cast(scale, tl.float32)
    dk_ptr += (i_s * dk_strides[0] + i_b * dk_strides[1] + i_h * dk_strides[2]) * OUT_UNIT
    dv_ptr += (i_s * dv_strides[0] + i_b * dv_strides[1] + i_h * dv_strides[2]) * OUT_UNIT
    store_tile(dk_ptr, dk1 * scale, start, dk_strides[3], N, BLOCK_N, 0, E1, E, OUT_UNIT)
    store_tile(dv_ptr, dv1, start, dv_strides[3], N, BLOCK_N, 0, E1, E, OUT_UNIT)
    if E2:
        store_tile(dk_ptr, dk2 * scale, start, dk_strides[3], N, BLOCK_N, E1, E2, E, OUT_UNIT)
        store_tile(dv_ptr, dv2, start, dv_strides[3], N, BLOCK_N, E1, E2, E, OUT_UNIT)


def _cut(E):
    """Head size as a sum of two powers of two, the second 0 where one alone wastes no more.

    Beside 128 and more, where blocks have few rows, fewer than 64 columns leave eight warps too little to share: registers spill.
    """
    whole = power_of_two(E, least=16)
    rest = power_of_two(E - whole // 2, least=16 if E < 128 else 64)
    return (whole // 2, rest) if whole > 16 and whole // 2 + rest < whole else (whole, 0)


def _columns(q, E):
    first, second = _cut(E)
    return {"PADDED": padded(E, q.dtype), "E1": first, "E2": second}


def _settings(what, q):
    """Launch settings for this dtype, head size and machine; where queries are few, blocks of 64 of them, not 128."""
    chosen = dict(pick(LAUNCH[what][q.element_size()], device.architecture(q.device), q.shape[3]))
    chosen["BLOCK_M"] = min(chosen["BLOCK_M"], power_of_two(q.shape[2], least=64))
    return chosen


def _parts(y, splits):
    """Where `splits` programs write their parts of y: y itself for one, fp32 memory for more; (splits, B, H, rows, E)."""
    return y.unsqueeze(0) if splits == 1 else y.new_empty((splits, *y.shape), dtype=torch.float32)


def _in_units(*tensors):
    """The largest unit in which all strides but the last can be counted, and the strides of each tensor in it."""
    strides = [x.stride()[:-1] for x in tensors]
    unit = unit_of(*(s for each in strides for s in each))
    return unit, [tuple(s // unit for s in each) for each in strides]


def _mask_arguments(bias, key_lengths, shape):
    """(bias, its strides over (B, H, M, N), key_lengths' stride)."""
    strides = (0,) * 4 if bias is None else bias.expand(shape).stride()
    return strides, 0 if key_lengths is None else key_lengths.stride(0)


def _scales(E, scale, natural):
    """scale, and what turns q k^T into logits in the kernels' units."""
    scale = E**-0.5 if scale is None else float(scale)
    return scale, scale if natural else scale * math.log2(math.e)


def _forward_plan(q, N):
    B, H, M, _ = q.shape
    chosen = _settings("forward", q)
    return chosen, *shares(device.architecture(q.device), B * H * cdiv(M, chosen["BLOCK_M"]), N, chosen["BLOCK_N"])


def _run_forward(args, outs):
    q, k, v, bias, key_lengths, causal, scale = args
    out, out_low, lse, low = outs
    (B, H, M, E), N = q.shape, k.shape[2]
    if not B * H * M:
        return
    chosen, splits, per = _forward_plan(q, N)
    natural = q.dtype == torch.float32
    parts = _parts(out, splits)
    out_low = out_low if out_low.numel() else None
    sums = (lse, low) if splits == 1 else lse.new_empty((2, splits, *lse.shape)).unbind(0)
    bias_strides, lengths_stride = _mask_arguments(bias, key_lengths, (B, H, M, N))
    q, k, v = aligned(q), aligned(k), aligned(v)
    (unit, strides), (out_unit, (out_strides,)) = _in_units(q, k, v), _in_units(parts)
    _, logit_scale = _scales(E, scale, natural)
    _forward[(B * H * splits * cdiv(M, chosen["BLOCK_M"]),)](
        q, k, v, bias, key_lengths, parts, out_low if splits == 1 else None, *sums, logit_scale, B, H, M, N, splits, per, *strides,
        bias_strides, lengths_stride, out_strides, SHARED=splits > 1, CAUSAL=causal,
        MASK=causal or key_lengths is not None or N % chosen["BLOCK_N"] != 0, NATURAL=natural, UNIT=unit, OUT_UNIT=out_unit, E=E,
        **_columns(q, E), **chosen, **OPTIONS)
    if splits > 1:
        by_rows(merge, out, parts, *sums, out, out_low, lse, low, B, H, M, splits, out.stride()[:3], natural)


def _backward_plan(q, N):
    """Settings, splits and share of the query gradients, then those of the key gradients."""
    B, H, M, _ = q.shape
    by_query, by_key = _settings("query gradients", q), _settings("key gradients", q)
    return ((by_query, *shares(device.architecture(q.device), B * H * cdiv(M, by_query["BLOCK_M"]), N, by_query["BLOCK_N"])),
            (by_key, *shares(device.architecture(q.device), B * H * cdiv(N, by_key["BLOCK_N"]), M, by_key["BLOCK_M"])))


def _run_backward(args, outs):
    dout, dlse, q, k, v, bias, key_lengths, out, out_low, lse, lse_low, causal, scale, bias_grad, _ = args
    dq, dk, dv, dbias = outs
    (B, H, M, E), N = q.shape, k.shape[2]
    (by_query, query_splits, keys), (by_key, key_splits, queries) = _backward_plan(q, N)
    stats = lse.new_empty((4, *lse.shape))
    dq_parts, dk_parts, dv_parts = _parts(dq, query_splits), _parts(dk, key_splits), _parts(dv, key_splits)
    dout, q, k, v, out = aligned(dout), aligned(q), aligned(k), aligned(v), aligned(out)
    out_low = aligned(out_low) if out_low.numel() else None
    unit, (out_strides, low_strides, *strides) = _in_units(out, out if out_low is None else out_low, dout, q, k, v)
    grad_unit, (dq_strides, dk_strides, dv_strides) = _in_units(dq_parts, dk_parts, dv_parts)
    tensors = (dout, q, k, v, bias, key_lengths, stats)
    strides += _mask_arguments(bias, key_lengths, (B, H, M, N))
    natural = q.dtype == torch.float32
    columns = {"NATURAL": natural, "UNIT": unit, **_columns(q, E)}
    hidden = causal or key_lengths is not None  # then blocks of dS may not be visited
    ds = None
    if bias_grad:
        ds = dbias if dbias.shape == (B, H, M, N) else q.new_empty((B, H, M, N), dtype=torch.float32)
        if hidden:
            ds.zero_()
    if B * H * M:
        dlse_strides = (0,) * 3 if dlse is None else dlse.stride()
        _statistics[(B * H * cdiv(M, STATISTICS["ROWS"]),)](
            dout, out, out_low, lse.contiguous(), lse_low.contiguous(), dlse, stats, B, H, M, strides[0], out_strides, low_strides,
            dlse_strides, **columns, **STATISTICS, **OPTIONS)
        _query_gradients[(B * H * query_splits * cdiv(M, by_query["BLOCK_M"]),)](
            *tensors, dq_parts, ds, *_scales(E, scale, natural), B, H, M, N, query_splits, keys, *strides, dq_strides, CAUSAL=causal,
            MASK=hidden or N % by_query["BLOCK_N"] != 0, OUT_UNIT=grad_unit, E=E, **columns, **by_query, **OPTIONS)
        if query_splits > 1:
            by_rows(add, dq, dq_parts, dq, B, H, M, query_splits, dq.stride()[:3])
    if B * H * N:
        _key_gradients[(B * H * key_splits * cdiv(N, by_key["BLOCK_N"]),)](
            *tensors, dk_parts, dv_parts, *_scales(E, scale, natural), B, H, M, N, key_splits, queries, *strides, dk_strides, dv_strides,
            CAUSAL=causal, MASK=hidden, OUT_UNIT=grad_unit, E=E, **columns, **by_key, **OPTIONS)
        if key_splits > 1:
            for parts, y in ((dk_parts, dk), (dv_parts, dv)):
                by_rows(add, y, parts, y, B, H, N, key_splits, y.stride()[:3])
    if bias_grad and ds is not dbias:
        shared = [axis for axis, (own, full) in enumerate(zip(dbias.shape, ds.shape, strict=True)) if own != full]
        dbias.copy_(ds.sum(shared, keepdim=True, dtype=torch.float64))


def _refuse_size(q, v):
    E, V = q.shape[3], v.shape[3]
    if E != V:
        return f"takes values as wide as keys, got {V} and {E}"
    return None if 1 <= E <= LARGEST else f"takes head sizes from 1 to {LARGEST}, got {E}"


def _plan_forward(q, k, *_):
    chosen, splits, per = _forward_plan(q, k.shape[2])
    over = f"{splits} programs share its keys, {per} each, and merge in order" if splits > 1 else "one program loops over its keys"
    return f"blocks of {chosen['BLOCK_M']} queries; {over}"


def _plan_backward(dout, dlse, q, k, *_):
    (by_query, query_splits, keys), (by_key, key_splits, queries) = _backward_plan(q, k.shape[2])
    return (f"dq: blocks of {by_query['BLOCK_M']} queries, {query_splits} programs each ({keys} keys); "
            f"dk, dv: blocks of {by_key['BLOCK_N']} keys, {key_splits} programs each ({queries} queries)")


FORWARD = triton(_run_forward, refuse=lambda q, k, v, *_: _refuse_size(q, v), plan=_plan_forward)
BACKWARD = triton(_run_backward, refuse=lambda dout, dlse, q, k, v, *_: _refuse_size(q, v), plan=_plan_backward)
